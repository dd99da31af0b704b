"""How a record is changed: the building blocks of `core.lifecycle`, `core.operations` and `core.endings`.

Every change goes through `enter`, `tell` or `give`, so that numbers of facts and actions stay gapless and no transition
outside of the table happens. Nothing here decides anything.
"""

from collections.abc import Mapping

import msgspec
from msgspec.structs import replace

from fusevm.model.environment import (
    ALLOWED,
    Action,
    Environment,
    RestoreMachine,
    SetUpMachine,
    State,
)
from fusevm.model.fact import Fact, Kind
from fusevm.model.snapshot import Snapshot

#: A machine is up, and the environment is neither being made nor ending.
SETTLED = frozenset({State.RUNNING, State.PAUSED, State.DRAINING})


class Step(msgspec.Struct, frozen=True):
    """What one event leads to. An unchanged record with nothing else means: ignore."""

    record: Environment
    actions: tuple[Action, ...] = ()
    facts: tuple[Fact, ...] = ()
    #: Snapshots to save as they now are, in the same transaction.
    snapshots: tuple[Snapshot, ...] = ()


def enter(env: Environment, state: State, cause: str, now_ms: int) -> Step:
    """Change the state and tell it."""
    if state not in ALLOWED[env.state]:
        raise AssertionError(f"{env.uid}: {env.state} -> {state} is not in the table")
    reason = env.ending.reason if env.ending is not None else ""
    return tell(replace(env, state=state), Kind.STATE, cause, now_ms, message=env.error, reason=reason)


def tell(
    env: Environment,
    kind: Kind,
    cause: str,
    now_ms: int,
    *,
    message: str = "",
    reason: str = "",
    data: Mapping[str, str] | None = None,
) -> Step:
    """Add one fact about the record as it now is."""
    seq = env.event_seq + 1
    fact = Fact(
        uid=env.uid,
        seq=seq,
        kind=kind,
        state=env.state,
        at_ms=now_ms,
        cause=cause,
        message=message,
        reason=reason,
        data=dict(data or {}),
    )
    return Step(replace(env, event_seq=seq, updated_at_ms=now_ms), (), (fact,))


def tell_snapshot(
    env: Environment, snapshot: Snapshot, cause: str, now_ms: int, *, reason: str, message: str = ""
) -> Step:
    """Save a snapshot as it now is, and tell what became of it."""
    data = {"snapshot_id": snapshot.id}
    told = tell(env, Kind.SNAPSHOT, cause, now_ms, message=message, reason=reason, data=data)
    return replace(told, snapshots=(snapshot,))


def after(first: Step, second: Step) -> Step:
    """Both in one: `second` went on with the record of `first`."""
    return Step(
        second.record,
        first.actions + second.actions,
        first.facts + second.facts,
        first.snapshots + second.snapshots,
    )


def give(step: Step, action: Action) -> Step:
    """Make `action` the pending one of what a step leads to. Its number is the next one."""
    record = replace(step.record, pending=action, action_seq=action.seq)
    return Step(record, (*step.actions, action), step.facts, step.snapshots)


def action_name(action: Action) -> str:
    """The action in snake_case, as messages and metrics call it."""
    return str(type(action).__struct_config__.tag)


def expects_machine(env: Environment) -> bool:
    """Is there a machine that must be running now? Not while an action makes it, starts it again or destroys it: the
    action's own outcome speaks then."""
    if isinstance(env.pending, RestoreMachine):
        return False
    return env.state in SETTLED or isinstance(env.pending, SetUpMachine)
