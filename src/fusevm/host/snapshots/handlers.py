"""The API's handlers of snapshots: decoding, one call, encoding. Bodies: `wire.host_snapshots`.

Owns: handlers. Must not: decide anything.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fusevm.host.bodies import decode_noting, read_body, render_json
from fusevm.host.contract.handlers import render_one
from fusevm.host.daemon import Daemon
from fusevm.host.render import render_time
from fusevm.host.snapshots.packed import PackedDisk
from fusevm.host.snapshots.record import DISK_ARTIFACT, Artifact, HostSnapshot, disk_artifact
from fusevm.host.snapshots.restoring import restore_by_contract
from fusevm.model.errors import ArtifactNotFound, BadRange
from fusevm.wire.host_api import CLUSTER_HEADER, parse_fence
from fusevm.wire.host_snapshots import (
    RestoreInPlace,
    RestoreSnapshot,
    SnapshotAnswer,
    SnapshotArtifact,
    SnapshotBody,
    SnapshotList,
    TakeSnapshot,
    UploadAnswer,
    UploadSnapshot,
)
from fusevm.wire.routes import Route

_CHUNK: Final = 1 << 20
#: A single range (RFC 9110, section 14.1.2); others are ignored, as the RFC allows.
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


async def take_snapshot(daemon: Daemon, request: Request, route: Route) -> Response:
    body = decode_noting(request, await read_body(request, route), TakeSnapshot)
    fence = parse_fence(request.headers)
    machine_id = request.path_params["id"]
    snapshot = await daemon.snapshots.take(machine_id, body.snapshot_id, fence, live=body.live)
    return render_json(_answer(snapshot), 201)


async def list_machine_snapshots(daemon: Daemon, request: Request, _route: Route) -> Response:
    found = await daemon.snapshots.of_machine(request.path_params["id"])
    return render_json(SnapshotList(snapshots=[render_snapshot(snapshot) for snapshot in found]))


async def list_snapshots(daemon: Daemon, _request: Request, _route: Route) -> Response:
    found = await daemon.snapshots.load_all()
    return render_json(SnapshotList(snapshots=[render_snapshot(snapshot) for snapshot in found]))


async def get_snapshot(daemon: Daemon, request: Request, _route: Route) -> Response:
    return render_json(_answer(await daemon.snapshots.get(request.path_params["sid"])))


async def delete_snapshot(daemon: Daemon, request: Request, _route: Route) -> Response:
    # The control plane names only itself: the snapshot's environment may be long gone.
    await daemon.snapshots.delete(request.path_params["sid"], request.headers.get(CLUSTER_HEADER, ""))
    return Response(status_code=204)


async def restore_in_place(daemon: Daemon, request: Request, route: Route) -> Response:
    body = decode_noting(request, await read_body(request, route), RestoreInPlace)
    fence = parse_fence(request.headers)
    return render_one(await daemon.machines.restore(request.path_params["id"], body.snapshot_id, fence))


async def upload_snapshot(daemon: Daemon, request: Request, route: Route) -> Response:
    body = decode_noting(request, await read_body(request, route), UploadSnapshot)
    snapshot = await daemon.snapshots.owned(request.path_params["sid"], request.headers.get(CLUSTER_HEADER, ""))
    return render_json(UploadAnswer(artifacts=await daemon.snapshots.upload(snapshot, body.artifacts)))


async def restore_snapshot(daemon: Daemon, request: Request, route: Route) -> Response:
    body = decode_noting(request, await read_body(request, route), RestoreSnapshot)
    return render_one(await restore_by_contract(daemon, request.path_params["sid"], body), 201)


async def get_artifact(daemon: Daemon, request: Request, _route: Route) -> Response:
    snapshot = await daemon.snapshots.owned(request.path_params["sid"], request.headers.get(CLUSTER_HEADER, ""))
    if request.path_params["aid"] != DISK_ARTIFACT:
        raise ArtifactNotFound(snapshot=snapshot.id, id=request.path_params["aid"][:80])
    artifact = disk_artifact(snapshot)
    start, end = _parse_range(request.headers.get("range", ""), artifact.size_bytes)
    is_part = end - start < artifact.size_bytes
    packed = await asyncio.to_thread(daemon.snapshots.open_packed, snapshot)
    answer = StreamingResponse(
        _chunks(packed, start, end), 206 if is_part else 200, media_type="application/octet-stream"
    )
    answer.headers.update(_headers(artifact, start, end, is_part=is_part))
    return answer


HANDLERS = {
    "take_snapshot": take_snapshot,
    "list_machine_snapshots": list_machine_snapshots,
    "list_snapshots": list_snapshots,
    "get_snapshot": get_snapshot,
    "delete_snapshot": delete_snapshot,
    "restore_in_place": restore_in_place,
    "get_artifact": get_artifact,
    "upload_snapshot": upload_snapshot,
    "restore_snapshot": restore_snapshot,
}


def render_snapshot(snapshot: HostSnapshot) -> SnapshotBody:
    """A snapshot as the API shows it."""
    artifact = next(iter(snapshot.artifacts), None)
    return SnapshotBody(
        id=snapshot.id,
        machine_id=snapshot.machine_id,
        created_at=render_time(snapshot.created_at_ms),
        state=snapshot.phase.value,
        size_bytes=artifact.size_bytes if artifact is not None else 0,
        digest=f"sha256:{artifact.sha256}" if artifact is not None else "",
        image_digest=snapshot.image_digest,
        disk_bytes=snapshot.disk_bytes,
        consistency=snapshot.consistency.value,
        frozen_ms=snapshot.frozen_ms,
    )


def _answer(snapshot: HostSnapshot) -> SnapshotAnswer:
    artifacts = [
        SnapshotArtifact(id=one.id, kind=one.kind, name=one.name, size_bytes=one.size_bytes, sha256_hex=one.sha256)
        for one in snapshot.artifacts
    ]
    return SnapshotAnswer(snapshot=render_snapshot(snapshot), artifacts=artifacts)


def _parse_range(text: str, size: int) -> tuple[int, int]:
    """First byte and the one behind the last. Raises BadRange."""
    found = _RANGE.fullmatch(text.strip())
    if found is None or not any(found.groups()):
        return 0, size
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    end = min(size, int(last) + 1) if last else size
    if int(first) >= end:
        raise BadRange(size=size)
    return int(first), end


def _headers(artifact: Artifact, start: int, end: int, *, is_part: bool) -> Headers:
    fields = {
        "content-length": str(end - start),
        "content-disposition": f'attachment; filename="{artifact.name}"',
        "accept-ranges": "bytes",
        "etag": f'"{artifact.sha256}"',
    }
    if is_part:
        fields["content-range"] = f"bytes {start}-{end - 1}/{artifact.size_bytes}"
    return Headers(fields)


async def _chunks(packed: PackedDisk, start: int, end: int) -> AsyncIterator[bytes]:
    try:
        for offset in range(start, end, _CHUNK):
            yield await asyncio.to_thread(packed.read, offset, min(_CHUNK, end - offset))
    finally:
        packed.close()
