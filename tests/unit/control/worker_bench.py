"""Workers of several replicas on one store and hosts that are fakes, with a clock of their own."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

from control_harness import world

from fusevm.control.clock import DatabaseClock
from fusevm.control.collector import Collector
from fusevm.control.entry import Asked, Entry
from fusevm.control.metrics import Metrics
from fusevm.control.performer import Performer
from fusevm.control.secrets import Sealer
from fusevm.control.signals import Signals
from fusevm.control.store.protocol import Claim, Committed
from fusevm.control.store.sql_store import SqlStore
from fusevm.control.store.sqlite import open_sqlite
from fusevm.control.vault import Vault
from fusevm.control.worker import Worker
from fusevm.core.invariants import violations
from fusevm.core.policy import Policy
from fusevm.core.spec import complete
from fusevm.model.environment import Environment, State
from fusevm.model.errors import (
    HostNotFound,
)
from fusevm.model.host import Host, Resources
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import FakeHost

POLICY = Policy(backoff_first_ms=100)
CAPACITY = Resources(cpus=100, ram_mb=1 << 20, storage_gb=1000, vm_count=100)


class Replica:
    """Entry and worker of one process."""

    def __init__(
        self, name: str, store: SqlStore, hosts: dict[str, FakeHost], clock: DatabaseClock, lease_ms: int
    ) -> None:
        async def host_of(host_id: str) -> FakeHost:
            if host_id not in hosts:
                raise HostNotFound(id=host_id)
            return hosts[host_id]

        self.metrics = Metrics()
        claim = Claim(name, lease_ms)
        self.entry = Entry(store, Signals(), POLICY, clock, claim)
        vault = Vault(store, Sealer(secrets.token_bytes(32)))
        performer = Performer(host_of, vault, self.entry, cluster=store.cluster, database_ms=store.now_ms)
        collector = Collector(store, host_of, cluster=store.cluster, claim=claim, metrics=self.metrics)
        self.worker = Worker(
            store,
            self.entry,
            performer,
            collector,
            claim=claim,
            clock=clock,
            metrics=self.metrics,
            poll_s=0.01,
        )

    async def create(self, task_id: str = "t1") -> Environment:
        return await self.entry.begin(self.entry.new_identity(task_id), Asked(spec=complete(POLICY)), cause="test")


class Bench:
    """A store, a host, and as many replicas as wanted."""

    def __init__(self, store: SqlStore, clock: FakeClock) -> None:
        self.store = store
        self.clock = clock
        self.host = FakeHost("h1")
        self.hosts = {"h1": self.host}
        self.replicas: list[Replica] = []
        store.listener = self._spread

    def _spread(self, committed: Committed) -> None:
        for replica in self.replicas:
            replica.worker.notice(committed.record, committed.leased_to)

    def replica(self, name: str, lease_ms: int = 600, clock: DatabaseClock | None = None) -> Replica:
        found = Replica(name, self.store, self.hosts, clock or DatabaseClock(self.clock), lease_ms)
        self.replicas.append(found)
        return found

    async def is_in(self, uid: str, *states: State) -> bool:
        found = await self.store.get(uid)
        return found is not None and found.state in states


@contextlib.asynccontextmanager
async def bench(path: str = ":memory:") -> AsyncIterator[Bench]:
    clock = FakeClock()
    store = await open_sqlite(path, POLICY, clock.now_ms)
    try:
        now_ms = clock.now_ms()
        host = Host(id="h1", url="x", capacity=CAPACITY, created_at_ms=now_ms, updated_at_ms=now_ms)
        if await store.host("h1") is None:
            await store.save_host(host)
        yield Bench(store, clock)
        assert violations(await world(store), POLICY) == []
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def at_work(*replicas: Replica) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        for replica in replicas:
            group.create_task(replica.worker.run())
        await asyncio.sleep(0)
        try:
            yield
        finally:
            for replica in replicas:
                replica.worker.stop()
