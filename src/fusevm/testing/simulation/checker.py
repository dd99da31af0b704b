"""What must hold in a simulated cluster: at every moment, and when it has come to rest.

The checker sees what really happens (commits, machines, leases), not what the control plane believes. Beside
`core.invariants` it knows rules about effects: nothing lives on after its confirmed end, nothing healthy is given up,
no superseded order has an effect, no lease is held twice.
"""

from collections.abc import Callable, Iterator, Mapping

import msgspec
from msgspec.structs import replace

from fusevm.control.store import host_rows
from fusevm.control.store.protocol import Committed
from fusevm.control.store.sqlite import drive, drive_moment
from fusevm.control.store.world import read_world
from fusevm.core.invariants import World, violations
from fusevm.core.placement import limits
from fusevm.core.reconcile import ObservedMachine
from fusevm.core.record import SETTLED
from fusevm.core.story import story
from fusevm.model.environment import DestroyMachine, Environment
from fusevm.model.host import Resources
from fusevm.model.machine import Fence, Phase
from fusevm.model.snapshot import SnapshotState
from fusevm.testing.inline_store import InlineDatabase
from fusevm.testing.simulation.host import SimHost
from fusevm.testing.simulation.network import Network
from fusevm.testing.simulation.scale import POLICY
from fusevm.testing.simulation.trace import Trace
from fusevm.wire.host_api import MachineBody

_ALIVE = frozenset({Phase.CREATING, Phase.RUNNING, Phase.PAUSED, Phase.STOPPED})
#: Reason of an end to the phases in which a machine must not meet it. One that is stopped was put back to a snapshot by
#: an order that has been given up meanwhile; one that is paused has met a fault, and stays so.
_WELL = {
    "machine_missing": frozenset({Phase.CREATING, Phase.RUNNING, Phase.PAUSED}),
    "machine_exited": frozenset({Phase.CREATING, Phase.RUNNING}),
}
_WORKED_ON = frozenset({SnapshotState.CREATING, SnapshotState.RESTORING, SnapshotState.DELETING})
#: A host may be called lost this much before its time: the heartbeat's own duration.
SLACK_S = 3.0


class Violation(msgspec.Struct, frozen=True):
    """A broken rule."""

    at_s: float
    #: The object concerned: an environment's uid, a host's, replica's or snapshot's id; or empty.
    subject: str
    rule: str


class Checker:
    """Implements `HostWatch` and `CommitWatch`."""

    def __init__(self, trace: Trace, now_s: Callable[[], float]) -> None:
        self.violations: list[Violation] = []
        self.hosts: dict[str, SimHost] = {}
        self.network: Network | None = None
        self.database: InlineDatabase | None = None
        #: uid to the record as it was committed last.
        self.records: dict[str, Environment] = {}
        #: uids that some client was told.
        self.promised: dict[str, str] = {}
        self._by_key: dict[str, str] = {}
        self._confirmed: dict[str, None] = {}
        #: uid to the number of the newest action that is over, done or given up, while its machine went on.
        self._over_seq: dict[str, int] = {}
        self._trace = trace
        self._now_s = now_s
        self._seen: dict[tuple[str, str], None] = {}

    def broken(self, subject: str, rule: str) -> None:
        """Note a broken rule, once."""
        if (subject, rule) not in self._seen:
            self._seen[subject, rule] = None
            self.violations.append(Violation(self._now_s(), subject, rule))
            self._trace.note(subject, f"BROKEN: {rule}")

    # -- clients --------------------------------------------------------------------------------------------------

    def told(self, uid: str, task_id: str, key: str) -> None:
        """A client was told that its create was accepted."""
        self.promised[uid] = task_id
        if key and self._by_key.setdefault(key, uid) != uid:
            self.broken(uid, f"the Idempotency-Key {key} made this one and {self._by_key[key]}")

    # -- commits --------------------------------------------------------------------------------------------------

    def committed(self, replica: str, committed: Committed) -> None:
        record = committed.record
        before = self.records.get(record.uid)
        self.records[record.uid] = record
        pending = f", {type(record.pending).__name__} {record.pending.seq}" if record.pending is not None else ""
        leased = " (its own)" if committed.leased_to else ""
        reason = f" for {record.ending.reason}" if record.ending is not None else ""
        self._trace.note(record.uid, f"{replica}: {record.revision} {record.state}{reason}{pending}{leased}")
        if before is not None and record.revision != before.revision + 1:
            self.broken(record.uid, f"revision {record.revision} follows {before.revision}")
        if before is not None and before.is_terminal:
            self.broken(record.uid, "changed after its end")
        if record.ending is not None and (before is None or before.ending is None):
            self._given_up(replica, record)
        if record.is_terminal and before is not None:
            self._ended(before, record)
        if before is not None and before.pending is not None and record.pending is None and not record.is_terminal:
            self._over_seq[record.uid] = before.pending.seq
        if record.host_id and (before is None or not before.host_id):
            self._booked(record)

    def _given_up(self, replica: str, record: Environment) -> None:
        reason = record.ending.reason if record.ending is not None else ""
        host = self.hosts.get(record.host_id)
        if host is None:
            return
        machine = host.table.get(record.machine_id)
        if machine is not None and machine.phase in _WELL.get(reason, ()):
            self.broken(record.uid, f"given up ({reason}), but {machine.id} is {machine.phase} on {host.id}")
        heard_s = self.network.heard_s.get((replica, host.id), 0.0) if self.network is not None else 0.0
        silent_s = self._now_s() - heard_s
        if reason == "host_lost" and silent_s < POLICY.host_lost_ms / 1000 - SLACK_S:
            self.broken(record.uid, f"given up with {host.id}, which {replica} heard of {silent_s:.1f} s ago")

    def _ended(self, before: Environment, record: Environment) -> None:
        if not isinstance(before.pending, DestroyMachine) or record.ending is None:
            return
        if record.error != record.ending.message:
            return  # the host was lost while it was to destroy the machine
        self._confirmed[record.uid] = None
        for host, machine in self._alive(record.uid):
            self.broken(record.uid, f"{machine.id} is {machine.phase} on {host.id} after its end was confirmed")

    def _booked(self, record: Environment) -> None:
        """Called within the booking transaction's moment: no other has happened since."""
        if self.database is None:
            return
        host = drive(self.database.connection, host_rows.get(record.host_id))
        if host is None:
            self.broken(record.uid, f"placed on {record.host_id}, which does not exist")
            return
        most = limits(host, POLICY)
        for name in Resources.__struct_fields__:
            if getattr(host.allocated, name) > getattr(most, name):
                self.broken(host.id, f"{name} is booked beyond its limit of {getattr(most, name)}")

    # -- hosts ----------------------------------------------------------------------------------------------------

    def made(self, host: SimHost, machine: MachineBody) -> None:
        self._trace.note(machine.uid, f"{host.id}: {machine.id} is being made")
        if machine.uid in self._confirmed:
            self.broken(machine.uid, f"{machine.id} is made on {host.id} after its end was confirmed")
        for other, twin in self._alive(machine.uid):
            if twin.id != machine.id or other is not host:
                self.broken(machine.uid, f"{machine.id} on {host.id} and {twin.id} on {other.id} live at once")

    def put_back(self, host: SimHost, machine: MachineBody, fence: Fence, *, is_stale: bool) -> None:
        self._trace.note(machine.uid, f"{host.id}: {machine.id} is put back to a snapshot by {fence.action_seq}")
        if is_stale:
            self.broken(machine.uid, f"{machine.id} was put back by the superseded action {fence.action_seq}")

    def accepted(self, host: SimHost, fence: Fence, what: str) -> None:
        self._trace.note(fence.uid, f"{host.id}: {what} by {fence.action_seq}")
        if fence.action_seq <= self._over_seq.get(fence.uid, -1):
            self.broken(fence.uid, f"{what} by the action {fence.action_seq}, which was over")

    def changed(self, host: SimHost, what: str, subject: str) -> None:
        self._trace.note(subject, f"{host.id}: {what}")

    def _alive(self, uid: str) -> Iterator[tuple[SimHost, MachineBody]]:
        for host in self.hosts.values():
            for machine in host.table.values():
                if machine.uid == uid and machine.phase in _ALIVE and not host.is_gone:
                    yield host, machine

    # -- the whole ------------------------------------------------------------------------------------------------

    def world(self) -> World:
        """Everything at this moment."""
        if self.database is None:
            return World()
        found = drive_moment(self.database.connection, read_world())
        machines = {
            host.id: tuple(_observed(machine) for machine in host.table.values())
            for host in self.hosts.values()
            if not host.is_gone
        }
        return replace(found, machines=machines)

    def look(self) -> World:
        """Check every invariant of the core."""
        world = self.world()
        for rule in violations(world, POLICY):
            self.broken(_subject_of(rule, world), rule)
        self._check_keys(world)
        return world

    def _check_keys(self, world: World) -> None:
        """Users write the Idempotency-Key under which they ask for a snapshot into its comment."""
        made: dict[str, str] = {}
        for snapshot in world.snapshots.values():
            if snapshot.comment and made.setdefault(snapshot.comment, snapshot.id) != snapshot.id:
                self.broken(snapshot.id, f"the Idempotency-Key {snapshot.comment} made this one, too")

    def unrest(self, world: World) -> list[tuple[str, str]]:
        """What is not at rest yet: (subject, sentence)."""
        found: list[tuple[str, str]] = []
        for env in world.environments.values():
            found += self._restless(env)
        found += self._leaks(world.environments)
        found += self._snapshots_left(world)
        return found

    def _restless(self, env: Environment) -> Iterator[tuple[str, str]]:
        if env.is_terminal:
            return
        if env.state not in SETTLED or env.pending is not None:
            pending = type(env.pending).__name__ if env.pending is not None else "nothing"
            yield env.uid, f"stuck: {env.state} with {pending} pending"
            return
        host = self.hosts.get(env.host_id)
        machine = host.table.get(env.machine_id) if host is not None and not host.is_gone else None
        if machine is None or machine.phase is not Phase.RUNNING:
            yield env.uid, f"stuck: {env.state}, but no machine of it runs on {env.host_id}"

    def _leaks(self, environments: Mapping[str, Environment]) -> Iterator[tuple[str, str]]:
        for host in self.hosts.values():
            if host.is_gone:
                continue
            for machine in host.table.values():
                env = environments.get(machine.uid)
                if env is None or env.is_terminal:
                    yield machine.uid, f"leaked: {machine.id} is {machine.phase} on {host.id}, and nobody wants it"

    def _snapshots_left(self, world: World) -> Iterator[tuple[str, str]]:
        for snapshot in world.snapshots.values():
            if snapshot.state in _WORKED_ON:
                yield snapshot.id, f"stuck: snapshot {snapshot.id} is {snapshot.state}"
        for host in self.hosts.values():
            if host.is_gone:
                continue
            for id_ in host.snapshots:
                if id_ not in world.snapshots:
                    yield id_, f"leaked: {host.id} keeps the bytes of {id_}, which has no record"

    def finish(self, world: World) -> None:
        """The end: what is not at rest is broken, and so is every promise that was not kept."""
        for subject, rule in self.unrest(world):
            self.broken(subject, rule)
        for uid, task_id in self.promised.items():
            if uid not in world.environments:
                self.broken(uid, f"lost: a client was told of it (task {task_id}), and there is no record")

    def story(self, subject: str) -> list[str]:
        """All that is known of an object."""
        lines = list(self._trace.about(subject))
        record = self.records.get(subject)
        if record is None:
            return lines
        facts = self.world().facts.get(subject, ())
        return [*story(record, facts), "", *lines, *(f"host: {line}" for line in self._trace.about(record.host_id))]


def _observed(machine: MachineBody) -> ObservedMachine:
    return ObservedMachine(
        id=machine.id,
        cluster=machine.cluster,
        uid=machine.uid,
        incarnation=machine.incarnation,
        phase=machine.phase,
        error=machine.error,
    )


def _subject_of(rule: str, world: World) -> str:
    word = rule.partition(":")[0].split(" ")[-1]
    return word if word in world.environments or word in world.hosts or word in world.snapshots else ""
