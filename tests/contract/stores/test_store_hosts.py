"""What every store guarantees about hosts."""

import asyncio

import pytest
from msgspec.structs import replace
from store_harness import ME, OTHER, POLICY, Place, create, feed, make_host

from fusevm.control.store.protocol import (
    SealedRow,
    Store,
)
from fusevm.core.invariants import violations
from fusevm.model.environment import Environment
from fusevm.model.errors import (
    HostInUse,
    HostNotFound,
    RevisionConflict,
)
from fusevm.model.event import HostLost
from fusevm.model.host import HostHealth, HostState, Resources


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
