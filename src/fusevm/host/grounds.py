"""The places on the host where something of a machine may be: one class for each kind, which looks there.

A `Ground` also removes what is nobody's; a `Witness` only looks, since what it sees goes with something else (a disk
with its directory) or is seen to by its owner (a network slot by the pool).

Owns: looking, removing by name. Must not: decide what belongs to whom (`drift`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fusevm.host.cgroup import Cgroups
from fusevm.host.drift import Kind, Thing, missing_snapshots
from fusevm.host.listing import names_in
from fusevm.host.mounts import detach_below, find_mounts
from fusevm.host.net.namespace import run_inside
from fusevm.host.net.network import HostNetwork
from fusevm.host.net.plan import plan_slot
from fusevm.host.process import identify
from fusevm.host.removal import remove_tree
from fusevm.host.snapshots.record import HostSnapshot
from fusevm.host.strays import find_strays, kill_strays
from fusevm.host.vmm.driver import JAIL
from fusevm.model.errors import Error
from fusevm.model.machine import Machine

#: `jail/<program>/<id>/root/run` is the deepest place of a VMM's socket.
_SOCKET_DEPTH = 5
Records = Callable[[], list[Machine]]


class Witness(Protocol):
    """Sees which machines have something."""

    async def observe(self) -> dict[Kind, set[str]]:
        """Names of the owners of everything that exists, by kind; every kind that it looks for is there."""
        ...


class Ground(Protocol):
    """One kind of thing that machines leave behind."""

    @property
    def kind(self) -> Kind: ...

    async def observe(self) -> set[str]:
        """Names of the owners of everything that exists."""
        ...

    async def clear(self, name: str) -> None:
        """Remove everything of one owner. Idempotent."""
        ...


class Processes:
    """VMM processes: by the machine in their command line, and those that records name."""

    kind = Kind.PROCESS

    def __init__(self, machines: Path, records: Records) -> None:
        self._machines = machines
        self._records = records

    async def observe(self) -> set[str]:
        """Machines that have processes. One of a record counts only if it is exactly that process."""
        recorded = {
            machine.id
            for machine in self._records()
            if machine.vmm is not None and identify(machine.vmm.pid) == machine.vmm
        }
        return recorded | set(await find_strays(self._machines))

    async def clear(self, name: str) -> None:
        """Kill them."""
        await kill_strays(self._machines, name)


class Groups:
    """Control groups."""

    kind = Kind.CGROUP

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups

    async def observe(self) -> set[str]:
        """Machines that have groups."""
        return await self._cgroups.names()

    async def clear(self, name: str) -> None:
        """Kill what is inside and remove them."""
        await self._cgroups.remove(name)


class Mounts:
    """Mounts below the machines' directories, by the machine."""

    kind = Kind.MOUNT

    def __init__(self, *roots: Path) -> None:
        self._roots = roots

    async def observe(self) -> set[str]:
        """Machines below whose directories something is mounted."""
        return await asyncio.to_thread(lambda: set(self._names()))

    async def clear(self, name: str) -> None:
        """Detach it."""
        for root in self._roots:
            await asyncio.to_thread(detach_below, root / name)

    def _names(self) -> Iterator[str]:
        for root in self._roots:
            yield from (point.relative_to(root).parts[0] for point in find_mounts(root) if point != root)


class Directories:
    """A directory with one entry per machine."""

    def __init__(self, kind: Kind, root: Path) -> None:
        self.kind = kind
        self._root = root

    async def observe(self) -> set[str]:
        """Names of the subdirectories."""
        return await asyncio.to_thread(lambda: {path.name for path in _folders(self._root)})

    async def clear(self, name: str) -> None:
        """Remove one."""
        await asyncio.to_thread(remove_tree, self._root / name)


class Contents:
    """What is inside of the machines' directories: disks, jails, sockets."""

    def __init__(self, machines: Path, run_dir: Path) -> None:
        self._machines = machines
        self._run_dir = run_dir

    async def observe(self) -> dict[Kind, set[str]]:
        """Machines that have a disk, a jail, a socket of their VMM."""
        return await asyncio.to_thread(self._observe)

    def _observe(self) -> dict[Kind, set[str]]:
        folders = list(_folders(self._machines))
        jails = {folder.name for folder in folders if (folder / JAIL).is_dir()}
        talking = {folder.name for folder in _folders(self._run_dir) if _has_socket(folder)}
        talking |= {name for name in jails if _has_socket(self._machines / name / JAIL)}
        return {
            Kind.DISK: {folder.name for folder in folders if _has_disk(folder)},
            Kind.JAIL: jails,
            Kind.SOCKET: talking,
        }


class Links:
    """Namespaces, links, taps and rules of the machines that have a network slot."""

    def __init__(self, network: HostNetwork, records: Records) -> None:
        self._network = network
        self._records = records

    async def observe(self) -> dict[Kind, set[str]]:
        """Machines that have each of them."""
        slots = {machine.slot: machine.id for machine in self._records() if machine.slot >= 0}
        seen = await self._network.observe()
        namespaces = seen.objects.namespaces & slots.keys()
        return {
            Kind.NAMESPACE: {slots[number] for number in namespaces},
            Kind.LINK: {slots[number] for number in seen.objects.veths & slots.keys()},
            Kind.RULES: {slots[number] for number in seen.rules.machines.keys() & slots.keys()},
            Kind.TAP: {slots[number] for number in namespaces if await self._has_tap(number)},
        }

    async def _has_tap(self, number: int) -> bool:
        slot = plan_slot(self._network.plan, number)
        try:
            names = await run_inside(slot.namespace_path, socket.if_nameindex)
        except (OSError, Error):
            return False  # it has gone meanwhile
        return slot.tap in {name for _index, name in names}


class Slots:
    """Network slots: the pool itself tells those that it keeps from those of nobody."""

    def __init__(self, network: HostNetwork, records: Records) -> None:
        self._network = network
        self._records = records

    async def clear_all(self) -> set[str]:
        """Repair the rules and remove the slots of nobody; return their numbers."""
        await self._network.ensure()
        kept = {machine.slot for machine in self._records() if machine.slot >= 0}
        return {str(number) for number in await self._network.sweep(kept)}


class Snapshots:
    """The bytes of snapshots; what is nobody's of them, their keeper removes."""

    def __init__(
        self,
        sizes: Callable[[], Awaitable[Mapping[str, int]]],
        known: Callable[[], Awaitable[Sequence[HostSnapshot]]],
    ) -> None:
        self._sizes = sizes
        self._known = known

    async def missing(self) -> frozenset[Thing]:
        """Those that are said to be usable, and are not there: what exists first, who is known then."""
        sizes = await self._sizes()
        return missing_snapshots(await self._known(), sizes)


def _folders(root: Path) -> Iterator[Path]:
    try:
        with os.scandir(root) as entries:
            yield from [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return


def _has_disk(folder: Path) -> bool:
    return any(name.startswith("overlay.") for name in names_in(folder))


def _has_socket(folder: Path) -> bool:
    """Is there a socket in it or below, where a VMM has its own? Links are not followed, nor folders without end."""
    for place, names, files in os.walk(folder):
        if len(Path(place).parts) - len(folder.parts) >= _SOCKET_DEPTH:
            names.clear()
        for name in files:
            try:
                if stat.S_ISSOCK(Path(place, name).lstat().st_mode):
                    return True
            except OSError:
                continue
    return False
