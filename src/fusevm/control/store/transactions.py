"""The store's transactions, as functions over a connection inside of one. They decide only what the database must
guarantee: one live environment per task, no booking beyond a host's limits, no transition outside of the table, no gap
in an environment's events."""

import sqlite3
from typing import Any

import msgspec
from msgspec.structs import replace

from fusevm.control.store.protocol import (
    Claim,
    Committed,
    Query,
    RequestKey,
    Reservation,
    ReservationLost,
    StoredFact,
    StoredRequest,
)
from fusevm.control.store.sql import load_queries
from fusevm.core.lifecycle import Step, next_deadline_ms
from fusevm.core.policy import Policy
from fusevm.model.environment import ALLOWED, Environment
from fusevm.model.errors import HostNotFound, Internal, RevisionConflict, TaskExists
from fusevm.model.fact import Fact
from fusevm.model.host import Host, Resources

SQL = load_queries()
_environment = msgspec.json.Decoder(Environment)
_fact = msgspec.json.Decoder(Fact)
_host = msgspec.json.Decoder(Host)
_encode = msgspec.json.Encoder().encode

_LIST_LIVE = "select doc from environments where is_live = 1"
_LIST_ENDED = "select doc from environments where is_live = 0"


def run(connection: sqlite3.Connection, name: str, *values: object) -> sqlite3.Cursor:
    """Execute a named query with $1, $2 ..."""
    return connection.execute(SQL[name], {str(number): value for number, value in enumerate(values, 1)})


def one(connection: sqlite3.Connection, name: str, *values: object) -> Any:
    """First row of a named query, or None."""
    rows = run(connection, name, *values).fetchall()
    return rows[0] if rows else None


# -- environments --------------------------------------------------------------------------------------------------


def create(
    connection: sqlite3.Connection,
    step: Step,
    reservation: Reservation,
    claim: Claim | None,
    key: RequestKey | None,
    *,
    policy: Policy,
    now_ms: int,
) -> Committed:
    """Insert the record, book its place, write its facts, bind the request key."""
    record = replace(step.record, revision=1)
    owner, until_ms = _lease(claim, now_ms)
    inserted = one(
        connection,
        "insert_environment",
        record.uid,
        record.task_id,
        record.tenant,
        record.state,
        record.host_id,
        1,
        1,
        record.pending.seq if record.pending else None,
        record.pending.not_before_ms if record.pending else None,
        next_deadline_ms(record, policy),
        owner,
        until_ms,
        record.ended_at_ms,
        _encode(record).decode(),
    )
    if inserted is None:
        other = get_live(connection, record.task_id)
        raise TaskExists(id=record.id, state=other.state if other else "unknown")
    _book(connection, record.uid, reservation)
    _insert_facts(connection, record, step.facts, 0)
    if key is not None:
        run(connection, "bind_request", key.tenant, key.route, key.key, record.uid)
    return Committed(record, owner)


def _book(connection: sqlite3.Connection, uid: str, reservation: Reservation) -> None:
    host = get_host(connection, reservation.host_id)
    if host is None:
        raise HostNotFound(id=reservation.host_id)
    if not reservation.fits(host):
        raise ReservationLost
    amount = msgspec.structs.astuple(reservation.resources)
    run(connection, "insert_placement", uid, host.id, *amount)
    run(connection, "book_host", host.id, *amount)


def commit(
    connection: sqlite3.Connection,
    uid: str,
    revision: int,
    step: Step,
    claim: Claim | None,
    *,
    policy: Policy,
    now_ms: int,
) -> Committed:
    """Replace the record if it is still the one that was read."""
    row = one(connection, "get_for_commit", uid)
    if row is None or row[1] != revision:
        raise RevisionConflict(uid=uid, revision=revision)
    before = _environment.decode(row[0])
    _check(before, step)
    record = replace(step.record, revision=revision + 1)
    pending_seq = record.pending.seq if record.pending else None
    not_before_ms = record.pending.not_before_ms if record.pending else None
    is_new = pending_seq is not None and (pending_seq, not_before_ms) != (row[2], row[3])
    owner, until_ms = _lease(claim, now_ms) if is_new else (row[4], row[5]) if record.pending else (None, None)
    run(
        connection,
        "update_environment",
        uid,
        revision,
        record.state,
        record.host_id,
        0 if record.is_terminal else 1,
        record.revision,
        pending_seq,
        not_before_ms,
        next_deadline_ms(record, policy),
        owner,
        until_ms,
        record.ended_at_ms,
        _encode(record).decode(),
    )
    _insert_facts(connection, record, step.facts, before.event_seq)
    if record.is_terminal and not before.is_terminal:
        _unbook(connection, uid)
    return Committed(record, owner if is_new else None)


def _check(before: Environment, step: Step) -> None:
    after = step.record
    if after.uid != before.uid or after.task_id != before.task_id:
        raise Internal(problem=f"{before.uid}: a commit may not change who the record is")
    if after.state is not before.state and after.state not in ALLOWED[before.state]:
        raise Internal(problem=f"{before.uid}: {before.state} -> {after.state} is not in the table")
    if after.host_id != before.host_id:
        raise Internal(problem=f"{before.uid}: a commit may not move a placement")


def _unbook(connection: sqlite3.Connection, uid: str) -> None:
    row = one(connection, "delete_placement", uid)
    if row is not None:
        run(connection, "book_host", row[0], *(-amount for amount in row[1:]))


def _insert_facts(connection: sqlite3.Connection, record: Environment, facts: tuple[Fact, ...], last_seq: int) -> None:
    if [fact.seq for fact in facts] != list(range(last_seq + 1, record.event_seq + 1)):
        raise Internal(problem=f"{record.uid}: facts after {last_seq} do not lead to {record.event_seq}")
    for fact in facts:
        run(connection, "insert_event", record.uid, fact.seq, record.task_id, _encode(fact).decode())


def _lease(claim: Claim | None, now_ms: int) -> tuple[str | None, int | None]:
    return (claim.owner, now_ms + claim.lease_ms) if claim is not None else (None, None)


def get(connection: sqlite3.Connection, uid: str) -> Environment | None:
    return decode_row(one(connection, "get_environment", uid))


def get_live(connection: sqlite3.Connection, task_id: str) -> Environment | None:
    return decode_row(one(connection, "get_live", task_id))


def get_last_ended(connection: sqlite3.Connection, task_id: str) -> Environment | None:
    return decode_row(one(connection, "get_last_ended", task_id))


def on_host(connection: sqlite3.Connection, host_id: str) -> list[Environment]:
    return [_environment.decode(row[0]) for row in run(connection, "live_on_host", host_id)]


def list_page(connection: sqlite3.Connection, query: Query) -> list[Environment]:
    """Only the filters that were given become part of the statement, so that each has its index."""
    text, values = (_LIST_ENDED if query.ended else _LIST_LIVE), list[object]()
    for column, value in (("task_id", query.task_id), ("state", query.state), ("host_id", query.host_id)):
        if value:
            values.append(value)
            text += f" and {column} = ${len(values)}"
    if query.after:
        values.append(query.after)
        text += f" and uid {'<' if query.ended else '>'} ${len(values)}"
    values.append(query.limit)
    text += f" order by uid {'desc' if query.ended else 'asc'} limit ${len(values)}"
    rows = connection.execute(text, {str(number): value for number, value in enumerate(values, 1)})
    return [_environment.decode(row[0]) for row in rows]


def refresh_deadlines(connection: sqlite3.Connection, policy: Policy) -> None:
    """Recompute the stored deadlines: the policy may have changed since they were written."""
    for row in run(connection, "all_live").fetchall():
        record = _environment.decode(row[0])
        run(connection, "update_deadline", record.uid, next_deadline_ms(record, policy))


def purge(connection: sqlite3.Connection, before_ms: int, now_ms: int, limit: int) -> int:
    """Delete old ended environments with their events, and expired request keys."""
    uids = [row[0] for row in run(connection, "ended_before", before_ms, limit)]
    for uid in uids:
        run(connection, "delete_events", uid)
        run(connection, "delete_environment", uid)
    run(connection, "delete_requests", now_ms)
    return len(uids)


def decode_row(row: Any) -> Environment | None:
    return _environment.decode(row[0]) if row is not None else None


# -- facts ---------------------------------------------------------------------------------------------------------


def facts(connection: sqlite3.Connection, name: str, *values: object) -> list[StoredFact]:
    """Rows of `events_of` or `events_after`."""
    return [StoredFact(row[0], row[1], _fact.decode(row[2])) for row in run(connection, name, *values)]


# -- hosts ---------------------------------------------------------------------------------------------------------


def list_hosts(connection: sqlite3.Connection) -> list[Host]:
    return [_host_of(row) for row in run(connection, "list_hosts")]


def get_host(connection: sqlite3.Connection, id: str) -> Host | None:  # noqa: A002 - the record's field
    row = one(connection, "get_host", id)
    return _host_of(row) if row is not None else None


def save_host(connection: sqlite3.Connection, host: Host) -> Host:
    """Insert or compare-and-swap."""
    saved = replace(host, revision=host.revision + 1)
    doc = _encode(replace(saved, allocated=Resources())).decode()
    if host.revision == 0:
        row = one(connection, "insert_host", host.id, saved.revision, host.last_seen_ms, doc)
    else:
        row = one(connection, "update_host", host.id, host.revision, saved.revision, host.last_seen_ms, doc)
    if row is None:
        raise RevisionConflict(uid=host.id, revision=host.revision)
    return saved


def _host_of(row: Any) -> Host:
    doc, revision, last_seen_ms, cpus, ram_mb, storage_gb, vm_count = row
    host = _host.decode(doc)
    allocated = Resources(cpus=cpus, ram_mb=ram_mb, storage_gb=storage_gb, vm_count=vm_count)
    return replace(host, revision=revision, last_seen_ms=last_seen_ms, allocated=allocated)


# -- requests ------------------------------------------------------------------------------------------------------


def claim_request(connection: sqlite3.Connection, key: RequestKey, now_ms: int, keep_ms: int) -> StoredRequest | None:
    """Claim a key, or say what came before under it."""
    claimed = one(
        connection, "claim_request", key.tenant, key.route, key.key, key.fingerprint, now_ms, now_ms + keep_ms
    )
    if claimed is not None:
        return None
    fingerprint, uid, status, body, claimed_at_ms = one(connection, "get_request", key.tenant, key.route, key.key)
    return StoredRequest(fingerprint, uid or "", status or 0, body or "", claimed_at_ms)
