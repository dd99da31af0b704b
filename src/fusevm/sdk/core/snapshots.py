"""Calls about snapshots."""

from typing import TypedDict

from fusevm.model.errors import NotFound
from fusevm.sdk.core.exchange import WAIT_TIMEOUT_S, Call, Request, Retry, get, json_reader, make_target, post
from fusevm.wire.rest_fleet import ResolvedLayer, SnapshotBody, SnapshotPage, SnapshotRequest


class SnapshotFields(TypedDict, total=False):
    """What a snapshot may be told by keyword."""

    comment: str
    #: `manual` unless said otherwise; `build` ones never expire.
    mode: str
    #: Deleted after this, unless it is the newest of its environment.
    retention_seconds: int
    #: `name` is what lists can be filtered by.
    metadata: dict[str, str]
    #: Recorded text; nothing is exported.
    export_ref: str
    export_status: str
    layer_key: str
    #: With the memory, where the host can.
    live: bool


def create_snapshot(env_id: str, fields: SnapshotFields, *, key: str, wait: bool = True) -> Call[SnapshotBody]:
    """Take one; answered when it is ready, or `creating` after 55 s, or at once without `wait`. Repeated by key."""
    return Call(
        request=post(
            make_target("environments", env_id, "snapshots"),
            SnapshotRequest(**fields),
            key=key,
            headers={} if wait else {"Prefer": "respond-async"},
        ),
        read=json_reader(SnapshotBody),
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S,
    )


class SnapshotFilter(TypedDict, total=False):
    """Which snapshots a list shows: exact values."""

    vm_id: str
    uid: str
    task_id: str
    tenant_id: str
    state: str
    mode: str
    name: str
    layer_key: str
    arch: str


def list_snapshots(wanted: SnapshotFilter, *, limit: int | None = None, cursor: str = "") -> Call[SnapshotPage]:
    """One page of snapshots, newest first."""
    query: dict[str, str | int | None] = {name: str(value) for name, value in wanted.items()}
    return get(make_target("snapshots", query=query | {"limit": limit, "cursor": cursor}), SnapshotPage)


def resolve_snapshot(layer_key: str, arch: str) -> Call[ResolvedLayer]:
    """The newest ready layer of a key; a miss is an answer, too."""
    query = {"layer_key": layer_key, "arch": arch}
    return get(make_target("snapshots", "resolve", query=query), ResolvedLayer)


def get_snapshot(snapshot_id: str) -> Call[SnapshotBody]:
    """One snapshot."""
    return get(make_target("snapshots", snapshot_id), SnapshotBody)


def restore_snapshot(snapshot_id: str, *, key: str) -> Call[bool]:
    """Put the environment's machine back to it. True: done; False: still under way after 55 s. Repeated by key."""
    return Call(
        request=post(make_target("snapshots", snapshot_id, query={"action": "restore"}), key=key),
        read=lambda answer: answer.status != 202,
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S,
    )


def delete_snapshot(snapshot_id: str) -> Call[bool]:
    """Delete it. True: it is gone; False: that is certain, and still under way after 55 s. Safe to repeat."""
    return Call(
        request=Request(method="DELETE", target=make_target("snapshots", snapshot_id)),
        read=lambda answer: answer.status != 202,
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S,
        done_by=(NotFound,),
    )
