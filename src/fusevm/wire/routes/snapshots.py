"""Snapshots."""

from fusevm.model import errors as e
from fusevm.wire import rest_fleet
from fusevm.wire.routes.parts import CURSOR, ENVIRONMENT, ENVIRONMENT_ERRORS, LIMIT
from fusevm.wire.routes.table import Param, Payload, Route, Scope

_SNAPSHOTS, _SNAPSHOT = "/v1/snapshots", "/v1/snapshots/{id}"
_ABSENT = (e.SnapshotNotFound,)
_PREFER = Param(name="Prefer", place="header", summary="`respond-async`: answer at once, in state creating")

SNAPSHOTS: tuple[Route, ...] = (
    Route(
        method="POST",
        path=ENVIRONMENT + "/snapshots",
        name="create_snapshot",
        scope=Scope.SNAPSHOTS,
        summary="Take a snapshot of a running environment; waits until it is ready, at most 55 s, then answers in "
        "state creating",
        takes=Payload.JSON,
        request=rest_fleet.SnapshotRequest,
        answer=rest_fleet.SnapshotBody,
        statuses=(201, 202),
        makes=_SNAPSHOT,
        params=(_PREFER,),
        errors=(*ENVIRONMENT_ERRORS, e.WrongState, e.ActionUnderWay, e.SnapshotFailed, e.NotSupported),
    ),
    Route(
        method="GET",
        path=_SNAPSHOTS,
        name="list_snapshots",
        scope=Scope.SNAPSHOTS,
        summary="List snapshots, newest first",
        answer=rest_fleet.SnapshotPage,
        params=(
            Param(name="vm_id", summary="Public id of the environment"),
            Param(name="uid", summary="Exact environment"),
            Param(name="task_id", summary="Exact task id"),
            Param(name="tenant_id", summary="Exact tenant"),
            Param(name="state", summary="Exact state"),
            Param(name="mode", summary="Exact mode"),
            Param(name="name", summary="Exact name (`metadata.name`)"),
            Param(name="layer_key", summary="Exact layer key"),
            Param(name="arch", summary="Exact architecture"),
            LIMIT,
            CURSOR,
        ),
    ),
    Route(
        method="GET",
        path=_SNAPSHOTS + "/resolve",
        name="resolve_snapshot",
        scope=Scope.SNAPSHOTS,
        summary="Find the newest ready build layer; a miss is 200 with `found` false",
        answer=rest_fleet.ResolvedLayer,
        params=(
            Param(name="layer_key", is_required=True, summary="Exact layer key"),
            Param(name="arch", is_required=True, summary="Exact architecture"),
        ),
    ),
    Route(
        method="GET",
        path=_SNAPSHOT,
        name="get_snapshot",
        is_versioned=True,
        scope=Scope.SNAPSHOTS,
        summary="One snapshot",
        answer=rest_fleet.SnapshotBody,
        errors=_ABSENT,
    ),
    Route(
        method="POST",
        path=_SNAPSHOT,
        selector="action",
        value="restore",
        name="restore_snapshot",
        is_versioned=True,
        scope=Scope.SNAPSHOTS,
        summary="Put the disk of the running environment that it was taken of back, and start the machine again; "
        "waits at most 55 s",
        takes=Payload.NONE,
        gives=Payload.NONE,
        statuses=(202, 204),
        errors=(
            *_ABSENT,
            *ENVIRONMENT_ERRORS,
            e.SnapshotNotReady,
            e.WrongState,
            e.ActionUnderWay,
            e.SnapshotFailed,
            e.NotSupported,
        ),
    ),
    Route(
        method="DELETE",
        path=_SNAPSHOT,
        name="delete_snapshot",
        is_versioned=True,
        scope=Scope.SNAPSHOTS,
        summary="Delete a snapshot and free its bytes; waits at most 55 s. Children stay: each is complete by itself",
        gives=Payload.NONE,
        statuses=(202, 204),
        errors=(*_ABSENT, e.SnapshotNotReady, e.ActionUnderWay),
    ),
)
