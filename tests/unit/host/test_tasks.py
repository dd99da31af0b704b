"""Work that something may stop, and clean-up that does not give up."""

import asyncio

import pytest

from fusevm.host.tasks import CleanUp, Stopped, finish, run_all, run_unless


async def never() -> None:
    await asyncio.Event().wait()


async def value(result: int) -> int:
    return result


async def fail(text: str) -> None:
    raise ValueError(text)


async def test_work_that_comes_first_counts():
    assert await run_unless(never(), value(3)) == 3
    assert await run_unless(value(1), value(3)) == 3


async def test_what_stops_the_work_is_told():
    with pytest.raises(Stopped) as stopped:
        await run_unless(value(7), never())
    assert stopped.value.value == 7


async def test_failures_of_either_are_raised():
    with pytest.raises(ValueError, match="work"):
        await run_unless(never(), fail("work"))
    with pytest.raises(ValueError, match="stop"):
        await run_unless(fail("stop"), never())


async def test_both_have_ended_when_it_is_over_even_if_cancelled_twice():
    ended: list[str] = []

    async def slow_to_end(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            ended.append(name)

    running = asyncio.create_task(run_unless(slow_to_end("stop"), slow_to_end("work")))
    await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sorted(ended) == ["stop", "work"]


async def test_clean_up_runs_every_step_and_notes_what_fails():
    done: list[str] = []

    async def step(name: str) -> None:
        done.append(name)
        if name == "second":
            raise OSError("busy")

    undo = CleanUp()
    for name in ("first", "second", "third"):
        undo.push(name, lambda name=name: step(name))
    error = ValueError("the reason")
    await undo.run(blame=error)
    assert done == ["third", "second", "first"]
    assert error.__notes__ == ["while cleaning up: second: busy"]
    assert undo.problems == ["second: busy"]


async def test_clean_up_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr("fusevm.host.tasks.CLEAN_UP_TIMEOUT_S", 0.01)
    undo = CleanUp()
    undo.push("stuck", never)
    await undo.run(blame=ValueError())
    assert undo.problems == ["stuck: TimeoutError"]


async def test_what_is_kept_is_not_undone():
    undo = CleanUp()
    undo.push("first", lambda: fail("never"))
    undo.keep_all()
    await undo.run(blame=ValueError())
    assert undo.problems == []


async def test_of_several_failures_the_first_is_raised_and_the_others_are_notes():
    with pytest.raises(ValueError, match="one") as caught:
        await run_all(fail("one"), fail("two"), never())
    assert caught.value.__notes__ == ["also: two"]
    await run_all(value(1), value(2))


async def test_work_that_others_need_ends_before_its_cancelled_caller() -> None:
    begun, may_end, done = asyncio.Event(), asyncio.Event(), []

    async def work() -> None:
        begun.set()
        await may_end.wait()
        done.append(1)

    caller = asyncio.create_task(finish(work()))
    await begun.wait()
    for _ in range(2):
        caller.cancel()
        await asyncio.sleep(0)
    assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done == [1]
