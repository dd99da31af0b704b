"""What every store guarantees. One suite; implementations are listed in `STORES`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec.structs import replace

from fusevm.control.store.protocol import (
    Claim,
    Committed,
    Query,
    RequestKey,
    Reservation,
    ReservationLost,
    Store,
)
from fusevm.control.store.sqlite import SqliteStore
from fusevm.core import lifecycle
from fusevm.core.invariants import violations
from fusevm.core.lifecycle import Identity, Step
from fusevm.core.placement import can_reserve
from fusevm.core.policy import Policy
from fusevm.core.spec import complete, resources_of
from fusevm.model.environment import (
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    Environment,
    Event,
    OutcomeUnknown,
    State,
)
from fusevm.model.errors import HostNotFound, Internal, RevisionConflict, TaskExists
from fusevm.model.host import Host, HostHealth, HostState, Resources
from fusevm.testing.clock import FakeClock

POLICY = Policy()
ME, OTHER = Claim("me", 10_000), Claim("other", 10_000)
Open = Callable[[Path, FakeClock], Awaitable[Store]]


async def _sqlite(folder: Path, clock: FakeClock) -> Store:
    return await SqliteStore.open(str(folder / "fuse.db"), POLICY, clock.now_ms)


async def _memory(_folder: Path, clock: FakeClock) -> Store:
    return await SqliteStore.open(":memory:", POLICY, clock.now_ms)


STORES: dict[str, Open] = {"sqlite": _sqlite, "sqlite in memory": _memory}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest_asyncio.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> AsyncIterator[Store]:
    opened = await STORES[request.param](tmp_path, clock)
    await opened.save_host(_host("h1"))
    yield opened
    await opened.close()


def _host(id_: str, **changes: object) -> Host:
    capacity = Resources(cpus=100, ram_mb=10_240, storage_gb=1000, vm_count=10)
    host = Host(id=id_, url="http://127.0.0.1:1", capacity=capacity, created_at_ms=1, updated_at_ms=1)
    return replace(host, **changes)


_numbers = iter(range(1, 1 << 30))


def _begin(clock: FakeClock, task_id: str = "t1", host_id: str = "h1", uid: str = "") -> Step:
    number = next(_numbers)
    identity = Identity(uid=uid or f"u{number:06}", task_id=task_id, machine_id=f"m-{number}")
    return lifecycle.begin(identity, complete(POLICY), host_id, cause="test", now_ms=clock.now_ms(), policy=POLICY)


def _room(step: Step) -> Reservation:
    spec = step.record.spec
    return Reservation(step.record.host_id, resources_of(spec), lambda host: can_reserve(host, spec, POLICY))


async def _create(store: Store, clock: FakeClock, task_id: str = "t1", claim: Claim | None = ME) -> Environment:
    step = _begin(clock, task_id)
    return await store.create(step, _room(step), claim)


async def _feed(
    store: Store, env: Environment, event: Event, clock: FakeClock, claim: Claim | None = ME
) -> Environment:
    step = lifecycle.step(env, event, clock.now_ms(), POLICY)
    return await store.commit(env.uid, env.revision, step, claim)


async def _end(store: Store, env: Environment, clock: FakeClock) -> Environment:
    env = await _feed(store, env, DestroyRequested(cause="test"), clock)
    return await _feed(store, env, DestroyConfirmed(cause="test", seq=env.action_seq), clock)


# -- records -------------------------------------------------------------------------------------------------------


async def test_what_was_created_is_read_back(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock)
    assert env.revision == 1
    assert await store.get(env.uid) == env == await store.live("t1")
    assert await store.get("nothing") is None
    assert await store.live("nothing") is None
    assert await store.last_ended("t1") is None
    host = await store.host("h1")
    assert host is not None
    assert host.allocated == Resources(cpus=1, ram_mb=512, storage_gb=4, vm_count=1)
    assert await store.on_host("h1") == [env]
    assert await store.count_live() == {"provisioning": 1}


async def test_a_task_has_one_live_environment(store: Store, clock: FakeClock) -> None:
    await _create(store, clock)
    with pytest.raises(TaskExists) as caught:
        await _create(store, clock)
    assert caught.value.details["state"] == "provisioning"
    host = await store.host("h1")
    assert host is not None
    assert host.allocated.vm_count == 1
    assert await store.last_position() == 1


async def test_a_refused_create_leaves_nothing(store: Store, clock: FakeClock) -> None:
    step = _begin(clock)
    with pytest.raises(ReservationLost):
        await store.create(step, replace(_room(step), fits=lambda _host: False), ME)
    with pytest.raises(HostNotFound):
        await store.create(step, replace(_room(step), host_id="nowhere"), ME)
    assert await store.get(step.record.uid) is None
    assert await store.facts_after(0, 10) == []


async def test_creates_at_once_never_book_beyond_the_limits(store: Store, clock: FakeClock) -> None:
    results = await asyncio.gather(*(_create(store, clock, f"t{n}") for n in range(30)), return_exceptions=True)
    assert sum(isinstance(result, Environment) for result in results) == 10
    assert sum(isinstance(result, ReservationLost) for result in results) == 20
    host = await store.host("h1")
    assert host is not None
    assert host.allocated.vm_count == 10


async def test_a_commit_needs_the_newest_revision(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock)
    running = await _feed(store, env, BootSucceeded(cause="test", seq=1), clock)
    assert (running.state, running.revision) == (State.RUNNING, 2)
    with pytest.raises(RevisionConflict):
        await _feed(store, env, DestroyRequested(cause="test"), clock)
    with pytest.raises(RevisionConflict):
        await store.commit("nothing", 1, Step(env), ME)
    assert await store.get(env.uid) == running


async def test_of_two_writers_one_wins(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock)
    results = await asyncio.gather(
        *(_feed(store, env, BootSucceeded(cause=str(n), seq=1), clock) for n in range(5)), return_exceptions=True
    )
    assert sum(isinstance(result, RevisionConflict) for result in results) == 4
    assert len(await store.facts_of(env.uid, 0, 10)) == 2


async def test_forbidden_changes_are_refused(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock)
    for wrong in (
        replace(env, state=State.DESTROYED),
        replace(env, state=State.DRAINING),
        replace(env, task_id="other"),
        replace(env, host_id="h2"),
        replace(env, event_seq=5),
    ):
        with pytest.raises(Internal):
            await store.commit(env.uid, env.revision, Step(wrong), ME)
    assert await store.get(env.uid) == env


async def test_the_end_gives_the_place_back_and_frees_the_task(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock)
    ended = await _end(store, env, clock)
    assert ended.state is State.DESTROYED
    assert await store.live("t1") is None
    assert await store.last_ended("t1") == ended == await store.get(env.uid)
    host = await store.host("h1")
    assert host is not None
    assert host.allocated == Resources()
    assert await store.on_host("h1") == []
    again = await _create(store, clock)
    assert await store.live("t1") == again
    second_end = await _end(store, again, clock)
    assert await store.last_ended("t1") == second_end


async def test_lists_filter_and_page(store: Store, clock: FakeClock) -> None:
    await store.save_host(_host("h2"))
    envs = [await _create(store, clock, f"t{n}") for n in range(4)]
    step = _begin(clock, "t4", "h2")
    envs.append(await store.create(step, _room(step), ME))
    envs[0] = await _feed(store, envs[0], BootSucceeded(cause="test", seq=1), clock)
    ended = [await _end(store, envs[number], clock) for number in (1, 2)]

    async def uids(**filters: object) -> list[str]:
        return [env.uid for env in await store.list_page(Query(**filters))]

    live = [envs[0].uid, envs[3].uid, envs[4].uid]
    assert await uids() == live
    assert await uids(limit=2) == live[:2]
    assert await uids(after=live[1]) == live[2:]
    assert await uids(state="running") == live[:1]
    assert await uids(host_id="h2") == live[2:]
    assert await uids(task_id="t3", state="provisioning", host_id="h1") == live[1:2]
    assert await uids(ended=True) == [ended[1].uid, ended[0].uid]
    assert await uids(ended=True, after=ended[1].uid) == [ended[0].uid]
    assert await uids(ended=True, task_id="t1") == [ended[0].uid]


async def test_the_listener_hears_of_every_commit_and_of_leases(store: Store, clock: FakeClock) -> None:
    heard: list[Committed] = []
    store.listener = heard.append
    env = await _create(store, clock)
    running = await _feed(store, env, BootSucceeded(cause="test", seq=1), clock)
    ending = await _feed(store, running, DestroyRequested(cause="test"), clock, None)
    assert heard == [Committed(env, "me"), Committed(running), Committed(ending)]


async def test_the_listener_hears_of_a_commit_whose_caller_was_cancelled(store: Store, clock: FakeClock) -> None:
    heard: list[Committed] = []
    store.listener = heard.append
    creating = asyncio.ensure_future(_create(store, clock))
    await asyncio.sleep(0)
    creating.cancel()
    async with asyncio.timeout(60):
        while not heard:
            await asyncio.sleep(0)
    assert await store.live("t1") == heard[0].record


# -- leases --------------------------------------------------------------------------------------------------------


async def test_an_action_is_due_when_nobody_holds_it(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock, claim=None)
    assert (await store.due(10)).actions == ((env.uid, 1),)
    assert await store.acquire(env.uid, 2, ME) is None
    assert await store.acquire(env.uid, 1, ME) == env
    assert await store.acquire(env.uid, 1, OTHER) is None
    assert await store.acquire(env.uid, 1, ME) is None
    assert (await store.due(10)).actions == ()


async def test_a_lease_runs_out_by_database_time(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock, claim=ME)
    clock.advance(9_999)
    assert (await store.due(10)).actions == ()
    clock.advance(1)
    assert (await store.due(10)).actions == ((env.uid, 1),)
    assert await store.acquire(env.uid, 1, OTHER) == env
    assert await store.renew([(env.uid, 1)], ME) == set()


async def test_a_renewed_lease_holds(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock, claim=ME)
    clock.advance(9_000)
    assert await store.renew([(env.uid, 1), ("other", 1), (env.uid, 2)], ME) == {(env.uid, 1)}
    clock.advance(9_000)
    assert (await store.due(10)).actions == ()


async def test_leases_can_be_given_back(store: Store, clock: FakeClock) -> None:
    first, second = await _create(store, clock, "a"), await _create(store, clock, "b")
    await store.release("other")
    assert (await store.due(10)).actions == ()
    await store.release("me", [(first.uid, 1)])
    assert (await store.due(10)).actions == ((first.uid, 1),)
    await store.release("me")
    assert {uid for uid, _ in (await store.due(10)).actions} == {first.uid, second.uid}


async def test_a_new_action_ends_the_lease_on_the_old_one(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock, claim=OTHER)
    ending = await _feed(store, env, DestroyRequested(cause="test"), clock, ME)
    assert await store.renew([(env.uid, 1)], OTHER) == set()
    assert await store.renew([(env.uid, 2)], ME) == {(env.uid, 2)}
    assert (await store.due(10)).actions == ()
    assert ending.pending is not None


async def test_a_destroy_does_not_wait_for_a_dead_lease_holder(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock, claim=OTHER)
    await _feed(store, env, DestroyRequested(cause="test"), clock, None)
    assert (await store.due(10)).actions == ((env.uid, 2),)


async def test_an_unchanged_action_keeps_its_lease(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock, claim=OTHER)
    await store.commit(env.uid, env.revision, Step(env), ME)
    assert await store.renew([(env.uid, 1)], OTHER) == {(env.uid, 1)}


async def test_an_action_is_not_due_before_its_time(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock)
    again = await _feed(store, env, OutcomeUnknown(cause="test", seq=1, message="lost"), clock, None)
    assert again.pending is not None
    assert (await store.due(10)).actions == ()
    clock.advance(again.pending.not_before_ms - clock.now_ms())
    assert (await store.due(10)).actions == ((env.uid, again.pending.seq),)


async def test_a_deadline_is_due_when_it_has_passed(store: Store, clock: FakeClock) -> None:
    env = await _create(store, clock)
    assert (await store.due(10)).deadlines == ()
    clock.advance(POLICY.boot_deadline_ms)
    assert (await store.due(10)).deadlines == (env.uid,)
    await _end(store, env, clock)
    assert (await store.due(10)).deadlines == ()


# -- facts ---------------------------------------------------------------------------------------------------------


async def test_facts_are_numbered_per_environment_and_ordered_globally(store: Store, clock: FakeClock) -> None:
    first, second = await _create(store, clock, "a"), await _create(store, clock, "b")
    await _feed(store, first, BootSucceeded(cause="test", seq=1), clock)
    everything = await store.facts_after(0, 10)
    assert [(stored.task_id, stored.fact.seq) for stored in everything] == [("a", 1), ("b", 1), ("a", 2)]
    positions = [stored.position for stored in everything]
    assert positions == sorted(set(positions))
    assert await store.facts_after(positions[1], 10) == everything[2:]
    assert await store.facts_after(0, 2) == everything[:2]
    assert [stored.fact.seq for stored in await store.facts_of(first.uid, 1, 10)] == [2]
    assert await store.position_of(second.uid, 1) == positions[1]
    assert await store.position_of(second.uid, 2) is None
    assert await store.last_position() == positions[-1]


# -- hosts ---------------------------------------------------------------------------------------------------------


async def test_hosts_are_saved_by_compare_and_swap(store: Store, clock: FakeClock) -> None:
    await _create(store, clock)
    host = await store.host("h1")
    assert host is not None
    cordoned = await store.save_host(replace(host, state=HostState.CORDONED, allocated=Resources()))
    assert cordoned.revision == host.revision + 1
    with pytest.raises(RevisionConflict):
        await store.save_host(replace(host, health=HostHealth.LOST))
    with pytest.raises(RevisionConflict):
        await store.save_host(_host("h1"))
    read = await store.host("h1")
    assert read is not None
    assert (read.state, read.allocated.vm_count) == (HostState.CORDONED, 1)
    await store.touch_host("h1", 77)
    await store.touch_host("h1", 5)
    read = await store.host("h1")
    assert read is not None
    assert read.last_seen_ms == 77
    await store.save_host(_host("a"))
    assert [host.id for host in await store.hosts()] == ["a", "h1"]
    assert await store.host("nowhere") is None


async def test_a_host_is_watched_by_one(store: Store, clock: FakeClock) -> None:
    assert await store.acquire_host("h1", ME)
    assert await store.acquire_host("h1", ME)
    assert not await store.acquire_host("h1", OTHER)
    assert not await store.acquire_host("nowhere", ME)
    clock.advance(10_000)
    assert await store.acquire_host("h1", OTHER)
    await store.release("other")
    assert await store.acquire_host("h1", ME)


# -- requests, secrets, upkeep -------------------------------------------------------------------------------------


async def test_a_request_key_is_claimed_once_and_keeps_its_answer(store: Store, clock: FakeClock) -> None:
    key = RequestKey("", "create", "k", "f1")
    assert await store.claim_request(key, 1000) is None
    before = await store.claim_request(replace(key, fingerprint="f2"), 1000)
    assert before is not None
    assert (before.fingerprint, before.status, before.uid) == ("f1", 0, "")
    step = _begin(clock)
    env = await store.create(step, _room(step), ME, key)
    await store.finish_request(key, 201, "{}")
    before = await store.claim_request(key, 1000)
    assert before is not None
    assert (before.status, before.body, before.uid) == (201, "{}", env.uid)
    assert await store.claim_request(RequestKey("", "exec", "k", "f1"), 1000) is None
    clock.advance(1000)
    assert await store.claim_request(replace(key, fingerprint="f3"), 1000) is None
    await store.forget_request(key)
    assert await store.claim_request(key, 1000) is None


async def test_a_key_is_not_bound_by_a_create_that_failed(store: Store, clock: FakeClock) -> None:
    await _create(store, clock)
    key = RequestKey("", "create", "k", "f1")
    await store.claim_request(key, 1000)
    step = _begin(clock)
    with pytest.raises(TaskExists):
        await store.create(step, _room(step), ME, key)
    before = await store.claim_request(key, 1000)
    assert before is not None
    assert before.uid == ""


async def test_secrets_are_kept_and_replaced(store: Store) -> None:
    assert await store.get_secret("host:h1", "token") is None
    await store.put_secret("host:h1", "token", "a")
    await store.put_secret("host:h1", "token", "b")
    assert await store.get_secret("host:h1", "token") == "b"


async def test_what_was_kept_long_enough_is_purged(store: Store, clock: FakeClock) -> None:
    old = await _end(store, await _create(store, clock, "old"), clock)
    live = await _create(store, clock, "live")
    key = RequestKey("", "create", "k", "f1")
    await store.claim_request(key, 500)
    clock.advance(1000)
    fresh = await _end(store, await _create(store, clock, "fresh"), clock)
    assert await store.purge(500, 10) == 1
    assert await store.get(old.uid) is None
    assert await store.facts_of(old.uid, 0, 10) == []
    assert await store.get(live.uid) is not None
    assert await store.get(fresh.uid) is not None
    assert await store.claim_request(key, 500) is None
    await store.ping()


async def test_the_cluster_has_an_id(store: Store) -> None:
    assert len(store.cluster) > 16


async def test_the_world_is_everything(store: Store, clock: FakeClock) -> None:
    live, other = await _create(store, clock, "t1"), await _create(store, clock, "t2")
    ended = await _end(store, other, clock)
    world = await store.world()
    assert world.environments == {live.uid: live, ended.uid: ended}
    assert world.placements == {live.uid: ("h1", Resources(cpus=1, ram_mb=512, storage_gb=4, vm_count=1))}
    assert world.hosts == {host.id: host for host in await store.hosts()}
    assert {uid: [fact.seq for fact in facts] for uid, facts in world.facts.items()} == {
        live.uid: [1],
        ended.uid: [1, 2, 3],
    }
    assert world.machines == {}
    assert violations(world, POLICY) == []
