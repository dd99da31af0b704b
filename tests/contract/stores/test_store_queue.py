"""What every store guarantees about those that wait for a place."""

import asyncio

import pytest
from msgspec.structs import replace
from store_harness import ME, POLICY, SMALL, Place, create, end, feed, queue, room

from fusevm.control.store.protocol import (
    Reading,
    ReservationLost,
    Store,
)
from fusevm.core import lifecycle
from fusevm.core.invariants import violations
from fusevm.core.lifecycle import Step
from fusevm.model.environment import Environment, State
from fusevm.model.errors import (
    Internal,
)
from fusevm.model.event import DestroyRequested, Placed


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
