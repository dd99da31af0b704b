"""Bodies of the public API about hosts and snapshots that requests bring, and snapshots as they are shown.

Field names are the contract's. 0, "" and absent mean unset, as the contract's SDK sends them.
"""

import msgspec


class CapacityInput(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator declares of a host. 0 and absent: as the host reports it."""

    cpus: int | None = None
    ram_mb: int | None = None
    storage_gb: int | None = None
    #: Machines.
    vm_count: int | None = None
    arch: str | None = None
    gpus: int | None = None
    gpu_kind: str | None = None


class RegisterHost(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/hosts`. A known id is updated: what is placed there, its cordon and its age stay."""

    id: str
    #: `https://host:8090`, or `http://` on loopback.
    url: str
    #: As the host daemon printed it: `<secret>.<sha256 of its certificate's public key>`.
    token: str | None = None
    region: str | None = None
    backend: str | None = None
    labels: dict[str, str] | None = None
    capacity: CapacityInput | None = None


class SnapshotRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST .../snapshots`; everything may be left out."""

    comment: str | None = None
    mode: str | None = None
    retention_seconds: int | None = None
    metadata: dict[str, str] | None = None
    export_ref: str | None = None
    export_status: str | None = None
    layer_key: str | None = None
    live: bool | None = None


class ExportBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Recorded text; nothing is exported."""

    destination: str = msgspec.field()
    status: str = ""


class SnapshotBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot: creating, ready, restoring, deleting or error."""

    id: str = msgspec.field()
    vm_id: str
    uid: str
    state: str
    kind: str
    task_id: str = ""
    tenant_id: str = ""
    host_id: str = ""
    parent_snapshot_id: str = ""
    mode: str = ""
    name: str = ""
    comment: str = ""
    metadata: dict[str, str] = {}
    layer_key: str = ""
    arch: str = ""
    digest: str = ""
    size_bytes: int = 0
    last_error: str = ""
    export_ref: str = ""
    exports: list[ExportBody] = []
    retention_until: str = ""
    created_at: str
    updated_at: str


class SnapshotPage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    snapshots: list[SnapshotBody] = msgspec.field()
    next_cursor: str = ""


class ResolvedLayer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`GET /v1/snapshots/resolve`: a miss is no error."""

    found: bool = msgspec.field()
    snapshot: SnapshotBody | None = None
