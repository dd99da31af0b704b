"""The life of a snapshot's record: who may change it when, and which ones are deleted by themselves.

While a snapshot is `creating` or `restoring`, it belongs to the pending action of its environment, and only
`core.lifecycle` changes it, in the transaction that changes the environment. A `ready` or failed one is free to be
deleted, by request or when its time is over. The bytes are freed before the record goes.
"""

import re
from collections.abc import Mapping

from msgspec.structs import replace

from fusevm.model.environment import Environment
from fusevm.model.errors import ActionUnderWay, BadField, SnapshotNotReady, WrongState
from fusevm.model.snapshot import ALLOWED, Snapshot, SnapshotKind, SnapshotState

#: Snapshots of this mode are layers that others are built on; they are never deleted by themselves.
BUILD_MODE = "build"
DEFAULT_MODE = "manual"
MODE = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,31})")
LAYER_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,255}")
MAX_COMMENT = 4_096
MAX_EXPORT_TEXT = 1_024
MAX_METADATA = 64
MAX_METADATA_KEY = 63
MAX_METADATA_VALUE = 1_024
#: Ten years.
MAX_RETENTION_SECONDS = 315_360_000
_PREFIX = "snap-"
_WORKED_ON = {SnapshotState.CREATING: "snapshot_machine", SnapshotState.RESTORING: "restore_machine"}


# -- making --------------------------------------------------------------------------------------------------------


def begin_snapshot(
    env: Environment,
    time_ordered: str,
    *,
    now_ms: int,
    parent_id: str = "",
    kind: SnapshotKind = SnapshotKind.DISK,
    mode: str = "",
    comment: str = "",
    metadata: Mapping[str, str] | None = None,
    layer_key: str = "",
    arch: str = "",
    export_ref: str = "",
    export_status: str = "",
    retention_seconds: int = 0,
) -> Snapshot:
    """The record of a snapshot that is to be taken. `time_ordered` makes its id (`model.ids.make_uid`); `arch` is that
    of the host. Raises BadField."""
    return Snapshot(
        id=_PREFIX + time_ordered,
        uid=env.uid,
        task_id=env.task_id,
        tenant=env.tenant,
        host_id=env.host_id,
        machine_id=env.machine_id,
        parent_id=parent_id,
        image=env.spec.image,
        kind=kind,
        state=SnapshotState.CREATING,
        mode=_token("mode", mode, MODE) or DEFAULT_MODE,
        comment=_text("comment", comment, MAX_COMMENT),
        metadata=_metadata(metadata or {}),
        layer_key=_token("layer_key", layer_key, LAYER_KEY),
        arch=arch,
        export_ref=_text("export_ref", export_ref, MAX_EXPORT_TEXT),
        export_status=_text("export_status", export_status, MAX_EXPORT_TEXT),
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        retention_until_ms=_retention(retention_seconds, now_ms),
    )


def made(snapshot: Snapshot, size_bytes: int, digest: str, now_ms: int) -> Snapshot:
    """It is complete on its host."""
    return replace(_enter(snapshot, SnapshotState.READY, now_ms), size_bytes=size_bytes, digest=digest, last_error="")


def restoring(snapshot: Snapshot, now_ms: int) -> Snapshot:
    """A machine is being put back to it."""
    return _enter(snapshot, SnapshotState.RESTORING, now_ms)


def restored(snapshot: Snapshot, now_ms: int) -> Snapshot:
    """The machine runs from it; it stays usable."""
    return replace(_enter(snapshot, SnapshotState.READY, now_ms), last_error="")


def given_up(snapshot: Snapshot, problem: str, now_ms: int) -> Snapshot:
    """The action failed: what was being taken is worthless, what was being restored is as good as before."""
    after = SnapshotState.ERROR if snapshot.state is SnapshotState.CREATING else SnapshotState.READY
    return replace(_enter(snapshot, after, now_ms), last_error=problem)


def stranded(snapshot: Snapshot, now_ms: int) -> Snapshot:
    """Its host was removed: a ready one cannot be used any more."""
    problem = f"host {snapshot.host_id}, where its bytes are, was removed"
    return replace(_enter(snapshot, SnapshotState.ERROR, now_ms), last_error=problem)


# -- using and deleting --------------------------------------------------------------------------------------------


def check_usable(snapshot: Snapshot) -> None:
    """Raises SnapshotNotReady unless a machine can start from it."""
    if snapshot.state is not SnapshotState.READY:
        raise SnapshotNotReady(id=snapshot.id, state=snapshot.state)


def check_seed(snapshot: Snapshot) -> None:
    """Raises SnapshotNotReady, or WrongState for one with memory, unless another environment can start from it."""
    check_usable(snapshot)
    if snapshot.kind is SnapshotKind.LIVE:
        wanted = "it holds the memory of its own machine, and another environment starts from a disk snapshot"
        raise WrongState(id=snapshot.id, state=snapshot.kind, wanted=wanted)


def check_restorable(snapshot: Snapshot, env: Environment) -> None:
    """Raises SnapshotNotReady or WrongState unless the environment's machine can be put back to it in place."""
    check_usable(snapshot)
    if snapshot.uid != env.uid:
        wanted = f"it can only be restored there; create an environment with seed_snapshot_id {snapshot.id!r} instead"
        raise WrongState(id=snapshot.id, state=f"of another environment than {env.id}", wanted=wanted)
    if snapshot.host_id != env.host_id:
        wanted = f"the machine is on host {env.host_id}, and a snapshot is restored where its bytes are"
        raise WrongState(id=snapshot.id, state=f"on host {snapshot.host_id}", wanted=wanted)


def begin_delete(snapshot: Snapshot, now_ms: int) -> Snapshot:
    """Mark it for deletion; again: no change. Raises ActionUnderWay while it is being taken or restored."""
    if snapshot.state is SnapshotState.DELETING:
        return snapshot
    if snapshot.state in _WORKED_ON:
        raise ActionUnderWay(id=snapshot.id, action=_WORKED_ON[snapshot.state])
    return _enter(snapshot, SnapshotState.DELETING, now_ms)


def _enter(snapshot: Snapshot, state: SnapshotState, now_ms: int) -> Snapshot:
    if state not in ALLOWED[snapshot.state]:
        raise AssertionError(f"{snapshot.id}: {snapshot.state} -> {state} is not in the table")
    return replace(snapshot, state=state, updated_at_ms=max(now_ms, snapshot.updated_at_ms))


# -- fields of a request -------------------------------------------------------------------------------------------


def _text(field: str, text: str, most: int) -> str:
    if len(text) > most or "\x00" in text:
        raise BadField(field=field, problem=f"use at most {most} characters, without NUL")
    return text


def _token(field: str, text: str, grammar: re.Pattern[str]) -> str:
    if text and not grammar.fullmatch(text):
        raise BadField(field=field, problem=f"{text[:80]!r} does not match {grammar.pattern}")
    return text


def _metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    if len(metadata) > MAX_METADATA:
        raise BadField(field="metadata", problem=f"{len(metadata)} entries are more than {MAX_METADATA}")
    for key, value in metadata.items():
        if not key or len(key) > MAX_METADATA_KEY or not key.isprintable():
            problem = f"{key[:80]!r} is not 1 to {MAX_METADATA_KEY} printable characters"
            raise BadField(field="metadata", problem=problem)
        _text(f"metadata.{key}", value, MAX_METADATA_VALUE)
    return dict(metadata)


def _retention(seconds: int, now_ms: int) -> int | None:
    if not seconds:
        return None
    if not 1 <= seconds <= MAX_RETENTION_SECONDS:
        raise BadField(field="retention_seconds", problem=f"{seconds} is not within 1 to {MAX_RETENTION_SECONDS}")
    return now_ms + seconds * 1000
