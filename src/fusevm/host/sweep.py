"""Leftovers: what exists on the host under our names and belongs to no machine of the journal.

There should be none: whatever makes something has written its intent first. A sweep at the start and every minute finds
what slips through all the same (a bug, a tool that lied), says so loudly, and removes it. Except at the start, a
leftover must be seen twice: a machine may come or go between a look at the host and a look at the journal.

Owns: the comparison and the second look. Must not: touch anything that has a record.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from fusevm.host.cgroup import Cgroups
from fusevm.host.net.network import HostNetwork
from fusevm.host.quarters import remove_tree
from fusevm.host.strays import find_strays, kill_strays
from fusevm.model.errors import Error

log = structlog.get_logger()


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """One thing without an owner."""

    #: `process`, `cgroup`, `run directory`, `machine directory`, `slot`.
    kind: str
    #: Machine id, or number of the slot.
    name: str


class Ground(Protocol):
    """One kind of thing that machines leave behind."""

    @property
    def kind(self) -> str: ...

    async def observe(self) -> set[str]:
        """Names of the owners of everything that exists."""
        ...

    async def clear(self, name: str) -> None:
        """Remove everything of one owner. Idempotent."""
        ...


class Processes:
    """VMM processes, by the machine in their command line."""

    kind = "process"

    def __init__(self, machines: Path) -> None:
        self._machines = machines

    async def observe(self) -> set[str]:
        """Machines that have processes."""
        return set(await find_strays(self._machines))

    async def clear(self, name: str) -> None:
        """Kill them."""
        await kill_strays(self._machines, name)


class Groups:
    """Control groups."""

    kind = "cgroup"

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups

    async def observe(self) -> set[str]:
        """Machines that have groups."""
        return await self._cgroups.names()

    async def clear(self, name: str) -> None:
        """Kill what is inside and remove them."""
        await self._cgroups.remove(name)


class Directories:
    """A directory with one entry per machine."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind = kind
        self._root = root

    async def observe(self) -> set[str]:
        """Names of the subdirectories."""
        return await asyncio.to_thread(lambda: {entry.name for entry in os.scandir(self._root) if entry.is_dir()})

    async def clear(self, name: str) -> None:
        """Remove one."""
        await asyncio.to_thread(remove_tree, self._root / name)


class Slots:
    """Network slots: the pool itself tells those that it keeps from those of nobody."""

    kind = "slot"

    def __init__(self, network: HostNetwork, reserved: Callable[[], set[int]]) -> None:
        self._network = network
        self._reserved = reserved

    async def clear_all(self) -> set[str]:
        """Repair the rules and remove the slots of nobody; return their numbers."""
        await self._network.ensure()
        return {str(number) for number in await self._network.sweep(self._reserved())}


class Sweeper:
    """Looks for leftovers and removes them."""

    def __init__(
        self, grounds: list[Ground], known: Callable[[], AbstractSet[str]], *, slots: Slots | None = None
    ) -> None:
        self._grounds = grounds
        self._slots = slots
        self._known = known
        self._suspects: set[Leftover] = set()
        #: Removed since the start.
        self.removed = 0
        #: Present at the last look.
        self.present: frozenset[Leftover] = frozenset()

    async def sweep(self, *, is_start: bool = False) -> frozenset[Leftover]:
        """Look once; remove what was seen before, or at the start everything. Returns what was removed."""
        found = await self._observe()
        doomed = found if is_start else found & self._suspects
        removed: set[Leftover] = set()
        for ground in self._grounds:
            for leftover in sorted((item for item in doomed if item.kind == ground.kind), key=lambda item: item.name):
                if await self._clear(ground, leftover):
                    removed.add(leftover)
        if self._slots is not None:
            removed |= await self._clear_slots(self._slots)
        self._suspects = found - removed
        self.present = frozenset(self._suspects)
        self.removed += len(removed)
        return frozenset(removed)

    async def _observe(self) -> set[Leftover]:
        """What exists first, who is known then: whoever was made in between is known."""
        observed = {
            Leftover(kind=ground.kind, name=name) for ground in self._grounds for name in await ground.observe()
        }
        known = self._known()
        return {leftover for leftover in observed if leftover.name not in known}

    async def _clear(self, ground: Ground, leftover: Leftover) -> bool:
        if leftover.name in self._known():
            return False
        try:
            await ground.clear(leftover.name)
        except (Error, OSError) as e:
            log.warning("leftover_not_removed", kind=leftover.kind, name=leftover.name, problem=str(e))
            return False
        log.warning("leftover_removed", kind=leftover.kind, name=leftover.name)
        return True

    async def _clear_slots(self, slots: Slots) -> set[Leftover]:
        try:
            numbers = await slots.clear_all()
        except (Error, OSError) as e:
            log.warning("slots_not_swept", problem=str(e))
            return set()
        for number in numbers:
            log.warning("leftover_removed", kind=slots.kind, name=number)
        return {Leftover(kind=slots.kind, name=number) for number in numbers}
