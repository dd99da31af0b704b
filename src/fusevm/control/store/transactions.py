"""The transactions about environments, without a database (see `statements`). They decide only what the database must
guarantee: one live environment per task, no booking beyond a host's limits, no transition outside of the table, no gap
in an environment's events.

Rows are locked in one order, so that two transactions seldom wait for each other in a circle: environment, snapshots,
sealed values, events, placement, and last, because many want it at once, the host.
"""

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from fusevm.control.store import host_rows, snapshot_rows
from fusevm.control.store.lists import decode_each, read_page
from fusevm.control.store.protocol import (
    Claim,
    Committed,
    Due,
    Position,
    Query,
    Reading,
    RequestKey,
    Reservation,
    SealedRow,
    StoredFact,
    StoredRequest,
    Tally,
)
from fusevm.control.store.statements import Conditions, Row, Statement, Transaction, one, rows
from fusevm.core.lifecycle import Step, next_deadline_ms
from fusevm.core.policy import Policy
from fusevm.model.environment import ALLOWED, Environment
from fusevm.model.errors import IdempotencyInProgress, Internal, RevisionConflict, TaskExists
from fusevm.model.fact import Fact

_environment = msgspec.json.Decoder(Environment)
_fact = msgspec.json.Decoder(Fact)
_encode = msgspec.json.Encoder().encode


def sealed_owner(uid: str) -> str:
    """Owner of an environment's sealed values: they are deleted when it ends."""
    return f"env:{uid}"


# -- create and commit ---------------------------------------------------------------------------------------------


def create(
    step: Step,
    reservation: Reservation | None,
    claim: Claim | None,
    key: RequestKey | None,
    sealed: SealedRow | None,
    *,
    policy: Policy,
) -> Transaction[Committed]:
    """Insert the record, write its facts, bind the request key, book its place."""
    record = replace(step.record, revision=1)
    _check_reservation(record, reservation)
    inserted = yield from one(
        "insert_environment",
        record.uid,
        record.task_id,
        record.tenant,
        record.state,
        record.host_id,
        record.pending.seq if record.pending else None,
        record.pending.not_before_ms if record.pending else None,
        next_deadline_ms(record, policy),
        claim.owner if claim else None,
        claim.lease_ms if claim else None,
        record.ended_at_ms,
        _encode(record).decode(),
    )
    if inserted is None:
        other = yield from get_live(record.task_id)
        raise TaskExists(id=record.id, state=other.state if other else "unknown")
    yield from _save_rest(record, step, sealed, 0)
    if key is not None:
        yield from _bind_request(key, record.uid)
    if reservation is not None:
        yield from host_rows.book(record.uid, record.tenant, reservation)
    return Committed(record, claim.owner if claim else None)


def commit(
    uid: str,
    revision: int,
    step: Step,
    claim: Claim | None,
    reservation: Reservation | None,
    sealed: SealedRow | None,
    *,
    policy: Policy,
) -> Transaction[Committed]:
    """Replace the record if it is still the one that was read."""
    row = yield from one("get_for_commit", uid, revision)
    if row is None:
        raise RevisionConflict(uid=uid, revision=revision)
    before = _environment.decode(row[0])
    _check(before, step, reservation)
    record = replace(step.record, revision=revision + 1)
    pending_seq = record.pending.seq if record.pending else None
    not_before_ms = record.pending.not_before_ms if record.pending else None
    is_new = pending_seq is not None and (pending_seq, not_before_ms) != (row[1], row[2])
    is_kept = pending_seq is not None and not is_new
    leased_to = claim.owner if claim is not None and is_new else None
    yield from rows(
        "update_environment",
        uid,
        record.state,
        record.host_id,
        0 if record.is_terminal else 1,
        record.revision,
        pending_seq,
        not_before_ms,
        next_deadline_ms(record, policy),
        record.ended_at_ms,
        _encode(record).decode(),
        row[3] if is_kept else leased_to,
        is_kept,
        claim.lease_ms if claim is not None and is_new else None,
    )
    yield from _save_rest(record, step, sealed, before.event_seq)
    if reservation is not None:
        yield from host_rows.book(uid, record.tenant, reservation)
    if record.is_terminal and not before.is_terminal:
        yield from rows("drop_secrets", sealed_owner(uid))
        yield from host_rows.unbook(uid)
    return Committed(record, leased_to)


def _check(before: Environment, step: Step, reservation: Reservation | None) -> None:
    after = step.record
    if (after.uid, after.task_id, after.tenant) != (before.uid, before.task_id, before.tenant):
        raise Internal(problem=f"{before.uid}: a commit may not change who the record is")
    if after.state is not before.state and after.state not in ALLOWED[before.state]:
        raise Internal(problem=f"{before.uid}: {before.state} -> {after.state} is not in the table")
    if before.host_id:
        if after.host_id != before.host_id or reservation is not None:
            raise Internal(problem=f"{before.uid}: a commit may not move a placement")
    else:
        _check_reservation(after, reservation)


def _check_reservation(record: Environment, reservation: Reservation | None) -> None:
    booked = reservation.host_id if reservation is not None else ""
    if record.host_id != booked:
        raise Internal(problem=f"{record.uid}: is on host {record.host_id!r}, but {booked!r} is to be booked")


def _save_rest(record: Environment, step: Step, sealed: SealedRow | None, last_seq: int) -> Transaction[None]:
    """What is saved with a record: snapshots, sealed values, facts."""
    for snapshot in step.snapshots:
        yield from snapshot_rows.follow(snapshot)
    if sealed is not None:
        yield from rows("put_secret", sealed.owner, sealed.name, sealed.sealed)
    if [fact.seq for fact in step.facts] != list(range(last_seq + 1, record.event_seq + 1)):
        raise Internal(problem=f"{record.uid}: facts after {last_seq} do not lead to {record.event_seq}")
    for fact in step.facts:
        doc = _encode(fact).decode()
        yield from rows("insert_event", record.uid, fact.seq, record.task_id, record.tenant, fact.at_ms, doc)


# -- reading -------------------------------------------------------------------------------------------------------


def get(uid: str) -> Transaction[Environment | None]:
    return _decode((yield from one("get_environment", uid)))


def get_live(task_id: str) -> Transaction[Environment | None]:
    return _decode((yield from one("get_live", task_id)))


def get_last_ended(task_id: str) -> Transaction[Environment | None]:
    return _decode((yield from one("get_last_ended", task_id)))


def on_host(host_id: str) -> Transaction[Reading[Environment]]:
    return _decode_each((yield from rows("live_on_host", host_id)))


def queued(limit: int) -> Transaction[Reading[Environment]]:
    return _decode_each((yield from rows("queued", limit)))


def queued_after(uid: str, limit: int) -> Transaction[Reading[Environment]]:
    return _decode_each((yield from rows("queued_after", uid, limit)))


def list_page(query: Query) -> Transaction[Reading[Environment]]:
    """One page."""

    def ask(after: str, limit: int) -> Transaction[Sequence[Row]]:
        return (yield _page(query, after, limit))

    return read_page(ask, query.after, query.limit, decode=_decode_listed, place=lambda row: str(row[0]))


def _page(query: Query, after: str, limit: int) -> Statement:
    where = Conditions()
    where.given(task_id=query.task_id, state=query.state, host_id=query.host_id)
    if query.tenant is not None:
        where.add("and tenant =", query.tenant)
    if after:
        where.add("and uid <" if query.ended else "and uid >", after)
    where.add(f"order by uid {'desc' if query.ended else 'asc'} limit", limit)
    return where.statement("list_ended" if query.ended else "list_live")


def count_live() -> Transaction[dict[str, int]]:
    return {str(state): int(count) for state, count in (yield from rows("count_live"))}


def tally() -> Transaction[Tally]:
    live = yield from count_live()
    ((waiting,),) = yield from rows("count_queued")
    oldest = (yield from queued(1)).records
    found = yield from rows("count_snapshots")
    return Tally(
        live=live,
        queued=int(waiting),
        queued_since_ms=oldest[0].created_at_ms if oldest else None,
        snapshots={(host_id, state): (int(count), int(size)) for host_id, state, count, size in found},
    )


def _decode(row: Row | None) -> Environment | None:
    return _environment.decode(row[0]) if row is not None else None


def _decode_each(found: Sequence[Row]) -> Reading[Environment]:
    """Rows of (uid, document)."""
    return decode_each(found, _decode_listed)


def _decode_listed(row: Row) -> Environment:
    return _environment.decode(row[1])


# -- leases --------------------------------------------------------------------------------------------------------


def now_ms() -> Transaction[int]:
    ((now,),) = yield from rows("now")
    return int(now)


def due(limit: int) -> Transaction[Due]:
    actions = yield from rows("due_actions", limit)
    deadlines = yield from rows("due_deadlines", limit)
    snapshots = yield from rows("due_snapshots", limit)
    return Due(
        tuple((str(uid), int(seq)) for uid, seq in actions),
        tuple(str(row[0]) for row in deadlines),
        tuple(str(row[0]) for row in snapshots),
    )


def acquire(uid: str, seq: int, claim: Claim) -> Transaction[Environment | None]:
    return _decode((yield from one("acquire_lease", uid, seq, claim.owner, claim.lease_ms)))


def renew(held: Sequence[tuple[str, int]], claim: Claim) -> Transaction[set[tuple[str, int]]]:
    """In the order of the keys, so that two who renew the same rows do not wait for each other."""
    kept: set[tuple[str, int]] = set()
    for uid, seq in sorted(held):
        if (yield from one("renew_lease", uid, seq, claim.owner, claim.lease_ms)) is not None:
            kept.add((uid, seq))
    return kept


def release(owner: str) -> Transaction[None]:
    for name in ("release_leases", "release_hosts", "release_snapshots"):
        yield from rows(name, owner)


# -- facts ---------------------------------------------------------------------------------------------------------


def facts_of(uid: str, after_seq: int, limit: int) -> Transaction[Reading[StoredFact]]:
    def ask(after: int, left: int) -> Transaction[Sequence[Row]]:
        return rows("events_of", uid, after, left)

    return read_page(ask, after_seq, limit, decode=_decode_fact, place=lambda row: int(row[3]))


def facts_after(position: Position, limit: int, tenant: str | None) -> Transaction[Reading[StoredFact]]:
    def ask(after: Position, left: int) -> Transaction[Sequence[Row]]:
        if tenant is None:
            return rows("events_after", *after, left)
        return rows("events_after_of_tenant", *after, left, tenant)

    return read_page(ask, position, limit, decode=_decode_fact, place=_position)


def _decode_fact(row: Row) -> StoredFact:
    return StoredFact(_position(row), row[4], row[5], _fact.decode(row[6]))


def _position(row: Row) -> Position:
    return (row[1], row[2])


# -- upkeep, requests ----------------------------------------------------------------------------------------------


def refresh_deadlines(policy: Policy) -> Transaction[None]:
    """Recompute the stored deadlines: the policy may have changed since they were written."""
    found = yield from rows("live_deadlines")
    stored = {uid: stored_ms for uid, _, stored_ms in found}
    for record in _decode_each([(uid, doc) for uid, doc, _ in found]).records:
        deadline_ms = next_deadline_ms(record, policy)
        if deadline_ms != stored[record.uid]:
            yield from rows("update_deadline", record.uid, record.revision, deadline_ms)


def purge(keep_ms: int, limit: int) -> Transaction[int]:
    """Delete old ended environments with their events, and expired request keys."""
    count = 0
    for (uid,) in (yield from rows("ended_before", keep_ms, limit)):
        yield from rows("delete_events", uid)
        yield from rows("drop_secrets", sealed_owner(uid))
        count += (yield from one("delete_environment", uid)) is not None
    yield from rows("delete_requests")
    return count


def prune_events(keep_ms: int, limit: int) -> Transaction[int]:
    """Delete the oldest events from the front of each environment's, but never its last one."""
    count = 0
    for uid, seq in (yield from rows("events_before", keep_ms, limit)):
        count += len((yield from rows("delete_events_until", uid, seq)))
    return count


def secrets_sealed_otherwise(mark: str, after: tuple[str, str], limit: int) -> Transaction[list[SealedRow]]:
    found = yield from rows("secrets_sealed_otherwise", mark, *after, limit)
    return [SealedRow(str(owner), str(name), str(sealed)) for owner, name, sealed in found]


def claim_request(key: RequestKey, keep_ms: int, dead_after_ms: int | None) -> Transaction[StoredRequest | None]:
    """Claim a key, or say what came before under it."""
    claim = (key.tenant, key.route, key.key, key.fingerprint, key.claimant, keep_ms, dead_after_ms)
    while (yield from one("claim_request", *claim)) is None:
        # It may be freed between the two statements: then it is claimed after all.
        found = yield from _request(key)
        if found is not None:
            return found
    return None


def forget_request(key: RequestKey) -> Transaction[str]:
    """Free a key that is bound to nothing; else say to what it is bound."""
    if (yield from one("forget_request", key.tenant, key.route, key.key, key.claimant)) is not None:
        return ""
    found = yield from _request(key)
    return found.uid if found is not None and found.fingerprint == key.fingerprint else ""


def _request(key: RequestKey) -> Transaction[StoredRequest | None]:
    found = yield from one("get_request", key.tenant, key.route, key.key)
    if found is None:
        return None
    fingerprint, uid, status, body, is_sealed = found
    return StoredRequest(fingerprint, uid or "", status or 0, body or "", bool(is_sealed))


def _bind_request(key: RequestKey, uid: str) -> Transaction[None]:
    """Raises IdempotencyInProgress when another request has taken the key over: that one acts."""
    if (yield from one("bind_request", key.tenant, key.route, key.key, key.claimant, uid)) is None:
        raise IdempotencyInProgress(key=key.key)
