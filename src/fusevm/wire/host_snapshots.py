"""Bodies of the machine API about snapshots. Names and statuses are those of computer-host's contract; what is ours
beside them is said at the field.
"""

import msgspec

from fusevm.model.snapshot import SnapshotKind
from fusevm.wire.contract import ArtifactBody, GuestConfig


class TakeSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /machines/{id}/snapshots`. Idempotent by `snapshot_id`."""

    snapshot_id: str
    #: Ours: with memory and device state.
    live: bool = False


class SnapshotBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot on its host."""

    id: str
    machine_id: str
    #: RFC 3339.
    created_at: str = ""
    #: Ours from here on. What was written.
    kind: SnapshotKind = msgspec.field(default=SnapshotKind.DISK)
    #: `sealing` until its digest is known, then `ready`; `damaged` when its record cannot be read.
    state: str = ""
    #: Of the artefact; holes do not count.
    size_bytes: int = 0
    #: Of the artefact: `sha256:` and 64 hex digits.
    digest: str = ""
    #: Of the image below the disk.
    image_digest: str = ""
    #: What a guest sees of the disk.
    disk_bytes: int = 0
    #: `frozen`: of a running machine whose file system was held still; `stopped`: of one that did not run.
    consistency: str = ""
    #: How long writes were held.
    frozen_ms: float = 0.0


class SnapshotArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a snapshot is carried away as."""

    #: `disk-system`.
    id: str
    #: `disk`.
    kind: str
    name: str
    size_bytes: int
    #: Of exactly the bytes that are served.
    sha256_hex: str


class SnapshotAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to a snapshot that was taken, or asked for."""

    snapshot: SnapshotBody
    artifacts: list[SnapshotArtifact] = []


class SnapshotList(msgspec.Struct, frozen=True, kw_only=True):
    """Snapshots, oldest first."""

    snapshots: list[SnapshotBody] = []


class RestoreInPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /machines/{id}/restore`: put the disk back and start again. Idempotent by the fence's action."""

    snapshot_id: str


class UploadPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a multipart upload, sent by PUT to a URL that somebody has signed."""

    part_number: int
    offset_bytes: int
    size_bytes: int
    upload_url: str


class ArtifactUpload(msgspec.Struct, frozen=True, kw_only=True):
    """Where an artefact goes. The caller begins and completes the upload at the store; names are its own."""

    artifact_id: str
    object_key: str = ""
    upload_id: str = ""
    parts: list[UploadPart]


class UploadSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /snapshots/{sid}/upload`."""

    artifacts: list[ArtifactUpload]


class CompletedPart(msgspec.Struct, frozen=True, kw_only=True):
    part_number: int
    #: As the store gave it.
    etag: str


class UploadedArtifact(msgspec.Struct, frozen=True, kw_only=True):
    artifact_id: str
    completed_parts: list[CompletedPart]


class UploadAnswer(msgspec.Struct, frozen=True, kw_only=True):
    artifacts: list[UploadedArtifact]


class LocalSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot whose bytes are on the host."""

    snapshot_id: str = ""


class DurableArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was uploaded, and where it is to be had. Its name never becomes one of the host's."""

    id: str
    kind: str = "disk"
    name: str = ""
    size_bytes: int = 0
    sha256_hex: str = ""
    object_key: str = ""
    download_url: str = ""


class DurableSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot that was carried away, and is fetched when the host has not got it."""

    snapshot_id: str = ""
    machine_id: str = ""
    #: Digest or name of the image below the disk; without it, the image of the request's `artifact` is taken.
    image_id: str = ""
    source_runtime_host: str = ""
    source_tap_device: str = ""
    artifacts: list[DurableArtifact] = []


class RestoreSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /snapshots/{sid}/restore`: a new machine that begins with the disk. Numbers of 0 mean unset."""

    machine_id: str
    artifact: ArtifactBody | None = None
    memory_mib: int = 0
    #: At least the snapshot's disk, which is what it is when unset.
    storage_bytes: int = 0
    local_snapshot: LocalSnapshot | None = None
    snapshot: DurableSnapshot | None = None
    guest_config: GuestConfig = GuestConfig()
