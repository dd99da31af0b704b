"""What the host knows of a snapshot: its record, and how far it has come. Pure."""

from enum import StrEnum

import msgspec

from fusevm.model.errors import SnapshotNotReady
from fusevm.model.machine import DiskSeed, Isolation

#: The one artefact that a snapshot has: the machine's disk, packed as a qcow2 file.
DISK_ARTIFACT = "disk-system"
#: Hex digits of the digest that name a disk's content in a machine's directory.
_BASE_DIGITS = 16


class SnapshotPhase(StrEnum):
    """How far a snapshot has come."""

    #: Its machine's task copies the disk.
    TAKING = "taking"
    #: The bytes are there and will not change; their digest is being made.
    SEALING = "sealing"
    READY = "ready"
    DELETING = "deleting"
    #: Its record cannot be read: it can be deleted, and that is all. Never written.
    DAMAGED = "damaged"


class Consistency(StrEnum):
    """What the disk was doing when it was copied."""

    #: Its file system was frozen: what programs had written is there, and nothing has to be repaired.
    FROZEN = "frozen"
    #: Its machine did not run; what was not written back when that ended is missing.
    STOPPED = "stopped"
    #: It was taken elsewhere.
    UNKNOWN = "unknown"


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a snapshot can be carried away as."""

    id: str
    kind: str
    name: str
    size_bytes: int
    #: 64 hex digits, of exactly the bytes that are served.
    sha256: str


class HostSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The record, in the journal and, once it is ready, beside the bytes (`manifest.json`)."""

    id: str
    cluster: str
    machine_id: str
    #: Environment of the machine.
    uid: str = ""
    phase: SnapshotPhase
    #: Image below the disk.
    image_digest: str
    #: What a guest sees of the disk.
    disk_bytes: int
    #: What the machine had, for whoever restores it.
    cpus: int = 0
    memory_mib: int = 0
    consistency: Consistency = Consistency.FROZEN
    #: How long writes were held, in milliseconds.
    frozen_ms: float = 0.0
    #: The copy shares the blocks of the machine's disk.
    is_reflink: bool = False
    artifacts: tuple[Artifact, ...] = ()
    kernel_digest: str = ""
    driver: str = ""
    isolation: Isolation = Isolation.NAMESPACE
    agent_version: str = ""
    #: Where it came from when it was not taken here; without what may be secret in it.
    source: str = ""
    created_at_ms: int


def disk_artifact(snapshot: HostSnapshot) -> Artifact:
    """The packed disk of a ready snapshot. Raises SnapshotNotReady."""
    check_ready(snapshot)
    return next(artifact for artifact in snapshot.artifacts if artifact.id == DISK_ARTIFACT)


def seed_of(snapshot: HostSnapshot) -> DiskSeed:
    """What a machine's disk is made from. Raises SnapshotNotReady."""
    return DiskSeed(snapshot_id=snapshot.id, base=disk_artifact(snapshot).sha256[:_BASE_DIGITS])


def check_ready(snapshot: HostSnapshot) -> None:
    """Raise SnapshotNotReady unless it can be used."""
    if snapshot.phase is not SnapshotPhase.READY:
        raise SnapshotNotReady(id=snapshot.id, state=snapshot.phase.value)
