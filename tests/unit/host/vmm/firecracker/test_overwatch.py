"""A VMM that hangs is noticed, one that is slow, paused or busy is left alone."""

import asyncio

from fusevm.host.vmm.firecracker.overwatch import PATIENCE, Patience, wait_hung

SHORT = Patience(every_s=0.001, answer_s=0.02, strikes=3)


class Vmm:
    """Answers as a test says: True at once, False never, an error, or nothing while paused."""

    def __init__(self, *answers: bool | Exception, is_paused: bool = False) -> None:
        self.answers = list(answers)
        self.is_paused = is_paused
        self.asked = 0

    async def ask(self) -> None:
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else False
        if isinstance(answer, Exception):
            raise answer
        if not answer:
            await asyncio.Event().wait()


async def watch(vmm: Vmm) -> None:
    async with asyncio.timeout(30):
        await wait_hung(vmm.ask, lambda: vmm.is_paused, SHORT)


async def test_silence_is_told_after_some_questions_in_a_row():
    vmm = Vmm()
    await watch(vmm)
    assert vmm.asked == 3


async def test_an_answer_wipes_the_slate():
    vmm = Vmm(False, False, True, False, False, True)
    await watch(vmm)
    assert vmm.asked == 9


async def test_a_socket_that_nobody_serves_is_silence_too():
    vmm = Vmm(*(ConnectionRefusedError() for _ in range(3)))
    await watch(vmm)
    assert vmm.asked == 3


async def test_a_paused_machine_is_not_asked():
    vmm = Vmm(is_paused=True)
    watching = asyncio.ensure_future(watch(vmm))
    await asyncio.sleep(0.05)
    assert not watching.done()
    assert vmm.asked == 0
    vmm.is_paused = False
    await watching
    assert vmm.asked == 3


async def test_one_that_was_paused_while_it_was_asked_has_missed_nothing():
    vmm = Vmm()

    async def ask() -> None:
        vmm.is_paused = vmm.asked == 1
        await vmm.ask()

    async with asyncio.timeout(30):
        await wait_hung(ask, lambda: vmm.is_paused and vmm.asked < 3 and not setattr(vmm, "is_paused", False), SHORT)
    assert vmm.asked > 3


def test_the_time_is_bounded_and_long_enough_for_a_starved_vmm():
    assert 30 <= PATIENCE.limit_s <= 120
