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
    Store,
)
from fusevm.control.store.statements import Statement
from fusevm.core.lifecycle import Step
from fusevm.model.environment import Environment, State
from fusevm.model.errors import (
    HostNotFound,
    Internal,
    RevisionConflict,
    TaskExists,
)
from fusevm.model.event import BootSucceeded, DestroyRequested, OutcomeUnknown
from fusevm.model.host import Resources

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


# -- odd texts -----------------------------------------------------------------------------------------------------


async def test_texts_that_no_column_can_hold_find_nothing(store: Store, place: Place) -> None:
    await create(store, place)
    assert await store.get("u\0") is None
    assert await store.list_page(Query(task_id="t1\0")) == []
    assert await store.list_page(Query(tenant="\0")) == []
    assert await store.find_key("\0") is None
    key = RequestKey("", "create", "\0\u2028'", "f1", "first")
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
