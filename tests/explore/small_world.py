"""A whole cluster in one value: the store's tables, the hosts, and every message that may still arrive.

`World` is immutable; `Cluster.moves` lists everything that can happen next. All decisions come from `fusevm.core`,
unchanged; this file plays the store (transactions), the workers and watchers (which call hosts and feed outcomes back)
and the hosts (idempotent boots, tombstones).

Messages are sets: each may be delivered now, later, twice or never. That is loss, delay, duplication, reordering and
the crash of a worker (its action is repeated by the next) at once, and it keeps the number of worlds finite. A message
is forgotten only when it was tried and changed nothing, and its number is no longer the pending one's. Time has two
values, NOW and FAR; whether a list is older than a record is kept as a relation.

What can be done to a machine that is up (drain, token, snapshot, restore) is asked for at most `wishes` times per
environment, so that numbers stay finite.

The small methods of `Cluster` without an underscore are what `test_seeded_bugs.py` replaces to plant mistakes.
"""

import functools
from collections.abc import Iterator
from itertools import permutations
from typing import Literal, NamedTuple, get_args

import msgspec
from msgspec.structs import replace

from fusevm.core import invariants, lifecycle
from fusevm.core.lifecycle import Identity, Step
from fusevm.core.placement import can_reserve, place
from fusevm.core.policy import Policy
from fusevm.core.queue import plan_placements
from fusevm.core.reconcile import ObservedMachine, Plan, Strikes, expectations, plan
from fusevm.core.snapshots import begin_delete, begin_snapshot
from fusevm.core.spec import complete, resources_of
from fusevm.model import snapshot as snapshot_model
from fusevm.model.environment import (
    Action,
    BootMachine,
    Desired,
    DestroyMachine,
    DrainAgent,
    Environment,
    RestoreMachine,
    RotateToken,
    SetUpMachine,
    SnapshotMachine,
    State,
)
from fusevm.model.errors import Conflict
from fusevm.model.event import (
    ActionRefused,
    AgentDrained,
    BootRefused,
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    Event,
    HostLost,
    MachineExited,
    MachineMissing,
    OutcomeUnknown,
    Placed,
    RestoreRequested,
    RotateRequested,
    SetUpSucceeded,
    SnapshotRequested,
    SnapshotRestored,
    SnapshotTaken,
    Tick,
    TokenRotated,
)
from fusevm.model.fact import Fact
from fusevm.model.host import Host, HostHealth, Resources
from fusevm.model.machine import Phase
from fusevm.model.setup import Duties
from fusevm.model.snapshot import Snapshot, SnapshotState

NOW, FAR = 1_000, 10**9
CLUSTER = "c1"
NONE = Duties()
POLICY = Policy(cpu_overcommit_percent=100, storage_overcommit_percent=100)
SPEC = complete(POLICY)
PATIENT = complete(POLICY, queue_seconds=60)
ONE = resources_of(SPEC)
#: How often the worker of one action may be left without an answer.
MAX_UNKNOWN = 1
_encode = msgspec.json.Encoder().encode

Fault = Literal["boot", "unknown", "time", "drain", "exit", "delete", "host", "reconcile", "glitch", "queue", "refuse"]
EVERYTHING: frozenset[Fault] = frozenset(get_args(Fault))
Wish = Literal["rotate", "snapshot", "restore", "drop"]


class Slot(msgspec.Struct, frozen=True):
    """What the store holds of one environment, or the plan of a create that is not booked yet."""

    planned: str = ""
    env: Environment | None = None
    facts: tuple[Fact, ...] = ()
    placement: str = ""
    #: The host itself has said that the machine is gone for good.
    is_confirmed: bool = False
    snapshots: tuple[Snapshot, ...] = ()
    #: The snapshot, as it was read, that somebody is about to order back; only where snapshots are dropped.
    read: Snapshot | None = None
    #: How often something was asked of the machine.
    asked: int = 0
    #: Ended, cleaned up and without a message that could still do anything: forgotten, so that worlds stay few.
    is_forgotten: bool = False


class Server(msgspec.Struct, frozen=True):
    """One host: the store's record of it, the daemon, and its watcher."""

    record: Host
    is_reachable: bool = True
    was_lost: bool = False
    was_confused: bool = False
    machines: tuple[ObservedMachine, ...] = ()
    #: (uid, incarnation) below and including which nothing is made any more.
    tombstones: tuple[tuple[str, int], ...] = ()
    #: A list on its way to the watcher, and the records of this host that have changed since it was asked for.
    listed: tuple[ObservedMachine, ...] | None = None
    changed: tuple[str, ...] = ()
    strikes: tuple[tuple[str, int], ...] = ()


class Order(NamedTuple):
    """A call to a host. `seq` is 0 for the destroy of an orphan, whose answer nobody waits for."""

    uid: str
    seq: int
    action: Action


class World(msgspec.Struct, frozen=True):
    slots: tuple[Slot, ...]
    servers: tuple[Server, ...]
    orders: tuple[Order, ...] = ()
    #: Outcomes and notices on their way to the store.
    replies: tuple[tuple[str, Event], ...] = ()


class Move(NamedTuple):
    """Something that can happen. `kind`: the system's own progress, a wish of the user, or a fault."""

    kind: Literal["progress", "user", "fault"]
    name: str
    world: World


class Broken(Exception):
    """A rule about a move, not about a world, is broken."""


class Cluster:
    """The rules of one small world: which tasks, how many hosts of which size, which faults."""

    def __init__(
        self,
        *,
        tasks: tuple[str, ...] = ("a", "b"),
        hosts: int = 2,
        room: int = 1,
        faults: frozenset[Fault] = frozenset(),
        comes_back: bool = True,
        duties: Duties = NONE,
        wishes: frozenset[Wish] = frozenset(),
        most_wishes: int = 1,
        most_lost: int = 2,
        is_symmetric: bool = False,
    ) -> None:
        self.tasks = tasks
        self.hosts = hosts
        self.room = room
        self.faults = faults
        self.comes_back = comes_back
        self.duties = duties
        self.wishes = wishes
        self.most_wishes = most_wishes
        #: How many hosts may fall silent, each once.
        self.most_lost = most_lost
        #: Tasks differ and hosts are alike: worlds that differ only by their names are one (`key`).
        self.is_symmetric = is_symmetric
        #: What was found out about environments (`_about`).
        self._known: dict[bytes, bytes] = {}
        if is_symmetric and len(set(tasks)) < len(tasks):
            raise ValueError("tasks that are the same cannot be exchanged")
        self.spec = PATIENT if "queue" in faults else SPEC

    def start(self) -> World:
        room = self.room
        capacity = Resources(cpus=room, ram_mb=ONE.ram_mb * room, storage_gb=ONE.storage_gb * room, vm_count=room)
        return World(
            slots=(Slot(),) * len(self.tasks),
            servers=tuple(
                Server(
                    Host(id=f"h{n}", url="", capacity=capacity, created_at_ms=NOW, updated_at_ms=NOW),
                    machines=(_foreign(n),) if "reconcile" in self.faults else (),
                )
                for n in range(self.hosts)
            ),
        )

    # -- what can happen -------------------------------------------------------------------------------------------

    def moves(self, world: World) -> Iterator[Move]:
        """Everything that can happen next. Raises Broken."""
        for move in self._moves(world):
            if move.world is not world:
                yield move._replace(world=self._tidy(move.world))

    def _moves(self, world: World) -> Iterator[Move]:
        for index, slot in enumerate(world.slots):
            yield from self._kept(world, index, slot)
            if slot.env is not None and not slot.env.is_terminal:
                yield from self._environment(world, index, slot.env)
            elif slot.env is None and not slot.is_forgotten:
                yield from self._create(world, index)
        for order in world.orders:
            yield from self._deliver(world, order)
        for uid, event in world.replies:
            yield Move("progress", f"{uid} hears {event}", self.apply(world, uid, event))
        if "queue" in self.faults:
            yield from self._serve_queue(world)
        for index, server in enumerate(world.servers):
            yield from self._server(world, index, server)

    def _tidy(self, world: World) -> World:
        """Forget messages that can no longer do anything, and environments of which nothing is left."""
        replies = tuple(reply for reply in world.replies if not self._is_spent(world, *reply))
        if replies != world.replies:
            world = replace(world, replies=replies)
        ended = {slot.env.uid for slot in world.slots if slot.env is not None and slot.env.is_terminal}
        orders = tuple(order for order in world.orders if not self._is_done(world, order, ended))
        if orders != world.orders:
            world = replace(world, orders=orders)
        for uid in ended:
            if self._is_gone(world, uid):
                world = _with_slot(world, _index_of(uid), Slot(is_forgotten=True))
        return world

    def _is_spent(self, world: World, uid: str, event: Event) -> bool:
        env = world.slots[_index_of(uid)].env
        if env is None:
            return True
        if isinstance(event, MachineExited):
            may_matter = env.desired is not Desired.DESTROYED
        else:
            may_matter = env.pending is not None and env.pending.seq == getattr(event, "seq", 0)
        return not may_matter and self.apply(world, uid, event) is world

    def _is_done(self, world: World, order: Order, ended: set[str]) -> bool:
        if order.seq and order.uid not in ended:
            return False
        server = _server_of(world, order.action.host_id)
        return server.is_reachable and all(move.world is world for move in self._deliver(world, order))

    def _is_gone(self, world: World, uid: str) -> bool:
        return (
            not any(order.uid == uid for order in world.orders)
            and not any(reply[0] == uid for reply in world.replies)
            and not any(machine.uid == uid for server in world.servers for machine in server.machines)
            and not world.slots[_index_of(uid)].placement
            and not self.problems(world)
        )

    def _create(self, world: World, index: int) -> Iterator[Move]:
        slot = world.slots[index]
        if slot.planned:
            yield Move("progress", f"book {index}", self._book(world, index))
        elif index == 0 or world.slots[index - 1] != Slot():
            records = [server.record for server in world.servers]
            open_ = [record for record in records if can_reserve(record, self.spec, POLICY)]
            if open_ and not self.is_symmetric:
                open_ = [record for record in open_ if record.id == place(records, self.spec, POLICY)]
            for record in open_:
                yield Move("user", f"create {index}", _with_slot(world, index, Slot(planned=record.id)))
            if not open_ and "queue" in self.faults and self.is_free(world, self.tasks[index]):
                yield Move("user", f"create {index} to wait", self._begin(world, index, ""))

    def _serve_queue(self, world: World) -> Iterator[Move]:
        """Give places to those who wait; each is booked if it still fits."""
        envs = [slot.env for slot in world.slots if slot.env is not None and slot.env.is_queued]
        hosts = [server.record for server in world.servers]
        for placed in self._plans(envs, hosts):
            after = world
            for uid, host_id in placed:
                if self.has_room(after, host_id):
                    after = self.apply(after, uid, Placed(cause="x", host_id=host_id))
            yield Move("progress", f"the queue is served: {placed}", after)

    def _plans(self, envs: list[Environment], hosts: list[Host]) -> Iterator[tuple[tuple[str, str], ...]]:
        """The plan; where names are forgotten, one for every order of age and every way to name the hosts."""
        if not self.is_symmetric:
            yield self.plan_queue(envs, hosts)
            return
        for order in permutations(envs):
            aged = [replace(env, created_at_ms=NOW - len(order) + place) for place, env in enumerate(order)]
            for renamed in permutations([host.id for host in hosts]):
                back = {new: host.id for new, host in zip(renamed, hosts, strict=True)}
                others = [replace(host, id=new) for new, host in zip(renamed, hosts, strict=True)]
                yield tuple((uid, back[host_id]) for uid, host_id in self.plan_queue(aged, others))

    def plan_queue(self, envs: list[Environment], hosts: list[Host]) -> tuple[tuple[str, str], ...]:
        return plan_placements(envs, hosts, {}, POLICY, now_ms=NOW).placed

    def _environment(self, world: World, index: int, env: Environment) -> Iterator[Move]:
        yield Move("user", f"delete {index}", self.apply(world, env.uid, DestroyRequested(cause="x")))
        if "drain" in self.faults and env.state is State.RUNNING and env.pending is None:
            yield Move("user", f"drain {index}", self.apply(world, env.uid, DrainRequested(cause="x")))
        if "time" in self.faults:
            yield Move("fault", f"time is over for {index}", self.apply(world, env.uid, Tick(cause="x"), FAR))
        if env.state is State.RUNNING and env.pending is None and world.slots[index].asked < self.most_wishes:
            for event in self._wishes(world.slots[index], env):
                asked = replace(world.slots[index], asked=world.slots[index].asked + 1)
                yield Move("user", f"{event} of {index}", self.apply(_with_slot(world, index, asked), env.uid, event))
        action = env.pending
        if action is not None and "unknown" in self.faults and action.attempt < MAX_UNKNOWN:
            lost = OutcomeUnknown(cause="x", seq=action.seq, message="no answer")
            yield Move("fault", f"no answer to {action}", self.apply(world, env.uid, lost))
        if not env.is_queued and _server_of(world, env.host_id).record.health is HostHealth.LOST:
            event = HostLost(cause="x", host_id=env.host_id)
            yield Move("progress", f"{env.uid} hears that its host is lost", self.apply(world, env.uid, event))

    def _wishes(self, slot: Slot, env: Environment) -> Iterator[Event]:
        """What may be asked of a machine that is up."""
        if "rotate" in self.wishes:
            yield RotateRequested(cause="x")
        if "snapshot" in self.wishes:
            yield SnapshotRequested(cause="x", snapshot=begin_snapshot(env, f"{env.uid}-{slot.asked}", now_ms=NOW))
        if "restore" in self.wishes and "drop" not in self.wishes:
            for snapshot in slot.snapshots:
                if snapshot.state is SnapshotState.READY:
                    yield RestoreRequested(cause="x", snapshot=snapshot)

    def _kept(self, world: World, index: int, slot: Slot) -> Iterator[Move]:
        """Snapshots are read to be restored, dropped by the user, and freed by the system."""
        if slot.read is not None:
            yield Move("progress", f"{slot.read.id} is ordered back", self._order_back(world, index, slot, slot.read))
        for snapshot in slot.snapshots if "drop" in self.wishes else ():
            others = tuple(other for other in slot.snapshots if other is not snapshot)
            if snapshot.state is SnapshotState.DELETING:
                freed = _with_slot(world, index, replace(slot, snapshots=others))
                yield Move("progress", f"{snapshot.id} is freed", freed)
            elif snapshot.state in (SnapshotState.READY, SnapshotState.ERROR):
                dropped = replace(slot, snapshots=(*others, begin_delete(snapshot, NOW)))
                yield Move("user", f"drop {snapshot.id}", _with_slot(world, index, dropped))
                if snapshot.state is SnapshotState.READY and slot.read is None and slot.asked < self.most_wishes:
                    read = replace(slot, read=snapshot, asked=slot.asked + 1)
                    yield Move("user", f"read {snapshot.id}", _with_slot(world, index, read))

    def _order_back(self, world: World, index: int, slot: Slot, read: Snapshot) -> World:
        """The order is given if the snapshot is still as it was read; else it is read again. Or it is refused."""
        answered = _with_slot(world, index, replace(slot, read=None))
        if slot.env is None or slot.env.is_terminal:
            return answered
        if read not in slot.snapshots:
            again = self.read_again(slot, read)
            return answered if again is None else _with_slot(world, index, replace(slot, read=again))
        try:
            return self.apply(answered, slot.env.uid, RestoreRequested(cause="x", snapshot=read))
        except Conflict:
            return answered

    def read_again(self, slot: Slot, read: Snapshot) -> Snapshot | None:
        """The snapshot as it is now; None: it is refused."""
        now = next((snapshot for snapshot in slot.snapshots if snapshot.id == read.id), None)
        return now if now is not None and now.state is SnapshotState.READY else None

    def _server(self, world: World, index: int, server: Server) -> Iterator[Move]:
        id_ = server.record.id
        for machine in server.machines:
            if machine.cluster != CLUSTER or machine.phase is not Phase.RUNNING:
                continue
            if "exit" in self.faults:
                dead = replace(machine, phase=Phase.FAILED, error="killed")
                notice = MachineExited(cause="x", machine_id=machine.id, message="killed")
                after = _with_server(world, index, replace(server, machines=_put(server.machines, dead)))
                yield Move("fault", f"{machine.id} exits", _with_reply(after, machine.uid, notice))
            if "delete" in self.faults:
                tombstones = _bury(server, machine.uid, machine.incarnation)
                gone = replace(server, machines=_drop(server.machines, machine.id), tombstones=tombstones)
                yield Move("fault", f"{machine.id} is deleted by hand", _with_server(world, index, gone))
        if "host" in self.faults and (index == 0 or self.is_symmetric):
            yield from self._reachability(world, index, server)
        if "reconcile" in self.faults and server.is_reachable and self._may_list(world, server):
            if server.listed is None:
                asked = replace(server, listed=server.machines, changed=())
                yield Move("progress", f"{id_} is listed", _with_server(world, index, asked))
                if "glitch" in self.faults and not server.was_confused and server.machines:
                    confused = replace(asked, listed=(), was_confused=True)
                    yield Move("fault", f"{id_} lists nothing", _with_server(world, index, confused))
            else:
                yield Move("progress", f"{id_} is judged", self._judge(world, index, server))

    def _may_list(self, world: World, server: Server) -> bool:
        """In a crowd one host is judged at a time: what a list leads to concerns its own host only."""
        others = (other for other in world.servers if other is not server)
        return not self.is_symmetric or all(other.listed is None for other in others)

    def _reachability(self, world: World, index: int, server: Server) -> Iterator[Move]:
        id_, record = server.record.id, server.record
        may_fall = not self.is_symmetric or self.most_lost > sum(other.was_lost for other in world.servers)
        if server.is_reachable and not server.was_lost and may_fall:
            gone = replace(server, is_reachable=False, was_lost=True, listed=None, changed=(), strikes=())
            yield Move("fault", f"{id_} falls silent", _with_server(world, index, gone))
        if not server.is_reachable:
            if record.health is HostHealth.OK:
                lost = replace(server, record=replace(record, health=HostHealth.LOST))
                yield Move("progress", f"{id_} is given up", _with_server(world, index, lost))
            if self.comes_back:
                back = replace(server, is_reachable=True, record=replace(record, health=HostHealth.OK))
                yield Move("progress", f"{id_} is back", _with_server(world, index, back))

    # -- the store -------------------------------------------------------------------------------------------------

    def _book(self, world: World, index: int) -> World:
        """The create's transaction: unique task, room on the host as it is now; else plan again."""
        task, chosen = self.tasks[index], world.slots[index].planned
        if not self.is_free(world, task) or not self.has_room(world, chosen):
            return _with_slot(world, index, Slot())
        return self._begin(world, index, chosen)

    def _begin(self, world: World, index: int, host_id: str) -> World:
        identity = Identity(uid=f"u{index}", task_id=self.tasks[index], machine_id=f"m-{index}")
        found = lifecycle.begin(identity, self.spec, host_id, cause="x", now_ms=NOW, policy=POLICY, duties=self.duties)
        slot = Slot(env=found.record, facts=found.facts, placement=host_id)
        return self.total(self._give(_with_slot(world, index, slot), identity.uid, found.actions))

    def is_free(self, world: World, task: str) -> bool:
        return all(slot.env is None or slot.env.is_terminal or slot.env.task_id != task for slot in world.slots)

    def has_room(self, world: World, host_id: str) -> bool:
        return can_reserve(_server_of(world, host_id).record, self.spec, POLICY)

    def apply(self, world: World, uid: str, event: Event, now_ms: int = NOW) -> World:
        """Feed one event to one environment and save what comes of it, in one transaction."""
        index = _index_of(uid)
        slot = world.slots[index]
        if slot.env is None:
            return world
        found = self.step(slot.env, event, now_ms)
        env = found.record
        if env == slot.env:
            return world
        is_confirmed = slot.is_confirmed or (env.is_terminal and isinstance(event, DestroyConfirmed))
        if isinstance(event, Placed):
            slot = replace(slot, placement=event.host_id)
        saved = _with_slot(
            world,
            index,
            replace(
                slot,
                env=env,
                facts=slot.facts + found.facts,
                placement=self.placement(env, slot),
                is_confirmed=is_confirmed,
                snapshots=self.snapshots(slot, found),
            ),
        )
        servers = tuple(
            replace(server, changed=tuple(sorted({*server.changed, uid})))
            if server.listed is not None and server.record.id == env.host_id
            else server
            for server in saved.servers
        )
        return self.total(self._give(replace(saved, servers=servers), uid, found.actions))

    def step(self, env: Environment, event: Event, now_ms: int) -> Step:
        return lifecycle.step(env, event, now_ms, POLICY)

    def snapshots(self, slot: Slot, found: Step) -> tuple[Snapshot, ...]:
        """What is saved of snapshots in the same transaction. Raises Broken for a change that no store accepts."""
        kept = {snapshot.id: snapshot for snapshot in slot.snapshots}
        for snapshot in found.snapshots:
            before = kept.get(snapshot.id)
            if before is not None and snapshot.state not in snapshot_model.ALLOWED[before.state]:
                raise Broken(f"snapshot {snapshot.id} goes from {before.state} to {snapshot.state}")
            kept[snapshot.id] = snapshot
        return tuple(kept.values())

    def placement(self, env: Environment, slot: Slot) -> str:
        return "" if env.is_terminal else slot.placement

    def total(self, world: World) -> World:
        """Host totals are the sums of the placements, written in the same transaction."""
        servers = []
        for server in world.servers:
            booked = Resources()
            for slot in world.slots:
                booked = booked.plus(ONE) if slot.placement == server.record.id else booked
            servers.append(replace(server, record=replace(server.record, allocated=booked)))
        return replace(world, servers=tuple(servers))

    def _give(self, world: World, uid: str, actions: tuple[Action, ...]) -> World:
        """A worker is at the actions from now on; when it dies, the next one gives the same orders again."""
        for action in self.orders(actions):
            world = _with_order(world, Order(uid, action.seq, action))
        return world

    def orders(self, actions: tuple[Action, ...]) -> tuple[Action, ...]:
        return actions

    # -- the hosts -------------------------------------------------------------------------------------------------

    def _deliver(self, world: World, order: Order) -> Iterator[Move]:
        """An order reaches its host; the host does what it says and answers."""
        index = _index_of(order.action.host_id)
        server = world.servers[index]
        if not server.is_reachable:
            return
        action = order.action
        if isinstance(action, DestroyMachine):
            machines = tuple(
                machine
                for machine in server.machines
                if not (machine.id == action.machine_id and machine.incarnation <= action.incarnation)
            )
            tombstones = _bury(server, order.uid, action.incarnation)
            after = world
            if (machines, tombstones) != (server.machines, server.tombstones):
                after = _with_server(world, index, replace(server, machines=machines, tombstones=tombstones))
            yield Move(
                "progress", f"did {order}", self._answer(after, order, DestroyConfirmed(cause="x", seq=order.seq))
            )
            return
        if not isinstance(action, BootMachine):
            yield from self._operate(world, index, order)
            return
        refused = BootRefused(cause="x", seq=order.seq, reason="boot_failed", message="it did not come up")
        success = BootSucceeded(cause="x", seq=order.seq)
        there = self.machine_of(server, action)
        if self.is_fenced(server, order):
            yield Move("progress", f"refused {order}", self._answer(world, order, refused))
            return
        if there is not None:
            outcome = success if there.phase is Phase.RUNNING else refused
            yield Move("progress", f"repeated {order}", self._answer(world, order, outcome))
            return
        made = self.make(order.uid, action)
        after = _with_server(world, index, replace(server, machines=_put(server.machines, made)))
        yield Move("progress", f"did {order}", self._answer(after, order, success))
        if "boot" in self.faults:
            wreck = replace(made, phase=Phase.FAILED, error="it did not come up")
            after = _with_server(world, index, replace(server, machines=_put(server.machines, wreck)))
            yield Move("fault", f"failed {order}", self._answer(after, order, refused))

    def _operate(self, world: World, index: int, order: Order) -> Iterator[Move]:
        """Something is done to a machine that is up. Repetitions do nothing else than the first time."""
        server, action = world.servers[index], order.action
        env = world.slots[_index_of(order.uid)].env
        if isinstance(action, RestoreMachine) and not (env and isinstance(env.pending, RestoreMachine)):
            # A host restores at most once per action, refuses older actions, and stops trying at the deadline.
            return
        refused = ActionRefused(cause="x", seq=order.seq, reason="no_space", message="the disk is full")
        there = next((machine for machine in server.machines if machine.id == action.machine_id), None)
        is_up = there is not None and (there.phase is Phase.RUNNING or isinstance(action, RestoreMachine))
        if there is None or not is_up or self.is_fenced(server, order):
            yield Move("progress", f"refused {order}", self._answer(world, order, refused))
            return
        after = world
        if isinstance(action, RestoreMachine):
            again = _put(server.machines, replace(there, phase=Phase.RUNNING, error=""))
            after = _with_server(world, index, replace(server, machines=again)) if again != server.machines else world
        yield Move("progress", f"did {order}", self._answer(after, order, _success(order)))
        if "refuse" in self.faults:
            yield Move("fault", f"failed {order}", self._answer(world, order, refused))

    def is_fenced(self, server: Server, order: Order) -> bool:
        return any(uid == order.uid and order.action.incarnation <= upto for uid, upto in server.tombstones)

    def machine_of(self, server: Server, action: BootMachine) -> ObservedMachine | None:
        return next((machine for machine in server.machines if machine.id == action.machine_id), None)

    def make(self, uid: str, action: BootMachine) -> ObservedMachine:
        return ObservedMachine(
            id=action.machine_id, cluster=CLUSTER, uid=uid, incarnation=action.incarnation, phase=Phase.RUNNING
        )

    def _answer(self, world: World, order: Order, outcome: Event) -> World:
        if not order.seq or self._is_spent(world, order.uid, outcome):
            return world
        return _with_reply(world, order.uid, outcome)

    # -- the watchers ----------------------------------------------------------------------------------------------

    def _judge(self, world: World, index: int, server: Server) -> World:
        """Reconcile one host with its list. Raises Broken when a living machine would be given up."""
        id_, listed = server.record.id, server.listed or ()
        envs = tuple(slot.env for slot in world.slots if slot.env is not None and slot.env.host_id == id_)
        found = self.plan(id_, envs, listed, server.changed, Strikes(counts=dict(server.strikes)))
        counts = tuple(sorted((key, min(count, 2)) for key, count in found.strikes.counts.items()))
        after = _with_server(world, index, replace(server, listed=None, changed=(), strikes=counts))
        for machine in found.destroy:
            self._must_be_orphan(world, machine)
            action = DestroyMachine(
                seq=0, cause="x", host_id=id_, machine_id=machine.id, incarnation=machine.incarnation
            )
            after = _with_order(after, Order(machine.uid, 0, action))
        for uid, event in found.events:
            self._must_be_gone(server, event)
            after = self.apply(after, uid, event)
        return after

    def plan(
        self,
        host_id: str,
        envs: tuple[Environment, ...],
        listed: tuple[ObservedMachine, ...],
        changed: tuple[str, ...],
        strikes: Strikes,
    ) -> Plan:
        """The plan of a list; the records named in `changed` were others when it was asked for."""
        known = expectations(env for env in envs if env.uid not in changed)
        return plan(host_id, CLUSTER, envs, listed, strikes, known=known, cause="x")

    def _must_be_orphan(self, world: World, machine: ObservedMachine) -> None:
        if machine.id.startswith("m-foreign"):
            raise Broken("a machine of another cluster is touched")
        env = next((slot.env for slot in world.slots if slot.env is not None and slot.env.uid == machine.uid), None)
        if env is not None and not env.is_terminal and env.incarnation == machine.incarnation:
            raise Broken(f"{machine.uid}: the machine of a live environment is destroyed as an orphan")

    def _must_be_gone(self, server: Server, event: Event) -> None:
        if isinstance(event, MachineMissing | MachineExited) and any(
            machine.id == event.machine_id and machine.phase is Phase.RUNNING for machine in server.machines
        ):
            raise Broken(f"{event.machine_id} lives and is given up")

    # -- worlds that are the same --------------------------------------------------------------------------------------

    def key(self, world: World) -> bytes:
        """Worlds with one key have the same future. Where tasks and hosts are alike, their names are forgotten: each
        environment is described with all that is about it, and the smallest of all ways to write them down counts."""
        if not self.is_symmetric:
            return _encode(world)
        parts = [self._about(world, index) for index in range(len(world.slots))]
        states = [
            (server.is_reachable, server.was_lost, server.was_confused, server.listed is None, server.record.health)
            for server in world.servers
        ]
        ways = []
        for order in permutations(range(len(world.servers))):
            servers = [states[number] for number in order]
            ways.append((servers, sorted(_with_hosts_in(part, order) for part in parts)))
        return _encode(min(ways))

    def _about(self, world: World, index: int) -> bytes:
        """Everything that concerns one environment, in which it is called `*`. It is the same in many worlds."""
        uid, slot = f"u{index}", world.slots[index]
        orders = [(order.seq, order.action) for order in world.orders if order.uid == uid]
        replies = [(getattr(event, "seq", 0), event) for owner, event in world.replies if owner == uid]
        on_hosts = [found for server in world.servers if (found := _about_host(server, uid, f" m-{index}"))]
        raw = _encode((slot, orders, replies, on_hosts))
        about = self._known.get(raw)
        if about is None:
            about = self._known[raw] = self._without_names(index, slot, orders, replies, on_hosts)
        return about

    def _without_names(
        self,
        index: int,
        slot: Slot,
        orders: list[tuple[int, Action]],
        replies: list[tuple[int, Event]],
        on_hosts: list[tuple[object, ...]],
    ) -> bytes:
        """Of the numbers of its actions only the order counts. No move looks at the pause before a repetition, which
        differs from name to name."""
        pending = slot.env.pending if slot.env is not None else None
        numbers = {0, slot.env.action_seq if slot.env else 0, pending.seq if pending else 0}
        rank = {seq: place for place, seq in enumerate(sorted(numbers | {seq for seq, _ in orders + replies}))}
        env = slot.env
        if env is not None:
            under_way = None if pending is None else replace(pending, seq=rank[pending.seq], not_before_ms=0)
            env = replace(env, action_seq=rank[env.action_seq], pending=under_way)
        about = _encode(
            (
                replace(slot, env=env),
                [replace(action, seq=rank[seq], attempt=0, not_before_ms=0) for seq, action in orders],
                [replace(event, seq=rank[seq]) if seq else event for seq, event in replies],
                on_hosts,
            )
        )
        uid = f"u{index}"
        names = [uid, f"m-{index}", self.tasks[index]]
        snapshots = [(f"snap-{uid}-{number}".encode(), f"snap-{number}".encode()) for number in range(self.most_wishes)]
        return _renamed(about, [(name.encode(), b"*") for name in names] + snapshots)

    # -- what must hold --------------------------------------------------------------------------------------------

    def problems(self, world: World) -> list[str]:
        """Broken invariants of the core, and broken promises about ends that were confirmed."""
        envs = {slot.env.uid: slot.env for slot in world.slots if slot.env is not None}
        found = invariants.violations(
            invariants.World(
                environments=envs,
                hosts={server.record.id: server.record for server in world.servers},
                placements={
                    slot.env.uid: (slot.placement, ONE)
                    for slot in world.slots
                    if slot.env is not None and slot.placement
                },
                machines={server.record.id: server.machines for server in world.servers},
                facts={slot.env.uid: slot.facts for slot in world.slots if slot.env is not None},
                snapshots={snapshot.id: snapshot for slot in world.slots for snapshot in slot.snapshots},
            ),
            POLICY,
        )
        confirmed = {slot.env.uid for slot in world.slots if slot.env is not None and slot.is_confirmed}
        return found + [
            f"{machine.uid}: a machine runs after its end was confirmed"
            for server in world.servers
            for machine in server.machines
            if machine.uid in confirmed
        ]

    def is_settled(self, world: World) -> bool:
        """Nothing is left to do: every environment is up or over, and no machine is there for nothing."""
        wanted = set()
        for slot in world.slots:
            if slot.planned or slot.read is not None or (slot.env is not None and slot.env.pending is not None):
                return False
            if slot.env is not None and slot.env.is_queued:
                if any(can_reserve(server.record, self.spec, POLICY) for server in world.servers):
                    return False
            elif slot.env is not None and not slot.env.is_terminal:
                wanted.add(slot.env.machine_id)
        return self._running(world) == wanted

    def is_over(self, world: World) -> bool:
        """Every environment has ended and nothing of them is left."""
        ended = all(slot.env is None or slot.env.is_terminal for slot in world.slots)
        return ended and not self._running(world) and not any(slot.planned or slot.placement for slot in world.slots)

    def _running(self, world: World) -> set[str]:
        """Machines of ours, wrecks included, on hosts that are there or will be again."""
        return {
            machine.id if machine.phase is Phase.RUNNING else f"wreck {machine.id}"
            for server in world.servers
            if server.is_reachable or self.comes_back
            for machine in server.machines
            if machine.cluster == CLUSTER
        }


@functools.cache
def _with_hosts_in(about: bytes, order: tuple[int, ...]) -> bytes:
    """What is about an environment, with the hosts numbered in this order. Few differ, and each is in many worlds."""
    return _renamed(about, [(f"h{number}".encode(), f"H{place}".encode()) for place, number in enumerate(order)])


def _about_host(server: Server, uid: str, machine_name: str) -> tuple[object, ...]:
    """What a host and its watcher have of one environment; nothing: empty."""
    found = (
        [machine for machine in server.machines if machine.uid == uid],
        [upto for owner, upto in server.tombstones if owner == uid],
        [machine for machine in server.listed or () if machine.uid == uid],
        uid in server.changed,
        [(what.split()[0], count) for what, count in server.strikes if what.endswith(machine_name)],
    )
    return (server.record.id, *found) if any(found) else ()


def _renamed(text: bytes, names: list[tuple[bytes, bytes]]) -> bytes:
    """Another name for what is called so, as a value of its own and in sentences about a host."""
    for old, new in names:
        text = text.replace(b'"' + old + b'"', b'"' + new + b'"').replace(b"host " + old, b"host " + new)
    return text


def _success(order: Order) -> Event:
    """What the host answers when it has done it."""
    match order.action:
        case SetUpMachine():
            return SetUpSucceeded(cause="x", seq=order.seq)
        case DrainAgent():
            return AgentDrained(cause="x", seq=order.seq, exit_code=0)
        case RotateToken():
            return TokenRotated(cause="x", seq=order.seq)
        case SnapshotMachine():
            return SnapshotTaken(cause="x", seq=order.seq, size_bytes=1, digest="sha256:1")
        case RestoreMachine():
            return SnapshotRestored(cause="x", seq=order.seq)
    raise AssertionError(order)


def _foreign(number: int) -> ObservedMachine:
    """A machine of another cluster on the same host, not to be touched."""
    uid = f"foreign-{number}"
    return ObservedMachine(id=f"m-{uid}", cluster="c2", uid=uid, incarnation=1, phase=Phase.RUNNING)


def _bury(server: Server, uid: str, incarnation: int) -> tuple[tuple[str, int], ...]:
    return tuple(sorted({*server.tombstones, (uid, incarnation)}))


def _server_of(world: World, host_id: str) -> Server:
    return world.servers[_index_of(host_id)]


def _index_of(id_: str) -> int:
    """Environments are called u0, u1 ..., hosts h0, h1 ..."""
    return int(id_[1:])


def _with_slot(world: World, index: int, slot: Slot) -> World:
    return replace(world, slots=(*world.slots[:index], slot, *world.slots[index + 1 :]))


def _with_server(world: World, index: int, server: Server) -> World:
    return replace(world, servers=(*world.servers[:index], server, *world.servers[index + 1 :]))


def _with_order(world: World, order: Order) -> World:
    """The order takes the place of an earlier attempt at the same: that would do nothing else, and nobody waits for its
    answer any more."""
    if order in world.orders:
        return world
    kept = [other for other in world.orders if not (order.seq and _is_attempt(other, order))]
    return replace(world, orders=tuple(sorted((*kept, order), key=_order_key)))


def _is_attempt(one: Order, other: Order) -> bool:
    return (one.uid, type(one.action), one.action.host_id, one.action.machine_id) == (
        other.uid,
        type(other.action),
        other.action.host_id,
        other.action.machine_id,
    ) and one.seq < other.seq


def _order_key(order: Order) -> tuple[str, int, str, str]:
    return order.uid, order.seq, order.action.machine_id, order.action.host_id


def _with_reply(world: World, uid: str, event: Event) -> World:
    if (uid, event) in world.replies:
        return world
    return replace(world, replies=tuple(sorted((*world.replies, (uid, event)), key=repr)))


def _put(machines: tuple[ObservedMachine, ...], machine: ObservedMachine) -> tuple[ObservedMachine, ...]:
    return tuple(sorted((*_drop(machines, machine.id), machine), key=lambda item: item.id))


def _drop(machines: tuple[ObservedMachine, ...], id_: str) -> tuple[ObservedMachine, ...]:
    return tuple(machine for machine in machines if machine.id != id_)
