"""How an environment ends, and when it does so by itself.

Every end goes through a confirmed DestroyMachine, with two exceptions: what never got a place has no machine (`close`);
and on a lost host nobody is there to confirm (`lose`): reconcile destroys what it still has when it comes back.
"""

import msgspec
from msgspec.structs import replace

from fusevm.core.policy import Policy
from fusevm.core.record import Step, after, enter, give, tell_snapshot
from fusevm.core.snapshots import given_up
from fusevm.model.environment import (
    Action,
    BootMachine,
    ChangeNetwork,
    Desired,
    DestroyMachine,
    DrainAgent,
    Ending,
    Environment,
    RestoreMachine,
    RotateToken,
    SetUpMachine,
    SnapshotMachine,
    State,
    TimedAction,
)

#: Stable reason and sentence when an action was not done by its deadline.
TIMEOUTS: dict[type[TimedAction], tuple[str, str]] = {
    BootMachine: ("boot_timeout", "the machine did not come up in time"),
    SetUpMachine: ("setup_timeout", "the setup was not done in time"),
    DrainAgent: ("drain_timeout", "the daemon was not drained in time"),
    RotateToken: ("rotate_timeout", "the new token was not delivered in time"),
    ChangeNetwork: ("network_timeout", "the network was not changed in time"),
    SnapshotMachine: ("snapshot_timeout", "the snapshot was not taken in time"),
    RestoreMachine: ("restore_timeout", "the snapshot was not restored in time"),
}

#: Cause of an order that nobody has asked for: the host is to hold a machine to the policy that its record has.
PUT_BACK = "put_back"

#: Reason of the fact about a snapshot or restore that an end comes before.
CUT_OFF = "environment_ended"


def is_put_back(action: Action | None) -> bool:
    """Is it the system's own wish?"""
    return isinstance(action, ChangeNetwork) and action.cause == PUT_BACK


class Deadline(msgspec.Struct, frozen=True):
    """What happens when nothing else does: the environment ends, or its pending action is overdue."""

    at_ms: int
    then: Ending | TimedAction


def end(env: Environment, ending: Ending, cause: str, now_ms: int) -> Step:
    """Begin the end: supersede whatever is under way by a DestroyMachine. What waits for a place ends at once."""
    if env.is_queued:
        return close(replace(env, error=ending.message), ending, cause, now_ms)
    destroy = DestroyMachine(
        seq=env.action_seq + 1,
        cause=cause,
        host_id=env.host_id,
        machine_id=env.machine_id,
        incarnation=env.incarnation,
    )
    cut_off = superseded(env, ending, cause, now_ms)
    record = replace(cut_off.record, desired=Desired.DESTROYED, ending=ending, error=ending.message)
    return give(after(cut_off, enter(record, State.DESTROYING, cause, now_ms)), destroy)


def close(env: Environment, ending: Ending, cause: str, now_ms: int) -> Step:
    """End at once, without anybody's confirmation. Later outcomes of what was under way change nothing."""
    cut_off = superseded(env, ending, cause, now_ms)
    record = replace(
        cut_off.record,
        desired=Desired.DESTROYED,
        pending=None,
        action_seq=env.action_seq + 1,
        ending=ending,
        ended_at_ms=now_ms,
    )
    return after(cut_off, enter(record, ending.state, cause, now_ms))


def lose(env: Environment, host_id: str, cause: str, now_ms: int) -> Step:
    """The host is given up, with all that was there. An end that had begun keeps its reason."""
    message = f"host {host_id} was lost"
    ending = env.ending or Ending(state=State.FAILED, reason="host_lost", message=message)
    return close(replace(env, error=message), ending, cause, now_ms)


def superseded(env: Environment, ending: Ending, cause: str, now_ms: int) -> Step:
    """Give up the snapshot that is being taken or restored when an end comes between; told before the end is."""
    if not isinstance(env.pending, SnapshotMachine | RestoreMachine):
        return Step(env)
    problem = f"the environment ended ({ending.reason}) before this was done"
    snapshot = given_up(env.pending.snapshot, problem, now_ms)
    return tell_snapshot(env, snapshot, cause, now_ms, reason=CUT_OFF, message=problem)


def next_deadline(env: Environment, policy: Policy) -> Deadline | None:
    """The first thing that will happen by itself."""
    if env.desired is Desired.DESTROYED:
        return None
    return min(deadlines(env, policy), key=lambda deadline: deadline.at_ms, default=None)


def deadlines(env: Environment, policy: Policy) -> list[Deadline]:
    """All that will happen by itself, unless it is to be destroyed already."""
    if env.queued_until_ms is not None:
        message = f"no place was found within {env.spec.queue_seconds} s"
        return [Deadline(env.queued_until_ms, Ending(state=State.FAILED, reason="no_capacity", message=message))]
    limits = (_runtime_limit(env), _action_limit(env), _idle_limit(env, policy), _linger_limit(env, policy))
    return [deadline for deadline in limits if deadline is not None]


def _runtime_limit(env: Environment) -> Deadline | None:
    """The time of waiting for a place does not count."""
    runtime = env.spec.max_runtime_seconds
    if runtime <= 0:
        return None
    ending = Ending(state=State.DESTROYED, reason="max_runtime", message=f"the limit of {runtime} s was reached")
    since_ms = env.placed_at_ms if env.placed_at_ms is not None else env.created_at_ms
    return Deadline(since_ms + runtime * 1000, ending)


def _action_limit(env: Environment) -> Deadline | None:
    action = env.pending
    if action is None or isinstance(action, DestroyMachine):
        return None
    return Deadline(action.deadline_ms, action)


def _idle_limit(env: Environment, policy: Policy) -> Deadline | None:
    idle = env.spec.idle_timeout_seconds
    is_busy = env.pending is not None and not is_put_back(env.pending)
    if idle <= 0 or env.state is not State.RUNNING or is_busy:
        return None
    ending = Ending(state=State.DESTROYED, reason="idle", message=f"no activity for {idle} s")
    return Deadline(env.last_activity_ms + idle * 1000 + policy.activity_grain_ms, ending)


def _linger_limit(env: Environment, policy: Policy) -> Deadline | None:
    if env.state is not State.DRAINING:
        return None
    ending = Ending(state=State.DESTROYED, reason="linger", message="drained, and nobody deleted it")
    since_ms = env.draining_at_ms if env.draining_at_ms is not None else env.updated_at_ms
    return Deadline(since_ms + policy.linger_ms, ending)
