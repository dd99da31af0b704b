"""What each event means in each state."""

import pytest
from making import MAKERS, NOW, POLICY, destroyed, destroying, draining, failed, paused, provisioning, running
from msgspec.structs import replace

from fusevm.core import lifecycle
from fusevm.core.lifecycle import DEAD_LETTER_ATTEMPTS, Step, next_deadline_ms, step, with_schedule_time
from fusevm.model.environment import TERMINAL, BootMachine, Desired, DestroyMachine, Environment, State, Timings
from fusevm.model.errors import WrongState
from fusevm.model.event import (
    ActivitySeen,
    BootRefused,
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    HostLost,
    MachineExited,
    MachineMissing,
    OutcomeUnknown,
    Tick,
)
from fusevm.model.fact import Kind

LATER = NOW + 10_000
EVERY_STATE = pytest.mark.parametrize("state", MAKERS)


def ignored(env: Environment, event: object, now_ms: int = LATER) -> bool:
    return step(env, event, now_ms, POLICY) == Step(env)  # type: ignore[arg-type]


# -- begin and boot ------------------------------------------------------------------------------------------------


def test_a_new_environment_has_its_boot_as_pending_action():
    env = provisioning()
    assert (env.state, env.desired, env.id) == (State.PROVISIONING, Desired.RUNNING, "fuse-task-u1")
    assert env.pending == BootMachine(
        seq=1,
        cause="create",
        host_id="h1",
        machine_id="m-u1",
        incarnation=1,
        deadline_ms=NOW + POLICY.boot_deadline_ms,
    )


def test_begin_publishes_the_first_fact_and_orders_the_boot():
    identity = lifecycle.Identity(uid="u", task_id="t", machine_id="m", tenant="acme")
    found = lifecycle.begin(identity, provisioning().spec, "h1", cause="c", now_ms=NOW, policy=POLICY)
    assert found.actions == (found.record.pending,)
    assert [(fact.seq, fact.kind, fact.state, fact.cause) for fact in found.facts] == [
        (1, Kind.STATE, State.PROVISIONING, "c")
    ]
    assert found.record.tenant == "acme"


def test_a_successful_boot_makes_it_run():
    timings = Timings(boot_ms=12.5)
    found = step(provisioning(), BootSucceeded(cause="boot", seq=1, timings=timings), LATER, POLICY)
    env = found.record
    assert (env.state, env.pending, env.running_at_ms, env.last_activity_ms) == (State.RUNNING, None, LATER, LATER)
    assert env.timings.boot_ms == 12.5
    assert [(fact.seq, fact.state) for fact in found.facts] == [(2, State.RUNNING)]
    assert found.actions == ()


def test_the_time_of_placement_survives_the_boot():
    env = with_schedule_time(provisioning(), 3.5)
    env = step(env, BootSucceeded(cause="boot", seq=1, timings=Timings(host_ms=9.0)), LATER, POLICY).record
    assert env.timings == Timings(schedule_ms=3.5, host_ms=9.0)


def test_a_refused_boot_is_cleaned_up_before_it_is_a_failure():
    event = BootRefused(cause="boot", seq=1, reason="image_corrupt", message="the image is damaged")
    found = step(provisioning(), event, LATER, POLICY)
    assert found.record.state is State.DESTROYING
    assert found.actions == (found.record.pending,)
    assert isinstance(found.record.pending, DestroyMachine)
    env = step(found.record, DestroyConfirmed(cause="destroy", seq=2), LATER, POLICY).record
    assert (env.state, env.error) == (State.FAILED, "the image is damaged")
    assert env.ending is not None
    assert env.ending.reason == "image_corrupt"


@EVERY_STATE
def test_an_outcome_of_another_action_changes_nothing(state: State):
    env = MAKERS[state]()
    for seq in (0, env.action_seq - 1, env.action_seq + 1):
        assert ignored(env, BootSucceeded(cause="late", seq=seq))
        assert ignored(env, BootRefused(cause="late", seq=seq, reason="x", message="y"))
        assert ignored(env, DestroyConfirmed(cause="late", seq=seq))
        assert ignored(env, OutcomeUnknown(cause="late", seq=seq, message="no answer"))


def test_an_outcome_of_the_other_kind_of_action_changes_nothing():
    assert ignored(provisioning(), DestroyConfirmed(cause="odd", seq=1))
    env = destroying()
    assert ignored(env, BootSucceeded(cause="odd", seq=env.action_seq))
    assert ignored(env, BootRefused(cause="odd", seq=env.action_seq, reason="x", message="y"))


def test_a_late_boot_outcome_changes_nothing():
    env = step(provisioning(), DestroyRequested(cause="delete"), LATER, POLICY).record
    assert ignored(env, BootSucceeded(cause="boot", seq=1))
    env = step(env, DestroyConfirmed(cause="destroy", seq=2), LATER, POLICY).record
    assert ignored(env, BootSucceeded(cause="boot", seq=1))
    assert env.state is State.DESTROYED


# -- unknown outcomes ----------------------------------------------------------------------------------------------


def test_an_unknown_outcome_repeats_the_boot_after_a_pause():
    found = step(provisioning(), OutcomeUnknown(cause="boot", seq=1, message="no answer"), LATER, POLICY)
    again = found.record.pending
    assert isinstance(again, BootMachine)
    assert found.actions == (again,)
    assert (again.attempt, again.seq, found.record.error) == (1, 2, "no answer")
    assert again.not_before_ms > LATER
    assert found.record.updated_at_ms == LATER
    assert (again.incarnation, again.machine_id) == (1, "m-u1")


def test_a_repeated_unknown_outcome_changes_nothing():
    event = OutcomeUnknown(cause="boot", seq=1, message="no answer")
    env = step(provisioning(), event, LATER, POLICY).record
    assert ignored(env, event)


def test_the_problem_is_forgotten_when_the_boot_succeeds_at_last():
    env = step(provisioning(), OutcomeUnknown(cause="boot", seq=1, message="no answer"), LATER, POLICY).record
    env = step(env, BootSucceeded(cause="boot", seq=2), LATER, POLICY).record
    assert (env.state, env.error) == (State.RUNNING, "")


def test_a_boot_is_given_up_when_the_next_attempt_would_be_too_late():
    env = provisioning()
    late = NOW + POLICY.boot_deadline_ms - 1
    env = step(env, OutcomeUnknown(cause="boot", seq=1, message="no answer"), late, POLICY).record
    assert env.state is State.DESTROYING
    assert env.ending is not None
    assert (env.ending.state, env.ending.reason, env.error) == (State.FAILED, "boot_timeout", "no answer")


def test_the_last_attempt_at_a_boot_begins_before_its_deadline():
    event = OutcomeUnknown(cause="boot", seq=1, message="no answer")
    again = step(provisioning(), event, LATER, POLICY).record.pending
    assert again is not None
    pause = again.not_before_ms - LATER
    deadline = NOW + POLICY.boot_deadline_ms
    assert step(provisioning(), event, deadline - pause - 1, POLICY).record.state is State.PROVISIONING
    assert step(provisioning(), event, deadline - pause, POLICY).record.state is State.DESTROYING


def test_a_destroy_is_never_given_up_and_asks_for_a_person_once():
    env, kinds = destroying(), []
    for attempt in range(1, 50):
        found = step(env, OutcomeUnknown(cause="destroy", seq=env.action_seq, message="no answer"), LATER, POLICY)
        env = found.record
        assert isinstance(env.pending, DestroyMachine)
        assert found.actions == (env.pending,)
        assert env.pending.attempt == attempt
        assert env.pending.not_before_ms <= LATER + POLICY.backoff_max_ms * 5 // 4
        kinds += [(attempt, fact.kind, fact.message) for fact in found.facts]
    assert kinds == [(DEAD_LETTER_ATTEMPTS, Kind.DEAD_LETTER, "no answer")]
    env = step(env, DestroyConfirmed(cause="destroy", seq=env.action_seq), LATER, POLICY).record
    assert (env.state, env.error) == (State.DESTROYED, "")


def test_a_boot_never_becomes_a_dead_letter():
    env = provisioning()
    for seq in range(1, DEAD_LETTER_ATTEMPTS + 2):
        found = step(env, OutcomeUnknown(cause="boot", seq=seq, message="no answer"), NOW, POLICY)
        env = found.record
        assert found.facts == ()
    assert env.state is State.PROVISIONING


# -- delete --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [provisioning, running, paused, draining])
def test_a_delete_supersedes_whatever_is_under_way(maker):
    env = maker()
    found = step(env, DestroyRequested(cause="delete"), LATER, POLICY)
    assert found.record.desired is Desired.DESTROYED
    assert found.record.state is State.DESTROYING
    assert found.record.pending == DestroyMachine(
        seq=env.action_seq + 1, cause="delete", host_id="h1", machine_id="m-u1", incarnation=1
    )
    assert found.actions == (found.record.pending,)
    assert found.facts[0].reason == "deleted"


@pytest.mark.parametrize("maker", [destroying, destroyed, failed])
def test_a_second_delete_changes_nothing(maker):
    assert ignored(maker(), DestroyRequested(cause="delete again"))


def test_a_delete_does_not_hide_why_it_was_ending_already():
    env = step(running(), MachineExited(cause="watch", machine_id="m-u1", message="panic"), LATER, POLICY).record
    assert ignored(env, DestroyRequested(cause="delete"))
    env = step(env, DestroyConfirmed(cause="destroy", seq=env.action_seq), LATER, POLICY).record
    assert (env.state, env.error) == (State.FAILED, "panic")


def test_a_confirmed_delete_is_the_end():
    env = destroying()
    found = step(env, DestroyConfirmed(cause="destroy", seq=env.action_seq), LATER, POLICY)
    assert (found.record.state, found.record.pending, found.record.ended_at_ms) == (State.DESTROYED, None, LATER)
    assert [(fact.state, fact.reason) for fact in found.facts] == [(State.DESTROYED, "deleted")]


def test_an_end_without_a_recorded_reason_counts_as_deleted():
    env = replace(destroying(), ending=None)
    assert step(env, DestroyConfirmed(cause="c", seq=env.action_seq), LATER, POLICY).record.state is State.DESTROYED


# -- drain ---------------------------------------------------------------------------------------------------------


def test_draining_begins_once():
    found = step(running(), DrainRequested(cause="drain"), LATER, POLICY)
    env = found.record
    assert (env.state, env.desired, env.draining_at_ms) == (State.DRAINING, Desired.DRAINED, LATER)
    assert found.actions == ()
    assert ignored(env, DrainRequested(cause="again"), LATER + 1)


@pytest.mark.parametrize("maker", [provisioning, paused, destroying, destroyed, failed])
def test_only_a_running_environment_can_be_drained(maker):
    with pytest.raises(WrongState, match="only a running environment can be drained"):
        step(maker(), DrainRequested(cause="drain"), LATER, POLICY)


def test_a_drained_environment_ends_when_nobody_deletes_it():
    env = draining()
    due = NOW + 2_000 + POLICY.linger_ms
    assert next_deadline_ms(replace(env, spec=running(max_runtime_seconds=-1).spec), POLICY) == due
    found = step(env, Tick(cause="tick"), due, POLICY).record
    assert found.ending is not None
    assert (found.state, found.ending.reason, found.ending.state) == (State.DESTROYING, "linger", State.DESTROYED)


def test_lingering_is_measured_from_the_drain():
    env = replace(draining(max_runtime_seconds=-1), updated_at_ms=LATER)
    assert next_deadline_ms(env, POLICY) == NOW + 2_000 + POLICY.linger_ms
    assert next_deadline_ms(replace(env, draining_at_ms=None), POLICY) == LATER + POLICY.linger_ms


# -- observations --------------------------------------------------------------------------------------------------

GONE = [
    (MachineExited(cause="watch", machine_id="m-u1", message="killed"), "machine_exited", "killed"),
    (MachineMissing(cause="watch", machine_id="m-u1"), "machine_missing", "the host no longer knows the machine"),
]


@pytest.mark.parametrize(("event", "reason", "message"), GONE)
@pytest.mark.parametrize("maker", [running, paused, draining])
def test_a_machine_that_is_gone_ends_its_environment_as_failed(maker, event, reason, message):
    env = step(maker(), event, LATER, POLICY).record
    assert env.state is State.DESTROYING
    assert env.ending is not None
    assert (env.ending.state, env.ending.reason, env.ending.message) == (State.FAILED, reason, message)


@pytest.mark.parametrize(("event", "reason", "message"), GONE)
@pytest.mark.parametrize("maker", [provisioning, destroying, destroyed, failed])
def test_a_missing_machine_is_no_news_while_an_action_is_under_way_or_after_the_end(maker, event, reason, message):
    assert ignored(maker(), event)


def test_the_end_of_an_earlier_machine_is_no_news():
    assert ignored(running(), MachineExited(cause="watch", machine_id="m-old", message="killed"))
    assert ignored(running(), MachineMissing(cause="watch", machine_id="m-old"))


@pytest.mark.parametrize("maker", [provisioning, running, paused, draining])
def test_a_lost_host_fails_its_environments_at_once(maker):
    found = step(maker(), HostLost(cause="watch", host_id="h1"), LATER, POLICY)
    env = found.record
    assert (env.state, env.pending, env.ended_at_ms, env.error) == (State.FAILED, None, LATER, "host h1 was lost")
    assert [fact.reason for fact in found.facts] == ["host_lost"]
    assert found.actions == ()


def test_a_lost_host_ends_a_delete_as_the_user_wanted():
    env = step(destroying(), HostLost(cause="watch", host_id="h1"), LATER, POLICY).record
    assert env.state is State.DESTROYED
    assert env.ending is not None
    assert env.ending.reason == "deleted"


def test_a_lost_host_supersedes_the_action_under_way():
    env = provisioning()
    lost = step(env, HostLost(cause="watch", host_id="h1"), LATER, POLICY).record
    assert lost.action_seq == env.action_seq + 1
    assert ignored(lost, BootSucceeded(cause="boot", seq=1))


@EVERY_STATE
def test_the_loss_of_another_host_is_no_news(state: State):
    assert ignored(MAKERS[state](), HostLost(cause="watch", host_id="h2"))


@pytest.mark.parametrize("maker", [destroyed, failed])
def test_nothing_happens_after_the_end(maker):
    env = maker()
    for event in (
        BootSucceeded(cause="x", seq=env.action_seq),
        DestroyConfirmed(cause="x", seq=env.action_seq),
        OutcomeUnknown(cause="x", seq=env.action_seq, message="x"),
        DestroyRequested(cause="x"),
        HostLost(cause="x", host_id="h1"),
        ActivitySeen(cause="x"),
        Tick(cause="x"),
    ):
        assert ignored(env, event, NOW + 10**12)


# -- activity and deadlines ----------------------------------------------------------------------------------------


def test_activity_is_written_once_per_grain_and_leaves_the_time_of_change_alone():
    env = running()
    assert ignored(env, ActivitySeen(cause="exec"), env.last_activity_ms + POLICY.activity_grain_ms - 1)
    seen = step(env, ActivitySeen(cause="exec"), env.last_activity_ms + POLICY.activity_grain_ms, POLICY)
    assert seen == Step(replace(env, last_activity_ms=env.last_activity_ms + POLICY.activity_grain_ms))


@pytest.mark.parametrize("maker", [provisioning, paused, draining, destroying])
def test_activity_matters_only_while_running(maker):
    assert ignored(maker(), ActivitySeen(cause="exec"), LATER)


def test_an_idle_environment_ends_never_before_its_timeout():
    env = running(idle_timeout_seconds=60)
    last_use = env.last_activity_ms + POLICY.activity_grain_ms - 1  # too soon to be written
    env = step(env, ActivitySeen(cause="exec"), last_use, POLICY).record
    due = next_deadline_ms(env, POLICY)
    assert due == env.last_activity_ms + 60_000 + POLICY.activity_grain_ms
    assert due >= last_use + 60_000
    assert ignored(env, Tick(cause="tick"), due - 1)
    found = step(env, Tick(cause="tick"), due, POLICY).record
    assert found.ending is not None
    assert (found.ending.reason, found.ending.state) == ("idle", State.DESTROYED)


def test_a_runtime_limit_counts_from_creation_in_every_live_state():
    for maker in (provisioning, running, paused, draining):
        env = maker(max_runtime_seconds=30)
        assert next_deadline_ms(env, POLICY) == NOW + 30_000
        found = step(env, Tick(cause="tick"), NOW + 30_000, POLICY).record
        assert found.ending is not None
        assert (found.ending.reason, found.ending.state) == ("max_runtime", State.DESTROYED)
        assert found.error == "the limit of 30 s was reached"


def test_a_boot_that_never_answers_ends_at_its_deadline():
    env = provisioning()
    assert next_deadline_ms(env, POLICY) == NOW + POLICY.boot_deadline_ms
    found = step(env, Tick(cause="tick"), NOW + POLICY.boot_deadline_ms, POLICY).record
    assert found.ending is not None
    assert (found.ending.reason, found.ending.state) == ("boot_timeout", State.FAILED)


def test_a_runtime_limit_of_a_second_counts():
    assert next_deadline_ms(running(max_runtime_seconds=1), POLICY) == NOW + 1_000


def test_the_earliest_deadline_names_the_reason():
    env = running(max_runtime_seconds=120, idle_timeout_seconds=60)
    found = step(env, Tick(cause="tick"), NOW + 10**9, POLICY).record
    assert found.ending is not None
    assert found.ending.reason == "idle"


def test_an_unlimited_environment_has_no_deadline():
    env = running(max_runtime_seconds=-1)
    assert next_deadline_ms(env, POLICY) is None
    assert ignored(env, Tick(cause="tick"), NOW + 10**12)


@pytest.mark.parametrize("maker", [destroying, destroyed, failed])
def test_what_is_ending_has_no_deadline(maker):
    assert next_deadline_ms(maker(), POLICY) is None


def test_a_tick_before_the_deadline_changes_nothing():
    assert ignored(running(), Tick(cause="tick"))


# -- rules of the whole --------------------------------------------------------------------------------------------


def test_a_clock_that_runs_behind_never_turns_the_times_of_a_record_back():
    env = running()
    found = step(env, DestroyRequested(cause="delete"), NOW - 60_000, POLICY)
    assert found.record.updated_at_ms == env.updated_at_ms
    assert found.facts[0].at_ms == env.updated_at_ms


def test_a_transition_outside_of_the_table_is_a_bug_and_says_so():
    broken = replace(destroyed(), pending=provisioning().pending)
    with pytest.raises(AssertionError, match="destroyed -> running is not in the table"):
        step(broken, BootSucceeded(cause="boot", seq=1), LATER, POLICY)


@EVERY_STATE
def test_the_makers_of_these_tests_make_what_they_say(state: State):
    assert MAKERS[state]().state is state
    assert MAKERS[state]().is_terminal is (state in TERMINAL)
