"""The one database of a simulated cluster: the real transactions in memory, with stalls, outages and failing commits;
and a ledger of leases that is kept apart from it, so that a lease that is given out twice is seen."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from random import Random
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from fusevm.control.store import transactions as tx
from fusevm.control.store.protocol import Claim, Committed, RequestKey, Reservation, SealedRow
from fusevm.control.store.sql_store import SqlStore
from fusevm.control.store.statements import Begin, Statement
from fusevm.core.lifecycle import Step
from fusevm.model.environment import Environment
from fusevm.model.errors import StoreUnreachable
from fusevm.testing.inline_store import InlineDatabase, InlineEngine
from fusevm.testing.simulation.scale import POLICY

T = TypeVar("T")
#: Part of the statements that take time; the others only let others go first.
_SLOW = 0.4


class CommitWatch(Protocol):
    """Who sees everything that is committed."""

    def committed(self, replica: str, committed: Committed) -> None:
        """A record was saved, in this moment."""
        ...

    def broken(self, subject: str, rule: str) -> None:
        """A rule is broken."""
        ...


class Fate(Enum):
    """What becomes of a commit."""

    DONE = auto()
    #: Carried out, and nobody hears of it.
    SILENT = auto()
    #: Not carried out. Whoever asked cannot tell it from `SILENT`.
    UNDONE = auto()


class SimDatabase:
    """The database, its clock and its moods."""

    def __init__(self, now_ms: Callable[[], int], chance: Random, watch: CommitWatch, *, has_leases: bool) -> None:
        self.inline = InlineDatabase(now_ms, POLICY)
        self.now_ms = now_ms
        self.chance = chance
        self.watch = watch
        self.has_leases = has_leases
        self.ledger = Ledger(now_ms, watch)
        #: Loop time until which nobody is answered.
        self.stalled_until_s = 0.0
        #: Loop time until which nobody gets a connection.
        self.away_until_s = 0.0
        #: The fates of the next commits; and of the next ones of a method of the store, by its name.
        self.fates: list[Fate] = []
        self.fates_of: dict[str, list[Fate]] = {}

    def view(self, replica: str) -> "SimStore":
        """The store of one process of a replica."""
        engine = SimEngine(self, replica)
        self.inline.attach(engine)
        return SimStore(engine, self)

    async def wait(self) -> None:
        """The way to the database, and its stalls."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.chance.uniform(0.0002, 0.002) if self.chance.random() < _SLOW else 0)
        while (stall_s := self.stalled_until_s - loop.time()) > 0:  # noqa: ASYNC110 - it may be prolonged meanwhile
            await asyncio.sleep(stall_s)
        if self.away_until_s > loop.time():
            raise StoreUnreachable(problem="no connection")

    def next_fate(self, method: str) -> Fate:
        """Of the commit that is about to be."""
        fates = self.fates_of.get(method) or self.fates
        return fates.pop(0) if fates else Fate.DONE


class SimEngine(InlineEngine):
    """Every statement takes a moment, and may fail."""

    def __init__(self, database: SimDatabase, replica: str) -> None:
        super().__init__(database.inline)
        self._sim = database
        self._replica = replica

    async def write(self, begin: Begin[T], after: Callable[[T], None] | None = None) -> T:
        await self._sim.wait()
        with self._failing(begin.__qualname__.split(".")[1]) as fate:  # `SqlStore.create.<locals>...`

            def heard(result: T) -> None:
                if isinstance(result, Committed):
                    self._sim.ledger.committed(result)
                    self._sim.watch.committed(self._replica, result)
                # What is no record concerns the ledger alone, which knows what the database does.
                if after is not None and (fate is Fate.DONE or not isinstance(result, Committed)):
                    after(result)

            result = await super().write(begin, heard)
        await asyncio.sleep(0)
        return result

    async def apply(self, statement: Statement) -> Sequence[Sequence[Any]]:
        await self._sim.wait()
        with self._failing(statement.name):
            return await super().apply(statement)

    @contextlib.contextmanager
    def _failing(self, method: str) -> Iterator[Fate]:
        """A commit, with the fate it has. Raises StoreUnreachable."""
        fate = self._sim.next_fate(method)
        if fate is Fate.UNDONE:
            raise StoreUnreachable(problem="the connection was lost before the commit")
        yield fate
        if fate is Fate.SILENT:
            raise StoreUnreachable(problem="the connection was lost while committing")

    async def read(self, begin: Begin[T], *, is_row: bool = False) -> T:
        await self._sim.wait()
        return await super().read(begin, is_row=is_row)

    def die(self) -> None:
        """The process is gone: nothing reaches the database any more."""
        self._is_closed = True
        self._sim.inline.forget(self)


class SimStore(SqlStore):
    """A store that notes leases as they are given out. Without the safeguard `leases`, they exclude nobody."""

    def __init__(self, engine: SimEngine, database: SimDatabase) -> None:
        super().__init__(engine, POLICY, database.inline.cluster)
        self._sim_engine = engine
        self._ledger = database.ledger
        self._has_leases = database.has_leases

    def die(self) -> None:
        """See `SimEngine.die`."""
        self._sim_engine.die()

    def _as_given(self, claim: Claim) -> Claim:
        return claim if self._has_leases else replace(claim, lease_ms=0)

    async def create(
        self,
        step: Step,
        reservation: Reservation | None,
        claim: Claim | None,
        key: RequestKey | None = None,
        sealed: SealedRow | None = None,
    ) -> Environment:
        self._ledger.meet(claim)
        return await super().create(step, reservation, self._as_given(claim) if claim else None, key, sealed)

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
        self._ledger.meet(claim)
        given = self._as_given(claim) if claim else None
        return await super().commit(uid, revision, step, given, reservation=reservation, sealed=sealed)

    async def acquire(self, uid: str, seq: int, claim: Claim) -> Environment | None:
        def taken(record: Environment | None) -> None:
            if record is not None:
                self._ledger.take(uid, seq, claim)

        given = self._as_given(claim)
        return await self._sim_engine.write(lambda: tx.acquire(uid, seq, given), taken)

    async def renew(self, held: Sequence[tuple[str, int]], claim: Claim) -> set[tuple[str, int]]:
        def kept(found: set[tuple[str, int]]) -> None:
            for uid, seq in sorted(found):
                self._ledger.take(uid, seq, claim)

        given = self._as_given(claim)
        return await self._sim_engine.write(lambda: tx.renew(held, given), kept)

    async def release(self, owner: str) -> None:
        def released(_nothing: None) -> None:
            self._ledger.release(owner)

        await self._sim_engine.write(lambda: tx.release(owner), released)


class Ledger:
    """Who holds which action until when, by database time, as those who hold it believe."""

    def __init__(self, now_ms: Callable[[], int], watch: CommitWatch) -> None:
        self._now_ms = now_ms
        self._watch = watch
        #: uid to (seq, owner, until).
        self._held: dict[str, tuple[int, str, int]] = {}
        self._claims: dict[str, Claim] = {}

    def meet(self, claim: Claim | None) -> None:
        """A claim that a commit may give a lease to."""
        if claim is not None:
            self._claims[claim.owner] = claim

    def committed(self, committed: Committed) -> None:
        """A commit gives out a lease, keeps one, or ends one."""
        record, held = committed.record, self._held.get(committed.record.uid)
        if record.pending is None or (held is not None and held[0] != record.pending.seq):
            self._held.pop(record.uid, None)
        if record.pending is not None and committed.leased_to is not None:
            self.take(record.uid, record.pending.seq, self._claims[committed.leased_to])

    def take(self, uid: str, seq: int, claim: Claim) -> None:
        """A lease was given out or prolonged."""
        now_ms, held = self._now_ms(), self._held.get(uid)
        if held is not None and held[0] == seq and held[1] != claim.owner and held[2] > now_ms:
            self._watch.broken(uid, f"action {seq} is leased to two workers at once")
        self._held[uid] = (seq, claim.owner, now_ms + claim.lease_ms)

    def release(self, owner: str) -> None:
        """All leases of an owner were given back."""
        self._held = {uid: lease for uid, lease in self._held.items() if lease[1] != owner}
