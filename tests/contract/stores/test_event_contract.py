"""What every store guarantees about old events: they go from the front of each environment's."""

from store_harness import POLICY, Place, boot, create, end, feed

from fusevm.control.store.protocol import START, Store
from fusevm.core.invariants import violations
from fusevm.model.environment import Environment
from fusevm.model.event import DestroyRequested, DrainRequested


async def _running(store: Store, place: Place, task_id: str = "t1") -> Environment:
    return await boot(store, await create(store, place, task_id), place)


async def _kept(store: Store, env: Environment) -> list[int]:
    return [stored.fact.seq for stored in await store.facts_of(env.uid, 0, 1000)]


async def test_old_events_go_from_the_front_and_the_last_one_stays(store: Store, place: Place) -> None:
    env = await _running(store, place)
    await place.advance(1000)
    young = await feed(store, env, DrainRequested(cause="test"), place)
    assert await store.prune_events(1000, 10) == 0
    assert await store.prune_events(500, 10) == env.event_seq
    assert await _kept(store, young) == list(range(env.event_seq + 1, young.event_seq + 1))
    await place.advance(10**9)
    await store.prune_events(500, 10)
    assert await store.prune_events(500, 10) == 0
    assert await _kept(store, young) == [young.event_seq]
    assert await store.get(young.uid) == young
    assert violations(await store.world(), POLICY) == []
    last = await feed(store, young, DestroyRequested(cause="test"), place)
    assert await _kept(store, last) == list(range(young.event_seq, last.event_seq + 1))


async def test_events_are_pruned_in_bounded_steps_and_never_leave_a_hole(store: Store, place: Place) -> None:
    envs = [await _running(store, place, task) for task in "abc"]
    total = sum(env.event_seq for env in envs)
    await place.advance(1000)
    removed = 0
    while step := await store.prune_events(500, 2):
        removed += step
        assert step <= 2
        assert violations(await store.world(), POLICY) == []
    assert removed == total - len(envs)


async def test_the_end_of_an_environment_is_kept_as_long_as_its_record(store: Store, place: Place) -> None:
    env = await end(store, await _running(store, place), place)
    assert env.event_seq == 4
    await place.advance(1000)
    assert await store.prune_events(500, 100) == env.event_seq - 1
    (stored,) = await store.facts_of(env.uid, 0, 10)
    assert (stored.fact.seq, stored.fact.state) == (env.event_seq, env.state)
    assert violations(await store.world(), POLICY) == []
    assert await store.purge(500, 10) == 1
    assert await _kept(store, env) == []


async def test_readers_of_everything_go_on_when_what_they_have_read_is_pruned(store: Store, place: Place) -> None:
    env = await _running(store, place)
    read = (await store.facts_after(START, 1))[-1].position
    last = await store.last_position()
    await place.advance(1000)
    await store.prune_events(500, 100)
    assert await store.position_of(env.uid, 1) is None
    assert await store.last_position() == last
    fresh = await create(store, place, "fresh")
    expected = [(env.uid, env.event_seq), (fresh.uid, 1)]
    assert [(stored.fact.uid, stored.fact.seq) for stored in await store.facts_after(read, 10)] == expected
    assert await store.facts_after(START, 10) == await store.facts_after(read, 10)
