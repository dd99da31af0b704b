"""The life of an environment, decided by one pure function.

`step(environment, event, now_ms, policy)` takes the durable record and one event and returns the new record, the
actions to perform, the facts to publish and the snapshots to save. The store writes all of it in one transaction; a
worker performs the action and feeds the outcome back as the next event.

Rules of this file, of `core.operations` (what is done to a machine that is up) and of `core.endings`:
- Every action has its own `seq`, a repetition included; an outcome whose `seq` is not that of the pending action
  changes nothing. So late, repeated and reordered outcomes are harmless, and a destroy supersedes a boot at once.
- Every end goes through a confirmed DestroyMachine, except where no machine was ever made, and on a lost host.
- A destroy is never given up; everything else is, at its deadline.
- Nothing here reads a clock or makes an id. Clocks of replicas differ: the times of a record never run backwards.
"""

from typing import assert_never

import msgspec
from msgspec.structs import replace

from fusevm.core import operations
from fusevm.core.backoff import backoff_ms
from fusevm.core.endings import TIMEOUTS, end, lose, next_deadline
from fusevm.core.policy import Policy
from fusevm.core.record import SETTLED, Step, enter, expects_machine, give, tell
from fusevm.model.environment import (
    BootMachine,
    Desired,
    DestroyMachine,
    Ending,
    Environment,
    SetUpMachine,
    Spec,
    State,
    TimedAction,
)
from fusevm.model.event import (
    ActionRefused,
    ActivitySeen,
    AgentDrained,
    AgentSeen,
    BootRefused,
    BootSucceeded,
    CommandsEnded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    Event,
    HealthSeen,
    HostLost,
    MachineExited,
    MachineMissing,
    NetworkChanged,
    NetworkRequested,
    OutcomeUnknown,
    OutputSeen,
    Placed,
    Reported,
    RestoreRequested,
    RotateRequested,
    SetUpSucceeded,
    SnapshotRequested,
    SnapshotRestored,
    SnapshotTaken,
    Tick,
    TokenRotated,
)
from fusevm.model.fact import Fact, Kind
from fusevm.model.setup import AgentState, Duties

__all__ = [
    "DEAD_LETTER_ATTEMPTS",
    "SETTLED",
    "Identity",
    "Step",
    "begin",
    "next_deadline_ms",
    "step",
    "with_schedule_time",
]

#: After this many attempts at a destroy a fact asks for a person; the attempts go on.
DEAD_LETTER_ATTEMPTS = 5


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The ids that the shell made for a new environment."""

    uid: str
    task_id: str
    machine_id: str
    tenant: str = ""


def begin(
    identity: Identity,
    spec: Spec,
    host_id: str,
    *,
    cause: str,
    now_ms: int,
    policy: Policy,
    duties: Duties = Duties(),  # noqa: B008 - frozen
) -> Step:
    """A new environment, placed on `host_id`, with its boot as the pending action.

    An empty `host_id`: it waits for a place for `spec.queue_seconds`, and nothing is pending.
    """
    record = Environment(
        uid=identity.uid,
        task_id=identity.task_id,
        tenant=identity.tenant,
        spec=spec,
        state=State.PROVISIONING,
        desired=Desired.RUNNING,
        duties=duties,
        host_id=host_id,
        machine_id=identity.machine_id,
        incarnation=1,
        action_seq=0,
        queued_until_ms=None if host_id else now_ms + spec.queue_seconds * 1000,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        placed_at_ms=now_ms if host_id else None,
        last_activity_ms=now_ms,
    )
    told = tell(record, Kind.STATE, cause, now_ms)
    return give(told, _boot(record, cause, now_ms, policy)) if host_id else told


def step(env: Environment, event: Event, now_ms: int, policy: Policy) -> Step:
    """Decide what `event` means for `env`.

    Pure and total: late and repeated events return the record unchanged; a request that the state forbids raises
    WrongState, ActionUnderWay or SnapshotNotReady. `updated_at_ms` changes with everything but activity and counts;
    `revision` is the store's.
    """
    now_ms = max(now_ms, env.updated_at_ms)
    match event:
        case (
            DestroyRequested()
            | DrainRequested()
            | RotateRequested()
            | NetworkRequested()
            | SnapshotRequested()
            | RestoreRequested()
            | Placed()
        ):
            return _request(env, event, now_ms, policy)
        case AgentSeen() | HealthSeen() | MachineExited() | MachineMissing() | HostLost():
            return _observation(env, event, now_ms)
        case Reported() | OutputSeen() | CommandsEnded():
            return _report(env, event, now_ms)
        case ActivitySeen():
            return _activity_seen(env, event, now_ms, policy)
        case Tick():
            return _tick(env, event, now_ms, policy)
        case _:
            return _outcome(env, event, now_ms, policy)


_Request = (
    DestroyRequested
    | DrainRequested
    | RotateRequested
    | NetworkRequested
    | SnapshotRequested
    | RestoreRequested
    | Placed
)
_Observation = AgentSeen | HealthSeen | MachineExited | MachineMissing | HostLost
_Report = Reported | OutputSeen | CommandsEnded
_Outcome = (
    BootSucceeded
    | BootRefused
    | SetUpSucceeded
    | ActionRefused
    | AgentDrained
    | TokenRotated
    | NetworkChanged
    | SnapshotTaken
    | SnapshotRestored
    | DestroyConfirmed
    | OutcomeUnknown
)


def _request(env: Environment, event: _Request, now_ms: int, policy: Policy) -> Step:
    match event:
        case Placed():
            return _placed(env, event, now_ms, policy)
        case DestroyRequested():
            return _destroy_requested(env, event, now_ms)
        case DrainRequested():
            return operations.request_drain(env, event, now_ms, policy)
        case RotateRequested():
            return operations.request_rotation(env, event, now_ms, policy)
        case NetworkRequested():
            return operations.request_network(env, event, now_ms, policy)
        case SnapshotRequested():
            return operations.request_snapshot(env, event, now_ms, policy)
        case RestoreRequested():
            return operations.request_restore(env, event, now_ms, policy)
        case _:  # pragma: no cover
            assert_never(event)


def _outcome(env: Environment, event: _Outcome, now_ms: int, policy: Policy) -> Step:
    match event:
        case BootSucceeded():
            return _boot_succeeded(env, event, now_ms, policy)
        case BootRefused():
            return _boot_refused(env, event, now_ms)
        case SetUpSucceeded():
            return _set_up_succeeded(env, event, now_ms)
        case AgentDrained():
            return operations.agent_drained(env, event, now_ms)
        case TokenRotated():
            return operations.token_rotated(env, event, now_ms)
        case NetworkChanged():
            return operations.network_changed(env, event, now_ms)
        case SnapshotTaken():
            return operations.snapshot_taken(env, event, now_ms)
        case SnapshotRestored():
            return operations.snapshot_restored(env, event, now_ms)
        case ActionRefused():
            return _action_refused(env, event, now_ms, policy)
        case DestroyConfirmed():
            return _destroy_confirmed(env, event, now_ms)
        case OutcomeUnknown():
            return _outcome_unknown(env, event, now_ms, policy)
        case _:  # pragma: no cover
            assert_never(event)


def _observation(env: Environment, event: _Observation, now_ms: int) -> Step:
    match event:
        case MachineExited():
            return _machine_gone(env, event.machine_id, "machine_exited", event.message, event.cause, now_ms)
        case MachineMissing():
            message = "the host no longer knows the machine"
            return _machine_gone(env, event.machine_id, "machine_missing", message, event.cause, now_ms)
        case HostLost():
            return _host_lost(env, event, now_ms)
        case AgentSeen():
            return _agent_seen(env, event, now_ms)
        case HealthSeen():
            return _health_seen(env, event, now_ms)
        case _:  # pragma: no cover
            assert_never(event)


def _report(env: Environment, event: _Report, now_ms: int) -> Step:
    """What is told and changes nothing else. Nothing comes after the end."""
    match event:
        case Reported():
            return _reported(env, event, now_ms)
        case OutputSeen() | CommandsEnded() if env.is_terminal:
            return Step(env)
        case OutputSeen():
            return _output_seen(env, event, now_ms)
        case CommandsEnded():
            return _commands_ended(env, event, now_ms)
        case _:  # pragma: no cover
            assert_never(event)


# -- place, boot and setup -----------------------------------------------------------------------------------------


def _placed(env: Environment, event: Placed, now_ms: int, policy: Policy) -> Step:
    if not env.is_queued:
        return Step(env)
    waited = replace(env.timings, schedule_ms=float(now_ms - env.created_at_ms))
    record = replace(env, host_id=event.host_id, queued_until_ms=None, placed_at_ms=now_ms, timings=waited)
    message = f"it got a place on host {event.host_id}"
    told = tell(record, Kind.HOST, event.cause, now_ms, message=message, reason="placed")
    return give(told, _boot(record, event.cause, now_ms, policy))


def _boot(env: Environment, cause: str, now_ms: int, policy: Policy) -> BootMachine:
    return BootMachine(
        seq=env.action_seq + 1,
        cause=cause,
        host_id=env.host_id,
        machine_id=env.machine_id,
        incarnation=env.incarnation,
        deadline_ms=now_ms + policy.boot_deadline_ms,
    )


def _boot_succeeded(env: Environment, event: BootSucceeded, now_ms: int, policy: Policy) -> Step:
    if not isinstance(env.pending, BootMachine) or env.pending.seq != event.seq:
        return Step(env)
    timings = replace(event.timings, schedule_ms=env.timings.schedule_ms)
    record = replace(
        env,
        pending=None,
        timings=timings,
        host_address=event.host_address,
        ports=event.ports,
        error="",
        updated_at_ms=now_ms,
    )
    if not env.duties.setup:
        return _run(record, event.cause, now_ms)
    setup = SetUpMachine(
        seq=env.action_seq + 1,
        cause=event.cause,
        host_id=env.host_id,
        machine_id=env.machine_id,
        incarnation=env.incarnation,
        deadline_ms=now_ms + policy.setup_deadline_ms + env.duties.startup_timeout_s * 1000,
    )
    return give(Step(record), setup)


def _set_up_succeeded(env: Environment, event: SetUpSucceeded, now_ms: int) -> Step:
    if not isinstance(env.pending, SetUpMachine) or env.pending.seq != event.seq:
        return Step(env)
    timings = replace(env.timings, setup_ms=event.setup_ms)
    return _run(replace(env, pending=None, timings=timings, error=""), event.cause, now_ms)


def _run(env: Environment, cause: str, now_ms: int) -> Step:
    return enter(replace(env, running_at_ms=now_ms, last_activity_ms=now_ms), State.RUNNING, cause, now_ms)


def _boot_refused(env: Environment, event: BootRefused, now_ms: int) -> Step:
    if not isinstance(env.pending, BootMachine) or env.pending.seq != event.seq:
        return Step(env)
    return end(env, Ending(state=State.FAILED, reason=event.reason, message=event.message), event.cause, now_ms)


# -- outcomes of all actions ---------------------------------------------------------------------------------------


def _action_refused(env: Environment, event: ActionRefused, now_ms: int, policy: Policy) -> Step:
    action = env.pending
    if action is None or action.seq != event.seq or isinstance(action, BootMachine | DestroyMachine):
        return Step(env)
    if isinstance(action, SetUpMachine):
        return end(env, Ending(state=State.FAILED, reason=event.reason, message=event.message), event.cause, now_ms)
    return operations.refuse(env, action, event, now_ms, policy)


def _outcome_unknown(env: Environment, event: OutcomeUnknown, now_ms: int, policy: Policy) -> Step:
    action = env.pending
    if action is None or action.seq != event.seq:
        return Step(env)
    attempt = action.attempt + 1
    pause = backoff_ms(attempt, first_ms=policy.backoff_first_ms, max_ms=policy.backoff_max_ms, key=env.uid)
    if isinstance(action, BootMachine | SetUpMachine) and now_ms + pause >= action.deadline_ms:
        # The destroy that follows has a newer number. What leaves the machine alive is given up at its deadline, not
        # before: until then the order whose outcome is unknown may still be taken up.
        return _overdue(env, action, event.message, event.cause, now_ms, policy)
    again = replace(action, seq=env.action_seq + 1, attempt=attempt, not_before_ms=now_ms + pause)
    found = Step(replace(env, error=event.message, updated_at_ms=now_ms))
    if isinstance(action, DestroyMachine) and attempt == DEAD_LETTER_ATTEMPTS:
        found = tell(found.record, Kind.DEAD_LETTER, event.cause, now_ms, message=event.message)
    return give(found, again)


def _overdue(env: Environment, action: TimedAction, message: str, cause: str, now_ms: int, policy: Policy) -> Step:
    """Give up what was not done by its deadline: a boot or setup with the environment, the rest alone."""
    if isinstance(action, BootMachine | SetUpMachine):
        reason, sentence = TIMEOUTS[type(action)]
        return end(env, Ending(state=State.FAILED, reason=reason, message=message or sentence), cause, now_ms)
    return operations.give_up_late(env, action, message, cause, now_ms, policy)


def _destroy_confirmed(env: Environment, event: DestroyConfirmed, now_ms: int) -> Step:
    if not isinstance(env.pending, DestroyMachine) or env.pending.seq != event.seq:
        return Step(env)
    ending = env.ending or Ending(state=State.DESTROYED, reason="deleted")
    record = replace(env, pending=None, ended_at_ms=now_ms, error=ending.message)
    return enter(record, ending.state, event.cause, now_ms)


def _destroy_requested(env: Environment, event: DestroyRequested, now_ms: int) -> Step:
    if env.desired is Desired.DESTROYED:
        return Step(env)
    return end(env, Ending(state=State.DESTROYED, reason="deleted"), event.cause, now_ms)


# -- observations --------------------------------------------------------------------------------------------------


def _machine_gone(env: Environment, machine_id: str, reason: str, message: str, cause: str, now_ms: int) -> Step:
    if env.machine_id != machine_id or not expects_machine(env):
        # While it boots or is restored, the action's own outcome speaks; while destroying, gone is what we want.
        return Step(env)
    return end(env, Ending(state=State.FAILED, reason=reason, message=message), cause, now_ms)


def _host_lost(env: Environment, event: HostLost, now_ms: int) -> Step:
    if env.is_terminal or env.is_queued or env.host_id != event.host_id:
        return Step(env)
    return lose(env, event.host_id, event.cause, now_ms)


def _agent_seen(env: Environment, event: AgentSeen, now_ms: int) -> Step:
    new, old = event.status, env.agent
    if not expects_machine(env):
        return Step(env)
    if old is not None and (new.state, new.restarts, new.exit_code) == (old.state, old.restarts, old.exit_code):
        return Step(env)
    if old is not None and old.state is AgentState.DRAINED:
        # The drain's own outcome has spoken; what was seen before may arrive after.
        return Step(env)
    data = {"restarts": str(new.restarts)}
    if new.exit_code is not None:
        data["exit_code"] = str(new.exit_code)
    record = replace(env, agent=new)
    return tell(record, Kind.AGENT, event.cause, now_ms, message=new.message, reason=new.state, data=data)


def _health_seen(env: Environment, event: HealthSeen, now_ms: int) -> Step:
    new, old = event.status, env.health
    if not expects_machine(env):
        return Step(env)
    if new == old:
        return Step(env)
    record = replace(env, health=new)
    if old is not None and (new.state, new.message) == (old.state, old.message):
        # Another count is shown, but is no news; as with activity, `updated_at_ms` stays.
        return Step(record)
    data = {"failures": str(new.failures)}
    return tell(record, Kind.HEALTH, event.cause, now_ms, message=new.message, reason=new.state, data=data)


def _reported(env: Environment, event: Reported, now_ms: int) -> Step:
    if event.kind is Kind.STATE:
        raise AssertionError(f"{env.uid}: a state is told by entering it, not by {event.cause}")
    if env.is_terminal:
        return Step(env)
    return tell(env, event.kind, event.cause, now_ms, message=event.message, reason=event.reason, data=event.data)


def _output_seen(env: Environment, event: OutputSeen, now_ms: int) -> Step:
    """Every byte is told once, whoever begins again: how far it was told is saved with what was told."""
    if event.offset < env.startup_told.get(event.stream, 0):
        return Step(env)
    record = replace(env, startup_told=env.startup_told | {event.stream: event.end})
    data = {"stream": event.stream, "offset": str(event.offset)}
    return tell(record, Kind.STARTUP_OUTPUT, event.cause, now_ms, message=event.text, data=data)


def _commands_ended(env: Environment, event: CommandsEnded, now_ms: int) -> Step:
    record, facts = env, list[Fact]()
    for ended in event.commands:
        told = tell(record, Kind.EXEC, ended.cause, now_ms, message=ended.message, reason=ended.reason, data=ended.data)
        record = told.record
        facts += told.facts
    return Step(record, (), tuple(facts))


def _activity_seen(env: Environment, event: ActivitySeen, now_ms: int, policy: Policy) -> Step:
    seen_ms = now_ms if event.at_ms is None else min(event.at_ms, now_ms)
    if env.state is not State.RUNNING or seen_ms < env.last_activity_ms + policy.activity_grain_ms:
        return Step(env)
    # `updated_at_ms` stays: reconcile must be able to judge a busy environment by a list older than its last command.
    return Step(replace(env, last_activity_ms=seen_ms))


# -- time ----------------------------------------------------------------------------------------------------------


def _tick(env: Environment, event: Tick, now_ms: int, policy: Policy) -> Step:
    due = next_deadline(env, policy)
    if due is None or now_ms < due.at_ms:
        return Step(env)
    if isinstance(due.then, Ending):
        return end(env, due.then, event.cause, now_ms)
    return _overdue(env, due.then, env.error if due.then.attempt else "", event.cause, now_ms, policy)


def next_deadline_ms(env: Environment, policy: Policy) -> int | None:
    """When a Tick will do something if nothing else happens; None: never."""
    due = next_deadline(env, policy)
    return None if due is None else due.at_ms


def with_schedule_time(env: Environment, schedule_ms: float) -> Environment:
    """Record how long placement took."""
    return replace(env, timings=replace(env.timings, schedule_ms=schedule_ms))
