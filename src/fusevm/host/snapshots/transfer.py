"""Carrying snapshots to an object store and back: parts sent to URLs that somebody has signed, a file fetched.

Where a URL may lead is decided as for images (`images.addresses`). A part is sent again when the store does not answer,
or says that it is its own fault; what is ours to mend is not repeated.

Owns: the exchange. Must not: know how the upload is begun or completed; the caller does that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from fusevm.host.disk.copy import CopyStopped, DiskImage, Stop, copy_disk
from fusevm.host.disk.qcow2 import QcowDamaged, read_size
from fusevm.host.images.fetch import FetchPolicy, connect, fetch, parse_url, shown
from fusevm.host.images.workspace import ensure_free
from fusevm.host.snapshots.packed import PackedDisk
from fusevm.host.snapshots.record import DISK_ARTIFACT
from fusevm.model.errors import BadField, SnapshotFailed, UploadFailed
from fusevm.wire.host_snapshots import CompletedPart, DurableArtifact, DurableSnapshot, UploadPart
from fusevm.wire.http1 import Connection

#: Of one part.
_ATTEMPTS: Final = 4
_FIRST_PAUSE_S: Final = 0.5
_PART_TIMEOUT_S: Final = 900.0
_CHUNK: Final = 1 << 20
_MAX_PARTS: Final = 10_000
_MAX_ETAG: Final = 1024
_MAX_ANSWER: Final = 1 << 16
_SERVER_ERROR: Final = 500
_TOO_MANY: Final = 429
_TIMED_OUT: Final = 408


class _Passing(Exception):
    """The store could not take the part now; the text says why."""


def check_parts(parts: list[UploadPart], size_bytes: int) -> None:
    """Raise BadField for parts that are not of the artefact, or whose numbers no store takes."""
    numbers = [part.part_number for part in parts]
    if not 0 < len(parts) <= _MAX_PARTS or len(set(numbers)) != len(numbers):
        raise BadField(field="parts", problem=f"must be 1 to {_MAX_PARTS} parts, each with a number of its own")
    for part in parts:
        is_within = 0 <= part.offset_bytes < part.offset_bytes + part.size_bytes <= size_bytes
        if not is_within or not 0 < part.part_number <= _MAX_PARTS:
            problem = f"part {part.part_number} is not within the artifact's {size_bytes} bytes"
            raise BadField(field="parts", problem=problem)
        parse_url(part.upload_url)


async def upload(packed: PackedDisk, parts: list[UploadPart], policy: FetchPolicy) -> list[CompletedPart]:
    """Send the parts of an artefact one after another. Raises AddressRefused, ArtifactRefused, UploadFailed."""
    return [CompletedPart(part_number=part.part_number, etag=await _send(packed, part, policy)) for part in parts]


async def _send(packed: PackedDisk, part: UploadPart, policy: FetchPolicy) -> str:
    pause_s, problem = _FIRST_PAUSE_S, ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            await asyncio.sleep(pause_s)
            pause_s *= 2
        try:
            async with asyncio.timeout(_PART_TIMEOUT_S):
                return await _put(packed, part, policy)
        except _Passing as e:
            problem = str(e)
        except TimeoutError:
            problem = f"it took longer than {_PART_TIMEOUT_S:.0f} s"
        except OSError as e:
            problem = str(e) or type(e).__name__
    raise UploadFailed(part=part.part_number, problem=f"{problem} ({_ATTEMPTS} attempts)")


async def _put(packed: PackedDisk, part: UploadPart, policy: FetchPolicy) -> str:
    place = parse_url(part.upload_url)
    connection = Connection(await connect(place, policy), place.authority)
    headers = {"content-length": str(part.size_bytes), "user-agent": "fuse"}
    try:
        response = await connection.request("PUT", place.target, headers=headers, body=_content(packed, part))
        with contextlib.suppress(OSError, ValueError):
            await response.read(_MAX_ANSWER)  # polite; what it says is for nobody
        status, etag = response.status, response.headers.get("etag", "")
    finally:
        await connection.close()
    if status >= _SERVER_ERROR or status in (_TOO_MANY, _TIMED_OUT):
        raise _Passing(f"the store answered {status}")
    if not 200 <= status < 300:
        raise UploadFailed(part=part.part_number, problem=f"the store answered {status}; sign the URL anew")
    if not etag or len(etag) > _MAX_ETAG:
        raise UploadFailed(part=part.part_number, problem="the store gave no ETag, without which nothing is completed")
    return etag


async def _content(packed: PackedDisk, part: UploadPart) -> AsyncIterator[bytes]:
    end = part.offset_bytes + part.size_bytes
    for offset in range(part.offset_bytes, end, _CHUNK):
        yield await asyncio.to_thread(packed.read, offset, min(_CHUNK, end - offset))


def find_disk(snapshot: DurableSnapshot, policy: FetchPolicy) -> DurableArtifact:
    """The one file that is needed. Raises BadField for none, several, one without a URL or beyond the size limit."""
    disks = [artifact for artifact in snapshot.artifacts if artifact.kind == "disk"]
    if len(disks) != 1 or disks[0].id != DISK_ARTIFACT or not disks[0].download_url:
        problem = f"must hold exactly one disk, {DISK_ARTIFACT!r}, with its download_url"
        raise BadField(field="snapshot.artifacts", problem=problem)
    parse_url(disks[0].download_url)
    if not 0 < disks[0].size_bytes <= policy.max_bytes:
        raise BadField(field="snapshot.artifacts", problem=f"size_bytes must be 1 to {policy.max_bytes}")
    return disks[0]


async def fetch_disk(snapshot_id: str, disk: DurableArtifact, target: Path, policy: FetchPolicy) -> None:
    """Download a packed disk into a new file. Raises what `images.fetch.fetch` raises."""
    limited = FetchPolicy(
        allowed=policy.allowed,
        max_bytes=disk.size_bytes,
        timeout_s=policy.timeout_s,
        silence_s=policy.silence_s,
        reserve_bytes=policy.reserve_bytes,
    )
    fetched = await fetch(disk.download_url, target, limited, sha256=disk.sha256_hex.lower())
    if fetched is None or fetched.size_bytes != disk.size_bytes:
        problem = f"{shown(disk.download_url)} has {fetched.size_bytes if fetched else 0} bytes, not {disk.size_bytes}"
        raise SnapshotFailed(id=snapshot_id, problem=problem)


async def unpack(snapshot_id: str, packed: Path, target: Path, policy: FetchPolicy, max_disk_bytes: int) -> int:
    """Make a raw disk of a packed one, which is not trusted; return its size. Raises SnapshotFailed, NoSpace."""
    try:
        size = await asyncio.to_thread(_read_size, packed)
        if size > max_disk_bytes:
            problem = f"it is a disk of {size} bytes; this host has {max_disk_bytes} for machines"
            raise SnapshotFailed(id=snapshot_id, problem=problem)
        disk = DiskImage(path=packed, format="qcow2", size_bytes=size)
        await copy_disk(disk, target, _Watch(policy.timeout_s, target.parent, policy.reserve_bytes))
    except QcowDamaged as e:
        raise SnapshotFailed(id=snapshot_id, problem=f"what was fetched is no packed disk: {e}") from e
    except CopyStopped as e:
        problem = f"what was fetched could not be unpacked within {policy.timeout_s:.0f} s"
        raise SnapshotFailed(id=snapshot_id, problem=problem) from e
    return size


class _Watch(Stop):
    """Lets a copy go on only while the file system keeps its reserve."""

    def __init__(self, limit_s: float, folder: Path, reserve_bytes: int) -> None:
        super().__init__(limit_s)
        self._folder = folder
        self._reserve_bytes = reserve_bytes

    def check(self) -> None:
        """As `Stop.check`; raises NoSpace, too."""
        super().check()
        ensure_free(self._folder, self._reserve_bytes)


def _read_size(packed: Path) -> int:
    with packed.open("rb") as file:
        return read_size(file.fileno())
