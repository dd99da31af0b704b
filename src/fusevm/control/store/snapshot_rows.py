"""Transactions about snapshots."""

import contextlib
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from fusevm.control.store.lists import read_page
from fusevm.control.store.protocol import Claim, Reading, SnapshotQuery
from fusevm.control.store.statements import Conditions, Row, Statement, Transaction, one, rows
from fusevm.core.snapshots import BUILD_MODE, stranded
from fusevm.model.errors import Internal, RevisionConflict
from fusevm.model.snapshot import ALLOWED, Snapshot, SnapshotState

_snapshot = msgspec.json.Decoder(Snapshot)
_encode = msgspec.json.Encoder().encode
#: States in which an action of the environment is at work on the snapshot.
_AT_WORK = frozenset({SnapshotState.CREATING, SnapshotState.RESTORING})


def get(id_: str) -> Transaction[Snapshot | None]:
    row = yield from one("get_snapshot", id_)
    return _snapshot.decode(row[0]) if row is not None else None


def list_all() -> Transaction[list[Snapshot]]:
    return [_snapshot.decode(row[0]) for row in (yield from rows("all_snapshots"))]


def list_page(query: SnapshotQuery) -> Transaction[Reading[Snapshot]]:
    """One page, newest first."""

    def ask(after: str, limit: int) -> Transaction[Sequence[Row]]:
        return (yield _page(query, after, limit))

    return read_page(
        ask,
        query.after,
        query.limit,
        decode=lambda row: _snapshot.decode(row[1]),
        place=lambda row: str(row[0]),
    )


def _page(query: SnapshotQuery, after: str, limit: int) -> Statement:
    where = Conditions()
    where.given(
        uid=query.uid,
        task_id=query.task_id,
        state=query.state,
        host_id=query.host_id,
        mode=query.mode,
        name=query.name,
        arch=query.arch,
    )
    if query.layer_key:
        where.add("and layer_key <> '' and layer_key =", query.layer_key)
    if query.tenant is not None:
        where.add("and tenant =", query.tenant)
    if after:
        where.add("and id <", after)
    where.add("order by id desc limit", limit)
    return where.statement("list_snapshots")


def save(snapshot: Snapshot) -> Transaction[Snapshot]:
    """Replace by compare-and-swap."""
    row = yield from one("get_snapshot_for_change", snapshot.id)
    before = _snapshot.decode(row[0]) if row is not None else None
    if before is None or before.revision != snapshot.revision:
        raise RevisionConflict(uid=snapshot.id, revision=snapshot.revision)
    return (yield from _replace(before, snapshot))


def follow(snapshot: Snapshot) -> Transaction[None]:
    """Save a snapshot as an environment's commit left it.

    Where a restore begins, it must be the one that was read. The end of an action is taken in any case, but a snapshot
    that is gone stays so.
    """
    row = yield from one("get_snapshot_for_change", snapshot.id)
    before = _snapshot.decode(row[0]) if row is not None else None
    if snapshot.state is SnapshotState.RESTORING and (before is None or before.state is not SnapshotState.RESTORING):
        if before is None or before.revision != snapshot.revision:
            raise RevisionConflict(uid=snapshot.id, revision=snapshot.revision)
        yield from _replace(before, snapshot)
    elif before is None:
        if snapshot.state is SnapshotState.CREATING:
            yield from _insert(replace(snapshot, revision=1))
    else:
        yield from _replace(before, snapshot)


def strand(host_id: str) -> Transaction[None]:
    """Nobody reaches the bytes on a removed host any more: the records stay until they are deleted, and say so."""
    ((now_ms,),) = yield from rows("now")
    for (doc,) in (yield from rows("ready_snapshots_on", host_id)):
        with contextlib.suppress(msgspec.MsgspecError):  # a damaged one cannot be used in any case
            snapshot = _snapshot.decode(doc)
            yield from _replace(snapshot, stranded(snapshot, now_ms))


def acquire(id_: str, claim: Claim) -> Transaction[Snapshot | None]:
    """Take the deletion of a snapshot that is due."""
    row = yield from one("acquire_snapshot", id_, claim.owner, claim.lease_ms)
    if row is None:
        return None
    found = _snapshot.decode(row[0])
    if found.state is SnapshotState.DELETING:
        return found
    return (yield from _replace(found, replace(found, state=SnapshotState.DELETING, updated_at_ms=row[1])))


def _replace(before: Snapshot, after: Snapshot) -> Transaction[Snapshot]:
    if after.state is not before.state and after.state not in ALLOWED[before.state]:
        raise Internal(problem=f"{before.id}: {before.state} -> {after.state} is not in the table")
    if (after.uid, after.task_id, after.tenant) != (before.uid, before.task_id, before.tenant):
        raise Internal(problem=f"{before.id}: a snapshot may not change whose it is")
    saved = replace(after, revision=before.revision + 1)
    yield from rows(
        "update_snapshot",
        saved.id,
        saved.host_id,
        saved.state,
        saved.mode,
        saved.metadata.get("name", ""),
        saved.layer_key,
        saved.arch,
        saved.size_bytes,
        saved.revision,
        due_ms(saved),
        _encode(saved).decode(),
    )
    return saved


def _insert(snapshot: Snapshot) -> Transaction[None]:
    yield from rows(
        "insert_snapshot",
        snapshot.id,
        snapshot.uid,
        snapshot.task_id,
        snapshot.tenant,
        snapshot.host_id,
        snapshot.state,
        snapshot.mode,
        snapshot.metadata.get("name", ""),
        snapshot.layer_key,
        snapshot.arch,
        snapshot.size_bytes,
        snapshot.revision,
        due_ms(snapshot),
        _encode(snapshot).decode(),
    )


def due_ms(snapshot: Snapshot) -> int | None:
    """When its deletion is due: 0: at once; None: never as it is."""
    if snapshot.state is SnapshotState.DELETING:
        return 0
    return None if snapshot.state in _AT_WORK or snapshot.mode == BUILD_MODE else snapshot.retention_until_ms
