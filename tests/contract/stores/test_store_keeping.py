"""What every store keeps besides environments: request keys, secrets, setups, and for how long."""

import pytest
from msgspec.structs import replace
from store_harness import ME, POLICY, Place, begin, create, end, room

from fusevm.control.store.protocol import (
    RequestKey,
    SealedRow,
    Store,
)
from fusevm.core.invariants import violations
from fusevm.core.lifecycle import Step
from fusevm.model.errors import (
    IdempotencyInProgress,
    TaskExists,
)
from fusevm.model.host import Resources

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
