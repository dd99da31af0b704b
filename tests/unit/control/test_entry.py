"""The door through which environments change, over a database in memory."""

from typing import Any

import pytest
from msgspec.structs import replace

from fusevm.control.entry import Asked, Entry
from fusevm.control.signals import Signals
from fusevm.control.store.protocol import Store
from fusevm.core.policy import Policy
from fusevm.core.snapshots import begin_snapshot
from fusevm.core.spec import complete
from fusevm.model.environment import Environment
from fusevm.model.errors import RevisionConflict
from fusevm.model.event import (
    BootSucceeded,
    DestroyRequested,
    RestoreRequested,
    SnapshotRequested,
    SnapshotTaken,
    Tick,
)
from fusevm.model.host import Host, Resources
from fusevm.model.snapshot import SnapshotState
from fusevm.testing.clock import FakeClock
from fusevm.testing.inline_store import InlineDatabase

POLICY = Policy()


async def test_a_deadline_that_is_noticed_twice_changes_an_ended_record_once():
    """Two replicas see the same deadline; the second comes when the first has ended the environment."""
    clock = FakeClock()
    database = InlineDatabase(clock.now_ms)
    entry = Entry(database.view(POLICY), Signals(), POLICY, clock, None)
    asked = Asked(spec=complete(POLICY, queue_seconds=10))
    waiting = await entry.begin(entry.new_identity("t1"), asked, cause="test")
    tick = Tick(cause="deadline")
    moved = await entry.feed(waiting.uid, tick, commit_always=True)
    assert moved == replace(waiting, revision=waiting.revision + 1)
    ended = await entry.feed(waiting.uid, DestroyRequested(cause="test"))
    assert ended.is_terminal
    assert await entry.feed(waiting.uid, tick, commit_always=True) == ended
    database.close()


class Counting:
    """A store that gives up on those who commit again and again."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.commits = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    async def commit(self, *args: Any, **rest: Any) -> Environment:
        self.commits += 1
        assert self.commits < 50
        return await self.store.commit(*args, **rest)


async def test_a_snapshot_that_has_changed_is_the_callers_to_read_again():
    clock = FakeClock()
    database = InlineDatabase(clock.now_ms)
    store = Counting(database.view(POLICY))
    entry = Entry(store, Signals(), POLICY, clock, None)
    capacity = Resources(cpus=4, ram_mb=4096, storage_gb=40, vm_count=4)
    now_ms = clock.now_ms()
    await store.save_host(Host(id="h1", url="", capacity=capacity, created_at_ms=now_ms, updated_at_ms=now_ms))
    env = await entry.begin(entry.new_identity("t1"), Asked(spec=complete(POLICY)), cause="test")
    env = await entry.feed(env.uid, BootSucceeded(cause="test", seq=env.action_seq))
    wanted = begin_snapshot(env, entry.new_id(), now_ms=clock.now_ms())
    env = await entry.feed(env.uid, SnapshotRequested(cause="test", snapshot=wanted))
    env = await entry.feed(env.uid, SnapshotTaken(cause="test", seq=env.action_seq, size_bytes=1, digest="d"))
    read = await store.snapshot(wanted.id)
    assert read is not None
    await store.save_snapshot(replace(read, state=SnapshotState.DELETING))
    store.commits = 0
    with pytest.raises(RevisionConflict) as raised:
        await entry.feed(env.uid, RestoreRequested(cause="test", snapshot=read))
    assert (raised.value.uid, store.commits) == (read.id, 1)
    assert await store.get(env.uid) == env
    database.close()


async def test_an_event_is_decided_again_when_the_environment_has_changed():
    clock = FakeClock()
    database = InlineDatabase(clock.now_ms)
    entry = Entry(database.view(POLICY), Signals(), POLICY, clock, None)
    waiting = await entry.begin(entry.new_identity("t1"), Asked(spec=complete(POLICY, queue_seconds=10)), cause="test")
    await entry.feed(waiting.uid, Tick(cause="deadline"), commit_always=True)
    ended = await entry.feed(waiting.uid, DestroyRequested(cause="test"), known=waiting)
    assert (ended.is_terminal, ended.revision) == (True, waiting.revision + 2)
    database.close()


async def test_ids_come_from_the_given_source():
    clock = FakeClock()
    database = InlineDatabase(clock.now_ms)
    entry = Entry(database.view(POLICY), Signals(), POLICY, clock, None, bytes)
    assert entry.new_identity("t1") == entry.new_identity("t1")
    assert entry.new_id() == entry.new_id()
    database.close()
