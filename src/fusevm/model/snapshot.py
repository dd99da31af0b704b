"""A snapshot: the disk (and, when live, the memory) of a machine at one moment. Its bytes are on one host."""

from enum import StrEnum

import msgspec


class SnapshotState(StrEnum):
    """Where a snapshot is. Only a ready one can be restored or seeded from."""

    CREATING = "creating"
    READY = "ready"
    RESTORING = "restoring"
    DELETING = "deleting"
    ERROR = "error"


#: The only transitions the store accepts. A deleted snapshot has no record. One that is being made or restored belongs
#: to the pending action of its environment and cannot be deleted meanwhile. A ready one is lost with its host.
ALLOWED: dict[SnapshotState, frozenset[SnapshotState]] = {
    SnapshotState.CREATING: frozenset({SnapshotState.READY, SnapshotState.ERROR}),
    SnapshotState.READY: frozenset({SnapshotState.RESTORING, SnapshotState.DELETING, SnapshotState.ERROR}),
    SnapshotState.RESTORING: frozenset({SnapshotState.READY}),
    SnapshotState.DELETING: frozenset(),
    SnapshotState.ERROR: frozenset({SnapshotState.DELETING}),
}


class SnapshotKind(StrEnum):
    """What was written."""

    DISK = "disk"
    LIVE = "live"


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The durable record of one snapshot."""

    #: `snap-` and a time-ordered id; never reused.
    id: str
    #: The environment it was taken of; may have ended since.
    uid: str
    task_id: str
    tenant: str = ""
    host_id: str
    machine_id: str
    #: The newest ready snapshot of the same environment when this one was taken; it may be gone.
    parent_id: str = ""
    #: Name or digest of the image below the disk.
    image: str = ""
    kind: SnapshotKind = SnapshotKind.DISK
    state: SnapshotState
    #: `manual` unless the request says otherwise; `build` ones are never expired.
    mode: str = "manual"
    comment: str = ""
    metadata: dict[str, str] = {}
    layer_key: str = ""
    arch: str = ""
    #: Recorded text; nothing is exported.
    export_ref: str = ""
    export_status: str = ""
    size_bytes: int = 0
    digest: str = ""
    #: Last problem, for people.
    last_error: str = ""
    created_at_ms: int
    updated_at_ms: int
    #: Deleted after this; None: kept.
    retention_until_ms: int | None = None
    revision: int = 0
