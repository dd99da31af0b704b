"""Databases to open stores on, with a time that tests move, and short ways to what tests do with a store."""

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

import asyncpg
from msgspec.structs import replace

from fusevm.control.store.location import MEMORY
from fusevm.control.store.opening import open_store
from fusevm.control.store.protocol import Claim, Reservation, Store
from fusevm.core import lifecycle
from fusevm.core.lifecycle import Identity, Step
from fusevm.core.placement import can_reserve
from fusevm.core.policy import Policy
from fusevm.core.spec import complete, resources_of
from fusevm.model.environment import Environment
from fusevm.model.event import BootSucceeded, DestroyConfirmed, DestroyRequested, Event
from fusevm.model.host import Host, Resources
from fusevm.testing.clock import FakeClock
from fusevm.testing.inline_store import InlineDatabase

POLICY = Policy()
ME, OTHER = Claim("me", 10_000), Claim("other", 10_000)
SMALL = Resources(cpus=1, ram_mb=512, storage_gb=4, vm_count=1)
_numbers = itertools.count(1)


class Place(Protocol):
    """A database. Its time stands still until `advance`."""

    def now_ms(self) -> int:
        """Its time."""
        ...

    async def open(self) -> Store:
        """A store over it. Where replicas are possible, each call opens another one."""
        ...

    async def advance(self, milliseconds: int) -> None:
        """Move its time on."""
        ...


class Local:
    """A database in this process, whose time is ours."""

    def __init__(self, open_: Callable[[Callable[[], int]], object]) -> None:
        self.clock = FakeClock()
        self._open = open_

    def now_ms(self) -> int:
        return self.clock.now_ms()

    async def open(self) -> Store:
        return await self._open(self.clock.now_ms)

    async def advance(self, milliseconds: int) -> None:
        self.clock.advance(milliseconds)


class Remote:
    """PostgreSQL whose SQL function `now_ms` reads a table. The clock of the process is an hour off."""

    def __init__(self, url: str) -> None:
        self.clock = FakeClock()
        self._url = url
        self._connection: asyncpg.Connection | None = None

    def now_ms(self) -> int:
        return self.clock.now_ms()

    async def open(self) -> Store:
        # A busy machine is no reason to give up.
        url = self._url + "?lock_timeout=120s&statement_timeout=120s"
        store = await open_store(url, POLICY, lambda: self.clock.now_ms() + 3_600_000, pool_size=4)
        if self._connection is None:
            self._connection = await asyncpg.connect(self._url)
            await self._connection.execute(
                f"create table test_clock (ms bigint); insert into test_clock values ({self.clock.now_ms()});"
                "create or replace function now_ms() returns bigint language sql stable"
                " return (select ms from test_clock)"
            )
        return store

    async def advance(self, milliseconds: int) -> None:
        self.clock.advance(milliseconds)
        await self._connection.execute("update test_clock set ms = $1", self.clock.now_ms())

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()


def sqlite_place(path: Path | str) -> Place:
    """A file, or `:memory:`."""
    return Local(lambda now_ms: open_store(str(path), POLICY, now_ms))


def inline_place() -> Place:
    """The simulation's database."""
    databases: list[InlineDatabase] = []

    async def open_(now_ms: Callable[[], int]) -> Store:
        if not databases:
            databases.append(InlineDatabase(now_ms))
        return databases[0].view(POLICY)

    return Local(open_)


@contextlib.asynccontextmanager
async def postgres_place(url: str) -> AsyncIterator[Place]:
    """A PostgreSQL database."""
    place = Remote(url)
    try:
        yield place
    finally:
        await place.close()


KINDS = ("sqlite", MEMORY, "inline", "postgres")


# -- short ways ----------------------------------------------------------------------------------------------------


def make_host(id_: str, **changes: object) -> Host:
    capacity = Resources(cpus=100, ram_mb=10_240, storage_gb=1000, vm_count=10)
    host = Host(id=id_, url="http://127.0.0.1:1", capacity=capacity, created_at_ms=1, updated_at_ms=1)
    return replace(host, **changes)


def begin(place: Place, task_id: str = "t1", host_id: str = "h1", *, tenant: str = "", **spec: object) -> Step:
    """The first step of a new environment."""
    number = next(_numbers)
    identity = Identity(uid=f"u{number:06}", task_id=task_id, machine_id=f"m-{number}", tenant=tenant)
    wanted = complete(POLICY, **spec)
    return lifecycle.begin(identity, wanted, host_id, cause="test", now_ms=place.now_ms(), policy=POLICY)


def room(step: Step) -> Reservation:
    spec = step.record.spec
    return Reservation(step.record.host_id, resources_of(spec), lambda host: can_reserve(host, spec, POLICY))


async def create(
    store: Store, place: Place, task_id: str = "t1", claim: Claim | None = ME, *, tenant: str = "", host_id: str = "h1"
) -> Environment:
    step = begin(place, task_id, host_id, tenant=tenant)
    return await store.create(step, room(step), claim)


async def queue(store: Store, place: Place, task_id: str = "t1", *, tenant: str = "") -> Environment:
    """An environment that waits for a place."""
    return await store.create(begin(place, task_id, "", tenant=tenant, queue_seconds=60), None, None)


async def feed(store: Store, env: Environment, event: Event, place: Place, claim: Claim | None = ME) -> Environment:
    step = lifecycle.step(env, event, place.now_ms(), POLICY)
    return await store.commit(env.uid, env.revision, step, claim)


async def boot(store: Store, env: Environment, place: Place) -> Environment:
    return await feed(store, env, BootSucceeded(cause="test", seq=env.action_seq), place)


async def end(store: Store, env: Environment, place: Place) -> Environment:
    env = await feed(store, env, DestroyRequested(cause="test"), place)
    return await feed(store, env, DestroyConfirmed(cause="test", seq=env.action_seq), place)
