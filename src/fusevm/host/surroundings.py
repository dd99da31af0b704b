"""What a machine's task works with: the daemon's parts, seen through the narrow protocols that the task needs.

Owns: the protocols and the record that carries the parts. Must not: do anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from fusevm.host.admission import Limits
from fusevm.host.disk.copy import DiskImage
from fusevm.host.events import EventHub
from fusevm.host.faults import Fault
from fusevm.host.journal import Journal
from fusevm.host.metrics import Metrics
from fusevm.host.rows import Numbers
from fusevm.host.snapshots.ledger import Ledger
from fusevm.host.vmm.driver import BootPlan, Driver
from fusevm.model.machine import DiskSeed, Isolation, Machine, MachineSpec, Moment
from fusevm.wire.guest import Configure


def _nothing() -> None:
    """Nothing is held."""


class Lodging(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's quarters, ready for its VMM. Call `release` once the VMM has been started, or will not be."""

    plan: BootPlan
    #: Address by which the host reaches the guest's namespace; empty without one.
    address: str = ""
    #: What the agent must be told; clock and entropy are added when it is sent.
    configure: Configure = Configure()
    #: How long each part took that was made at the same time as the others, in seconds: `disk`, `cgroup`, `net`.
    seconds: Mapping[str, float] = {}
    #: Closes what the VMM inherits.
    release: Callable[[], None] = _nothing


class Blueprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine would be made of."""

    image_digest: str
    kernel_digest: str
    driver: str
    isolation: Isolation


class Remains(msgspec.Struct, frozen=True, kw_only=True):
    """What can still be found out about a run of a machine without its VMM."""

    #: The last printable lines of its console; empty when there is none.
    console_tail: str = ""
    #: The same as it was written.
    console: bytes = b""
    #: Its control groups say that the kernel has killed one of its processes for want of memory.
    is_out_of_memory: bool = False
    #: Its disk's file system was left in order; None: nobody can tell.
    is_disk_clean: bool | None = None


class Quarters(Protocol):
    """What a machine occupies on the host besides its VMM: directories, disk, network slot, cgroup."""

    async def prepare(self, machine: Machine, *, is_visit: bool = False) -> Lodging:
        """Make everything that is missing. Fails or is cancelled: what it made is gone, but for an older disk.

        A visit to the disk of a machine at rest goes without network.
        """
        ...

    async def grow(self, machine: Machine) -> None:
        """Make the disk of a machine at rest as large as its record says. Idempotent. Raises NoSpace."""
        ...

    async def rejoin(self, machine: Machine) -> Lodging:
        """Take over what an earlier daemon made for a machine that runs, and serve it again."""
        ...

    async def rewire(self, machine: Machine) -> None:
        """Make the network of a machine that runs what its record says: policy and published ports. Idempotent."""
        ...

    async def vacate(self, machine: Machine, *, keep_disk: bool) -> None:
        """End stray processes of the machine and remove everything; without `keep_disk` its disk, too. Idempotent."""
        ...

    async def resolve(self, spec: MachineSpec) -> Blueprint:
        """Find out what a machine would be made of. Raises ImageNotFound."""
        ...

    async def limits(self) -> Limits:
        """What there is to book, as of now."""
        ...

    def numbers(self) -> Numbers:
        """Which numbers a machine may get."""
        ...

    async def remains(self, machine_id: str) -> Remains:
        """What a machine's last run has left to read."""
        ...


class Disks(Protocol):
    """Machines' disks as files."""

    async def image(self, machine: Machine) -> DiskImage:
        """A machine's disk, for whoever copies it."""
        ...

    async def needed_bytes(self, machine: Machine) -> int:
        """What a copy of it may take of the host's disk."""
        ...

    async def seed_bytes(self, snapshot_id: str) -> int:
        """What a disk that begins with a snapshot takes of the host's disk at once."""
        ...

    async def stage(self, machine: Machine, seed: DiskSeed) -> None:
        """Make the disk that `swap` will put in place of the machine's. Raises NoSpace, SnapshotNotFound."""
        ...

    async def swap(self, machine: Machine) -> None:
        """Put the staged disk in place. Idempotent: can be begun again anywhere."""
        ...

    async def unstage(self, machine: Machine) -> None:
        """Remove a staged disk that will not be used. Idempotent."""
        ...


class SnapshotBytes(Protocol):
    """Where the bytes of snapshots are."""

    async def copy(self, snapshot_id: str, disk: DiskImage, limit_s: float | None = None) -> bool:
        """Bring the snapshot's disk up to a machine's; True when they share blocks. With a limit, the disk stands still
        meanwhile. Raises SnapshotFailed, NoSpace."""
        ...

    async def remove(self, snapshot_id: str) -> None:
        """Remove everything of a snapshot. Idempotent."""
        ...


class Clock(Protocol):
    """Time and chance, as the daemon sees them."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        ...

    def now_ns(self) -> int:
        """Nanoseconds since the epoch."""
        ...

    def monotonic_ms(self) -> float:
        """For durations."""
        ...

    def moment(self) -> Moment:
        """Now, by the clock that limits of orders go by."""
        ...

    def entropy(self, size: int) -> bytes:
        """Fresh random bytes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The daemon's parts that a machine's task uses."""

    journal: Journal
    ledger: Ledger
    quarters: Quarters
    disks: Disks
    snapshot_folders: SnapshotBytes
    driver: Driver
    events: EventHub
    metrics: Metrics
    clock: Clock
    fault: Fault
    #: Identity of this boot of the host.
    boot_id: Callable[[], str]
