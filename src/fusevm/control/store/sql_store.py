"""The store over any database: every method of `protocol.Store` is a transaction given to an engine, which knows how to
carry transactions out. Nothing here knows which database that is."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from fusevm.control.store import host_rows, key_rows, snapshot_rows
from fusevm.control.store import transactions as tx
from fusevm.control.store.protocol import (
    START,
    Claim,
    Committed,
    Due,
    Position,
    Query,
    Reading,
    RequestKey,
    Reservation,
    SealedRow,
    SnapshotQuery,
    StoredFact,
    StoredRequest,
    Tally,
)
from fusevm.control.store.statements import Begin, Row, Statement, Transaction, one, rows
from fusevm.control.store.world import read_world
from fusevm.core.invariants import World
from fusevm.core.lifecycle import Step
from fusevm.core.policy import Policy
from fusevm.model.api_key import ApiKey
from fusevm.model.environment import Environment
from fusevm.model.host import Host, Resources
from fusevm.model.snapshot import Snapshot

T = TypeVar("T")


class Engine(Protocol):
    """Carries transactions out. `begin` makes the generator; an engine may begin again after a conflict."""

    #: See `protocol.Store`. An engine of a database that others write to calls it.
    waker: Callable[[str], None]

    async def write(self, begin: Begin[T], after: Callable[[T], None] | None = None) -> T:
        """One transaction, durable when this returns. `after` is called even if the caller was cancelled meanwhile."""
        ...

    async def apply(self, statement: Statement) -> Sequence[Sequence[Any]]:
        """A transaction of one statement."""
        ...

    async def read(self, begin: Begin[T], *, is_row: bool = False) -> T:
        """Queries, each of the moment it runs. `is_row`: one row by its key, so little that no thread is worth it."""
        ...

    async def read_moment(self, begin: Begin[T]) -> T:
        """Queries that all see one moment."""
        ...

    async def close(self) -> None:
        """Finish what is under way and close. Idempotent."""
        ...


class SqlStore:
    """Implements `protocol.Store`."""

    def __init__(self, engine: Engine, policy: Policy, cluster: str) -> None:
        self.cluster = cluster
        self.listener: Callable[[Committed], None] = lambda _committed: None
        self.doubter: Callable[[frozenset[str]], None] = lambda _uids: None
        self._engine = engine
        self._policy = policy
        #: As they were read last, by their rows.
        self._hosts: dict[Row, Host] = {}

    @property
    def waker(self) -> Callable[[str], None]:
        """See `protocol.Store`."""
        return self._engine.waker

    @waker.setter
    def waker(self, waker: Callable[[str], None]) -> None:
        self._engine.waker = waker

    # -- environments ---------------------------------------------------------------------------------------------

    async def create(
        self,
        step: Step,
        reservation: Reservation | None,
        claim: Claim | None,
        key: RequestKey | None = None,
        sealed: SealedRow | None = None,
    ) -> Environment:
        def begin() -> Transaction[Committed]:
            return tx.create(step, reservation, claim, key, sealed, policy=self._policy)

        return (await self._engine.write(begin, after=self._tell)).record

    async def commit(
        self,
        uid: str,
        revision: int,
        step: Step,
        claim: Claim | None,
        *,
        reservation: Reservation | None = None,
        sealed: SealedRow | None = None,
    ) -> Environment:
        def begin() -> Transaction[Committed]:
            return tx.commit(uid, revision, step, claim, reservation, sealed, policy=self._policy)

        return (await self._engine.write(begin, after=self._tell)).record

    def _tell(self, committed: Committed) -> None:
        self.listener(committed)

    async def queued(self, limit: int) -> list[Environment]:
        return list((await self._list(lambda: tx.queued(limit))).records)

    async def queued_after(self, uid: str, limit: int) -> list[Environment]:
        return list((await self._list(lambda: tx.queued_after(uid, limit))).records)

    async def usage_by_tenant(self) -> dict[str, Resources]:
        return await self._engine.read(host_rows.usage_by_tenant)

    async def get(self, uid: str) -> Environment | None:
        return await self._engine.read(lambda: tx.get(uid), is_row=True)

    async def live(self, task_id: str) -> Environment | None:
        return await self._engine.read(lambda: tx.get_live(task_id), is_row=True)

    async def last_ended(self, task_id: str) -> Environment | None:
        return await self._engine.read(lambda: tx.get_last_ended(task_id))

    async def list_page(self, query: Query) -> list[Environment]:
        return list((await self._list(lambda: tx.list_page(query))).records)

    async def _list(self, begin: Begin[Reading[T]]) -> Reading[T]:
        reading = await self._engine.read(begin)
        if reading.unreadable:
            self.doubter(reading.unreadable)
        return reading

    async def count_live(self) -> dict[str, int]:
        return await self._engine.read(tx.count_live)

    # -- leases ---------------------------------------------------------------------------------------------------

    async def now_ms(self) -> int:
        return await self._engine.read(tx.now_ms, is_row=True)

    async def due(self, limit: int) -> Due:
        return await self._engine.read(lambda: tx.due(limit))

    async def acquire(self, uid: str, seq: int, claim: Claim) -> Environment | None:
        return await self._engine.write(lambda: tx.acquire(uid, seq, claim))

    async def renew(self, held: Sequence[tuple[str, int]], claim: Claim) -> set[tuple[str, int]]:
        return await self._engine.write(lambda: tx.renew(held, claim))

    async def release(self, owner: str) -> None:
        await self._engine.write(lambda: tx.release(owner))

    # -- facts ----------------------------------------------------------------------------------------------------

    async def facts_of(self, uid: str, after_seq: int, limit: int) -> list[StoredFact]:
        return list((await self._list(lambda: tx.facts_of(uid, after_seq, limit))).records)

    async def facts_after(self, position: Position, limit: int, tenant: str | None = None) -> list[StoredFact]:
        return list((await self._list(lambda: tx.facts_after(position, limit, tenant))).records)

    async def position_of(self, uid: str, seq: int) -> Position | None:
        row = await self._engine.read(lambda: one("event_position", uid, seq))
        return (row[0], row[1]) if row is not None else None

    async def last_position(self) -> Position:
        row = await self._engine.read(lambda: one("last_position"))
        return (row[0], row[1]) if row is not None else START

    # -- hosts ----------------------------------------------------------------------------------------------------

    async def hosts(self) -> list[Host]:
        known = self._hosts
        self._hosts = dict((await self._list(lambda: host_rows.list_all(known))).records)
        return list(self._hosts.values())

    async def has_hosts(self) -> bool:
        return bool(await self._engine.read(lambda: rows("list_hosts")))

    async def host_page(self, after: str, limit: int) -> list[Host]:
        return list((await self._list(lambda: host_rows.page(after, limit))).records)

    async def host(self, id: str) -> Host | None:  # noqa: A002 - the record's field
        return await self._engine.read(lambda: host_rows.get(id), is_row=True)

    async def save_host(self, host: Host, sealed: SealedRow | None = None) -> Host:
        return await self._engine.write(lambda: host_rows.save(host, sealed))

    async def touch_host(self, id: str, last_seen_ms: int) -> None:  # noqa: A002
        await self._engine.apply(Statement("touch_host", (id, last_seen_ms)))

    async def on_host(self, host_id: str) -> Reading[Environment]:
        return await self._list(lambda: tx.on_host(host_id))

    async def drop_host(self, id: str, revision: int | None = None) -> None:  # noqa: A002
        await self._engine.write(lambda: host_rows.drop(id, revision))

    async def acquire_host(self, id: str, claim: Claim) -> bool:  # noqa: A002
        return bool(await self._engine.apply(Statement("acquire_host", (id, claim.owner, claim.lease_ms))))

    # -- snapshots ------------------------------------------------------------------------------------------------

    async def snapshot(self, id: str) -> Snapshot | None:  # noqa: A002
        return await self._engine.read(lambda: snapshot_rows.get(id), is_row=True)

    async def snapshots(self, query: SnapshotQuery) -> list[Snapshot]:
        return list((await self._list(lambda: snapshot_rows.list_page(query))).records)

    async def save_snapshot(self, snapshot: Snapshot) -> Snapshot:
        return await self._engine.write(lambda: snapshot_rows.save(snapshot))

    async def acquire_snapshot(self, id: str, claim: Claim) -> Snapshot | None:  # noqa: A002
        return await self._engine.write(lambda: snapshot_rows.acquire(id, claim))

    async def drop_snapshot(self, id: str) -> None:  # noqa: A002
        await self._engine.apply(Statement("delete_snapshot", (id,)))

    # -- keys -----------------------------------------------------------------------------------------------------

    async def add_key(self, key: ApiKey) -> None:
        await self._engine.write(lambda: key_rows.add(key))

    async def find_key(self, prefix: str) -> ApiKey | None:
        return await self._engine.read(lambda: key_rows.find(prefix), is_row=True)

    async def keys(self) -> list[ApiKey]:
        return await self._engine.read(key_rows.list_all)

    async def revoke_key(self, id: str, now_ms: int) -> bool:  # noqa: A002
        return bool(await self._engine.apply(Statement("revoke_key", (id, now_ms))))

    async def touch_key(self, id: str, now_ms: int) -> None:  # noqa: A002
        await self._engine.apply(Statement("touch_key", (id, now_ms)))

    # -- requests, secrets ----------------------------------------------------------------------------------------

    async def claim_request(
        self, key: RequestKey, keep_ms: int, dead_after_ms: int | None = None
    ) -> StoredRequest | None:
        return await self._engine.write(lambda: tx.claim_request(key, keep_ms, dead_after_ms))

    async def finish_request(
        self, key: RequestKey, status: int, body: str, *, is_sealed: bool = False, uid: str = ""
    ) -> None:
        where = (key.tenant, key.route, key.key, key.claimant, uid)
        await self._engine.apply(Statement("finish_request", (*where, status, body, int(is_sealed))))

    async def forget_request(self, key: RequestKey) -> str:
        return await self._engine.write(lambda: tx.forget_request(key))

    async def put_secret(self, owner: str, name: str, sealed: str) -> None:
        await self._engine.apply(Statement("put_secret", (owner, name, sealed)))

    async def get_secret(self, owner: str, name: str) -> str | None:
        row = await self._engine.read(lambda: one("get_secret", owner, name), is_row=True)
        return str(row[0]) if row is not None else None

    async def reseal_secret(self, owner: str, name: str, old: str, new: str) -> None:
        await self._engine.apply(Statement("reseal_secret", (owner, name, old, new)))

    async def secrets_sealed_otherwise(self, mark: str, after: tuple[str, str], limit: int) -> list[SealedRow]:
        return await self._engine.read(lambda: tx.secrets_sealed_otherwise(mark, after, limit))

    # -- upkeep ---------------------------------------------------------------------------------------------------

    async def ping(self) -> None:
        await self._engine.read(lambda: one("", tail="select 1"))

    async def tally(self) -> Tally:
        return await self._engine.read(tx.tally)

    async def world(self) -> World:
        return await self._engine.read_moment(read_world)

    async def purge(self, keep_ms: int, limit: int) -> int:
        return await self._engine.write(lambda: tx.purge(keep_ms, limit))

    async def prune_events(self, keep_ms: int, limit: int) -> int:
        return await self._engine.write(lambda: tx.prune_events(keep_ms, limit))

    async def close(self) -> None:
        """Finish what is queued and close. Idempotent."""
        await self._engine.close()
