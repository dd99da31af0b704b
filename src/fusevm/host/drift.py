"""The registry compared with the host, as far as both can be named: what is there and should not be, what should be
there and is not. Pure.

Of snapshots only what is missing is told: what is there and nobody's, their keeper removes.

A machine claims things by kind: those that it must have, and those that it may have. One that is being changed may have
everything and must have nothing: its task sees to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import StrEnum

import msgspec

from fusevm.host.snapshots.record import HostSnapshot, SnapshotPhase
from fusevm.host.vmm.driver import JAILERS
from fusevm.model.machine import Machine, Phase


class Kind(StrEnum):
    """What exists of machines and snapshots on a host."""

    PROCESS = "process"
    SOCKET = "socket"
    CGROUP = "cgroup"
    MOUNT = "mount"
    JAIL = "jail"
    RUN_DIRECTORY = "run directory"
    MACHINE_DIRECTORY = "machine directory"
    DISK = "disk"
    NAMESPACE = "namespace"
    LINK = "link"
    TAP = "tap"
    RULES = "rules"
    #: A whole network slot, where nobody says which part of it.
    SLOT = "slot"
    #: The bytes of a snapshot.
    SNAPSHOT = "snapshot"


class Thing(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """Something that exists on the host, or should."""

    kind: Kind
    #: Of the machine, or the snapshot; of a network slot that is nobody's, its number.
    name: str


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What one machine has on the host."""

    must: frozenset[Kind] = frozenset()
    may: frozenset[Kind] = frozenset(Kind)


#: Stays with a machine that rests.
_KEPT = frozenset({Kind.MACHINE_DIRECTORY, Kind.DISK})
#: Belongs to a run; mounts only some have.
_OF_RUN = frozenset({Kind.PROCESS, Kind.SOCKET, Kind.CGROUP, Kind.RUN_DIRECTORY})
_NETWORK = frozenset({Kind.NAMESPACE, Kind.LINK, Kind.TAP, Kind.RULES})


def claim_of(machine: Machine, *, is_quiet: bool) -> Claim:
    """What a machine must and may have. `is_quiet`: nothing is under way with it."""
    if not is_quiet:
        return Claim()
    match machine.phase:
        case Phase.RUNNING | Phase.PAUSED:
            network = _NETWORK if machine.slot >= 0 else frozenset[Kind]()
            jail = frozenset({Kind.JAIL}) if machine.driver in JAILERS else frozenset[Kind]()
            return Claim(must=_KEPT | _OF_RUN | network | jail)
        case Phase.STOPPED | Phase.FAILED if machine.slot < 0:
            # One that has never run, since its guest did not get ready, gets its disk when it is started.
            return Claim(must=_KEPT if machine.started_at_ms is not None else frozenset(), may=_KEPT)
        case _:
            return Claim()


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """How host and registry differ."""

    #: Of nobody.
    leftovers: frozenset[Thing] = frozenset()
    #: Of a machine that should not have it.
    surplus: frozenset[Thing] = frozenset()
    missing: frozenset[Thing] = frozenset()

    def both(self, other: Drift) -> Drift:
        """What two looks have in common."""
        return Drift(
            leftovers=self.leftovers & other.leftovers,
            surplus=self.surplus & other.surplus,
            missing=self.missing & other.missing,
        )


def compare(observed: Iterable[Thing], claims: Mapping[str, Claim], kinds: AbstractSet[Kind]) -> Drift:
    """Compare what exists with what machines claim; `kinds` are those that were looked at."""
    present = frozenset(observed)
    owned = {thing for thing in present if thing.name in claims}
    wanted = {Thing(kind=kind, name=name) for name, claim in claims.items() for kind in claim.must & kinds}
    return Drift(
        leftovers=present - owned,
        surplus=frozenset(thing for thing in owned if thing.kind not in claims[thing.name].may),
        missing=frozenset(wanted - present),
    )


def missing_snapshots(known: Sequence[HostSnapshot], sizes: Mapping[str, int]) -> frozenset[Thing]:
    """Snapshots that are said to be usable and have not the bytes for it; `sizes`: of the disks that are there, whole.

    One that is being made or removed has whatever it has: its own work sees to it.
    """
    ready = [snapshot for snapshot in known if snapshot.phase is SnapshotPhase.READY]
    lost = [snapshot.id for snapshot in ready if sizes.get(snapshot.id) != snapshot.disk_bytes]
    return frozenset(Thing(kind=Kind.SNAPSHOT, name=name) for name in lost)
