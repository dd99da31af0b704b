"""What is done to a machine that is up: drain, new token, snapshot, restore. One at a time.

A request while another one is under way raises ActionUnderWay; the same request again changes nothing, where it has a
name to know it by (the id of a new snapshot, the cause of a restore). None of them ends the environment: what is
refused or overdue is given up, with a fact that says so. A change of the network may have reached the host all the
same, so it is put back there: the record says what the machine is held to.
"""

from msgspec.structs import replace

from fusevm.core.endings import PUT_BACK, TIMEOUTS, is_put_back
from fusevm.core.policy import Policy
from fusevm.core.record import Step, action_name, enter, give, tell, tell_snapshot
from fusevm.core.snapshots import check_restorable, given_up, made, restored, restoring
from fusevm.model.environment import (
    ChangeNetwork,
    Desired,
    DrainAgent,
    Environment,
    RestoreMachine,
    RotateToken,
    SnapshotMachine,
    State,
)
from fusevm.model.errors import ActionUnderWay, WrongState
from fusevm.model.event import (
    ActionRefused,
    AgentDrained,
    DrainRequested,
    NetworkChanged,
    NetworkRequested,
    RestoreRequested,
    RotateRequested,
    SnapshotRequested,
    SnapshotRestored,
    SnapshotTaken,
    TokenRotated,
)
from fusevm.model.fact import Kind
from fusevm.model.network import Network
from fusevm.model.setup import AgentState, AgentStatus
from fusevm.model.snapshot import SnapshotState

Operation = DrainAgent | RotateToken | ChangeNetwork | SnapshotMachine | RestoreMachine

# -- requests ------------------------------------------------------------------------------------------------------


def request_drain(env: Environment, event: DrainRequested, now_ms: int, policy: Policy) -> Step:
    """Accept nothing new; where there is a daemon, drain it."""
    if env.state is State.DRAINING:
        return Step(env)
    _must_be_free(env, "only a running environment can be drained")
    record = replace(env, desired=Desired.DRAINED, draining_at_ms=now_ms)
    found = enter(record, State.DRAINING, event.cause, now_ms)
    if not env.duties.agent:
        return found
    action = DrainAgent(
        seq=env.action_seq + 1,
        cause=event.cause,
        host_id=env.host_id,
        machine_id=env.machine_id,
        incarnation=env.incarnation,
        deadline_ms=now_ms + policy.drain_deadline_ms,
    )
    return give(found, action)


def request_rotation(env: Environment, event: RotateRequested, now_ms: int, policy: Policy) -> Step:
    """Deliver the new token that is saved together with this step."""
    _must_be_free(env, "only a running environment can be given a new token")
    action = RotateToken(
        seq=env.action_seq + 1,
        cause=event.cause,
        host_id=env.host_id,
        machine_id=env.machine_id,
        incarnation=env.incarnation,
        deadline_ms=now_ms + policy.rotate_deadline_ms,
    )
    return give(Step(replace(env, updated_at_ms=now_ms)), action)


def request_network(env: Environment, event: NetworkRequested, now_ms: int, policy: Policy) -> Step:
    """Hold the machine to another policy. An earlier one that is being put back need not be waited for."""
    _must_be_free(
        replace(env, pending=None) if is_put_back(env.pending) else env,
        "only the network of a running environment can be changed",
    )
    return give(Step(replace(env, updated_at_ms=now_ms)), _hold_to(env, event.network, event.cause, now_ms, policy))


def _hold_to(env: Environment, network: Network, cause: str, now_ms: int, policy: Policy) -> ChangeNetwork:
    return ChangeNetwork(
        seq=env.action_seq + 1,
        cause=cause,
        host_id=env.host_id,
        machine_id=env.machine_id,
        incarnation=env.incarnation,
        deadline_ms=now_ms + policy.network_deadline_ms,
        network=network,
    )


def request_snapshot(env: Environment, event: SnapshotRequested, now_ms: int, policy: Policy) -> Step:
    """Take the snapshot whose record the event brings; it is saved with this step."""
    if isinstance(env.pending, SnapshotMachine) and env.pending.snapshot.id == event.snapshot.id:
        return Step(env)
    _must_be_free(env, "a snapshot can only be taken of a running environment")
    if event.snapshot.uid != env.uid or event.snapshot.state is not SnapshotState.CREATING:
        raise AssertionError(f"{event.snapshot.id} is no new snapshot of {env.uid}")
    action = SnapshotMachine(
        seq=env.action_seq + 1,
        cause=event.cause,
        host_id=env.host_id,
        machine_id=env.machine_id,
        incarnation=env.incarnation,
        deadline_ms=now_ms + policy.snapshot_deadline_ms,
        snapshot=event.snapshot,
    )
    return give(tell_snapshot(env, event.snapshot, event.cause, now_ms, reason="creating"), action)


def request_restore(env: Environment, event: RestoreRequested, now_ms: int, policy: Policy) -> Step:
    """Put the machine back to one of its snapshots. Raises SnapshotNotReady, WrongState."""
    if isinstance(env.pending, RestoreMachine) and env.pending.cause == event.cause:
        return Step(env)
    _must_be_free(env, "only a running environment can be put back to a snapshot")
    check_restorable(event.snapshot, env)
    snapshot = restoring(event.snapshot, now_ms)
    action = RestoreMachine(
        seq=env.action_seq + 1,
        cause=event.cause,
        host_id=env.host_id,
        machine_id=env.machine_id,
        incarnation=env.incarnation,
        deadline_ms=now_ms + policy.restore_deadline_ms,
        snapshot=snapshot,
    )
    return give(tell_snapshot(env, snapshot, event.cause, now_ms, reason="restoring"), action)


def _must_be_free(env: Environment, wanted: str) -> None:
    if env.state is not State.RUNNING:
        raise WrongState(id=env.id, state=env.state, wanted=wanted)
    if env.pending is not None:
        raise ActionUnderWay(id=env.id, action=action_name(env.pending))


# -- outcomes ------------------------------------------------------------------------------------------------------


def agent_drained(env: Environment, event: AgentDrained, now_ms: int) -> Step:
    """The daemon has ended, as it should or by force; the machine stays."""
    if not isinstance(env.pending, DrainAgent) or env.pending.seq != event.seq:
        return Step(env)
    status = AgentStatus(
        state=AgentState.DRAINED,
        restarts=env.agent.restarts if env.agent is not None else 0,
        exit_code=event.exit_code,
        message=event.message,
        since_ms=now_ms,
    )
    record = replace(_free(env, now_ms), agent=status, error=event.message)
    data = _about(env.pending)
    if event.exit_code is not None:
        data["exit_code"] = str(event.exit_code)
    reason = "drain_failed" if event.message else "drained"
    return tell(record, Kind.AGENT, event.cause, now_ms, message=event.message, reason=reason, data=data)


def token_rotated(env: Environment, event: TokenRotated, now_ms: int) -> Step:
    """The daemon runs with the new token; the old one is refused."""
    if not isinstance(env.pending, RotateToken) or env.pending.seq != event.seq:
        return Step(env)
    data = _about(env.pending)
    return tell(_free(env, now_ms), Kind.AGENT, event.cause, now_ms, reason="token_rotated", data=data)


def network_changed(env: Environment, event: NetworkChanged, now_ms: int) -> Step:
    """The machine is held to the new policy."""
    if not isinstance(env.pending, ChangeNetwork) or env.pending.seq != event.seq:
        return Step(env)
    record = replace(_free(env, now_ms), spec=replace(env.spec, network=env.pending.network))
    data = _about(env.pending)
    if is_put_back(env.pending):
        kept = replace(record, error=env.error)
        return tell(kept, Kind.HOST, event.cause, now_ms, reason="network_put_back", data=data)
    return tell(record, Kind.HOST, event.cause, now_ms, reason="network_changed", data=data)


def snapshot_taken(env: Environment, event: SnapshotTaken, now_ms: int) -> Step:
    """The snapshot is complete."""
    if not isinstance(env.pending, SnapshotMachine) or env.pending.seq != event.seq:
        return Step(env)
    snapshot = made(env.pending.snapshot, event.size_bytes, event.digest, now_ms)
    return tell_snapshot(_free(env, now_ms), snapshot, event.cause, now_ms, reason="ready")


def snapshot_restored(env: Environment, event: SnapshotRestored, now_ms: int) -> Step:
    """The machine runs from the snapshot's disk; what was seen of its daemon before says nothing any more."""
    if not isinstance(env.pending, RestoreMachine) or env.pending.seq != event.seq:
        return Step(env)
    snapshot = restored(env.pending.snapshot, now_ms)
    record = replace(_free(env, now_ms), agent=None, health=None)
    return tell_snapshot(record, snapshot, event.cause, now_ms, reason="restored")


def refuse(env: Environment, action: Operation, event: ActionRefused, now_ms: int, policy: Policy) -> Step:
    """The host will not do it. Even then it may hold a machine to a policy whose rules it could not make yet."""
    found = _give_up(env, action, event.reason, event.message, event.cause, now_ms)
    is_known = not isinstance(action, ChangeNetwork) or is_put_back(action)
    return found if is_known else _put_back(found, now_ms, policy)


def give_up_late(env: Environment, action: Operation, message: str, cause: str, now_ms: int, policy: Policy) -> Step:
    """The action was not done by its deadline. To put a policy back is given another one, and nothing is told."""
    if is_put_back(action):
        return _put_back(Step(replace(env, updated_at_ms=now_ms)), now_ms, policy)
    reason, sentence = TIMEOUTS[type(action)]
    found = _give_up(env, action, reason, message or sentence, cause, now_ms)
    return _put_back(found, now_ms, policy) if isinstance(action, ChangeNetwork) else found


def _put_back(found: Step, now_ms: int, policy: Policy) -> Step:
    """Nobody knows what the host holds the machine to."""
    env = found.record
    return give(found, _hold_to(env, env.spec.network, PUT_BACK, now_ms, policy))


def _give_up(env: Environment, action: Operation, reason: str, message: str, cause: str, now_ms: int) -> Step:
    """The action failed for good; the environment goes on without it."""
    record = replace(_free(env, now_ms), error=message)
    if isinstance(action, ChangeNetwork):
        return tell(record, Kind.HOST, cause, now_ms, message=message, reason=reason, data=_about(action))
    if isinstance(action, DrainAgent | RotateToken):
        return tell(record, Kind.AGENT, cause, now_ms, message=message, reason=reason, data=_about(action))
    snapshot = given_up(action.snapshot, message, now_ms)
    return tell_snapshot(record, snapshot, cause, now_ms, reason=reason, message=message)


def _free(env: Environment, now_ms: int) -> Environment:
    """Nothing is under way any more. The number moves on, so that the host refuses the order if it comes late; the time
    of the action counts as activity."""
    last_ms = max(env.last_activity_ms, now_ms)
    return replace(env, pending=None, action_seq=env.action_seq + 1, error="", last_activity_ms=last_ms)


def _about(action: DrainAgent | RotateToken | ChangeNetwork) -> dict[str, str]:
    """Which action a fact speaks of: its attempts have different numbers, but one that asked for it."""
    return {"action": action_name(action), "asked_by": action.cause}
