"""Drain, new token, snapshot and restore of a machine that is up."""

import pytest
from making import (
    EVERYTHING,
    MAKERS,
    NOW,
    POLICY,
    SITUATIONS,
    changing_network,
    creating,
    draining_agent,
    queued,
    ready,
    restoring,
    rotating,
    running,
    setting_up,
    snapshotting,
)
from msgspec.structs import replace

from fusevm.core.endings import CUT_OFF, PUT_BACK
from fusevm.core.lifecycle import Step, next_deadline_ms, step
from fusevm.core.record import action_name
from fusevm.model.environment import (
    ChangeNetwork,
    Desired,
    DestroyMachine,
    DrainAgent,
    Environment,
    RestoreMachine,
    RotateToken,
    SnapshotMachine,
    State,
)
from fusevm.model.errors import ActionUnderWay, SnapshotNotReady, WrongState
from fusevm.model.event import (
    ActionRefused,
    AgentDrained,
    BootSucceeded,
    DestroyRequested,
    DrainRequested,
    Event,
    HostLost,
    MachineExited,
    MachineMissing,
    NetworkChanged,
    NetworkRequested,
    OutcomeUnknown,
    RestoreRequested,
    RotateRequested,
    SnapshotRequested,
    SnapshotRestored,
    SnapshotTaken,
    Tick,
    TokenRotated,
)
from fusevm.model.fact import Kind
from fusevm.model.network import Network
from fusevm.model.setup import AgentState, AgentStatus, HealthStatus, Verdict
from fusevm.model.snapshot import SnapshotState

LATER = NOW + 10_000
BUSY = {
    "drain_agent": draining_agent,
    "rotate_token": rotating,
    "change_network": changing_network,
    "snapshot_machine": snapshotting,
    "restore_machine": restoring,
}
EVERY_OPERATION = pytest.mark.parametrize("name", BUSY)
DEADLINES = {
    "drain_agent": POLICY.drain_deadline_ms,
    "rotate_token": POLICY.rotate_deadline_ms,
    "change_network": POLICY.network_deadline_ms,
    "snapshot_machine": POLICY.snapshot_deadline_ms,
    "restore_machine": POLICY.restore_deadline_ms,
}
TIMEOUTS = {
    "drain_agent": "drain_timeout",
    "rotate_token": "rotate_timeout",
    "change_network": "network_timeout",
    "snapshot_machine": "snapshot_timeout",
    "restore_machine": "restore_timeout",
}


def requests(env: Environment) -> list[Event]:
    """Everything that can be asked of a running machine."""
    return [
        RotateRequested(cause="x"),
        NetworkRequested(cause="x", network=Network(internet=False)),
        SnapshotRequested(cause="x", snapshot=replace(creating(env), id="snap-new")),
        RestoreRequested(cause="x", snapshot=replace(ready(env), id="snap-new")),
        DrainRequested(cause="x"),
    ]


def outcomes(seq: int) -> list[Event]:
    return [
        AgentDrained(cause="late", seq=seq, exit_code=0),
        TokenRotated(cause="late", seq=seq),
        NetworkChanged(cause="late", seq=seq),
        SnapshotTaken(cause="late", seq=seq, size_bytes=1, digest="x"),
        SnapshotRestored(cause="late", seq=seq),
        ActionRefused(cause="late", seq=seq, reason="x", message="y"),
    ]


def outcome(name: str, env: Environment) -> Event:
    """The one that the pending action waits for."""
    kinds = {name: place for place, name in enumerate(BUSY)}
    assert env.pending is not None
    return outcomes(env.pending.seq)[kinds[name]]


def goes_on(found: Step) -> bool:
    """Nothing is under way any more, but for a policy that may have reached the host: it is put back."""
    pending = found.record.pending
    if not isinstance(pending, ChangeNetwork):
        return pending is None and found.actions == ()
    return found.actions == (pending,) and (pending.cause, pending.network) == (PUT_BACK, found.record.spec.network)


# -- what all of them have in common -------------------------------------------------------------------------------


@EVERY_OPERATION
def test_the_action_knows_its_machine_and_its_deadline(name: str):
    action = BUSY[name]().pending
    assert action is not None
    assert action_name(action) == name
    assert not isinstance(action, DestroyMachine)
    assert (action.host_id, action.machine_id, action.incarnation) == ("h1", "m-u1", 1)
    assert action.deadline_ms == NOW + 2_000 + DEADLINES[name]


@pytest.mark.parametrize("situation", [name for name in SITUATIONS if name not in ("running", "rotating")])
def test_only_a_running_machine_takes_requests(situation: str):
    env = SITUATIONS[situation]()
    for event in requests(running()):
        if env.state is State.RUNNING:
            with pytest.raises(ActionUnderWay):
                step(env, event, LATER, POLICY)
        elif not (env.state is State.DRAINING and isinstance(event, DrainRequested)):
            with pytest.raises(WrongState):
                step(env, event, LATER, POLICY)


@pytest.mark.parametrize("name", ["rotate_token", "snapshot_machine", "restore_machine"])
def test_one_action_at_a_time(name: str):
    for event in requests(running()):
        with pytest.raises(ActionUnderWay, match=f"busy with another action .{name}."):
            step(BUSY[name](), event, LATER, POLICY)


@EVERY_OPERATION
def test_an_outcome_of_another_action_changes_nothing(name: str):
    env = BUSY[name]()
    for event in outcomes(env.action_seq - 1) + outcomes(env.action_seq + 1):
        assert step(env, event, LATER, POLICY) == Step(env)


@EVERY_OPERATION
def test_an_outcome_of_another_kind_changes_nothing(name: str):
    env = BUSY[name]()
    right = outcome(name, env)
    for event in [*outcomes(env.action_seq), BootSucceeded(cause="odd", seq=env.action_seq)]:
        if type(event) is not type(right) and not isinstance(event, ActionRefused):
            assert step(env, event, LATER, POLICY) == Step(env)


@EVERY_OPERATION
def test_after_its_outcome_nothing_is_under_way_and_the_order_is_out_of_date(name: str):
    env = BUSY[name]()
    done = step(env, outcome(name, env), LATER, POLICY).record
    assert (done.state, done.pending, done.error) == (env.state, None, "")
    assert done.action_seq == env.action_seq + 1
    assert done.last_activity_ms == LATER
    for event in outcomes(env.action_seq) + outcomes(done.action_seq):
        assert step(done, event, LATER, POLICY) == Step(done)


@EVERY_OPERATION
def test_a_refusal_leaves_the_machine_alone_and_is_told(name: str):
    env = BUSY[name]()
    refused = ActionRefused(cause="host", seq=env.action_seq, reason="no_space", message="the disk is full")
    found = step(env, refused, LATER, POLICY)
    after = found.record
    assert (after.state, after.desired) == (env.state, env.desired)
    assert (after.error, after.ending) == ("the disk is full", None)
    (fact,) = found.facts
    kinds = {"drain_agent": Kind.AGENT, "rotate_token": Kind.AGENT, "change_network": Kind.HOST}
    kind = kinds.get(name, Kind.SNAPSHOT)
    assert (fact.kind, fact.reason, fact.message, fact.state) == (kind, "no_space", "the disk is full", env.state)
    assert goes_on(found)
    assert step(after, refused, LATER, POLICY) == Step(after)


@EVERY_OPERATION
def test_an_unknown_outcome_repeats_the_action_and_gives_nothing_up_before_its_deadline(name: str):
    env = BUSY[name]()
    found = step(env, OutcomeUnknown(cause="call", seq=env.action_seq, message="no answer"), LATER, POLICY)
    again = found.record.pending
    assert again is not None
    assert (action_name(again), again.seq, again.attempt) == (name, env.action_seq + 1, 1)
    assert (found.actions, found.facts, found.snapshots) == ((again,), (), ())
    assert found.record.error == "no answer"
    late = NOW + 2_000 + DEADLINES[name] - 1
    waits = step(found.record, OutcomeUnknown(cause="call", seq=again.seq, message="still nothing"), late, POLICY)
    assert waits.record.pending is not None
    assert waits.record.pending.not_before_ms > late + 1
    assert waits.facts == ()
    over = step(waits.record, Tick(cause="deadline"), late + 1, POLICY)
    assert (over.record.state, over.record.error) == (env.state, "still nothing")
    assert goes_on(over)
    assert [fact.reason for fact in over.facts] == [TIMEOUTS[name]]


@EVERY_OPERATION
def test_an_action_that_never_answers_is_given_up_at_its_deadline(name: str):
    env = BUSY[name](max_runtime_seconds=-1)
    due = NOW + 2_000 + DEADLINES[name]
    assert next_deadline_ms(env, POLICY) == due
    assert step(env, Tick(cause="tick"), due - 1, POLICY) == Step(env)
    found = step(env, Tick(cause="tick"), due, POLICY)
    assert (found.record.state, found.record.ending) == (env.state, None)
    assert goes_on(found)
    (fact,) = found.facts
    assert fact.reason == TIMEOUTS[name]
    assert fact.message == found.record.error != ""


@EVERY_OPERATION
def test_a_runtime_limit_supersedes_it(name: str):
    env = BUSY[name](max_runtime_seconds=3)
    ended = step(env, Tick(cause="tick"), NOW + 3_000, POLICY).record
    assert ended.ending is not None
    assert (ended.state, ended.ending.reason) == (State.DESTROYING, "max_runtime")


@EVERY_OPERATION
def test_a_delete_supersedes_it(name: str):
    env = BUSY[name]()
    found = step(env, DestroyRequested(cause="delete"), LATER, POLICY)
    assert found.record.state is State.DESTROYING
    assert isinstance(found.record.pending, DestroyMachine)
    assert found.record.pending.seq == env.action_seq + 1
    assert step(found.record, outcome(name, env), LATER, POLICY) == Step(found.record)


@EVERY_OPERATION
def test_the_loss_of_the_host_supersedes_it(name: str):
    env = BUSY[name]()
    found = step(env, HostLost(cause="watch", host_id="h1"), LATER, POLICY)
    assert (found.record.state, found.record.pending) == (State.FAILED, None)
    assert step(found.record, outcome(name, env), LATER, POLICY) == Step(found.record)


@pytest.mark.parametrize("name", ["drain_agent", "rotate_token", "snapshot_machine"])
def test_the_end_of_the_machine_supersedes_it(name: str):
    for gone in (
        MachineExited(cause="watch", machine_id="m-u1", message="killed"),
        MachineMissing(cause="watch", machine_id="m-u1"),
    ):
        env = step(BUSY[name](), gone, LATER, POLICY).record
        assert (env.state, env.error) == (State.DESTROYING, env.ending.message if env.ending else None)


def test_a_restore_stops_the_machine_itself_so_its_end_is_no_news():
    env = restoring()
    for gone in (
        MachineExited(cause="watch", machine_id="m-u1", message="stopped"),
        MachineMissing(cause="watch", machine_id="m-u1"),
    ):
        assert step(env, gone, LATER, POLICY) == Step(env)


@pytest.mark.parametrize("name", ["rotate_token", "snapshot_machine", "restore_machine"])
def test_nothing_is_idle_while_something_is_under_way(name: str):
    env = BUSY[name](idle_timeout_seconds=60, max_runtime_seconds=-1)
    assert next_deadline_ms(env, POLICY) == NOW + 2_000 + DEADLINES[name]
    done = step(env, outcome(name, env), LATER, POLICY).record
    assert next_deadline_ms(done, POLICY) == LATER + 60_000 + POLICY.activity_grain_ms


# -- drain ---------------------------------------------------------------------------------------------------------


def test_draining_asks_the_daemon_to_end():
    found = step(running(duties=EVERYTHING), DrainRequested(cause="drain"), LATER, POLICY)
    env = found.record
    assert (env.state, env.desired, env.draining_at_ms) == (State.DRAINING, Desired.DRAINED, LATER)
    assert isinstance(env.pending, DrainAgent)
    assert found.actions == (env.pending,)
    assert [(fact.kind, fact.state) for fact in found.facts] == [(Kind.STATE, State.DRAINING)]
    assert step(env, DrainRequested(cause="again"), LATER, POLICY) == Step(env)


def test_a_drained_daemon_is_told_with_its_exit_code():
    env = replace(draining_agent(), agent=AgentStatus(state=AgentState.RUNNING, restarts=2))
    found = step(env, AgentDrained(cause="drain", seq=env.action_seq, exit_code=0), LATER, POLICY)
    drained = AgentStatus(state=AgentState.DRAINED, restarts=2, exit_code=0, since_ms=LATER)
    assert (found.record.agent, found.record.state, found.record.error) == (drained, State.DRAINING, "")
    (fact,) = found.facts
    assert (fact.kind, fact.reason) == (Kind.AGENT, "drained")
    assert fact.data == {"action": "drain_agent", "asked_by": "drain", "exit_code": "0"}


def test_a_daemon_that_did_not_end_by_itself_is_told_with_the_problem():
    env = draining_agent()
    found = step(env, AgentDrained(cause="drain", seq=env.action_seq, message="killed after 30 s"), LATER, POLICY)
    assert found.record.agent == AgentStatus(
        state=AgentState.DRAINED, restarts=0, message="killed after 30 s", since_ms=LATER
    )
    assert found.record.error == "killed after 30 s"
    (fact,) = found.facts
    assert (fact.reason, fact.message) == ("drain_failed", "killed after 30 s")
    assert fact.data == {"action": "drain_agent", "asked_by": "drain"}


def test_a_drained_environment_still_ends_by_its_linger_limit():
    env = draining_agent(max_runtime_seconds=-1)
    env = step(env, AgentDrained(cause="drain", seq=env.action_seq, exit_code=0), LATER, POLICY).record
    assert next_deadline_ms(env, POLICY) == NOW + 2_000 + POLICY.linger_ms


# -- new token -----------------------------------------------------------------------------------------------------


def test_a_new_token_is_delivered():
    found = step(running(), RotateRequested(cause="rotate"), LATER, POLICY)
    assert isinstance(found.record.pending, RotateToken)
    assert found.actions == (found.record.pending,)
    assert (found.facts, found.record.updated_at_ms) == ((), LATER)
    done = step(found.record, TokenRotated(cause="action", seq=found.record.action_seq), LATER, POLICY)
    assert [(fact.kind, fact.reason) for fact in done.facts] == [(Kind.AGENT, "token_rotated")]
    assert done.facts[0].data == {"action": "rotate_token", "asked_by": "rotate"}


def test_what_became_of_a_new_token_names_the_request_also_after_several_attempts():
    env = step(rotating(), OutcomeUnknown(cause="call", seq=2, message="silent"), LATER, POLICY).record
    assert env.pending is not None
    refused = ActionRefused(cause="call", seq=env.pending.seq, reason="daemon_failed", message="no such file")
    (fact,) = step(env, refused, LATER, POLICY).facts
    assert (fact.reason, fact.data) == ("daemon_failed", {"action": "rotate_token", "asked_by": "rotate"})


def test_a_second_new_token_is_refused_while_the_first_is_under_way():
    with pytest.raises(ActionUnderWay):
        step(rotating(), RotateRequested(cause="again"), LATER, POLICY)


# -- snapshot ------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_saved_as_creating_and_taken():
    env = running()
    found = step(env, SnapshotRequested(cause="snapshot", snapshot=creating(env)), LATER, POLICY)
    assert isinstance(found.record.pending, SnapshotMachine)
    assert found.record.pending.snapshot == creating(env)
    assert found.snapshots == (creating(env),)
    (fact,) = found.facts
    assert (fact.kind, fact.reason, fact.data) == (Kind.SNAPSHOT, "creating", {"snapshot_id": "snap-0u1"})


def test_a_complete_snapshot_is_ready():
    env = snapshotting()
    taken = SnapshotTaken(cause="action", seq=env.action_seq, size_bytes=42, digest="sha256:ab")
    found = step(env, taken, LATER, POLICY)
    (snapshot,) = found.snapshots
    assert (snapshot.state, snapshot.size_bytes, snapshot.digest) == (SnapshotState.READY, 42, "sha256:ab")
    assert snapshot.updated_at_ms == LATER
    (fact,) = found.facts
    assert (fact.reason, fact.data) == ("ready", {"snapshot_id": "snap-0u1"})


def test_the_same_request_again_changes_nothing_while_it_is_under_way():
    env = snapshotting()
    assert step(env, SnapshotRequested(cause="again", snapshot=creating(env)), LATER, POLICY) == Step(env)
    env = restoring()
    assert step(env, RestoreRequested(cause="restore", snapshot=ready(env)), LATER, POLICY) == Step(env)
    with pytest.raises(ActionUnderWay):
        step(env, RestoreRequested(cause="another", snapshot=ready(env)), LATER, POLICY)


@pytest.mark.parametrize(
    "end",
    [
        DestroyRequested(cause="delete"),
        HostLost(cause="watch", host_id="h1"),
        MachineExited(cause="watch", machine_id="m-u1", message="killed"),
    ],
)
def test_a_snapshot_that_an_end_comes_before_is_worthless(end):
    found = step(snapshotting(), end, LATER, POLICY)
    (snapshot,) = found.snapshots
    assert snapshot.state is SnapshotState.ERROR
    assert snapshot.last_error.startswith("the environment ended (")
    told, state = found.facts
    assert (told.kind, told.reason, told.state) == (Kind.SNAPSHOT, CUT_OFF, State.RUNNING)
    assert (told.message, told.data) == (snapshot.last_error, {"snapshot_id": snapshot.id})
    assert (state.kind, state.state, state.seq) == (Kind.STATE, found.record.state, told.seq + 1)


def test_a_snapshot_that_failed_says_why():
    env = snapshotting()
    refused = ActionRefused(cause="host", seq=env.action_seq, reason="no_space", message="the disk is full")
    (snapshot,) = step(env, refused, LATER, POLICY).snapshots
    assert (snapshot.state, snapshot.last_error) == (SnapshotState.ERROR, "the disk is full")


def test_a_snapshot_of_something_else_is_a_bug_and_says_so():
    env = running()
    for snapshot in (ready(env), creating(running("u2"))):
        with pytest.raises(AssertionError, match="is no new snapshot of u1"):
            step(env, SnapshotRequested(cause="x", snapshot=snapshot), LATER, POLICY)


# -- restore -------------------------------------------------------------------------------------------------------


def test_a_machine_is_put_back_to_a_ready_snapshot():
    env = running()
    found = step(env, RestoreRequested(cause="restore", snapshot=ready(env)), LATER, POLICY)
    (snapshot,) = found.snapshots
    assert snapshot.state is SnapshotState.RESTORING
    assert isinstance(found.record.pending, RestoreMachine)
    assert found.record.pending.snapshot == snapshot
    assert [(fact.kind, fact.reason) for fact in found.facts] == [(Kind.SNAPSHOT, "restoring")]
    assert (found.record.machine_id, found.record.incarnation) == (env.machine_id, env.incarnation)


def test_after_a_restore_the_daemon_is_looked_at_anew():
    env = replace(restoring(), agent=AgentStatus(state=AgentState.RUNNING), health=HealthStatus(state=Verdict.PASSING))
    found = step(env, SnapshotRestored(cause="action", seq=env.action_seq), LATER, POLICY)
    assert (found.record.agent, found.record.health) == (None, None)
    assert (found.record.machine_id, found.record.incarnation) == ("m-u1", 1)
    assert [snapshot.state for snapshot in found.snapshots] == [SnapshotState.READY]
    assert [(fact.reason, fact.data) for fact in found.facts] == [("restored", {"snapshot_id": "snap-0u1"})]


@pytest.mark.parametrize("end", [DestroyRequested(cause="delete"), HostLost(cause="watch", host_id="h1")])
def test_a_snapshot_that_could_not_be_restored_is_as_good_as_before(end):
    (snapshot,) = step(restoring(), end, LATER, POLICY).snapshots
    assert snapshot.state is SnapshotState.READY
    env = restoring()
    refused = ActionRefused(cause="host", seq=env.action_seq, reason="no_space", message="the disk is full")
    (snapshot,) = step(env, refused, LATER, POLICY).snapshots
    assert (snapshot.state, snapshot.last_error) == (SnapshotState.READY, "the disk is full")


@pytest.mark.parametrize("state", [state for state in SnapshotState if state is not SnapshotState.READY])
def test_only_a_ready_snapshot_is_restored(state: SnapshotState):
    env = running()
    with pytest.raises(SnapshotNotReady, match=f"is {state}"):
        step(env, RestoreRequested(cause="x", snapshot=ready(env, state=state)), LATER, POLICY)


def test_a_snapshot_of_another_environment_or_host_is_not_restored_in_place():
    env = running()
    with pytest.raises(WrongState, match="of another environment than fuse-task-u1"):
        step(env, RestoreRequested(cause="x", snapshot=ready(running("u2"))), LATER, POLICY)
    with pytest.raises(WrongState, match="the machine is on host h1"):
        step(env, RestoreRequested(cause="x", snapshot=ready(env, host_id="h2")), LATER, POLICY)


# -- not about snapshots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [*MAKERS.values(), queued, setting_up, rotating, draining_agent])
def test_ends_without_a_snapshot_save_none(maker):
    env = maker()
    assert step(env, DestroyRequested(cause="delete"), LATER, POLICY).snapshots == ()


# -- a policy that may have reached the host -----------------------------------------------------------------------


def put_back() -> Environment:
    """Its change was refused, and the policy of before is ordered again."""
    env = changing_network()
    refused = ActionRefused(cause="host", seq=env.action_seq, reason="command_failed", message="nft does not work")
    return step(env, refused, LATER, POLICY).record


def test_a_policy_that_was_put_back_is_told_and_the_problem_stays():
    env = put_back()
    assert env.action_seq > changing_network().action_seq + 1
    found = step(env, NetworkChanged(cause="host", seq=env.action_seq), LATER, POLICY)
    assert (found.record.pending, found.record.error) == (None, "nft does not work")
    assert found.record.spec.network == Network()
    assert [fact.reason for fact in found.facts] == ["network_put_back"]


def test_putting_back_goes_on_until_the_host_answers():
    env = put_back()
    assert env.pending is not None
    found = step(env, Tick(cause="deadline"), LATER + POLICY.network_deadline_ms, POLICY)
    assert goes_on(found)
    assert found.facts == ()
    assert found.record.last_activity_ms == env.last_activity_ms


def test_an_environment_whose_policy_cannot_be_put_back_is_idle_all_the_same():
    env = replace(put_back(), spec=replace(put_back().spec, idle_timeout_seconds=60))
    over = env.last_activity_ms + 60_000 + POLICY.activity_grain_ms
    ended = step(env, Tick(cause="deadline"), over, POLICY).record
    while ended.pending is not None and not isinstance(ended.pending, DestroyMachine):
        ended = step(ended, Tick(cause="deadline"), over, POLICY).record
    assert ended.ending is not None
    assert ended.ending.reason == "idle"


def test_a_host_that_refuses_to_put_a_policy_back_is_not_asked_again():
    env = put_back()
    refused = ActionRefused(cause="host", seq=env.action_seq, reason="wrong_state", message="it is stopped")
    found = step(env, refused, LATER, POLICY)
    assert (found.record.pending, found.actions) == (None, ())


def test_another_change_need_not_wait_for_the_putting_back():
    env = put_back()
    found = step(env, NetworkRequested(cause="again", network=Network(internet=False)), LATER, POLICY)
    action = found.record.pending
    assert isinstance(action, ChangeNetwork)
    assert (action.cause, action.network, action.seq) == ("again", Network(internet=False), env.action_seq + 1)
    with pytest.raises(ActionUnderWay):
        step(env, RotateRequested(cause="x"), LATER, POLICY)
