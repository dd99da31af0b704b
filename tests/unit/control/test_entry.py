"""The door through which environments change, over a database in memory."""

from msgspec.structs import replace

from fusevm.control.entry import Asked, Entry
from fusevm.control.signals import Signals
from fusevm.core.policy import Policy
from fusevm.core.spec import complete
from fusevm.model.event import DestroyRequested, Tick
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


async def test_ids_come_from_the_given_source():
    clock = FakeClock()
    database = InlineDatabase(clock.now_ms)
    entry = Entry(database.view(POLICY), Signals(), POLICY, clock, None, bytes)
    assert entry.new_identity("t1") == entry.new_identity("t1")
    assert entry.new_id() == entry.new_id()
    database.close()
