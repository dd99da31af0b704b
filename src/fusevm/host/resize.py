"""Giving a machine another size: stopped, its disk enlarged, left stopped. The guest's agent grows the file system when
it is there again.

The record has the new size from the intent on, so that whoever finishes a resize needs nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from fusevm.host.mailbox import Resize
from fusevm.host.surroundings import Surroundings
from fusevm.model.machine import Machine, Phase


async def resize_machine(
    machine: Machine,
    order: Resize,
    parts: Surroundings,
    shut_down: Callable[[], Awaitable[None]],
    commit: Callable[[Machine], None],
) -> Machine:
    """Do what an order says; one that changes nothing stops nothing. Raises what `Journal.begin_resize` raises."""
    limits = await parts.quarters.limits()
    machine, has_changed = await parts.journal.begin_resize(
        machine.id, order.fence, limits, order.size, on_commit=commit
    )
    if not has_changed:
        return machine
    await shut_down()
    return await finish_resize(machine, parts, commit)


async def finish_resize(machine: Machine, parts: Surroundings, commit: Callable[[Machine], None]) -> Machine:
    """Its VMM has ended: enlarge the disk. Idempotent."""
    parts.fault.reached("resize.killed")
    await parts.quarters.vacate(machine, keep_disk=True)
    await parts.quarters.grow(machine)
    parts.fault.reached("resize.grown")
    stopped = msgspec.structs.replace(machine, phase=Phase.STOPPED, error="")
    return await parts.journal.finish(stopped, "resize", "done", on_commit=commit)
