"""The values that a small world is made of, what must hold of them, and how one follows from another."""

from typing import Literal, NamedTuple, get_args

import msgspec
from msgspec.structs import replace

from fusevm.core import invariants
from fusevm.core.policy import Policy
from fusevm.core.reconcile import ObservedMachine
from fusevm.core.spec import complete, resources_of
from fusevm.model.environment import (
    Action,
    ChangeNetwork,
    DrainAgent,
    Environment,
    RestoreMachine,
    RotateToken,
    SetUpMachine,
    SnapshotMachine,
    State,
)
from fusevm.model.event import (
    AgentDrained,
    Event,
    MachineExited,
    MachineMissing,
    NetworkChanged,
    SetUpSucceeded,
    SnapshotRestored,
    SnapshotTaken,
    TokenRotated,
)
from fusevm.model.fact import Fact
from fusevm.model.host import Host
from fusevm.model.machine import Phase
from fusevm.model.setup import Duties
from fusevm.model.snapshot import Snapshot

NOW, FAR = 1_000, 10**9
CLUSTER = "c1"
NONE = Duties()
POLICY = Policy(cpu_overcommit_percent=100, storage_overcommit_percent=100)
SPEC = complete(POLICY)
PATIENT = complete(POLICY, queue_seconds=60)
ONE = resources_of(SPEC)
#: How often the worker of one action may be left without an answer.
MAX_UNKNOWN = 1

Fault = Literal["boot", "unknown", "time", "drain", "exit", "delete", "host", "reconcile", "glitch", "queue", "refuse"]
EVERYTHING: frozenset[Fault] = frozenset(get_args(Fault))
Wish = Literal["rotate", "network", "snapshot", "restore", "drop"]


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
    #: (uid, number of the order, Internet or not) of machines whose network was changed.
    held: tuple[tuple[str, int, bool], ...] = ()
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


def find_problems(world: World) -> list[str]:
    """Broken invariants of the core, and broken promises about ends that were confirmed, and about policies."""
    envs = {slot.env.uid: slot.env for slot in world.slots if slot.env is not None}
    found = invariants.violations(
        invariants.World(
            environments=envs,
            hosts={server.record.id: server.record for server in world.servers},
            placements={
                slot.env.uid: (slot.placement, ONE) for slot in world.slots if slot.env is not None and slot.placement
            },
            machines={server.record.id: server.machines for server in world.servers},
            facts={slot.env.uid: slot.facts for slot in world.slots if slot.env is not None},
            snapshots={snapshot.id: snapshot for slot in world.slots for snapshot in slot.snapshots},
        ),
        POLICY,
    )
    confirmed = {slot.env.uid for slot in world.slots if slot.env is not None and slot.is_confirmed}
    found += [
        f"{machine.uid}: a machine runs after its end was confirmed"
        for server in world.servers
        for machine in server.machines
        if machine.uid in confirmed
    ]
    granted = {
        uid: env.spec.network.internet
        for uid, env in envs.items()
        if env.state is State.RUNNING and env.pending is None
    }
    return found + [
        f"{machine.uid}: it is held to another policy than its record has"
        for server in world.servers
        for machine in server.machines
        for uid, _, internet in server.held
        if uid == machine.uid and machine.phase is Phase.RUNNING and granted.get(uid, internet) is not internet
    ]


def foreign(number: int) -> ObservedMachine:
    """A machine of another cluster on the same host, not to be touched."""
    uid = f"foreign-{number}"
    return ObservedMachine(id=f"m-{uid}", cluster="c2", uid=uid, incarnation=1, phase=Phase.RUNNING)


def bury(server: Server, uid: str, incarnation: int) -> tuple[tuple[str, int], ...]:
    return tuple(sorted({*server.tombstones, (uid, incarnation)}))


def hold(server: Server, order: Order, *, internet: bool) -> Server:
    """The host holds a machine to a policy from here on."""
    others = (entry for entry in server.held if entry[0] != order.uid)
    return replace(server, held=tuple(sorted((*others, (order.uid, order.seq, internet)))))


def server_of(world: World, host_id: str) -> Server:
    return world.servers[index_of(host_id)]


def index_of(id_: str) -> int:
    """Environments are called u0, u1 ..., hosts h0, h1 ..."""
    return int(id_[1:])


def with_slot(world: World, index: int, slot: Slot) -> World:
    return replace(world, slots=(*world.slots[:index], slot, *world.slots[index + 1 :]))


def with_server(world: World, index: int, server: Server) -> World:
    return replace(world, servers=(*world.servers[:index], server, *world.servers[index + 1 :]))


def with_order(world: World, order: Order) -> World:
    """The order takes the place of an earlier attempt at the same: that would do nothing else, and nobody waits for its
    answer any more."""
    if order in world.orders:
        return world
    kept = [other for other in world.orders if not (order.seq and is_attempt(other, order))]
    return replace(world, orders=tuple(sorted((*kept, order), key=order_key)))


def is_attempt(one: Order, other: Order) -> bool:
    return (one.uid, type(one.action), one.action.host_id, one.action.machine_id) == (
        other.uid,
        type(other.action),
        other.action.host_id,
        other.action.machine_id,
    ) and one.seq < other.seq


def order_key(order: Order) -> tuple[str, int, str, str]:
    return order.uid, order.seq, order.action.machine_id, order.action.host_id


def with_reply(world: World, uid: str, event: Event) -> World:
    if (uid, event) in world.replies:
        return world
    return replace(world, replies=tuple(sorted((*world.replies, (uid, event)), key=repr)))


def put(machines: tuple[ObservedMachine, ...], machine: ObservedMachine) -> tuple[ObservedMachine, ...]:
    return tuple(sorted((*drop(machines, machine.id), machine), key=lambda item: item.id))


def drop(machines: tuple[ObservedMachine, ...], id_: str) -> tuple[ObservedMachine, ...]:
    return tuple(machine for machine in machines if machine.id != id_)


def running(world: World, *, comes_back: bool) -> set[str]:
    """Machines of ours, wrecks included, on hosts that are there or, where they come back, will be."""
    return {
        machine.id if machine.phase is Phase.RUNNING else f"wreck {machine.id}"
        for server in world.servers
        if server.is_reachable or comes_back
        for machine in server.machines
        if machine.cluster == CLUSTER
    }


def must_be_orphan(world: World, machine: ObservedMachine) -> None:
    if machine.id.startswith("m-foreign"):
        raise Broken("a machine of another cluster is touched")
    env = next((slot.env for slot in world.slots if slot.env is not None and slot.env.uid == machine.uid), None)
    if env is not None and not env.is_terminal and env.incarnation == machine.incarnation:
        raise Broken(f"{machine.uid}: the machine of a live environment is destroyed as an orphan")


def must_be_gone(server: Server, event: Event) -> None:
    if isinstance(event, MachineMissing | MachineExited) and any(
        machine.id == event.machine_id and machine.phase is Phase.RUNNING for machine in server.machines
    ):
        raise Broken(f"{event.machine_id} lives and is given up")


def success(order: Order) -> Event:
    """What the host answers when it has done it."""
    match order.action:
        case SetUpMachine():
            return SetUpSucceeded(cause="x", seq=order.seq)
        case DrainAgent():
            return AgentDrained(cause="x", seq=order.seq, exit_code=0)
        case RotateToken():
            return TokenRotated(cause="x", seq=order.seq)
        case ChangeNetwork():
            return NetworkChanged(cause="x", seq=order.seq)
        case SnapshotMachine():
            return SnapshotTaken(cause="x", seq=order.seq, size_bytes=1, digest="sha256:1")
        case RestoreMachine():
            return SnapshotRestored(cause="x", seq=order.seq)
    raise AssertionError(order)
