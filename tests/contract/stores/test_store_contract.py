"""What every store guarantees. One suite; the databases are in `store_harness`."""

import asyncio

import msgspec
import pytest
from msgspec.structs import replace
from store_harness import ME, OTHER, POLICY, SMALL, Place, begin, boot, create, end, feed, make_host, queue, room

from fusevm.control.store.protocol import (
    START,
    Committed,
    Query,
    Reading,
    RequestKey,
    ReservationLost,
    SealedRow,
    Store,
)
from fusevm.control.store.statements import Statement
from fusevm.core import lifecycle
from fusevm.core.invariants import violations
from fusevm.core.lifecycle import Step
from fusevm.model.environment import Environment, State
from fusevm.model.errors import (
    HostInUse,
    HostNotFound,
    IdempotencyInProgress,
    Internal,
    RevisionConflict,
    TaskExists,
)
from fusevm.model.event import BootSucceeded, DestroyRequested, HostLost, OutcomeUnknown, Placed
from fusevm.model.host import HostHealth, HostState, Resources

# -- records -------------------------------------------------------------------------------------------------------


async def test_what_was_created_is_read_back(store: Store, place: Place) -> None:
    env = await create(store, place)
    assert env.revision == 1
    assert await store.get(env.uid) == env == await store.live("t1")
    assert await store.get("nothing") is None
    assert await store.live("nothing") is None
    assert await store.last_ended("t1") is None
    host = await store.host("h1")
    assert host is not None
    assert host.allocated == Resources(cpus=1, ram_mb=512, storage_gb=4, vm_count=1)
    assert await store.on_host("h1") == Reading((env,))
    assert await store.count_live() == {"provisioning": 1}


async def test_a_task_has_one_live_environment(store: Store, place: Place) -> None:
    await create(store, place)
    with pytest.raises(TaskExists) as caught:
        await create(store, place)
    assert caught.value.details["state"] == "provisioning"
    host = await store.host("h1")
    assert host is not None
    assert host.allocated.vm_count == 1
    assert await store.last_position() == (await store.facts_after(START, 10))[-1].position


async def test_a_refused_create_leaves_nothing(store: Store, place: Place) -> None:
    step = begin(place)
    with pytest.raises(ReservationLost):
        await store.create(step, replace(room(step), fits=lambda _host: False), ME)
    nowhere = begin(place, host_id="nowhere")
    with pytest.raises(HostNotFound):
        await store.create(nowhere, room(nowhere), ME)
    with pytest.raises(Internal):
        await store.create(step, None, ME)
    assert await store.get(step.record.uid) is None
    assert await store.facts_after(START, 10) == []


async def test_creates_at_once_never_book_beyond_the_limits(store: Store, place: Place) -> None:
    results = await asyncio.gather(*(create(store, place, f"t{n}") for n in range(30)), return_exceptions=True)
    assert sum(isinstance(result, Environment) for result in results) == 10
    assert sum(isinstance(result, ReservationLost) for result in results) == 20
    host = await store.host("h1")
    assert host is not None
    assert host.allocated.vm_count == 10


async def test_a_commit_needs_the_newest_revision(store: Store, place: Place) -> None:
    env = await create(store, place)
    running = await feed(store, env, BootSucceeded(cause="test", seq=1), place)
    assert (running.state, running.revision) == (State.RUNNING, 2)
    with pytest.raises(RevisionConflict):
        await feed(store, env, DestroyRequested(cause="test"), place)
    with pytest.raises(RevisionConflict):
        await store.commit("nothing", 1, Step(env), ME)
    assert await store.get(env.uid) == running


async def test_of_two_writers_one_wins(store: Store, place: Place) -> None:
    env = await create(store, place)
    results = await asyncio.gather(
        *(feed(store, env, BootSucceeded(cause=str(n), seq=1), place) for n in range(5)), return_exceptions=True
    )
    assert sum(isinstance(result, RevisionConflict) for result in results) == 4
    assert len(await store.facts_of(env.uid, 0, 10)) == 2


async def test_forbidden_changes_are_refused(store: Store, place: Place) -> None:
    env = await create(store, place)
    for wrong in (
        replace(env, state=State.PAUSED),
        replace(env, state=State.DRAINING),
        replace(env, task_id="other"),
        replace(env, tenant="other"),
        replace(env, host_id="h2"),
        replace(env, event_seq=5),
    ):
        with pytest.raises(Internal):
            await store.commit(env.uid, env.revision, Step(wrong), ME)
    assert await store.get(env.uid) == env


async def test_the_end_gives_the_place_back_and_frees_the_task(store: Store, place: Place) -> None:
    env = await create(store, place)
    ended = await end(store, env, place)
    assert ended.state is State.DESTROYED
    assert await store.live("t1") is None
    assert await store.last_ended("t1") == ended == await store.get(env.uid)
    host = await store.host("h1")
    assert host is not None
    assert host.allocated == Resources()
    assert await store.on_host("h1") == Reading()
    again = await create(store, place)
    assert await store.live("t1") == again
    second_end = await end(store, again, place)
    assert await store.last_ended("t1") == second_end


async def test_lists_filter_and_page(store: Store, place: Place) -> None:
    await store.save_host(make_host("h2"))
    envs = [await create(store, place, f"t{n}") for n in range(4)]
    step = begin(place, "t4", "h2")
    envs.append(await store.create(step, room(step), ME))
    envs[0] = await feed(store, envs[0], BootSucceeded(cause="test", seq=1), place)
    ended = [await end(store, envs[number], place) for number in (1, 2)]

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


async def test_a_list_leaves_out_what_cannot_be_read_and_says_so(store: Store, place: Place) -> None:
    envs = [await create(store, place, f"t{n}") for n in range(5)]
    waiting = [await queue(store, place, f"q{n}") for n in range(2)]
    doubted: list[str] = []
    store.doubter = doubted.extend
    broken = {envs[1].uid, envs[2].uid, waiting[0].uid}
    for uid in broken:
        statement = "update environments set doc = replace(doc, 'provisioning', 'floating') where uid = $1"
        await store._engine.apply(Statement("", (uid,), statement))
    first = await store.list_page(Query(limit=3))
    assert first == [envs[0], envs[3], envs[4]]
    assert await store.list_page(Query(limit=3, after=first[-1].uid)) == [waiting[1]]
    reading = await store.on_host("h1")
    assert sorted(env.uid for env in reading.records) == [envs[0].uid, envs[3].uid, envs[4].uid]
    assert reading.unreadable == {envs[1].uid, envs[2].uid}
    assert await store.queued(10) == [waiting[1]] == await store.queued_after("", 10)
    assert set(doubted) == broken
    with pytest.raises(msgspec.ValidationError):
        await store.get(envs[1].uid)


async def _damage(store: Store, table: str, condition: str) -> None:
    await store._engine.apply(Statement("", (), f"update {table} set doc = '{{' where {condition}"))


async def test_a_damaged_host_hides_no_other_one(store: Store, place: Place) -> None:
    assert await store.has_hosts()
    for host_id in ("a", "b", "c"):
        await store.save_host(make_host(host_id))
    whole = {host.id: host for host in await store.hosts()}
    doubted: list[str] = []
    store.doubter = doubted.extend
    await _damage(store, "hosts", "id in ('b', 'c')")
    assert await store.hosts() == [whole["a"], whole["h1"]] == await store.hosts()
    assert await store.host_page("", 2) == [whole["a"], whole["h1"]]
    assert set(doubted) == {"b", "c"}
    assert (await create(store, place)).host_id == "h1"
    with pytest.raises(msgspec.DecodeError):
        await store.host("b")
    with pytest.raises(msgspec.DecodeError):
        await store.world()
    await _damage(store, "hosts", "1 = 1")
    assert await store.hosts() == []
    assert await store.has_hosts()


async def test_a_damaged_event_hides_no_other_one(store: Store, place: Place) -> None:
    env = await boot(store, await create(store, place, tenant="x"), place)
    env = await end(store, env, place)
    whole = await store.facts_after(START, 10)
    assert [stored.fact.seq for stored in whole] == [1, 2, 3, 4]
    doubted: list[str] = []
    store.doubter = doubted.extend
    await _damage(store, "events", "seq in (2, 3)")
    left = [whole[0], whole[3]]
    for tenant in (None, "x"):
        assert await store.facts_after(START, 10, tenant) == left
        assert await store.facts_after(whole[0].position, 1, tenant) == left[1:]
    assert await store.facts_of(env.uid, 0, 10) == left
    assert await store.facts_of(env.uid, 1, 1) == left[1:]
    assert set(doubted) == {f"{env.uid}.2", f"{env.uid}.3"}


async def test_the_listener_hears_of_every_commit_and_of_leases(store: Store, place: Place) -> None:
    heard: list[Committed] = []
    store.listener = heard.append
    env = await create(store, place)
    running = await feed(store, env, BootSucceeded(cause="test", seq=1), place)
    ending = await feed(store, running, DestroyRequested(cause="test"), place, None)
    assert heard == [Committed(env, "me"), Committed(running), Committed(ending)]


async def test_the_listener_hears_of_a_commit_whose_caller_was_cancelled(store: Store, place: Place) -> None:
    heard: list[Committed] = []
    store.listener = heard.append
    creating = asyncio.ensure_future(create(store, place))
    await asyncio.sleep(0)
    creating.cancel()
    async with asyncio.timeout(60):
        while not heard:
            await asyncio.sleep(0)
    assert await store.live("t1") == heard[0].record


# -- leases --------------------------------------------------------------------------------------------------------


async def test_an_action_is_due_when_nobody_holds_it(store: Store, place: Place) -> None:
    env = await create(store, place, claim=None)
    assert (await store.due(10)).actions == ((env.uid, 1),)
    assert await store.acquire(env.uid, 2, ME) is None
    assert await store.acquire(env.uid, 1, ME) == env
    assert await store.acquire(env.uid, 1, OTHER) is None
    assert await store.acquire(env.uid, 1, ME) is None
    assert (await store.due(10)).actions == ()


async def test_a_lease_runs_out_by_database_time(store: Store, place: Place) -> None:
    env = await create(store, place, claim=ME)
    await place.advance(9_999)
    assert (await store.due(10)).actions == ()
    await place.advance(1)
    assert (await store.due(10)).actions == ((env.uid, 1),)
    assert await store.acquire(env.uid, 1, OTHER) == env
    assert await store.renew([(env.uid, 1)], ME) == set()


async def test_a_renewed_lease_holds(store: Store, place: Place) -> None:
    env = await create(store, place, claim=ME)
    await place.advance(9_000)
    assert await store.renew([(env.uid, 1), ("other", 1), (env.uid, 2)], ME) == {(env.uid, 1)}
    await place.advance(9_000)
    assert (await store.due(10)).actions == ()


async def test_leases_can_be_given_back(store: Store, place: Place) -> None:
    first, second = await create(store, place, "a"), await create(store, place, "b")
    await store.release("other")
    assert (await store.due(10)).actions == ()
    await store.release("me")
    assert {uid for uid, _ in (await store.due(10)).actions} == {first.uid, second.uid}


async def test_a_new_action_ends_the_lease_on_the_old_one(store: Store, place: Place) -> None:
    env = await create(store, place, claim=OTHER)
    ending = await feed(store, env, DestroyRequested(cause="test"), place, ME)
    assert await store.renew([(env.uid, 1)], OTHER) == set()
    assert await store.renew([(env.uid, 2)], ME) == {(env.uid, 2)}
    assert (await store.due(10)).actions == ()
    assert ending.pending is not None


async def test_a_destroy_does_not_wait_for_a_dead_lease_holder(store: Store, place: Place) -> None:
    env = await create(store, place, claim=OTHER)
    await feed(store, env, DestroyRequested(cause="test"), place, None)
    assert (await store.due(10)).actions == ((env.uid, 2),)


async def test_an_unchanged_action_keeps_its_lease(store: Store, place: Place) -> None:
    env = await create(store, place, claim=OTHER)
    await store.commit(env.uid, env.revision, Step(env), ME)
    assert await store.renew([(env.uid, 1)], OTHER) == {(env.uid, 1)}


async def test_an_action_is_not_due_before_its_time(store: Store, place: Place) -> None:
    env = await create(store, place)
    again = await feed(store, env, OutcomeUnknown(cause="test", seq=1, message="lost"), place, None)
    assert again.pending is not None
    assert (await store.due(10)).actions == ()
    await place.advance(again.pending.not_before_ms - place.now_ms())
    assert (await store.due(10)).actions == ((env.uid, again.pending.seq),)


async def test_a_deadline_is_due_when_it_has_passed(store: Store, place: Place) -> None:
    env = await create(store, place)
    assert (await store.due(10)).deadlines == ()
    await place.advance(POLICY.boot_deadline_ms)
    assert (await store.due(10)).deadlines == (env.uid,)
    await end(store, env, place)
    assert (await store.due(10)).deadlines == ()


# -- facts ---------------------------------------------------------------------------------------------------------


async def test_facts_are_numbered_per_environment_and_ordered_globally(store: Store, place: Place) -> None:
    first, second = await create(store, place, "a"), await create(store, place, "b")
    await feed(store, first, BootSucceeded(cause="test", seq=1), place)
    everything = await store.facts_after(START, 10)
    assert [(stored.task_id, stored.fact.seq) for stored in everything] == [("a", 1), ("b", 1), ("a", 2)]
    positions = [stored.position for stored in everything]
    assert positions == sorted(set(positions))
    assert await store.facts_after(positions[1], 10) == everything[2:]
    assert await store.facts_after(START, 2) == everything[:2]
    assert [stored.fact.seq for stored in await store.facts_of(first.uid, 1, 10)] == [2]
    assert await store.position_of(second.uid, 1) == positions[1]
    assert await store.position_of(second.uid, 2) is None
    assert await store.last_position() == positions[-1]


# -- hosts ---------------------------------------------------------------------------------------------------------


async def test_hosts_are_saved_by_compare_and_swap(store: Store, place: Place) -> None:
    await create(store, place)
    host = await store.host("h1")
    assert host is not None
    cordoned = await store.save_host(replace(host, state=HostState.CORDONED, allocated=Resources()))
    assert cordoned.revision == host.revision + 1
    with pytest.raises(RevisionConflict):
        await store.save_host(replace(host, health=HostHealth.LOST))
    with pytest.raises(RevisionConflict):
        await store.save_host(make_host("h1"))
    read = await store.host("h1")
    assert read is not None
    assert (read.state, read.allocated.vm_count) == (HostState.CORDONED, 1)
    await store.touch_host("h1", 77)
    await store.touch_host("h1", 5)
    read = await store.host("h1")
    assert read is not None
    assert read.last_seen_ms == 77
    await store.save_host(make_host("a"))
    assert [host.id for host in await store.hosts()] == ["a", "h1"]
    assert await store.host("nowhere") is None


async def test_hosts_come_in_pages(store: Store) -> None:
    for host_id in ("a", "b", "c"):
        await store.save_host(make_host(host_id))
    assert [host.id for host in await store.host_page("", 2)] == ["a", "b"]
    assert [host.id for host in await store.host_page("b", 9)] == ["c", "h1"]
    assert await store.host_page("h1", 9) == []


async def test_a_host_is_decoded_again_only_where_it_has_changed(store: Store, place: Place) -> None:
    await store.save_host(make_host("h2"))
    first, second = await store.hosts()
    again = await store.hosts()
    assert again[0] is first
    assert again[1] is second
    await create(store, place)
    await store.touch_host("h2", 77)
    booked, seen = await store.hosts()
    assert (booked.allocated.vm_count, seen.last_seen_ms) == (1, 77)
    await store.drop_host("h2")
    assert await store.hosts() == [booked]
    # Of the same revision as the dropped one.
    await store.save_host(replace(make_host("h2"), url="elsewhere"))
    assert [host.url for host in await store.hosts()][1] == "elsewhere"


async def test_a_host_is_watched_by_one(store: Store, place: Place) -> None:
    assert await store.acquire_host("h1", ME)
    assert await store.acquire_host("h1", ME)
    assert not await store.acquire_host("h1", OTHER)
    assert not await store.acquire_host("nowhere", ME)
    await place.advance(10_000)
    assert await store.acquire_host("h1", OTHER)
    await store.release("other")
    assert await store.acquire_host("h1", ME)


# -- requests, secrets, upkeep -------------------------------------------------------------------------------------


FIRST = RequestKey("", "create", "k", "f1", "first")
AGAIN = replace(FIRST, claimant="again")
#: A claim that has bound nothing for this long is dead.
DEAD_MS = 500


async def test_a_request_key_is_claimed_once_and_keeps_its_answer(store: Store, place: Place) -> None:
    assert await store.claim_request(FIRST, 1000) is None
    before = await store.claim_request(replace(AGAIN, fingerprint="f2"), 1000)
    assert before is not None
    assert (before.fingerprint, before.status, before.uid) == ("f1", 0, "")
    step = begin(place)
    env = await store.create(step, room(step), ME, FIRST)
    await store.finish_request(FIRST, 201, "{}", is_sealed=True)
    await store.finish_request(FIRST, 500, "")
    before = await store.claim_request(AGAIN, 1000)
    assert before is not None
    assert (before.status, before.body, before.is_sealed, before.uid) == (201, "{}", True, env.uid)
    assert await store.claim_request(replace(AGAIN, route="exec"), 1000) is None
    await place.advance(1000)
    anew = replace(AGAIN, fingerprint="f3")
    assert await store.claim_request(anew, 1000) is None
    assert await store.forget_request(anew) == ""
    assert await store.claim_request(FIRST, 1000) is None


async def test_a_claim_whose_answer_was_lost_may_be_repeated_by_its_claimant(store: Store) -> None:
    assert await store.claim_request(FIRST, 1000) is None
    assert await store.claim_request(FIRST, 1000) is None
    assert await store.claim_request(AGAIN, 1000) is not None
    await store.finish_request(FIRST, 200, "")
    assert await store.claim_request(FIRST, 1000) is not None


async def test_a_key_that_is_bound_is_not_freed(store: Store, place: Place) -> None:
    await store.claim_request(FIRST, 1000)
    step = begin(place)
    env = await store.create(step, room(step), ME, FIRST)
    assert await store.forget_request(FIRST) == env.uid
    assert await store.forget_request(AGAIN) == env.uid
    assert await store.forget_request(replace(AGAIN, fingerprint="f2")) == ""
    before = await store.claim_request(AGAIN, 1000)
    assert before is not None
    assert (before.uid, before.status) == (env.uid, 0)
    await store.finish_request(AGAIN, 500, "")
    await store.finish_request(AGAIN, 201, "{}", uid=env.uid)
    before = await store.claim_request(AGAIN, 1000)
    assert before is not None
    assert (before.status, before.body, before.is_sealed) == (201, "{}", False)


async def test_a_claim_that_is_taken_over_can_neither_bind_nor_finish_nor_free_the_key(
    store: Store, place: Place
) -> None:
    await store.claim_request(FIRST, 1000, DEAD_MS)
    assert await store.claim_request(AGAIN, 1000, DEAD_MS) is not None
    await place.advance(DEAD_MS)
    assert await store.claim_request(AGAIN, 1000) is not None
    assert await store.claim_request(AGAIN, 1000, DEAD_MS) is None
    step = begin(place)
    with pytest.raises(IdempotencyInProgress):
        await store.create(step, room(step), ME, FIRST)
    assert await store.live("t1") is None
    await store.finish_request(FIRST, 201, "{}")
    assert await store.forget_request(FIRST) == ""
    env = await store.create(step, room(step), ME, AGAIN)
    assert await store.forget_request(FIRST) == env.uid


async def test_a_key_is_not_bound_by_a_create_that_failed(store: Store, place: Place) -> None:
    await create(store, place)
    await store.claim_request(FIRST, 1000)
    step = begin(place)
    with pytest.raises(TaskExists):
        await store.create(step, room(step), ME, FIRST)
    before = await store.claim_request(AGAIN, 1000)
    assert before is not None
    assert before.uid == ""
    assert await store.forget_request(FIRST) == ""
    assert await store.claim_request(AGAIN, 1000) is None


async def test_secrets_are_kept_and_replaced(store: Store) -> None:
    assert await store.get_secret("host:h1", "token") is None
    await store.put_secret("host:h1", "token", "a")
    await store.put_secret("host:h1", "token", "b")
    assert await store.get_secret("host:h1", "token") == "b"


async def test_what_was_kept_long_enough_is_purged(store: Store, place: Place) -> None:
    old = await end(store, await create(store, place, "old"), place)
    live = await create(store, place, "live")
    await store.claim_request(FIRST, 500)
    await place.advance(1000)
    fresh = await end(store, await create(store, place, "fresh"), place)
    assert await store.purge(500, 10) == 1
    assert await store.get(old.uid) is None
    assert await store.facts_of(old.uid, 0, 10) == []
    assert await store.get(live.uid) is not None
    assert await store.get(fresh.uid) is not None
    assert await store.claim_request(AGAIN, 500) is None
    await store.ping()


async def test_the_cluster_has_an_id(store: Store) -> None:
    assert len(store.cluster) > 16


async def test_the_world_is_everything(store: Store, place: Place) -> None:
    live, other = await create(store, place, "t1"), await create(store, place, "t2")
    ended = await end(store, other, place)
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


# -- waiting for a place -------------------------------------------------------------------------------------------


async def _place(store: Store, env: Environment, place: Place, host_id: str = "h1") -> Environment:
    step = lifecycle.step(env, Placed(cause="test", host_id=host_id), place.now_ms(), POLICY)
    return await store.commit(env.uid, env.revision, step, ME, reservation=room(step))


async def test_who_waits_for_a_place_comes_in_order_of_age(store: Store, place: Place) -> None:
    first, second = await queue(store, place, "a"), await queue(store, place, "b", tenant="x")
    await create(store, place, "c")
    assert await store.queued(10) == [first, second]
    assert await store.queued(1) == [first]
    assert (await store.due(10)).actions == ()
    assert await store.usage_by_tenant() == {"": SMALL}


async def test_tenants_take_turns_in_the_line(store: Store, place: Place) -> None:
    """Whoever brings many hides nobody."""
    many = [await queue(store, place, f"a{number}", tenant="x") for number in range(3)]
    one = await queue(store, place, "b", tenant="y")
    assert await store.queued(2) == [many[0], one]
    assert await store.queued(10) == [many[0], one, *many[1:]]
    assert await store.queued_after("", 2) == many[:2]
    assert await store.queued_after(many[1].uid, 10) == [many[2], one]


async def test_a_place_is_booked_with_the_commit(store: Store, place: Place) -> None:
    waiting = await queue(store, place)
    placed = await _place(store, waiting, place)
    assert placed.host_id == "h1"
    assert placed.pending is not None
    assert await store.queued(10) == []
    assert await store.on_host("h1") == Reading((placed,))
    assert await store.renew([(placed.uid, placed.pending.seq)], ME) == {(placed.uid, placed.pending.seq)}
    host = await store.host("h1")
    assert host is not None
    assert host.allocated == SMALL
    ended = await end(store, placed, place)
    assert ended.is_terminal
    assert await store.usage_by_tenant() == {}


async def test_a_place_that_is_gone_books_nothing(store: Store, place: Place) -> None:
    waiting = await queue(store, place)
    step = lifecycle.step(waiting, Placed(cause="test", host_id="h1"), place.now_ms(), POLICY)
    with pytest.raises(ReservationLost):
        await store.commit(
            waiting.uid, 1, step, ME, reservation=replace(room(step), fits=lambda host: host.allocated.vm_count > 0)
        )
    with pytest.raises(Internal):
        await store.commit(waiting.uid, 1, step, ME)
    with pytest.raises(Internal):
        await store.commit(waiting.uid, 1, step, ME, reservation=replace(room(step), host_id="h2"))
    assert await store.queued(10) == [waiting]
    assert (await store.usage_by_tenant(), len(await store.facts_of(waiting.uid, 0, 10))) == ({}, 1)


async def test_a_placement_is_booked_once(store: Store, place: Place) -> None:
    waiting = await queue(store, place)
    placed = await _place(store, waiting, place)
    again = Step(placed)
    with pytest.raises(Internal):
        await store.commit(placed.uid, placed.revision, again, ME, reservation=room(again))
    assert await store.usage_by_tenant() == {"": SMALL}


async def test_one_that_waits_can_end_at_once(store: Store, place: Place) -> None:
    waiting = await queue(store, place)
    ended = await feed(store, waiting, DestroyRequested(cause="test"), place)
    assert ended.state is State.DESTROYED
    assert violations(await store.world(), POLICY) == []


async def test_the_deadline_of_one_that_waits_comes(store: Store, place: Place) -> None:
    waiting = await queue(store, place)
    await place.advance(59_999)
    assert (await store.due(10)).deadlines == ()
    await place.advance(1)
    assert (await store.due(10)).deadlines == (waiting.uid,)


async def test_places_for_many_are_never_booked_beyond_the_limits(store: Store, place: Place) -> None:
    waiting = [await queue(store, place, f"t{n}") for n in range(14)]
    results = await asyncio.gather(*(_place(store, env, place) for env in waiting), return_exceptions=True)
    assert sum(isinstance(result, Environment) for result in results) == 10
    assert sum(isinstance(result, ReservationLost) for result in results) == 4
    assert len(await store.queued(100)) == 4


# -- tenants -------------------------------------------------------------------------------------------------------


async def test_a_tenant_sees_only_its_own(store: Store, place: Place) -> None:
    ours = await create(store, place, "a", tenant="x")
    theirs = await create(store, place, "b", tenant="y")
    nobodys = await create(store, place, "c")
    assert [env.uid for env in await store.list_page(Query())] == [ours.uid, theirs.uid, nobodys.uid]
    assert await store.list_page(Query(tenant="x")) == [ours]
    assert await store.list_page(Query(tenant="")) == [nobodys]
    ended = await end(store, theirs, place)
    assert await store.list_page(Query(tenant="y", ended=True)) == [ended]
    assert await store.list_page(Query(tenant="x", ended=True)) == []
    assert {stored.tenant for stored in await store.facts_after(START, 10)} == {"", "x", "y"}
    facts = await store.facts_after(START, 10, "y")
    assert [(stored.task_id, stored.fact.seq) for stored in facts] == [("b", 1), ("b", 2), ("b", 3)]
    assert await store.facts_after(facts[0].position, 1, "y") == facts[1:2]
    assert await store.facts_after(facts[-1].position, 10, "y") == []
    assert await store.usage_by_tenant() == {"": SMALL, "x": SMALL}


# -- sealed values -------------------------------------------------------------------------------------------------


async def test_a_setup_is_saved_with_its_environment_and_deleted_with_its_end(store: Store, place: Place) -> None:
    step = begin(place)
    owner = f"env:{step.record.uid}"
    env = await store.create(step, room(step), ME, sealed=SealedRow(owner, "setup", "one"))
    assert await store.get_secret(owner, "setup") == "one"
    env = await store.commit(env.uid, 1, Step(env), ME, sealed=SealedRow(owner, "setup", "two"))
    assert await store.get_secret(owner, "setup") == "two"
    await store.put_secret("host:h1", "token", "kept")
    await end(store, env, place)
    assert await store.get_secret(owner, "setup") is None
    assert await store.get_secret("host:h1", "token") == "kept"


async def test_a_setup_is_not_saved_when_its_environment_is_not(store: Store, place: Place) -> None:
    await create(store, place)
    step = begin(place)
    with pytest.raises(TaskExists):
        await store.create(step, room(step), ME, sealed=SealedRow("env:x", "setup", "one"))
    assert await store.get_secret("env:x", "setup") is None


async def test_secrets_that_are_sealed_otherwise_come_page_by_page(store: Store) -> None:
    for owner, name, sealed in (("a", "1", "OLD-1"), ("a", "2", "NEW-2"), ("b", "1", "OLD-3"), ("c", "1", "OLD-4")):
        await store.put_secret(owner, name, sealed)
    first = await store.secrets_sealed_otherwise("NEW", ("", ""), 2)
    assert [(row.owner, row.name, row.sealed) for row in first] == [("a", "1", "OLD-1"), ("b", "1", "OLD-3")]
    rest = await store.secrets_sealed_otherwise("NEW", ("b", "1"), 2)
    assert [(row.owner, row.sealed) for row in rest] == [("c", "OLD-4")]


async def test_secrets_are_resealed_only_if_unchanged(store: Store) -> None:
    for owner, name in (("a", "1"), ("a", "2"), ("b", "1")):
        await store.put_secret(owner, name, "old")
    await store.reseal_secret("b", "1", "other", "new")
    assert await store.get_secret("b", "1") == "old"
    await store.reseal_secret("b", "1", "old", "new")
    assert await store.get_secret("b", "1") == "new"
    await store.reseal_secret("c", "1", "old", "new")
    assert await store.get_secret("c", "1") is None


# -- hosts that leave ----------------------------------------------------------------------------------------------


async def test_a_host_with_placements_stays(store: Store, place: Place) -> None:
    env = await create(store, place)
    with pytest.raises(HostInUse) as caught:
        await store.drop_host("h1")
    assert caught.value.machines == 1
    await feed(store, env, HostLost(cause="test", host_id="h1"), place)
    await store.drop_host("h1")
    assert await store.hosts() == []
    with pytest.raises(HostNotFound):
        await store.drop_host("h1")


async def test_a_host_and_its_token_are_saved_together_or_not_at_all(store: Store) -> None:
    first = await store.save_host(make_host("h2"), SealedRow("host:h2", "token", "one"))
    assert await store.get_secret("host:h2", "token") == "one"
    await store.save_host(replace(first, url="elsewhere"), SealedRow("host:h2", "token", "two"))
    for late in (replace(first, url="late"), make_host("h2")):
        with pytest.raises(RevisionConflict):
            await store.save_host(late, SealedRow("host:h2", "token", "late"))
    assert await store.get_secret("host:h2", "token") == "two"


async def test_a_host_leaves_with_its_token_and_without_the_others(store: Store) -> None:
    for host_id in ("h2", "h3"):
        await store.save_host(make_host(host_id), SealedRow(f"host:{host_id}", "token", "sealed"))
    await store.drop_host("h2")
    assert await store.get_secret("host:h2", "token") is None
    assert await store.get_secret("host:h3", "token") == "sealed"


async def test_only_the_revision_of_a_host_that_was_seen_is_dropped(store: Store) -> None:
    seen = await store.save_host(make_host("h2"), SealedRow("host:h2", "token", "sealed"))
    newer = await store.save_host(replace(seen, state=HostState.CORDONED))
    with pytest.raises(RevisionConflict):
        await store.drop_host("h2", seen.revision)
    assert await store.host("h2") == newer
    assert await store.get_secret("host:h2", "token") == "sealed"
    await store.drop_host("h2", newer.revision)
    assert await store.host("h2") is None


async def test_a_create_and_the_removal_of_its_host_exclude_each_other(store: Store, place: Place) -> None:
    for number in range(5):
        host_id = f"x{number}"
        await store.save_host(make_host(host_id))
        made, dropped = await asyncio.gather(
            create(store, place, f"t{number}", host_id=host_id), store.drop_host(host_id), return_exceptions=True
        )
        is_made, is_dropped = isinstance(made, Environment), dropped is None
        assert is_made is not is_dropped, (made, dropped)
    assert violations(await store.world(), POLICY) == []


# -- odd texts -----------------------------------------------------------------------------------------------------


async def test_texts_that_no_column_can_hold_find_nothing(store: Store, place: Place) -> None:
    await create(store, place)
    assert await store.get("u\0") is None
    assert await store.list_page(Query(task_id="t1\0")) == []
    assert await store.list_page(Query(tenant="\0")) == []
    assert await store.find_key("\0") is None
    key = replace(FIRST, key="\0\u2028'")
    assert await store.claim_request(key, 1000) is None
    await store.finish_request(key, 200, '{"a":"\\u0000"}')
    assert (await store.claim_request(replace(key, claimant="again"), 1000)) is not None


async def test_a_record_with_odd_texts_is_read_as_it_was_written(store: Store, place: Place) -> None:
    step = begin(place, tenant="ü'\"\\")
    odd = replace(step.record, error="\0 \x1b[0m \u2028 𐍈")
    env = await store.create(replace(step, record=odd), room(step), ME)
    assert env.error == odd.error
    assert await store.get(env.uid) == env
    assert await store.list_page(Query(tenant="ü'\"\\")) == [env]
