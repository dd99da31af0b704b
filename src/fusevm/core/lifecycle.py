"""The life of an environment, decided by one pure function.

`step(environment, event, now_ms, policy)` takes the durable record and one event and returns the new record, the
actions to perform and the facts to publish. The store writes all of it in one transaction; a worker performs the action
and feeds the outcome back as the next event.

Rules of this file:
- Every action has its own `seq`, a repetition included; an outcome whose `seq` is not that of the pending action
  changes nothing. So late, repeated and reordered outcomes are harmless, and a destroy supersedes a boot at once.
- Every end goes through a confirmed DestroyMachine, except on a lost host: reconcile destroys what it still has when it
  comes back.
- A boot is given up at its deadline, a destroy never.
- Nothing here reads a clock or makes an id. Clocks of replicas differ: the times of a record never run backwards.
"""

from typing import assert_never

import msgspec
from msgspec.structs import replace

from fusevm.core.backoff import backoff_ms
from fusevm.core.policy import Policy
from fusevm.model.environment import (
    ALLOWED,
    Action,
    ActivitySeen,
    BootMachine,
    BootRefused,
    BootSucceeded,
    Desired,
    DestroyConfirmed,
    DestroyMachine,
    DestroyRequested,
    DrainRequested,
    Ending,
    Environment,
    Event,
    HostLost,
    MachineExited,
    MachineMissing,
    OutcomeUnknown,
    Spec,
    State,
    Tick,
)
from fusevm.model.errors import WrongState
from fusevm.model.fact import Fact, Kind

#: A machine is up and no action is at work on it.
SETTLED = frozenset({State.RUNNING, State.PAUSED, State.DRAINING})
#: After this many attempts at a destroy a fact asks for a person; the attempts go on.
DEAD_LETTER_ATTEMPTS = 5


class Step(msgspec.Struct, frozen=True):
    """What one event leads to. An unchanged record with nothing else means: ignore."""

    record: Environment
    actions: tuple[Action, ...] = ()
    facts: tuple[Fact, ...] = ()


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The ids that the shell made for a new environment."""

    uid: str
    task_id: str
    machine_id: str
    tenant: str = ""


def begin(identity: Identity, spec: Spec, host_id: str, *, cause: str, now_ms: int, policy: Policy) -> Step:
    """A new environment, placed on `host_id`, with its boot as the pending action."""
    boot = BootMachine(
        seq=1,
        cause=cause,
        host_id=host_id,
        machine_id=identity.machine_id,
        incarnation=1,
        deadline_ms=now_ms + policy.boot_deadline_ms,
    )
    record = Environment(
        uid=identity.uid,
        task_id=identity.task_id,
        tenant=identity.tenant,
        spec=spec,
        state=State.PROVISIONING,
        desired=Desired.RUNNING,
        host_id=host_id,
        machine_id=identity.machine_id,
        incarnation=1,
        action_seq=1,
        pending=boot,
        event_seq=1,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        last_activity_ms=now_ms,
    )
    fact = Fact(uid=record.uid, seq=1, kind=Kind.STATE, state=record.state, at_ms=now_ms, cause=cause)
    return Step(record, (boot,), (fact,))


def step(env: Environment, event: Event, now_ms: int, policy: Policy) -> Step:
    """Decide what `event` means for `env`.

    Pure and total: late and repeated events return the record unchanged; a request that the state forbids raises
    WrongState. `updated_at_ms` changes with everything but activity; `revision` is the store's.
    """
    now_ms = max(now_ms, env.updated_at_ms)
    match event:
        case BootSucceeded():
            return _boot_succeeded(env, event, now_ms)
        case BootRefused():
            return _boot_refused(env, event, now_ms)
        case DestroyConfirmed():
            return _destroy_confirmed(env, event, now_ms)
        case OutcomeUnknown():
            return _outcome_unknown(env, event, now_ms, policy)
        case DestroyRequested():
            return _destroy_requested(env, event, now_ms)
        case DrainRequested():
            return _drain_requested(env, event, now_ms)
        case MachineExited():
            return _machine_gone(env, event.machine_id, "machine_exited", event.message, event.cause, now_ms)
        case MachineMissing():
            message = "the host no longer knows the machine"
            return _machine_gone(env, event.machine_id, "machine_missing", message, event.cause, now_ms)
        case HostLost():
            return _host_lost(env, event, now_ms)
        case ActivitySeen():
            return _activity_seen(env, now_ms, policy)
        case Tick():
            return _tick(env, event, now_ms, policy)
        case _:  # pragma: no cover
            assert_never(event)


# -- outcomes of actions -------------------------------------------------------------------------------------------


def _boot_succeeded(env: Environment, event: BootSucceeded, now_ms: int) -> Step:
    if not isinstance(env.pending, BootMachine) or env.pending.seq != event.seq:
        return Step(env)
    timings = replace(event.timings, schedule_ms=env.timings.schedule_ms)
    record = replace(env, pending=None, running_at_ms=now_ms, last_activity_ms=now_ms, timings=timings, error="")
    return _enter(record, State.RUNNING, event.cause, now_ms)


def _boot_refused(env: Environment, event: BootRefused, now_ms: int) -> Step:
    if not isinstance(env.pending, BootMachine) or env.pending.seq != event.seq:
        return Step(env)
    return _end(env, Ending(state=State.FAILED, reason=event.reason, message=event.message), event.cause, now_ms)


def _destroy_confirmed(env: Environment, event: DestroyConfirmed, now_ms: int) -> Step:
    if not isinstance(env.pending, DestroyMachine) or env.pending.seq != event.seq:
        return Step(env)
    ending = env.ending or Ending(state=State.DESTROYED, reason="deleted")
    record = replace(env, pending=None, ended_at_ms=now_ms, error=ending.message)
    return _enter(record, ending.state, event.cause, now_ms)


def _outcome_unknown(env: Environment, event: OutcomeUnknown, now_ms: int, policy: Policy) -> Step:
    action = env.pending
    if action is None or action.seq != event.seq:
        return Step(env)
    attempt = action.attempt + 1
    pause = backoff_ms(attempt, first_ms=policy.backoff_first_ms, max_ms=policy.backoff_max_ms, key=env.uid)
    if isinstance(action, BootMachine) and now_ms + pause >= action.deadline_ms:
        ending = Ending(state=State.FAILED, reason="boot_timeout", message=event.message)
        return _end(env, ending, event.cause, now_ms)
    seq = env.action_seq + 1
    again = replace(action, seq=seq, attempt=attempt, not_before_ms=now_ms + pause)
    record = replace(env, pending=again, action_seq=seq, error=event.message, updated_at_ms=now_ms)
    if isinstance(action, DestroyMachine) and attempt == DEAD_LETTER_ATTEMPTS:
        record, fact = _fact(record, Kind.DEAD_LETTER, event.cause, now_ms, message=event.message)
        return Step(record, (again,), (fact,))
    return Step(record, (again,))


# -- requests ------------------------------------------------------------------------------------------------------


def _destroy_requested(env: Environment, event: DestroyRequested, now_ms: int) -> Step:
    if env.desired is Desired.DESTROYED:
        return Step(env)
    return _end(env, Ending(state=State.DESTROYED, reason="deleted"), event.cause, now_ms)


def _drain_requested(env: Environment, event: DrainRequested, now_ms: int) -> Step:
    if env.state is State.DRAINING:
        return Step(env)
    if env.state is not State.RUNNING:
        raise WrongState(id=env.id, state=env.state, wanted="only a running environment can be drained")
    record = replace(env, desired=Desired.DRAINED, draining_at_ms=now_ms)
    return _enter(record, State.DRAINING, event.cause, now_ms)


# -- observations --------------------------------------------------------------------------------------------------


def _machine_gone(env: Environment, machine_id: str, reason: str, message: str, cause: str, now_ms: int) -> Step:
    if env.machine_id != machine_id or env.state not in SETTLED:
        # While provisioning, the boot's own outcome speaks; while destroying, gone is what we want.
        return Step(env)
    return _end(env, Ending(state=State.FAILED, reason=reason, message=message), cause, now_ms)


def _host_lost(env: Environment, event: HostLost, now_ms: int) -> Step:
    if env.is_terminal or env.host_id != event.host_id:
        return Step(env)
    message = f"host {event.host_id} was lost"
    ending = env.ending or Ending(state=State.FAILED, reason="host_lost", message=message)
    record = replace(
        env,
        desired=Desired.DESTROYED,
        pending=None,
        action_seq=env.action_seq + 1,
        ending=ending,
        error=message,
        ended_at_ms=now_ms,
    )
    return _enter(record, ending.state, event.cause, now_ms)


def _activity_seen(env: Environment, now_ms: int, policy: Policy) -> Step:
    if env.state is not State.RUNNING or now_ms < env.last_activity_ms + policy.activity_grain_ms:
        return Step(env)
    # `updated_at_ms` stays: reconcile must be able to judge a busy environment by a list older than its last command.
    return Step(replace(env, last_activity_ms=now_ms))


def _tick(env: Environment, event: Tick, now_ms: int, policy: Policy) -> Step:
    due = _next_deadline(env, policy)
    if due is None or now_ms < due[0]:
        return Step(env)
    return _end(env, due[1], event.cause, now_ms)


def next_deadline_ms(env: Environment, policy: Policy) -> int | None:
    """When a Tick will end this environment if nothing else happens; None: never."""
    due = _next_deadline(env, policy)
    return None if due is None else due[0]


def _next_deadline(env: Environment, policy: Policy) -> tuple[int, Ending] | None:
    return min(_deadlines(env, policy), key=lambda item: item[0], default=None)


def _deadlines(env: Environment, policy: Policy) -> list[tuple[int, Ending]]:
    found: list[tuple[int, Ending]] = []
    if env.desired is Desired.DESTROYED:
        return found
    runtime = env.spec.max_runtime_seconds
    if runtime > 0:
        message = f"the limit of {runtime} s was reached"
        ending = Ending(state=State.DESTROYED, reason="max_runtime", message=message)
        found.append((env.created_at_ms + runtime * 1000, ending))
    if isinstance(env.pending, BootMachine):
        ending = Ending(state=State.FAILED, reason="boot_timeout", message="the machine did not come up in time")
        found.append((env.pending.deadline_ms, ending))
    idle = env.spec.idle_timeout_seconds
    if idle > 0 and env.state is State.RUNNING:
        ending = Ending(state=State.DESTROYED, reason="idle", message=f"no activity for {idle} s")
        found.append((env.last_activity_ms + idle * 1000 + policy.activity_grain_ms, ending))
    if env.state is State.DRAINING:
        ending = Ending(state=State.DESTROYED, reason="linger", message="drained, and nobody deleted it")
        found.append(((env.draining_at_ms or env.updated_at_ms) + policy.linger_ms, ending))
    return found


# -- building blocks -----------------------------------------------------------------------------------------------


def _end(env: Environment, ending: Ending, cause: str, now_ms: int) -> Step:
    """Begin the end: supersede whatever is under way by a DestroyMachine."""
    seq = env.action_seq + 1
    destroy = DestroyMachine(
        seq=seq, cause=cause, host_id=env.host_id, machine_id=env.machine_id, incarnation=env.incarnation
    )
    record = replace(
        env,
        desired=Desired.DESTROYED,
        ending=ending,
        error=ending.message,
        pending=destroy,
        action_seq=seq,
    )
    entered = _enter(record, State.DESTROYING, cause, now_ms)
    return Step(entered.record, (destroy,), entered.facts)


def _enter(env: Environment, state: State, cause: str, now_ms: int) -> Step:
    if state not in ALLOWED[env.state]:
        raise AssertionError(f"{env.uid}: {env.state} -> {state} is not in the table")
    record = replace(env, state=state, updated_at_ms=now_ms)
    reason = env.ending.reason if env.ending is not None else ""
    record, fact = _fact(record, Kind.STATE, cause, now_ms, message=record.error, reason=reason)
    return Step(record, (), (fact,))


def _fact(
    env: Environment, kind: Kind, cause: str, now_ms: int, *, message: str = "", reason: str = ""
) -> tuple[Environment, Fact]:
    seq = env.event_seq + 1
    fact = Fact(
        uid=env.uid, seq=seq, kind=kind, state=env.state, at_ms=now_ms, cause=cause, message=message, reason=reason
    )
    return replace(env, event_seq=seq), fact


def with_schedule_time(env: Environment, schedule_ms: float) -> Environment:
    """Record how long placement took."""
    return replace(env, timings=replace(env.timings, schedule_ms=schedule_ms))
