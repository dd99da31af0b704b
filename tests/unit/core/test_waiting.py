"""An environment that waits for a place."""

import pytest
from making import NOW, POLICY, destroyed, provisioning, queued, running
from msgspec.structs import replace

from fusevm.core.lifecycle import Identity, Step, begin, next_deadline_ms, step
from fusevm.core.spec import complete
from fusevm.model.environment import BootMachine, Desired, Ending, State
from fusevm.model.errors import WrongState
from fusevm.model.event import (
    BootSucceeded,
    DestroyRequested,
    DrainRequested,
    HostLost,
    MachineMissing,
    Placed,
    RotateRequested,
    Tick,
)
from fusevm.model.fact import Kind
from fusevm.model.setup import Duties

LATER = NOW + 10_000


def test_without_a_host_it_waits_and_nothing_is_under_way():
    identity = Identity(uid="u", task_id="t", machine_id="m")
    spec = complete(POLICY, queue_seconds=60)
    found = begin(identity, spec, "", cause="c", now_ms=NOW, policy=POLICY, duties=Duties(agent=True))
    env = found.record
    assert (env.state, env.host_id, env.pending, env.placed_at_ms) == (State.PROVISIONING, "", None, None)
    assert (env.is_queued, env.queued_until_ms, env.duties.agent) == (True, NOW + 60_000, True)
    assert found.actions == ()
    assert [(fact.seq, fact.state) for fact in found.facts] == [(1, State.PROVISIONING)]


def test_a_place_lets_it_boot():
    found = step(queued(), Placed(cause="queue", host_id="h7"), LATER, POLICY)
    env = found.record
    assert (env.host_id, env.is_queued, env.queued_until_ms, env.placed_at_ms) == ("h7", False, None, LATER)
    assert env.pending == BootMachine(
        seq=1,
        cause="queue",
        host_id="h7",
        machine_id="m-u1",
        incarnation=1,
        deadline_ms=LATER + POLICY.boot_deadline_ms,
    )
    assert found.actions == (env.pending,)
    assert env.timings.schedule_ms == 10_000
    assert [(fact.seq, fact.kind, fact.reason) for fact in found.facts] == [(2, Kind.HOST, "placed")]
    env = step(env, BootSucceeded(cause="boot", seq=1), LATER + 500, POLICY).record
    assert (env.state, env.timings.schedule_ms) == (State.RUNNING, 10_000)


@pytest.mark.parametrize("maker", [provisioning, running, destroyed])
def test_only_who_waits_is_placed(maker):
    env = maker()
    assert step(env, Placed(cause="queue", host_id="h2"), LATER, POLICY) == Step(env)


def test_a_second_place_changes_nothing():
    env = step(queued(), Placed(cause="queue", host_id="h1"), LATER, POLICY).record
    assert step(env, Placed(cause="queue", host_id="h2"), LATER, POLICY) == Step(env)


def test_it_gives_up_at_its_deadline_and_never_before():
    env = queued(max_runtime_seconds=1, idle_timeout_seconds=60)
    assert next_deadline_ms(env, POLICY) == NOW + 60_000
    assert step(env, Tick(cause="tick"), NOW + 59_999, POLICY) == Step(env)
    found = step(env, Tick(cause="tick"), NOW + 60_000, POLICY)
    ended = found.record
    message = "no place was found within 60 s"
    assert ended.ending == Ending(state=State.FAILED, reason="no_capacity", message=message)
    assert (ended.state, ended.desired, ended.ended_at_ms) == (State.FAILED, Desired.DESTROYED, NOW + 60_000)
    assert (ended.error, ended.is_queued, found.actions) == (message, False, ())
    assert [(fact.state, fact.reason, fact.message) for fact in found.facts] == [(State.FAILED, "no_capacity", message)]


def test_a_delete_ends_it_at_once_since_no_machine_was_ever_made():
    found = step(queued(), DestroyRequested(cause="delete"), LATER, POLICY)
    env = found.record
    assert (env.state, env.pending, env.ended_at_ms, env.error) == (State.DESTROYED, None, LATER, "")
    assert [(fact.seq, fact.state, fact.reason) for fact in found.facts] == [(2, State.DESTROYED, "deleted")]
    assert found.actions == ()
    assert step(env, Placed(cause="queue", host_id="h1"), LATER, POLICY) == Step(env)
    assert step(env, DestroyRequested(cause="again"), LATER, POLICY) == Step(env)
    assert next_deadline_ms(env, POLICY) is None


@pytest.mark.parametrize("host_id", ["h1", ""])
def test_hosts_and_machines_are_nothing_to_it(host_id: str):
    env = queued()
    assert step(env, HostLost(cause="watch", host_id=host_id), LATER, POLICY) == Step(env)
    assert step(env, MachineMissing(cause="watch", machine_id="m-u1"), LATER, POLICY) == Step(env)


@pytest.mark.parametrize("event", [DrainRequested(cause="x"), RotateRequested(cause="x")])
def test_nothing_can_be_done_to_a_machine_that_is_not_there(event):
    with pytest.raises(WrongState):
        step(queued(), event, LATER, POLICY)


def test_the_time_of_waiting_does_not_count_as_runtime():
    env = step(queued(max_runtime_seconds=30), Placed(cause="queue", host_id="h1"), LATER, POLICY).record
    env = step(env, BootSucceeded(cause="boot", seq=1), LATER + 500, POLICY).record
    assert next_deadline_ms(env, POLICY) == LATER + 30_000
    # A record of an earlier version does not know when it was placed.
    assert next_deadline_ms(replace(env, placed_at_ms=None), POLICY) == NOW + 30_000
