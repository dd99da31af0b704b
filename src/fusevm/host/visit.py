"""A visit to the disk of a machine at rest: its own agent runs for a while, without network and without people.

No program of the host reads a file system that a guest has written. The guest's kernel does, in a VMM as confined as
ever; it repairs what a crash has left, and the agent answers as in a machine that runs. The machine's phase stays what
it is, and its memory is booked for as long.

Owns: the VMM of the visit. Must not: know what visitors do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from fusevm.host.agent import ask_shutdown
from fusevm.host.boot import bring_up
from fusevm.host.channel import AgentClient
from fusevm.host.surroundings import Surroundings
from fusevm.host.tasks import CleanUp, Stopped, run_unless
from fusevm.host.visitors import Visit
from fusevm.host.vmm.driver import Vmm
from fusevm.host.writer import Superseded
from fusevm.model.errors import Error, GuestUnreachable, Internal
from fusevm.model.machine import Machine

log = structlog.get_logger()

#: How long the agent may take to be there, the boot included.
_BOOT_TIMEOUT_MS = 60_000
#: How long it may take to write everything back.
_SHUTDOWN_S = 10.0


async def hold_visit(
    visit: Visit,
    machine: Machine,
    parts: Surroundings,
    wait_other: Callable[[], Coroutine[Any, Any, None]],
    commit: Callable[[Machine], None],
) -> Machine:
    """Open the disk, let visitors in until they are gone or `wait_other` returns, close it; return the record.

    Raises WrongState for a machine that does not rest, HostFull, BootFailed, and what quarters and driver raise.
    """
    limits = await parts.quarters.limits()
    nonce = parts.clock.entropy(16).hex()
    machine = await parts.journal.begin_visit(machine.id, limits, nonce, on_commit=commit)
    undo = CleanUp()
    try:
        await _receive(visit, machine, parts, wait_other, undo)
    except BaseException as error:
        await undo.run(blame=error)
        if not undo.problems:
            await _close_intent(machine, parts, commit, error)
        raise
    blame = Internal(problem=f"the disk of machine {machine.id} could not be closed")
    await undo.run(blame)
    if undo.problems:
        raise blame
    return await parts.journal.finish(machine, "visit", "done", on_commit=commit)


async def end_visit(machine: Machine, parts: Surroundings, commit: Callable[[Machine], None]) -> Machine:
    """End what an earlier daemon left of a visit."""
    await parts.quarters.vacate(machine, keep_disk=True)
    return await parts.journal.finish(machine, "visit", "done", on_commit=commit)


async def _receive(
    visit: Visit,
    machine: Machine,
    parts: Surroundings,
    wait_other: Callable[[], Coroutine[Any, Any, None]],
    undo: CleanUp,
) -> None:
    deadline_ms = parts.clock.now_ms() + _BOOT_TIMEOUT_MS
    _, vmm = await bring_up(machine, "visit", deadline_ms, parts, undo)
    agent = AgentClient(vmm.open_stream)
    try:
        await run_unless(vmm.wait_exit(), visit.receive(agent, wait_other))
    except Stopped as e:
        raise GuestUnreachable(id=machine.id, problem=f"what had opened its disk ended: {e.value}") from e
    finally:
        await agent.close()
    await _shut_down(vmm)


async def _shut_down(vmm: Vmm) -> None:
    """Let the guest write everything back. One that does not is killed: what was answered is on the disk already."""
    try:
        async with asyncio.timeout(_SHUTDOWN_S):
            await ask_shutdown(vmm)
            await vmm.wait_exit()
    except (TimeoutError, ConnectionError, Error) as e:
        log.warning("visit_not_shut_down", problem=str(e) or "it took too long")


async def _close_intent(
    machine: Machine, parts: Surroundings, commit: Callable[[Machine], None], error: BaseException
) -> None:
    """Nothing is left: take the intent back. Where that fails it stays, and is looked at again."""
    try:
        await parts.journal.finish(machine, "visit", "undone", on_commit=commit)
    except Superseded:
        return
    except Error as e:
        error.add_note(f"the journal could not take the intent back: {e.message}")
