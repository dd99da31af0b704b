"""Compare what the store expects of one host with what the host lists, and plan what to do. One host at a time.

Rules of this file:
- A suspicion is acted upon at its second strike in a row; only a machine that reports its own end counts at once.
- A machine that must run and is listed twice in a row in one other phase is stuck in it, and over. A pause belongs to a
  snapshot that is being taken; a boot is judged only after its action has said that the machine runs.
- A list is evidence only about records that have not changed since it was asked for. Two readings say that, one before
  the question and one after the answer; never a clock, since records bear the times of other replicas' clocks.
- Machines of another cluster, or of none, are never touched.
- Only silence gives a host up, as far as heartbeats have found it: what answers and refuses is there, and what nobody
  asked may have been. Time without heartbeats, and heartbeats whose meaning could not be saved, do not count.
- Environments that are being made, put back to a snapshot or destroyed are left to their pending action; one that is
  being set up has a machine already, and is judged.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum, auto

import msgspec
from msgspec.structs import replace

from fusevm.core.policy import Policy
from fusevm.core.record import expects_machine
from fusevm.model.environment import Environment, SnapshotMachine, State
from fusevm.model.event import Event, MachineExited, MachineMissing
from fusevm.model.host import Host, HostHealth
from fusevm.model.machine import Phase

#: How many lists in a row must say so.
STRIKES_TO_ACT = 2
#: An orphan that is still listed after so many attempts to destroy it needs a person; the attempts go on.
STUCK_ATTEMPTS = 5
#: What a machine does not leave by itself.
_OVER = frozenset({Phase.STOPPED, Phase.FAILED})
_SEVERITY = {HostHealth.OK: 0, HostHealth.UNREACHABLE: 1, HostHealth.LOST: 2}


class ObservedMachine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine in a host's list."""

    id: str
    #: Empty when the machine was made by hand, without a fence.
    cluster: str
    uid: str
    incarnation: int
    phase: Phase
    error: str = ""
    #: Seconds since a client last sent something to one of its published ports; None: unknown, or never.
    ports_used_s_ago: int | None = None


class Strikes(msgspec.Struct, frozen=True, kw_only=True):
    """Suspicions of earlier lists. Kept in memory by the watcher of the host; losing them only delays."""

    #: Suspicion to how many lists in a row have raised it.
    counts: dict[str, int] = {}


class Heartbeat(Enum):
    """What came of asking a host who it is."""

    ANSWERED = auto()
    #: It is there, and does not serve us: another token, another cluster, a failure of its own.
    REFUSED = auto()
    SILENT = auto()


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """How long heartbeats in a row have not found a host well. Kept in memory by its watcher; a new one begins anew."""

    #: When the last heartbeat began, by a clock that nobody sets; None: there was none.
    asked_ms: int | None = None
    last: Heartbeat = Heartbeat.ANSWERED
    #: From the first heartbeat without a good answer to the last one.
    unwell_ms: int = 0
    #: From the first one without any answer to the last one.
    silent_ms: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What one list leads to."""

    #: (environment uid, event) to feed to `lifecycle.step`.
    events: tuple[tuple[str, Event], ...] = ()
    #: Machines nobody wants. Destroy each with its own uid and incarnation as the fence; repeated until it is gone.
    destroy: tuple[ObservedMachine, ...] = ()
    #: Those of `destroy` to tell a person about: said once.
    stuck: tuple[ObservedMachine, ...] = ()
    #: Something is wrong with a record that is too young for this list: ask for another one soon.
    is_unsure: bool = False
    #: To hand to the next call.
    strikes: Strikes = Strikes()


def plan(
    host_id: str,
    cluster: str,
    expected: Sequence[Environment],
    observed: Sequence[ObservedMachine],
    strikes: Strikes,
    *,
    known: Mapping[str, int],
    unreadable: Collection[str] = (),
    cause: str,
) -> Plan:
    """Decide what a host's machine list means.

    `known` is what `expectations` made of a reading from *before* the list was asked for. Read `expected` (the live
    environments of the host; ended ones do no harm) *after* the list has arrived: records are saved before machines are
    made, so a machine without a record in a later reading is really nobody's. Machines of `unreadable`, live records
    of this host that could not be read, are not judged.
    """
    records = {env.uid: env for env in expected if env.host_id == host_id}
    ours = [machine for machine in observed if machine.cluster == cluster and machine.uid not in unreadable]
    counts: dict[str, int] = {}

    def is_due(suspicion: str) -> bool:
        counts[suspicion] = strikes.counts.get(suspicion, 0) + 1
        return counts[suspicion] >= STRIKES_TO_ACT

    destroy = tuple(
        machine for machine in ours if _is_orphan(machine, records.get(machine.uid)) and is_due(f"orphan {machine.id}")
    )
    present = {machine.id: machine for machine in ours}
    suspects = [env for env in records.values() if _is_suspect(env, present.get(env.machine_id))]
    judged = [env for env in suspects if known.get(env.uid) == env.action_seq]
    ends = ((env.uid, _end_of(env, present.get(env.machine_id), cause, is_due)) for env in judged)
    events = tuple((uid, event) for uid, event in ends if event is not None)
    stuck = tuple(machine for machine in destroy if counts[f"orphan {machine.id}"] == STRIKES_TO_ACT + STUCK_ATTEMPTS)
    return Plan(
        events=events,
        destroy=destroy,
        stuck=stuck,
        is_unsure=len(judged) < len(suspects),
        strikes=Strikes(counts=counts),
    )


def expectations(records: Iterable[Environment]) -> dict[str, int]:
    """The environments whose machine must be running, to the number of their newest action.

    As long as that number stays the same, no machine was made, started or ended on purpose.
    """
    return {env.uid: env.action_seq for env in records if expects_machine(env)}


def heard(before: Silence, beat: Heartbeat, asked_ms: int, gap_ms: int) -> Silence:
    """Count a heartbeat that began at `asked_ms`. Two that are further apart than `gap_ms` stand for no longer time:
    meanwhile we were stopped."""
    if beat is Heartbeat.ANSWERED:
        return Silence(asked_ms=asked_ms)
    passed_ms = 0 if before.asked_ms is None else min(asked_ms - before.asked_ms, gap_ms)
    was_unwell, was_silent = before.last is not Heartbeat.ANSWERED, before.last is Heartbeat.SILENT
    return Silence(
        asked_ms=asked_ms,
        last=beat,
        unwell_ms=before.unwell_ms + passed_ms if was_unwell else 0,
        silent_ms=before.silent_ms + passed_ms if was_silent and beat is Heartbeat.SILENT else 0,
    )


def host_health(silence: Silence, policy: Policy) -> HostHealth:
    """What heartbeats in a row mean."""
    if silence.silent_ms >= policy.host_lost_ms:
        return HostHealth.LOST
    return HostHealth.UNREACHABLE if silence.unwell_ms >= policy.host_unreachable_ms else HostHealth.OK


def observe_host(host: Host, silence: Silence, problem: str, policy: Policy) -> Host:
    """The record of a host after a heartbeat without a good answer. Only such an answer makes a host well again."""
    health = max(host_health(silence, policy), host.health, key=_SEVERITY.__getitem__)
    if health is HostHealth.OK:
        return host
    return replace(host, health=health, problem=problem, is_refusing=silence.last is Heartbeat.REFUSED)


def _is_orphan(machine: ObservedMachine, env: Environment | None) -> bool:
    if env is None or env.is_terminal:
        return True
    # A newer incarnation than the record's means that our reading is old, never that the machine is.
    return machine.incarnation < env.incarnation


def _is_suspect(env: Environment, machine: ObservedMachine | None) -> bool:
    return expects_machine(env) and (machine is None or not _is_well(env, machine))


def _is_well(env: Environment, machine: ObservedMachine) -> bool:
    if machine.phase is Phase.PAUSED:
        return env.state is State.PAUSED or isinstance(env.pending, SnapshotMachine)
    return machine.phase is Phase.RUNNING


def _end_of(
    env: Environment, machine: ObservedMachine | None, cause: str, is_due: Callable[[str], bool]
) -> Event | None:
    """What to tell of a machine that is not well; None: not yet."""
    if machine is None:
        missing = MachineMissing(cause=cause, machine_id=env.machine_id)
        return missing if is_due(f"missing {env.machine_id}") else None
    if machine.phase in _OVER:
        message = machine.error or f"the host reports the machine as {machine.phase}"
        return MachineExited(cause=cause, machine_id=machine.id, message=message)
    message = f"the host reports the machine as {machine.phase} again and again, and nobody has asked for that here"
    exited = MachineExited(cause=cause, machine_id=machine.id, message=message)
    return exited if is_due(f"{machine.phase} {env.machine_id}") else None
