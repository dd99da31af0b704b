"""The loop on which simulations run."""

import asyncio
import time

import pytest

from fusevm.testing.simulation.loop import Deadlock, VirtualLoop, run


def test_a_year_passes_at_once():
    async def year() -> float:
        await asyncio.sleep(365 * 86_400)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert run(year()) == pytest.approx(365 * 86_400)
    assert time.monotonic() - began < 86_400


def test_timeouts_and_timers_keep_their_order():
    seen: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(2, seen.append, "second")
        loop.call_later(1, seen.append, "first")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await asyncio.Event().wait()
        seen.append("timeout")
        await asyncio.sleep(1)

    run(main())
    assert seen == ["first", "timeout", "second"]


def test_cancelled_tasks_of_a_group_end_in_the_order_in_which_they_were_made():
    ended: list[int] = []

    async def wait(number: int) -> None:
        try:
            await asyncio.sleep(1_000)
        finally:
            ended.append(number)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(wait(number))
            await asyncio.sleep(1)
            raise ValueError

    with pytest.raises(ExceptionGroup):
        run(main())
    assert ended == list(range(50))


def test_a_loop_in_which_nothing_can_happen_any_more_says_so():
    loop = VirtualLoop()
    waiting = asyncio.Event().wait()
    try:
        with pytest.raises(Deadlock):
            loop.run_until_complete(waiting)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
