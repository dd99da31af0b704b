"""What clients do at the published ports of an environment, which only its host sees: use, like a command or a session.

A host tells with its machines how long ago a client last sent something. That time, not the time of the list, is noted
as the last activity, so that it does not matter when and by which replica it is asked for. Who watches the host is also
the only one that ends such an environment as idle, after a list: what no list has said since is unknown, and unknown is
not idle. A control plane that was down, or did not reach the host, ends nothing that is in use.
"""

from collections.abc import Iterable, Sequence

from fusevm.core.endings import deadlines
from fusevm.core.policy import Policy
from fusevm.core.reconcile import ObservedMachine
from fusevm.model.environment import Ending, Environment, State
from fusevm.model.event import ActivitySeen

#: Lasting use is noted this many times per idle timeout.
NOTES_PER_TIMEOUT = 4


def uses(
    expected: Iterable[Environment],
    observed: Sequence[ObservedMachine],
    *,
    cause: str,
    heard_ms: int,
    policy: Policy,
) -> tuple[tuple[str, ActivitySeen], ...]:
    """What a host's list says of the use of ports, where it is worth a note, by environment uid.

    `heard_ms`: when the list arrived. A host that does not tell, because it is too old or has no root, says nothing.
    """
    by_id = {machine.id: machine for machine in observed}
    found = ((env, _used_ms(env, by_id.get(env.machine_id), heard_ms)) for env in expected)
    return tuple(
        (env.uid, ActivitySeen(cause=cause, at_ms=at_ms))
        for env, at_ms in found
        if at_ms is not None and _is_news(env, at_ms, heard_ms, policy)
    )


def waits_for_list(env: Environment, now_ms: int, policy: Policy) -> bool:
    """Would it end as idle now, and nothing else is due, while clients may use it without our knowing?"""
    if not env.ports or not env.spec.idle_timeout_seconds:
        return False
    due = [deadline.then for deadline in deadlines(env, policy) if deadline.at_ms <= now_ms]
    return bool(due) and all(isinstance(it, Ending) and it.reason == "idle" for it in due)


def _used_ms(env: Environment, machine: ObservedMachine | None, heard_ms: int) -> int | None:
    if machine is None or machine.ports_used_s_ago is None:
        return None
    is_same = (machine.uid, machine.incarnation) == (env.uid, env.incarnation)
    return heard_ms - machine.ports_used_s_ago * 1000 if is_same else None


def _is_news(env: Environment, at_ms: int, heard_ms: int, policy: Policy) -> bool:
    """Is it to be written? Not each time: what is asked for again later is still known then."""
    idle_ms = env.spec.idle_timeout_seconds * 1000
    if not idle_ms or env.state is not State.RUNNING:
        return False
    is_later = at_ms >= env.last_activity_ms + policy.activity_grain_ms
    return is_later and heard_ms >= env.last_activity_ms + idle_ms // NOTES_PER_TIMEOUT
