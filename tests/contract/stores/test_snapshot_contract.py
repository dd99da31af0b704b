"""What every store guarantees about snapshots and API keys."""

import msgspec
import pytest
from msgspec.structs import replace
from store_harness import ME, OTHER, POLICY, Place, boot, create, end, feed, queue

from fusevm.control.store.protocol import SnapshotQuery, Store
from fusevm.control.store.statements import Statement
from fusevm.core.invariants import violations
from fusevm.model.api_key import ApiKey
from fusevm.model.environment import Environment, SnapshotMachine
from fusevm.model.errors import HostInUse, Internal, RevisionConflict
from fusevm.model.event import HostLost, RestoreRequested, SnapshotRequested, SnapshotRestored, SnapshotTaken
from fusevm.model.snapshot import Snapshot, SnapshotState


def _snapshot(env: Environment, id_: str = "snap-1", **changes: object) -> Snapshot:
    made = Snapshot(
        id=id_,
        uid=env.uid,
        task_id=env.task_id,
        tenant=env.tenant,
        host_id=env.host_id,
        machine_id=env.machine_id,
        state=SnapshotState.CREATING,
        created_at_ms=1,
        updated_at_ms=1,
    )
    return replace(made, **changes)


async def _take(store: Store, env: Environment, place: Place, id_: str = "snap-1", **changes: object) -> Environment:
    """A ready snapshot; the environment after it."""
    env = await feed(store, env, SnapshotRequested(cause="test", snapshot=_snapshot(env, id_, **changes)), place)
    assert isinstance(env.pending, SnapshotMachine)
    taken = SnapshotTaken(cause="test", seq=env.pending.seq, size_bytes=7, digest="d")
    return await feed(store, env, taken, place)


async def _running(store: Store, place: Place, task_id: str = "t1", tenant: str = "") -> Environment:
    return await boot(store, await create(store, place, task_id, tenant=tenant), place)


async def test_the_snapshots_of_a_host_that_leaves_stay_and_cannot_be_used(store: Store, place: Place) -> None:
    env = await _take(store, await _running(store, place), place)
    env = await _take(store, env, place, "snap-2")
    ready = await _must(store, "snap-2")
    deleting = await store.save_snapshot(replace(ready, state=SnapshotState.DELETING))
    with pytest.raises(HostInUse):
        await store.drop_host("h1")
    assert (await _must(store, "snap-1")).state is SnapshotState.READY
    await feed(store, env, HostLost(cause="test", host_id="h1"), place)
    await store.drop_host("h1")
    left = await _must(store, "snap-1")
    assert (left.state, left.last_error) == (SnapshotState.ERROR, "host h1, where its bytes are, was removed")
    assert await _must(store, "snap-2") == deleting
    assert violations(await store.world(), POLICY) == []


async def _must(store: Store, id_: str) -> Snapshot:
    found = await store.snapshot(id_)
    assert found is not None
    return found


async def test_a_snapshot_is_saved_with_its_action(store: Store, place: Place) -> None:
    env = await _running(store, place)
    env = await feed(store, env, SnapshotRequested(cause="test", snapshot=_snapshot(env)), place)
    begun = await _must(store, "snap-1")
    assert (begun.state, begun.revision) == (SnapshotState.CREATING, 1)
    assert (await store.world()).snapshots == {"snap-1": begun}
    assert env.pending is not None
    taken = SnapshotTaken(cause="test", seq=env.pending.seq, size_bytes=7, digest="d")
    await feed(store, env, taken, place)
    ready = await _must(store, "snap-1")
    assert (ready.state, ready.size_bytes, ready.digest, ready.revision) == (SnapshotState.READY, 7, "d", 2)
    assert violations(await store.world(), POLICY) == []
    assert await store.snapshot("nothing") is None


async def test_a_commit_that_fails_saves_no_snapshot(store: Store, place: Place) -> None:
    env = await _running(store, place)
    with pytest.raises(RevisionConflict):
        await feed(
            store,
            replace(env, revision=env.revision - 1),
            SnapshotRequested(cause="test", snapshot=_snapshot(env)),
            place,
        )
    assert await store.snapshots(SnapshotQuery()) == []


async def test_a_damaged_snapshot_hides_no_other_one(store: Store, place: Place) -> None:
    env = await _running(store, place)
    for number in range(1, 5):
        env = await _take(store, env, place, f"snap-{number}")
    doubted: list[str] = []
    store.doubter = doubted.extend
    damage = "update snapshots set doc = '{' where id in ('snap-2', 'snap-3')"
    await store._engine.apply(Statement("", (), damage))
    found = [await _must(store, "snap-4"), await _must(store, "snap-1")]
    assert await store.snapshots(SnapshotQuery(limit=2)) == found
    assert set(doubted) == {"snap-2", "snap-3"}
    with pytest.raises(msgspec.DecodeError):
        await store.snapshot("snap-2")


async def test_lists_of_snapshots_filter_and_page(store: Store, place: Place) -> None:
    first = await _running(store, place, "a")
    first = await _take(store, first, place, "snap-1", mode="build", layer_key="k1", arch="amd64")
    await _take(store, first, place, "snap-2", metadata={"name": "nice"})
    second = await _running(store, place, "b", tenant="x")
    await _take(store, second, place, "snap-3", layer_key="k1", arch="arm64")
    await store.save_snapshot(replace(await _must(store, "snap-2"), state=SnapshotState.DELETING))

    async def ids(**filters: object) -> list[str]:
        return [found.id for found in await store.snapshots(SnapshotQuery(**filters))]

    assert await ids() == ["snap-3", "snap-2", "snap-1"]
    assert await ids(limit=2) == ["snap-3", "snap-2"]
    assert await ids(after="snap-2") == ["snap-1"]
    assert await ids(uid=first.uid) == ["snap-2", "snap-1"]
    assert await ids(task_id="b") == ["snap-3"]
    assert await ids(tenant="") == ["snap-2", "snap-1"]
    assert await ids(tenant="x") == ["snap-3"]
    assert await ids(state="ready") == ["snap-3", "snap-1"]
    assert await ids(mode="build") == ["snap-1"]
    assert await ids(name="nice") == ["snap-2"]
    assert await ids(layer_key="k1") == ["snap-3", "snap-1"]
    assert await ids(layer_key="k1", arch="arm64") == ["snap-3"]
    assert await ids(host_id="h1", task_id="a", after="snap-2", limit=1) == ["snap-1"]
    assert await ids(host_id="h2") == []


async def test_snapshots_are_saved_by_compare_and_swap(store: Store, place: Place) -> None:
    await _take(store, await _running(store, place), place)
    ready = await _must(store, "snap-1")
    saved = await store.save_snapshot(replace(ready, comment="mine"))
    assert saved == await _must(store, "snap-1")
    assert (saved.comment, saved.revision) == ("mine", ready.revision + 1)
    with pytest.raises(RevisionConflict):
        await store.save_snapshot(replace(ready, comment="theirs"))
    with pytest.raises(RevisionConflict):
        await store.save_snapshot(replace(saved, id="nothing"))
    for wrong in (replace(saved, state=SnapshotState.CREATING), replace(saved, tenant="other")):
        with pytest.raises(Internal):
            await store.save_snapshot(wrong)
    assert await _must(store, "snap-1") == saved


async def test_a_restore_begins_only_on_the_snapshot_that_was_read(store: Store, place: Place) -> None:
    env = await _take(store, await _running(store, place), place)
    read = await _must(store, "snap-1")
    deleting = await store.save_snapshot(replace(read, state=SnapshotState.DELETING))
    with pytest.raises(RevisionConflict):
        await feed(store, env, RestoreRequested(cause="test", snapshot=read), place)
    await store.drop_snapshot(deleting.id)
    with pytest.raises(RevisionConflict):
        await feed(store, env, RestoreRequested(cause="test", snapshot=read), place)
    assert await store.get(env.uid) == env


async def test_a_restored_snapshot_is_ready_again(store: Store, place: Place) -> None:
    env = await _take(store, await _running(store, place), place)
    env = await feed(store, env, RestoreRequested(cause="test", snapshot=await _must(store, "snap-1")), place)
    assert (await _must(store, "snap-1")).state is SnapshotState.RESTORING
    assert env.pending is not None
    await feed(store, env, SnapshotRestored(cause="test", seq=env.pending.seq), place)
    assert (await _must(store, "snap-1")).state is SnapshotState.READY
    assert violations(await store.world(), POLICY) == []


async def test_the_end_of_an_action_does_not_bring_a_snapshot_back(store: Store, place: Place) -> None:
    env = await _running(store, place)
    env = await feed(store, env, SnapshotRequested(cause="test", snapshot=_snapshot(env)), place)
    await store.drop_snapshot("snap-1")
    assert env.pending is not None
    taken = SnapshotTaken(cause="test", seq=env.pending.seq, size_bytes=7, digest="d")
    assert (await feed(store, env, taken, place)).pending is None
    assert await store.snapshot("snap-1") is None


async def test_a_deletion_is_due_at_once_and_done_by_one(store: Store, place: Place) -> None:
    await _take(store, await _running(store, place), place)
    assert (await store.due(10)).snapshots == ()
    assert await store.acquire_snapshot("snap-1", ME) is None
    deleting = await store.save_snapshot(replace(await _must(store, "snap-1"), state=SnapshotState.DELETING))
    assert (await store.due(10)).snapshots == ("snap-1",)
    assert await store.acquire_snapshot("snap-1", ME) == deleting
    assert await store.acquire_snapshot("snap-1", OTHER) is None
    assert (await store.due(10)).snapshots == ()
    await place.advance(10_000)
    assert (await store.due(10)).snapshots == ("snap-1",)
    assert await store.acquire_snapshot("snap-1", OTHER) == deleting
    await store.release("other")
    assert await store.acquire_snapshot("snap-1", ME) == deleting
    await store.drop_snapshot("snap-1")
    await store.drop_snapshot("snap-1")
    assert await store.snapshot("snap-1") is None
    assert (await store.due(10)).snapshots == ()


async def test_an_expired_snapshot_is_deleted_but_one_of_a_build_is_not(store: Store, place: Place) -> None:
    until_ms = place.now_ms() + 1000
    env = await _take(store, await _running(store, place), place, "snap-1", retention_until_ms=until_ms)
    env = await _take(store, env, place, "snap-2", retention_until_ms=until_ms, mode="build")
    await _take(store, env, place, "snap-3")
    await place.advance(999)
    assert (await store.due(10)).snapshots == ()
    await place.advance(1)
    assert (await store.due(10)).snapshots == ("snap-1",)
    taken = await store.acquire_snapshot("snap-1", ME)
    assert taken is not None
    assert (taken.state, taken.updated_at_ms) == (SnapshotState.DELETING, place.now_ms())
    assert taken == await _must(store, "snap-1")


async def test_one_that_is_being_restored_does_not_expire(store: Store, place: Place) -> None:
    env = await _running(store, place)
    env = await _take(store, env, place, retention_until_ms=place.now_ms() + 1000)
    await feed(store, env, RestoreRequested(cause="test", snapshot=await _must(store, "snap-1")), place)
    await place.advance(5000)
    assert (await store.due(10)).snapshots == ()
    assert await store.acquire_snapshot("snap-1", ME) is None


async def test_a_record_is_kept_as_long_as_it_has_snapshots(store: Store, place: Place) -> None:
    env = await _take(store, await _running(store, place), place)
    ended = await end(store, env, place)
    await place.advance(1000)
    assert await store.purge(500, 10) == 0
    assert await store.get(env.uid) == ended
    assert violations(await store.world(), POLICY) == []
    await store.drop_snapshot("snap-1")
    assert await store.purge(500, 10) == 1
    assert await store.get(env.uid) is None


# -- keys ----------------------------------------------------------------------------------------------------------


def _key(number: int, **changes: object) -> ApiKey:
    key = ApiKey(id=f"ak_{number}", prefix=f"p{number}", digest="d", scopes=("admin",), created_at_ms=number)
    return replace(key, **changes)


async def test_a_key_is_found_by_its_prefix(store: Store) -> None:
    await store.add_key(_key(1, tenant="x", expires_at_ms=5, label="CI"))
    await store.add_key(_key(2))
    assert await store.find_key("p1") == _key(1, tenant="x", expires_at_ms=5, label="CI")
    assert await store.find_key("p3") is None
    assert [key.id for key in await store.keys()] == ["ak_2", "ak_1"]
    for taken in (_key(1, prefix="new"), _key(3, prefix="p1")):
        with pytest.raises(RevisionConflict):
            await store.add_key(taken)


async def test_a_key_is_revoked_once_and_for_all(store: Store) -> None:
    await store.add_key(_key(1))
    assert await store.revoke_key("ak_1", 10)
    assert await store.revoke_key("ak_1", 20)
    assert not await store.revoke_key("ak_2", 10)
    found = await store.find_key("p1")
    assert found is not None
    assert found.revoked_at_ms == 10
    assert await store.keys() == [found]


async def test_the_last_use_of_a_key_does_not_run_backwards(store: Store) -> None:
    await store.add_key(_key(1))
    await store.touch_key("ak_1", 10)
    await store.touch_key("ak_1", 5)
    await store.touch_key("ak_2", 5)
    found = await store.find_key("p1")
    assert found is not None
    assert found.last_used_at_ms == 10


async def test_the_newest_ready_snapshot_of_an_environment_does_not_expire(store: Store, place: Place) -> None:
    until_ms = place.now_ms() + 1000
    env = await _take(store, await _running(store, place), place, "snap-1", retention_until_ms=until_ms)
    env = await _take(store, env, place, "snap-2", retention_until_ms=until_ms)
    other = await _running(store, place, "t2")
    await _take(store, other, place, "snap-3", retention_until_ms=until_ms)
    await place.advance(2000)
    assert (await store.due(10)).snapshots == ("snap-1",)
    assert await store.acquire_snapshot("snap-2", ME) is None
    assert await store.acquire_snapshot("snap-3", ME) is None
    await _take(store, env, place, "snap-4")
    assert sorted((await store.due(10)).snapshots) == ["snap-1", "snap-2"]


async def test_the_newest_snapshot_expires_when_its_environment_has_ended(store: Store, place: Place) -> None:
    until_ms = place.now_ms() + 1000
    env = await _take(store, await _running(store, place), place, "snap-1", retention_until_ms=until_ms)
    await place.advance(2000)
    assert (await store.due(10)).snapshots == ()
    await end(store, env, place)
    assert (await store.due(10)).snapshots == ("snap-1",)
    taken = await store.acquire_snapshot("snap-1", ME)
    assert taken is not None
    assert taken.state is SnapshotState.DELETING
    await store.drop_snapshot("snap-1")
    await place.advance(1000)
    assert await store.purge(500, 10) == 1


async def test_everything_is_counted(store: Store, place: Place) -> None:
    empty = await store.tally()
    assert (empty.live, empty.queued, empty.queued_since_ms, empty.snapshots) == ({}, 0, None, {})
    env = await _running(store, place)
    odd = {"name": 'a"size_bytes":99', "size_bytes": "98"}
    env = await _take(store, env, place, "snap-1", metadata=odd, comment='"size_bytes":97')
    await _take(store, env, place, "snap-2")
    begun = await queue(store, place, "t2")
    counted = await store.tally()
    assert counted.live == {"running": 1, "provisioning": 1}
    assert (counted.queued, counted.queued_since_ms) == (1, begun.created_at_ms)
    assert counted.snapshots == {("h1", "ready"): (2, 14)}
