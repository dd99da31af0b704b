"""Transactions about hosts and what is booked on them.

A host's own sealed values and snapshots are locked after its row, by all that change them with it. Environments lock
theirs before the host; no circle comes of it, since a host is dropped only when no environment is placed there.
"""

from collections.abc import Mapping
from functools import partial

import msgspec
from msgspec.structs import replace

from fusevm.control.store import snapshot_rows
from fusevm.control.store.lists import decode_each, read_page
from fusevm.control.store.protocol import Reading, Reservation, ReservationLost, SealedRow
from fusevm.control.store.statements import Row, Transaction, one, rows
from fusevm.model.errors import HostInUse, HostNotFound, RevisionConflict
from fusevm.model.host import Host, Resources

_host = msgspec.json.Decoder(Host)
_encode = msgspec.json.Encoder().encode


def list_all(known: Mapping[Row, Host]) -> Transaction[Reading[tuple[Row, Host]]]:
    """All hosts by id, each with its row. What is in `known` under an equal row is not decoded again: with a thousand
    hosts, decoding takes longer than the query, and every placement asks."""
    found = [tuple(row) for row in (yield from rows("list_hosts"))]
    return decode_each(found, lambda row: (row, known.get(row) or decode(row)))


def page(after: str, limit: int) -> Transaction[Reading[Host]]:
    return read_page(partial(rows, "page_hosts"), after, limit, decode=decode, place=lambda row: str(row[0]))


def get(host_id: str) -> Transaction[Host | None]:
    row = yield from one("get_host", host_id)
    return decode(row) if row is not None else None


def sealed_owner(host_id: str) -> str:
    """Owner of a host's sealed values: they are deleted with it."""
    return f"host:{host_id}"


def save(host: Host, sealed: SealedRow | None = None) -> Transaction[Host]:
    """Insert or compare-and-swap, and keep its token."""
    saved = replace(host, revision=host.revision + 1)
    doc = _encode(replace(saved, allocated=Resources())).decode()
    if host.revision == 0:
        row = yield from one("insert_host", host.id, saved.revision, host.last_seen_ms, doc)
    else:
        row = yield from one("update_host", host.id, host.revision, saved.revision, host.last_seen_ms, doc)
    if row is None:
        raise RevisionConflict(uid=host.id, revision=host.revision)
    if sealed is not None:
        yield from rows("put_secret", sealed.owner, sealed.name, sealed.sealed)
    return saved


def drop(host_id: str, revision: int | None) -> Transaction[None]:
    """Delete a host without placements, and what belongs to it. Whoever books there waits for our lock, and then finds
    no host."""
    row = yield from one("lock_host", host_id)
    if row is None:
        raise HostNotFound(id=host_id)
    if revision not in (None, row[0]):
        raise RevisionConflict(uid=host_id, revision=revision)
    ((count,),) = yield from rows("count_placements", host_id)
    if count:
        raise HostInUse(id=host_id, machines=count)
    yield from snapshot_rows.strand(host_id)
    yield from rows("drop_secrets", sealed_owner(host_id))
    yield from rows("delete_host", host_id)


def book(uid: str, tenant: str, reservation: Reservation) -> Transaction[None]:
    """Add to a host's sum; `fits` judges the host as it was before. Its row is locked from here to the commit."""
    amount = msgspec.structs.astuple(reservation.resources)
    yield from rows("insert_placement", uid, reservation.host_id, tenant, *amount)
    row = yield from one("book_host", reservation.host_id, *amount)
    if row is None:
        raise HostNotFound(id=reservation.host_id)
    host = decode(row)
    before = (total - part for total, part in zip(msgspec.structs.astuple(host.allocated), amount, strict=True))
    if not reservation.fits(replace(host, allocated=_resources(*before))):
        raise ReservationLost


def unbook(uid: str) -> Transaction[None]:
    """Give a place back, if there is one."""
    row = yield from one("delete_placement", uid)
    if row is not None:
        yield from rows("book_host", row[0], *(-amount for amount in row[1:]))


def placements() -> Transaction[dict[str, tuple[str, Resources]]]:
    """Environment to (host, what is booked there)."""
    found = yield from rows("all_placements")
    return {uid: (host_id, _resources(*amounts)) for uid, host_id, *amounts in found}


def usage_by_tenant() -> Transaction[dict[str, Resources]]:
    return {tenant: _resources(*amounts) for tenant, *amounts in (yield from rows("usage_by_tenant"))}


def decode(row: Row) -> Host:
    """A row as every query has it."""
    _id, doc, revision, last_seen_ms, *amounts = row
    return replace(_host.decode(doc), revision=revision, last_seen_ms=last_seen_ms, allocated=_resources(*amounts))


def _resources(cpus: int, ram_mb: int, storage_gb: int, vm_count: int) -> Resources:
    return Resources(cpus=cpus, ram_mb=ram_mb, storage_gb=storage_gb, vm_count=vm_count)
