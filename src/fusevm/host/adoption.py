"""Taking over a guest that this daemon has not booted, or has lost sight of: is it the right one, is it ready?

Must not: hold a VMM, or decide what becomes of the machine.
"""

from __future__ import annotations

import asyncio

import structlog

from fusevm.host.boot import Marks, check_guest, meet_guest
from fusevm.host.held_vmm import ADOPTION_TIMEOUT_S, was_rebooted
from fusevm.host.rows import Operation
from fusevm.host.surroundings import Surroundings
from fusevm.host.tasks import CleanUp
from fusevm.host.vmm.driver import Vmm
from fusevm.host.vmm.exit_reason import HOST_REBOOTED
from fusevm.model.errors import BootFailed, Error
from fusevm.model.machine import Machine

log = structlog.get_logger()


async def judge_adopted(machine: Machine, vmm: Vmm) -> str:
    """Ask an adopted guest who it is: what is wrong with it, or nothing; one that is too busy to answer is right."""
    try:
        async with asyncio.timeout(ADOPTION_TIMEOUT_S):
            problem = await check_guest(machine, vmm)
    except (TimeoutError, ConnectionError, Error) as e:
        log.warning("adopted_guest_is_silent", machine=machine.id, problem=str(e) or "no answer in time")
        return ""
    if not problem:
        log.info("machine_adopted", machine=machine.id, generation=machine.generation)
    return problem


async def meet_again(
    machine: Machine, kind: str, operation: Operation, parts: Surroundings, undo: CleanUp, why_lost: str
) -> tuple[Machine, Vmm]:
    """Go on waiting for a guest that was started by a boot which is still open.

    Raises BootFailed when there is none, for the reason `why_lost` if that is known.
    """
    process = machine.vmm
    if operation.step != "booted" or process is None:
        raise _lost(machine, parts, why_lost)
    lodging = await parts.quarters.rejoin(machine)
    async with asyncio.timeout(ADOPTION_TIMEOUT_S):
        vmm = await parts.driver.adopt(lodging.plan, process)
    if vmm is None:
        raise _lost(machine, parts, why_lost)
    undo.push("vmm", vmm.kill)
    await meet_guest(machine, kind, vmm, lodging.configure, operation.deadline_ms, parts, Marks(started=0))
    return machine, vmm


def _lost(machine: Machine, parts: Surroundings, why: str) -> BootFailed:
    problem = HOST_REBOOTED if was_rebooted(machine, parts) else why or "the daemon ended while it was starting"
    return BootFailed(id=machine.id, problem=problem)
