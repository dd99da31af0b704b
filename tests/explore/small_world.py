"""A whole cluster in one value: the store's tables, the hosts, and every message that may still arrive.

`World` is immutable; `Cluster.moves` lists everything that can happen next. All decisions come from `fusevm.core`,
unchanged; this file plays the store (transactions), the workers and watchers (which call hosts and feed outcomes back)
and the hosts (idempotent boots, tombstones).

Messages are sets: each may be delivered now, later, twice or never. That is loss, delay, duplication, reordering and
the crash of a worker (its action is repeated by the next) at once, and it keeps the number of worlds finite. A message
is forgotten only when it was tried and changed nothing, and its number is no longer the pending one's. Time has two
values, NOW and FAR; whether a list is older than a record is kept as a relation.

What can be done to a machine that is up (drain, token, network, snapshot, restore) is asked for at most `wishes` times
per environment, so that numbers stay finite.

The small methods of `Cluster` without an underscore are what `test_seeded_bugs.py` replaces to plant mistakes.
"""

from collections.abc import Iterator
from itertools import permutations

import msgspec
from msgspec.structs import replace
from sameness import Naming
from worlds import (
    CLUSTER,
    FAR,
    MAX_UNKNOWN,
    NONE,
    NOW,
    ONE,
    PATIENT,
    POLICY,
    SPEC,
    Broken,
    Fault,
    Move,
    Order,
    Server,
    Slot,
    Wish,
    World,
    bury,
    drop,
    find_problems,
    foreign,
    hold,
    index_of,
    must_be_gone,
    must_be_orphan,
    put,
    running,
    server_of,
    success,
    with_order,
    with_reply,
    with_server,
    with_slot,
)

from fusevm.core import lifecycle
from fusevm.core.lifecycle import Identity, Step
from fusevm.core.placement import can_reserve, place
from fusevm.core.queue import plan_placements
from fusevm.core.reconcile import ObservedMachine, Plan, Strikes, expectations, plan
from fusevm.core.snapshots import begin_delete, begin_snapshot
from fusevm.model import snapshot as snapshot_model
from fusevm.model.environment import (
    Action,
    BootMachine,
    ChangeNetwork,
    Desired,
    DestroyMachine,
    Environment,
    RestoreMachine,
    State,
)
from fusevm.model.errors import Conflict
from fusevm.model.event import (
    ActionRefused,
    BootRefused,
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    Event,
    HostLost,
    MachineExited,
    NetworkRequested,
    OutcomeUnknown,
    Placed,
    RestoreRequested,
    RotateRequested,
    SnapshotRequested,
    Tick,
)
from fusevm.model.host import Host, HostHealth, Resources
from fusevm.model.machine import Phase
from fusevm.model.network import Network
from fusevm.model.setup import Duties
from fusevm.model.snapshot import Snapshot, SnapshotState

_encode = msgspec.json.Encoder().encode


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
        self._naming = Naming(tasks, most_wishes)
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
                    machines=(foreign(n),) if "reconcile" in self.faults else (),
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
                world = with_slot(world, index_of(uid), Slot(is_forgotten=True))
        return world

    def _is_spent(self, world: World, uid: str, event: Event) -> bool:
        env = world.slots[index_of(uid)].env
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
        server = server_of(world, order.action.host_id)
        return server.is_reachable and all(move.world is world for move in self._deliver(world, order))

    def _is_gone(self, world: World, uid: str) -> bool:
        return (
            not any(order.uid == uid for order in world.orders)
            and not any(reply[0] == uid for reply in world.replies)
            and not any(machine.uid == uid for server in world.servers for machine in server.machines)
            and not world.slots[index_of(uid)].placement
            and not find_problems(world)
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
                yield Move("user", f"create {index}", with_slot(world, index, Slot(planned=record.id)))
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
                yield Move("user", f"{event} of {index}", self.apply(with_slot(world, index, asked), env.uid, event))
        action = env.pending
        if action is not None and "unknown" in self.faults and action.attempt < MAX_UNKNOWN:
            lost = OutcomeUnknown(cause="x", seq=action.seq, message="no answer")
            yield Move("fault", f"no answer to {action}", self.apply(world, env.uid, lost))
        if not env.is_queued and server_of(world, env.host_id).record.health is HostHealth.LOST:
            event = HostLost(cause="x", host_id=env.host_id)
            yield Move("progress", f"{env.uid} hears that its host is lost", self.apply(world, env.uid, event))

    def _wishes(self, slot: Slot, env: Environment) -> Iterator[Event]:
        """What may be asked of a machine that is up."""
        if "rotate" in self.wishes:
            yield RotateRequested(cause="x")
        if "network" in self.wishes:
            yield NetworkRequested(cause="x", network=Network(internet=not env.spec.network.internet))
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
                freed = with_slot(world, index, replace(slot, snapshots=others))
                yield Move("progress", f"{snapshot.id} is freed", freed)
            elif snapshot.state in (SnapshotState.READY, SnapshotState.ERROR):
                dropped = replace(slot, snapshots=(*others, begin_delete(snapshot, NOW)))
                yield Move("user", f"drop {snapshot.id}", with_slot(world, index, dropped))
                if snapshot.state is SnapshotState.READY and slot.read is None and slot.asked < self.most_wishes:
                    read = replace(slot, read=snapshot, asked=slot.asked + 1)
                    yield Move("user", f"read {snapshot.id}", with_slot(world, index, read))

    def _order_back(self, world: World, index: int, slot: Slot, read: Snapshot) -> World:
        """The order is given if the snapshot is still as it was read; else it is read again. Or it is refused."""
        answered = with_slot(world, index, replace(slot, read=None))
        if slot.env is None or slot.env.is_terminal:
            return answered
        if read not in slot.snapshots:
            again = self.read_again(slot, read)
            return answered if again is None else with_slot(world, index, replace(slot, read=again))
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
                after = with_server(world, index, replace(server, machines=put(server.machines, dead)))
                yield Move("fault", f"{machine.id} exits", with_reply(after, machine.uid, notice))
            if "delete" in self.faults:
                tombstones = bury(server, machine.uid, machine.incarnation)
                gone = replace(server, machines=drop(server.machines, machine.id), tombstones=tombstones)
                yield Move("fault", f"{machine.id} is deleted by hand", with_server(world, index, gone))
        if "host" in self.faults and (index == 0 or self.is_symmetric):
            yield from self._reachability(world, index, server)
        if "reconcile" in self.faults and server.is_reachable and self._may_list(world, server):
            if server.listed is None:
                asked = replace(server, listed=server.machines, changed=())
                yield Move("progress", f"{id_} is listed", with_server(world, index, asked))
                if "glitch" in self.faults and not server.was_confused and server.machines:
                    confused = replace(asked, listed=(), was_confused=True)
                    yield Move("fault", f"{id_} lists nothing", with_server(world, index, confused))
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
            yield Move("fault", f"{id_} falls silent", with_server(world, index, gone))
        if not server.is_reachable:
            if record.health is HostHealth.OK:
                lost = replace(server, record=replace(record, health=HostHealth.LOST))
                yield Move("progress", f"{id_} is given up", with_server(world, index, lost))
            if self.comes_back:
                back = replace(server, is_reachable=True, record=replace(record, health=HostHealth.OK))
                yield Move("progress", f"{id_} is back", with_server(world, index, back))

    # -- the store -------------------------------------------------------------------------------------------------

    def _book(self, world: World, index: int) -> World:
        """The create's transaction: unique task, room on the host as it is now; else plan again."""
        task, chosen = self.tasks[index], world.slots[index].planned
        if not self.is_free(world, task) or not self.has_room(world, chosen):
            return with_slot(world, index, Slot())
        return self._begin(world, index, chosen)

    def _begin(self, world: World, index: int, host_id: str) -> World:
        identity = Identity(uid=f"u{index}", task_id=self.tasks[index], machine_id=f"m-{index}")
        found = lifecycle.begin(identity, self.spec, host_id, cause="x", now_ms=NOW, policy=POLICY, duties=self.duties)
        slot = Slot(env=found.record, facts=found.facts, placement=host_id)
        return self.total(self._give(with_slot(world, index, slot), identity.uid, found.actions))

    def is_free(self, world: World, task: str) -> bool:
        return all(slot.env is None or slot.env.is_terminal or slot.env.task_id != task for slot in world.slots)

    def has_room(self, world: World, host_id: str) -> bool:
        return can_reserve(server_of(world, host_id).record, self.spec, POLICY)

    def apply(self, world: World, uid: str, event: Event, now_ms: int = NOW) -> World:
        """Feed one event to one environment and save what comes of it, in one transaction."""
        index = index_of(uid)
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
        saved = with_slot(
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
            world = with_order(world, Order(uid, action.seq, action))
        return world

    def orders(self, actions: tuple[Action, ...]) -> tuple[Action, ...]:
        return actions

    # -- the hosts -------------------------------------------------------------------------------------------------

    def _deliver(self, world: World, order: Order) -> Iterator[Move]:
        """An order reaches its host; the host does what it says and answers."""
        index = index_of(order.action.host_id)
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
            tombstones = bury(server, order.uid, action.incarnation)
            after = world
            if (machines, tombstones) != (server.machines, server.tombstones):
                after = with_server(world, index, replace(server, machines=machines, tombstones=tombstones))
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
        after = with_server(world, index, replace(server, machines=put(server.machines, made)))
        yield Move("progress", f"did {order}", self._answer(after, order, success))
        if "boot" in self.faults:
            wreck = replace(made, phase=Phase.FAILED, error="it did not come up")
            after = with_server(world, index, replace(server, machines=put(server.machines, wreck)))
            yield Move("fault", f"failed {order}", self._answer(after, order, refused))

    def _operate(self, world: World, index: int, order: Order) -> Iterator[Move]:
        """Something is done to a machine that is up. Repetitions do nothing else than the first time."""
        server, action = world.servers[index], order.action
        env = world.slots[index_of(order.uid)].env
        if isinstance(action, RestoreMachine) and not (env and isinstance(env.pending, RestoreMachine)):
            # A host restores at most once per action, refuses older actions, and stops trying at the deadline.
            return
        refused = ActionRefused(cause="x", seq=order.seq, reason="no_space", message="the disk is full")
        there = next((machine for machine in server.machines if machine.id == action.machine_id), None)
        is_up = there is not None and (there.phase is Phase.RUNNING or isinstance(action, RestoreMachine))
        if there is None or not is_up or self.is_fenced(server, order):
            yield Move("progress", f"refused {order}", self._answer(world, order, refused))
            return
        if isinstance(action, ChangeNetwork):
            yield from self._change_network(world, index, order, action)
            return
        after = world
        if isinstance(action, RestoreMachine):
            again = put(server.machines, replace(there, phase=Phase.RUNNING, error=""))
            after = with_server(world, index, replace(server, machines=again)) if again != server.machines else world
        yield Move("progress", f"did {order}", self._answer(after, order, success(order)))
        if "refuse" in self.faults:
            yield Move("fault", f"failed {order}", self._answer(world, order, refused))

    def _change_network(self, world: World, index: int, order: Order, action: ChangeNetwork) -> Iterator[Move]:
        """A host notes the policy first; what it cannot make so now, it refuses, and goes on trying."""
        server = world.servers[index]
        refused = ActionRefused(cause="x", seq=order.seq, reason="command_failed", message="nft does not work")
        if any(uid == order.uid and seq > order.seq for uid, seq, _ in server.held):
            yield Move("progress", f"refused {order}", self._answer(world, order, refused))
            return
        after = with_server(world, index, hold(server, order, internet=action.network.internet))
        yield Move("progress", f"did {order}", self._answer(after, order, success(order)))
        if "refuse" in self.faults:
            yield Move("fault", f"failed {order}", self._answer(after, order, refused))

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
        return with_reply(world, order.uid, outcome)

    # -- the watchers ----------------------------------------------------------------------------------------------

    def _judge(self, world: World, index: int, server: Server) -> World:
        """Reconcile one host with its list. Raises Broken when a living machine would be given up."""
        id_, listed = server.record.id, server.listed or ()
        envs = tuple(slot.env for slot in world.slots if slot.env is not None and slot.env.host_id == id_)
        found = self.plan(id_, envs, listed, server.changed, Strikes(counts=dict(server.strikes)))
        counts = tuple(sorted((key, min(count, 2)) for key, count in found.strikes.counts.items()))
        after = with_server(world, index, replace(server, listed=None, changed=(), strikes=counts))
        for machine in found.destroy:
            must_be_orphan(world, machine)
            action = DestroyMachine(
                seq=0, cause="x", host_id=id_, machine_id=machine.id, incarnation=machine.incarnation
            )
            after = with_order(after, Order(machine.uid, 0, action))
        for uid, event in found.events:
            must_be_gone(server, event)
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

    # -- worlds that are the same --------------------------------------------------------------------------------------

    def key(self, world: World) -> bytes:
        """Worlds with one key have the same future. Where tasks and hosts are alike, their names are forgotten."""
        return self._naming.key(world) if self.is_symmetric else _encode(world)

    # -- what must hold --------------------------------------------------------------------------------------------

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
        return running(world, comes_back=self.comes_back) == wanted

    def is_over(self, world: World) -> bool:
        """Every environment has ended and nothing of them is left."""
        if any(slot.planned or slot.placement for slot in world.slots):
            return False
        ended = all(slot.env is None or slot.env.is_terminal for slot in world.slots)
        return ended and not running(world, comes_back=self.comes_back)
