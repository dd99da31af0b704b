"""Compare what the store expects of one host with what the host lists, and plan what to do. One host at a time.

Rules of this file:
- A suspicion is acted upon at its second strike in a row; only a machine that reports its own end counts at once.
- A list is evidence only about records that have not changed since it was asked for.
- Machines of another cluster, or of none, are never touched.
- Environments that are being made or destroyed are left to their pending action.
"""

from collections.abc import Iterator, Sequence

import msgspec

from fusevm.core.lifecycle import SETTLED
from fusevm.core.policy import Policy
from fusevm.model.environment import Environment, Event, MachineExited, MachineMissing
from fusevm.model.host import Host, HostHealth
from fusevm.model.machine import Phase

#: How many lists in a row must say so.
STRIKES_TO_ACT = 2
_OVER = frozenset({Phase.STOPPED, Phase.FAILED})


class ObservedMachine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine in a host's list."""

    id: str
    #: Empty when the machine was made by hand, without a fence.
    cluster: str
    uid: str
    incarnation: int
    phase: Phase
    error: str = ""


class Strikes(msgspec.Struct, frozen=True, kw_only=True):
    """Suspicions of earlier lists. Kept in memory by the watcher of the host; losing them only delays."""

    #: Suspicion to how many lists in a row have raised it.
    counts: dict[str, int] = {}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What one list leads to."""

    #: (environment uid, event) to feed to `lifecycle.step`.
    events: tuple[tuple[str, Event], ...] = ()
    #: Machines nobody wants. Destroy each with its own uid and incarnation as the fence; repeated until it is gone.
    destroy: tuple[ObservedMachine, ...] = ()
    #: To hand to the next call.
    strikes: Strikes = Strikes()


def plan(
    host_id: str,
    cluster: str,
    expected: Sequence[Environment],
    observed: Sequence[ObservedMachine],
    strikes: Strikes,
    *,
    listed_at_ms: int,
    cause: str,
) -> Plan:
    """Decide what a host's machine list means.

    `listed_at_ms` is when the list was *asked for*. Read `expected` (the live environments of the host; ended ones do
    no harm) *after* the list has arrived: records are saved before machines are made, so a machine without a record in
    a later reading is really nobody's.
    """
    records = {env.uid: env for env in expected if env.host_id == host_id}
    ours = [machine for machine in observed if machine.cluster == cluster]
    counts: dict[str, int] = {}

    def is_due(suspicion: str) -> bool:
        counts[suspicion] = strikes.counts.get(suspicion, 0) + 1
        return counts[suspicion] >= STRIKES_TO_ACT

    destroy = tuple(
        machine for machine in ours if _is_orphan(machine, records.get(machine.uid)) and is_due(f"orphan {machine.id}")
    )
    present = {machine.id: machine for machine in ours}
    events: list[tuple[str, Event]] = []
    for env in _judged(records, listed_at_ms):
        machine = present.get(env.machine_id)
        if machine is None:
            if is_due(f"missing {env.machine_id}"):
                events.append((env.uid, MachineMissing(cause=cause, machine_id=env.machine_id)))
        elif machine.phase in _OVER:
            message = machine.error or f"the host reports the machine as {machine.phase}"
            events.append((env.uid, MachineExited(cause=cause, machine_id=machine.id, message=message)))
    return Plan(events=tuple(events), destroy=destroy, strikes=Strikes(counts=counts))


def host_health(host: Host, now_ms: int, policy: Policy) -> HostHealth:
    """What the silence of a host means. A host that never answered is measured from its registration."""
    silent_ms = now_ms - max(host.last_seen_ms, host.created_at_ms)
    if silent_ms >= policy.host_lost_ms:
        return HostHealth.LOST
    return HostHealth.UNREACHABLE if silent_ms >= policy.host_unreachable_ms else HostHealth.OK


def _is_orphan(machine: ObservedMachine, env: Environment | None) -> bool:
    if env is None or env.is_terminal:
        return True
    # A newer incarnation than the record's means that our reading is old, never that the machine is.
    return machine.incarnation < env.incarnation


def _judged(records: dict[str, Environment], listed_at_ms: int) -> Iterator[Environment]:
    """The records that this list can say something about."""
    return (env for env in records.values() if env.state in SETTLED and env.updated_at_ms < listed_at_ms)
