"""What is particular to PostgreSQL: several replicas, transactions side by side, connections that are lost."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest
import pytest_asyncio
from store_harness import (
    ME,
    OTHER,
    POLICY,
    Place,
    begin,
    boot,
    create,
    end,
    feed,
    make_host,
    postgres_place,
    room,
)

from fusevm.control.store import migrate
from fusevm.control.store.opening import open_store
from fusevm.control.store.postgres import ATTEMPTS
from fusevm.control.store.protocol import EVERYTHING, GLOBAL_ORDER, START, Store
from fusevm.control.store.sql import Migration, load_migrations
from fusevm.control.store.statements import Begin, Statement, Transaction
from fusevm.core.lifecycle import Step
from fusevm.model.environment import Environment
from fusevm.model.errors import (
    BadSetting,
    Error,
    RevisionConflict,
    ShuttingDown,
    StoreFull,
    StoreUnreachable,
    TaskExists,
)
from fusevm.model.event import BootSucceeded, DestroyRequested
from fusevm.testing.postgres import PostgresServer

PATIENCE_S = 60.0
SCHEMAS = load_migrations(migrate.Dialect.POSTGRES)


@pytest_asyncio.fixture
async def place(postgres_url: str) -> AsyncIterator[Place]:
    async with postgres_place(postgres_url) as found:
        yield found


@pytest_asyncio.fixture
async def store(place: Place) -> AsyncIterator[Store]:
    opened = await place.open()
    await opened.save_host(make_host("h1"))
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def other(store: Store, place: Place) -> AsyncIterator[Store]:
    """A second replica."""
    opened = await place.open()
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def raw(postgres_url: str, store: Store) -> AsyncIterator[asyncpg.Connection]:
    """A connection of somebody else's."""
    connection = await asyncpg.connect(postgres_url)
    yield connection
    connection.terminate()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def _soon(work: Callable[[], object]) -> object:
    """The answer of the first attempt that finds the database."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await work()
            except StoreUnreachable:
                await asyncio.sleep(0.02)


# -- replicas ------------------------------------------------------------------------------------------------------


async def test_replicas_share_everything(store: Store, other: Store, place: Place) -> None:
    assert store.cluster == other.cluster
    env = await create(store, place)
    assert await other.get(env.uid) == env
    with pytest.raises(TaskExists):
        await create(other, place)
    running = await boot(other, env, place)
    with pytest.raises(RevisionConflict):
        await feed(store, env, DestroyRequested(cause="test"), place)
    assert await store.live("t1") == running


async def test_of_many_writers_on_two_replicas_one_wins(store: Store, other: Store, place: Place) -> None:
    env = await create(store, place)
    results = await asyncio.gather(
        *(feed(replica, env, BootSucceeded(cause="c", seq=1), place) for replica in (store, other) * 6),
        return_exceptions=True,
    )
    assert sum(isinstance(result, Environment) for result in results) == 1
    assert sum(isinstance(result, RevisionConflict) for result in results) == 11
    assert len(await store.facts_of(env.uid, 0, 10)) == 2


async def test_replicas_never_book_a_host_beyond_its_limits(store: Store, other: Store, place: Place) -> None:
    results = await asyncio.gather(
        *(create((store, other)[n % 2], place, f"t{n}") for n in range(30)), return_exceptions=True
    )
    assert sum(isinstance(result, Environment) for result in results) == 10
    host = await other.host("h1")
    assert host is not None
    assert host.allocated.vm_count == 10


async def test_a_replica_takes_over_when_the_lease_of_another_runs_out(
    store: Store, other: Store, place: Place
) -> None:
    """By the server's time: both processes' clocks are an hour ahead of it, and nothing is due for that."""
    env = await create(store, place, claim=ME)
    assert (await other.due(10)).actions == ()
    assert await other.acquire(env.uid, 1, OTHER) is None
    await place.advance(10_000)
    assert (await other.due(10)).actions == ((env.uid, 1),)
    assert await other.acquire(env.uid, 1, OTHER) == env
    assert await store.renew([(env.uid, 1)], ME) == set()


async def test_opening_ends_no_lease_of_another_replica(store: Store, place: Place) -> None:
    env = await create(store, place, claim=ME)
    assert await store.acquire_host("h1", ME)
    late = await place.open()
    assert (await late.due(10)).actions == ()
    assert not await late.acquire_host("h1", OTHER)
    await late.close()
    assert await store.renew([(env.uid, 1)], ME) == {(env.uid, 1)}


async def test_a_replica_hears_what_another_commits_and_not_what_it_did_itself(
    store: Store, other: Store, place: Place
) -> None:
    mine: list[str] = []
    theirs: list[str] = []
    store.waker, other.waker = mine.append, theirs.append
    env = await create(store, place)
    await _until(lambda: env.uid in theirs and GLOBAL_ORDER in theirs and GLOBAL_ORDER in mine)
    await boot(other, env, place)
    await _until(lambda: env.uid in mine)
    second = await create(store, place, "t2")
    await _until(lambda: second.uid in theirs)
    assert second.uid not in mine
    assert theirs.count(env.uid) == 1


async def test_creates_at_once_wake_for_each(store: Store, other: Store, place: Place) -> None:
    heard: set[str] = set()
    other.waker = heard.add
    envs = await asyncio.gather(*(create(store, place, f"t{n}") for n in range(10)))
    await _until(lambda: {env.uid for env in envs} <= heard)


# -- the global order ----------------------------------------------------------------------------------------------


async def _insert_event(raw: asyncpg.Connection, uid: str) -> None:
    doc = f'{{"uid":"{uid}","seq":1,"kind":"state","state":"running","at_ms":1,"cause":"c"}}'
    await raw.execute(
        "insert into events (uid, seq, task_id, tenant, at_ms, doc) values ($1, 1, 'held', '', 1, $2)", uid, doc
    )


async def test_a_transaction_that_began_earlier_and_commits_later_is_neither_skipped_nor_overtaken(
    store: Store, place: Place, raw: asyncpg.Connection
) -> None:
    woken: list[str] = []
    await create(store, place, "before")
    begun = await store.facts_after(START, 10)
    assert [stored.task_id for stored in begun] == ["before"]
    held = raw.transaction()
    await held.start()
    await raw.execute("select pg_current_xact_id()")
    late = await create(store, place, "late")
    # It is there for readers of the environment, but not for readers of everything.
    assert len(await store.facts_of(late.uid, 0, 10)) == 1
    assert await store.facts_after(begun[-1].position, 10) == []
    assert await store.last_position() == begun[-1].position
    await _insert_event(raw, "held")
    assert await store.facts_after(begun[-1].position, 10) == []
    store.waker = woken.append
    await held.commit()
    shown = await store.facts_after(begun[-1].position, 10)
    assert [stored.task_id for stored in shown] == ["held", "late"]
    assert await store.last_position() == shown[-1].position
    assert await store.facts_after(begun[-1].position, 10, "") == shown
    await _until(lambda: GLOBAL_ORDER in woken)


async def test_a_transaction_that_is_undone_holds_nothing_back(
    store: Store, place: Place, raw: asyncpg.Connection
) -> None:
    held = raw.transaction()
    await held.start()
    await _insert_event(raw, "held")
    await create(store, place, "late")
    assert await store.facts_after(START, 10) == []
    woken: list[str] = []
    store.waker = woken.append
    await held.rollback()
    await _until(lambda: GLOBAL_ORDER in woken)
    assert [stored.task_id for stored in await store.facts_after(START, 10)] == ["late"]


async def test_a_reader_of_everything_sees_each_fact_once_and_in_one_order(
    store: Store, other: Store, place: Place
) -> None:
    """While two replicas write at once."""

    async def live(replica: Store, task_id: str) -> None:
        env = await create(replica, place, task_id)
        await end(replica, await boot(replica, env, place), place)

    seen: list[tuple[str, int]] = []
    position = START

    async def look() -> None:
        nonlocal position
        for stored in await store.facts_after(position, 7):
            assert stored.position > position
            position = stored.position
            seen.append((stored.fact.uid, stored.fact.seq))

    writing = asyncio.gather(*(live((store, other)[n % 2], f"t{n}") for n in range(8)))
    while not writing.done():
        await look()
    await writing
    async with asyncio.timeout(PATIENCE_S):
        while len(seen) < 8 * 4:
            await look()
    assert len(seen) == len(set(seen)) == 32
    for uid in {uid for uid, _ in seen}:
        assert [seq for found, seq in seen if found == uid] == [1, 2, 3, 4]


async def test_events_of_a_restored_database_stay_visible_and_first(
    store: Store, place: Place, raw: asyncpg.Connection
) -> None:
    """Their transactions have numbers of another server, which ours may not have reached."""
    env = await create(store, place, "old")
    await boot(store, env, place)
    await raw.execute("update events set tx = tx + 1000000000")
    assert await store.facts_after(START, 10) == []
    again = await place.open()
    await create(again, place, "new")
    facts = await again.facts_after(START, 10)
    assert [(stored.task_id, stored.fact.seq) for stored in facts] == [("old", 1), ("old", 2), ("new", 1)]
    await again.close()


# -- the schema ----------------------------------------------------------------------------------------------------


async def test_two_replicas_that_start_at_once_migrate_once(postgres_url: str) -> None:
    stores = await asyncio.gather(*(open_store(postgres_url, POLICY, lambda: 1) for _ in range(4)))
    assert len({store.cluster for store in stores}) == 1
    raw = await asyncpg.connect(postgres_url)
    assert await raw.fetchval("select count(*) from schema_version") == len(SCHEMAS)
    await raw.close()
    for store in stores:
        await store.close()


async def test_a_newer_schema_is_refused_and_left_alone(
    store: Store, raw: asyncpg.Connection, postgres_url: str
) -> None:
    await raw.execute("insert into schema_version values (99, '0099_later.sql', 'x', 1)")
    with pytest.raises(BadSetting, match="newer"):
        await open_store(postgres_url, POLICY, lambda: 1)
    assert await raw.fetchval("select count(*) from schema_version") == len(SCHEMAS) + 1


async def test_a_schema_of_another_build_is_refused(store: Store, raw: asyncpg.Connection, postgres_url: str) -> None:
    await raw.execute("update schema_version set checksum = 'x'")
    with pytest.raises(BadSetting, match="another build"):
        await open_store(postgres_url, POLICY, lambda: 1)


async def test_a_migration_is_all_or_nothing(
    store: Store, raw: asyncpg.Connection, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Migration(len(SCHEMAS) + 1, "broken.sql", ("create table good (a text)", "create tabel bad (a text)"), "x")
    monkeypatch.setattr(migrate, "load_migrations", lambda dialect: [*SCHEMAS, broken])
    with pytest.raises(BadSetting, match="tabel"):
        await open_store(postgres_url, POLICY, lambda: 1)
    assert await raw.fetchval("select to_regclass('good')") is None
    assert await raw.fetchval("select max(version) from schema_version") == len(SCHEMAS)


# -- failures ------------------------------------------------------------------------------------------------------


def _failing(times: int, code: str) -> tuple[list[int], Begin[str]]:
    """A transaction that fails with an SQL state so many times; and the attempts made."""
    attempts: list[int] = []

    def work() -> Transaction[str]:
        attempts.append(1)
        yield Statement("put_secret", ("a", "b", str(len(attempts))))
        if len(attempts) <= times:
            yield Statement("", (), f"do $$ begin raise exception using errcode = '{code}'; end $$")
        return "done"

    return attempts, work


@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_a_transaction_that_was_in_the_way_is_begun_again(store: Store, code: str) -> None:
    attempts, work = _failing(3, code)
    assert await store._engine.write(work) == "done"
    assert len(attempts) == 4
    assert await store.get_secret("a", "b") == "4"


async def test_it_is_given_up_some_time(store: Store) -> None:
    attempts, work = _failing(1000, "40001")
    with pytest.raises(StoreUnreachable):
        await store._engine.write(work)
    assert len(attempts) == ATTEMPTS
    assert await store.get_secret("a", "b") is None


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("53100", StoreFull),
        ("58030", StoreFull),
        ("57014", StoreUnreachable),
        ("55P03", StoreUnreachable),
        ("25006", StoreUnreachable),
        ("53300", StoreUnreachable),
    ],
)
async def test_what_the_server_cannot_do_is_a_clean_error(store: Store, code: str, expected: type[Error]) -> None:
    attempts, work = _failing(1000, code)
    with pytest.raises(expected):
        await store._engine.write(work)
    assert len(attempts) == 1
    assert expected.status == 503
    assert await store.get_secret("a", "b") is None
    await store.put_secret("a", "b", "after")


async def test_it_goes_on_when_a_newer_replica_changes_the_schema(
    store: Store, place: Place, raw: asyncpg.Connection
) -> None:
    """What was prepared before does not fit any more."""
    env = await create(store, place)
    env = await store.commit(env.uid, env.revision, Step(env), None)
    await raw.execute("alter table environments alter column doc type varchar")
    assert (await store.commit(env.uid, env.revision, Step(env), None)).revision == 3
    assert (await store.get(env.uid)) is not None


async def test_a_bug_stays_a_bug(store: Store) -> None:
    with pytest.raises(asyncpg.UndefinedTableError):
        await store._engine.apply(Statement("", (), "select 1 from nothing"))
    await store.ping()


async def test_a_row_that_stays_locked_is_a_clean_error(store: Store, place: Place, raw: asyncpg.Connection) -> None:
    env = await create(store, place)
    held = raw.transaction()
    await held.start()
    await raw.execute("select 1 from environments for update")

    def work() -> Transaction[None]:
        yield Statement("", (), "set local lock_timeout = '1ms'")
        yield Statement("get_for_commit", (env.uid, env.revision))

    with pytest.raises(StoreUnreachable, match="lock"):
        await store._engine.write(work)
    await held.rollback()
    await boot(store, env, place)


async def test_a_connection_that_is_ended_within_a_transaction_costs_nothing(
    store: Store, place: Place, raw: asyncpg.Connection
) -> None:
    """It had not come to the commit: it is begun again."""
    env = await create(store, place)
    held = raw.transaction()
    await held.start()
    await raw.execute("select 1 from environments for update")
    booting = asyncio.ensure_future(boot(store, env, place))
    ended = 0
    async with asyncio.timeout(PATIENCE_S):
        while not ended:
            ended = await raw.fetchval(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity"
                " where datname = current_database() and wait_event_type = 'Lock'"
            )
    await held.rollback()
    assert (await booting).revision == 2
    assert len(await store.facts_of(env.uid, 0, 10)) == 2


async def test_a_connection_that_is_lost_during_the_commit_leaves_it_open(
    store: Store, place: Place, raw: asyncpg.Connection
) -> None:
    """It may have been carried out, so it is not begun again. The commit itself ends its connection: nobody waits."""
    await raw.execute(
        "create sequence losses;"
        "create function lose() returns trigger language plpgsql as $$ begin"
        " perform nextval('losses'), pg_terminate_backend(pg_backend_pid()), pg_sleep(600); return null; end $$;"
        "create constraint trigger lose after insert on events deferrable initially deferred"
        " for each row execute function lose()"
    )
    with pytest.raises(StoreUnreachable, match="lost"):
        await create(store, place)
    assert await raw.fetchval("select last_value from losses where is_called") == 1
    await raw.execute("drop trigger lose on events")
    assert await store.live("t1") is None
    await create(store, place)


async def test_it_goes_on_after_all_connections_were_ended(
    store: Store, other: Store, place: Place, raw: asyncpg.Connection
) -> None:
    woken: list[str] = []
    store.waker = woken.append
    await create(store, place, "before")
    await raw.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and application_name = 'fuse'"
    )
    assert await _soon(lambda: store.live("before")) is not None
    await _until(lambda: EVERYTHING in woken)
    env = await _soon(lambda: create(other, place, "after"))
    assert isinstance(env, Environment)
    await _until(lambda: env.uid in woken)


@pytest.mark.shared_stack
@pytest.mark.parametrize("is_crash", [False, True])
async def test_it_goes_on_after_a_restart_of_the_server(
    postgres_server: PostgresServer, store: Store, place: Place, is_crash: bool
) -> None:
    if not postgres_server.is_ours:
        pytest.skip("the server is not ours to restart")
    woken: list[str] = []
    store.waker = woken.append
    made = [await create(store, place, f"t{n}") for n in range(3)]
    postgres_server.stop(is_crash=is_crash)
    for work in (store.ping, lambda: store.get(made[0].uid), lambda: create(store, place, "away")):
        with pytest.raises(StoreUnreachable):
            await work()
    postgres_server.start()
    assert await _soon(lambda: store.get(made[0].uid)) == made[0]
    await _until(lambda: EVERYTHING in woken)
    assert {env.uid for env in (await store.on_host("h1")).records} == {env.uid for env in made}
    assert await _soon(lambda: create(store, place, "after")) is not None


async def test_a_closed_store_has_finished_what_was_under_way(place: Place) -> None:
    store = await place.open()
    await store.save_host(make_host("h1"))
    step = begin(place)
    creating = asyncio.ensure_future(store.create(step, room(step), ME))
    await asyncio.sleep(0)
    await store.close()
    await store.close()
    assert (await creating).revision == 1
    with pytest.raises(ShuttingDown):
        await store.ping()


async def test_settings_that_cannot_work_are_named_without_the_password(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    if not postgres_server.is_ours:
        pytest.skip("another server may let everybody in")
    secret = postgres_url.partition("://")[2].partition("@")[0].partition(":")[2]
    for url, expected in (
        (postgres_url.replace(secret, "wrong"), BadSetting),
        (postgres_url + "_missing", BadSetting),
        ("postgresql://nobody@127.0.0.1:1/x", StoreUnreachable),
    ):
        with pytest.raises(expected) as caught:
            await open_store(url, POLICY, lambda: 1)
        assert secret not in str(caught.value)
        assert "wrong" not in str(caught.value)


async def test_a_statement_without_a_transaction_is_one(store: Store, place: Place) -> None:
    """What is under way when the caller leaves is finished."""
    writing = asyncio.ensure_future(store.put_secret("a", "b", "c"))
    await asyncio.sleep(0)
    writing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await writing
    async with asyncio.timeout(PATIENCE_S):
        while await store.get_secret("a", "b") is None:
            await asyncio.sleep(0)
    assert isinstance(await create(store, place), Environment)
