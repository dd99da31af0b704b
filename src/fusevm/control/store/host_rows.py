"""Transactions about hosts and what is booked on them."""

import msgspec
from msgspec.structs import replace

from fusevm.control.store.protocol import Claim, Reservation, ReservationLost
from fusevm.control.store.statements import Row, Transaction, one, rows
from fusevm.model.errors import HostInUse, HostNotFound, RevisionConflict
from fusevm.model.host import Host, Resources

_host = msgspec.json.Decoder(Host)
_encode = msgspec.json.Encoder().encode


def list_all() -> Transaction[list[Host]]:
    return [_decode(row) for row in (yield from rows("list_hosts"))]


def get(host_id: str) -> Transaction[Host | None]:
    row = yield from one("get_host", host_id)
    return _decode(row) if row is not None else None


def save(host: Host) -> Transaction[Host]:
    """Insert or compare-and-swap."""
    saved = replace(host, revision=host.revision + 1)
    doc = _encode(replace(saved, allocated=Resources())).decode()
    if host.revision == 0:
        row = yield from one("insert_host", host.id, saved.revision, host.last_seen_ms, doc)
    else:
        row = yield from one("update_host", host.id, host.revision, saved.revision, host.last_seen_ms, doc)
    if row is None:
        raise RevisionConflict(uid=host.id, revision=host.revision)
    return saved


def drop(host_id: str) -> Transaction[None]:
    """Delete a host without placements. Whoever books there waits for our lock, and then finds no host."""
    if (yield from one("lock_host", host_id)) is None:
        raise HostNotFound(id=host_id)
    ((count,),) = yield from rows("count_placements", host_id)
    if count:
        raise HostInUse(id=host_id, machines=count)
    yield from rows("delete_host", host_id)


def acquire(host_id: str, claim: Claim) -> Transaction[bool]:
    return (yield from one("acquire_host", host_id, claim.owner, claim.lease_ms)) is not None


def book(uid: str, tenant: str, reservation: Reservation) -> Transaction[None]:
    """Add to a host's sum; `fits` judges the host as it was before. Its row is locked from here to the commit."""
    amount = msgspec.structs.astuple(reservation.resources)
    yield from rows("insert_placement", uid, reservation.host_id, tenant, *amount)
    row = yield from one("book_host", reservation.host_id, *amount)
    if row is None:
        raise HostNotFound(id=reservation.host_id)
    host = _decode(row)
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


def _decode(row: Row) -> Host:
    doc, revision, last_seen_ms, *amounts = row
    return replace(_host.decode(doc), revision=revision, last_seen_ms=last_seen_ms, allocated=_resources(*amounts))


def _resources(cpus: int, ram_mb: int, storage_gb: int, vm_count: int) -> Resources:
    return Resources(cpus=cpus, ram_mb=ram_mb, storage_gb=storage_gb, vm_count=vm_count)
