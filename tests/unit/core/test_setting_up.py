"""From a booted machine to a running environment: files, startup script, daemon."""

import pytest
from making import EVERYTHING, NOW, POLICY, provisioning, setting_up
from msgspec.structs import replace

from fusevm.core.lifecycle import Step, next_deadline_ms, step
from fusevm.model.environment import DestroyMachine, Ending, SetUpMachine, State, Timings
from fusevm.model.errors import WrongState
from fusevm.model.event import (
    ActionRefused,
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    HostLost,
    MachineExited,
    MachineMissing,
    OutcomeUnknown,
    SetUpSucceeded,
    Tick,
)

LATER = NOW + 10_000
DEADLINE = NOW + 500 + POLICY.setup_deadline_ms + 30_000


def test_a_booted_machine_is_set_up_before_the_environment_runs():
    booted = BootSucceeded(cause="boot", seq=1, timings=Timings(boot_ms=7.0))
    found = step(provisioning(duties=EVERYTHING), booted, NOW + 500, POLICY)
    env = found.record
    assert (env.state, env.running_at_ms, env.timings.boot_ms) == (State.PROVISIONING, None, 7.0)
    assert env.pending == SetUpMachine(
        seq=2, cause="boot", host_id="h1", machine_id="m-u1", incarnation=1, deadline_ms=DEADLINE
    )
    assert (found.actions, found.facts) == ((env.pending,), ())
    assert env.updated_at_ms == NOW + 500
    assert step(env, booted, LATER, POLICY) == Step(env)


def test_a_successful_setup_makes_it_run():
    env = replace(setting_up(), timings=Timings(boot_ms=7.0), error="no answer")
    found = step(env, SetUpSucceeded(cause="setup", seq=2, setup_ms=12.5), LATER, POLICY)
    env = found.record
    assert (env.state, env.pending, env.running_at_ms, env.last_activity_ms) == (State.RUNNING, None, LATER, LATER)
    assert (env.timings, env.error) == (Timings(boot_ms=7.0, setup_ms=12.5), "")
    assert [fact.state for fact in found.facts] == [State.RUNNING]
    assert step(env, SetUpSucceeded(cause="setup", seq=2), LATER, POLICY) == Step(env)


@pytest.mark.parametrize("seq", [1, 3])
def test_an_outcome_of_another_action_changes_nothing(seq: int):
    for env in (setting_up(), provisioning()):
        if env.pending is not None and env.pending.seq != seq:
            assert step(env, SetUpSucceeded(cause="late", seq=seq), LATER, POLICY) == Step(env)
            refused = ActionRefused(cause="late", seq=seq, reason="x", message="y")
            assert step(env, refused, LATER, POLICY) == Step(env)


def test_a_setup_outcome_says_nothing_about_a_boot():
    env = provisioning()
    assert step(env, SetUpSucceeded(cause="odd", seq=1), LATER, POLICY) == Step(env)
    assert step(env, ActionRefused(cause="odd", seq=1, reason="x", message="y"), LATER, POLICY) == Step(env)


def test_a_failed_startup_script_ends_the_environment_with_its_reason():
    refused = ActionRefused(cause="setup", seq=2, reason="startup_failed", message="exit status 3: no such file")
    found = step(setting_up(), refused, LATER, POLICY)
    env = found.record
    assert env.ending == Ending(state=State.FAILED, reason="startup_failed", message="exit status 3: no such file")
    assert isinstance(env.pending, DestroyMachine)
    env = step(env, DestroyConfirmed(cause="destroy", seq=3), LATER, POLICY).record
    assert (env.state, env.error) == (State.FAILED, "exit status 3: no such file")


def test_a_setup_without_an_answer_is_repeated_until_its_deadline():
    found = step(setting_up(), OutcomeUnknown(cause="setup", seq=2, message="no answer"), LATER, POLICY)
    again = found.record.pending
    assert isinstance(again, SetUpMachine)
    assert (again.seq, again.attempt, again.deadline_ms, found.record.state) == (3, 1, DEADLINE, State.PROVISIONING)
    late = step(
        found.record, OutcomeUnknown(cause="setup", seq=3, message="still no answer"), DEADLINE - 1, POLICY
    ).record
    assert late.ending == Ending(state=State.FAILED, reason="setup_timeout", message="still no answer")


def test_a_setup_that_never_answers_ends_at_its_deadline():
    env = setting_up(max_runtime_seconds=-1)
    assert next_deadline_ms(env, POLICY) == DEADLINE
    ended = step(env, Tick(cause="tick"), DEADLINE, POLICY).record
    assert ended.ending == Ending(state=State.FAILED, reason="setup_timeout", message="the setup was not done in time")


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (MachineExited(cause="watch", machine_id="m-u1", message="killed"), "machine_exited"),
        (MachineMissing(cause="watch", machine_id="m-u1"), "machine_missing"),
    ],
)
def test_a_machine_that_is_gone_during_the_setup_ends_it_at_once(event, reason: str):
    env = step(setting_up(), event, LATER, POLICY).record
    assert env.ending is not None
    assert (env.state, env.ending.reason, env.ending.state) == (State.DESTROYING, reason, State.FAILED)


def test_delete_and_the_loss_of_the_host_supersede_a_setup():
    env = step(setting_up(), DestroyRequested(cause="delete"), LATER, POLICY).record
    assert (env.state, env.action_seq) == (State.DESTROYING, 3)
    assert step(env, SetUpSucceeded(cause="setup", seq=2), LATER, POLICY) == Step(env)
    lost = step(setting_up(), HostLost(cause="watch", host_id="h1"), LATER, POLICY).record
    assert (lost.state, lost.pending) == (State.FAILED, None)


def test_what_is_being_set_up_cannot_be_drained():
    with pytest.raises(WrongState):
        step(setting_up(), DrainRequested(cause="drain"), LATER, POLICY)
