"""What must hold at every moment, whatever has happened: checked after every step in tests, and in production behind
`GET /v1/debug/invariants`.

Each check is one generator over a World and says in a sentence what is wrong. Nothing here repairs anything.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise

import msgspec

from fusevm.core.placement import limits
from fusevm.core.policy import Policy
from fusevm.core.reconcile import ObservedMachine
from fusevm.core.record import SETTLED, action_name
from fusevm.core.spec import resources_of
from fusevm.model.environment import (
    ALLOWED,
    TERMINAL,
    Action,
    BootMachine,
    ChangeNetwork,
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
from fusevm.model.fact import Fact, Kind
from fusevm.model.host import Host, HostHealth, Resources
from fusevm.model.machine import Phase
from fusevm.model.snapshot import Snapshot, SnapshotState

_ALIVE = frozenset({Phase.CREATING, Phase.RUNNING, Phase.PAUSED})
_NONE: frozenset[type[Action] | None] = frozenset({None})
#: What may be under way, by state. Which of them, depends on the duties (`_permitted`).
_ACTIONS: dict[State, frozenset[type[Action] | None]] = {
    State.PROVISIONING: frozenset({BootMachine, SetUpMachine}),
    State.RUNNING: frozenset({None, RotateToken, ChangeNetwork, SnapshotMachine, RestoreMachine}),
    State.PAUSED: _NONE,
    State.DRAINING: frozenset({None, DrainAgent}),
    State.DESTROYING: frozenset({DestroyMachine}),
    State.DESTROYED: _NONE,
    State.FAILED: _NONE,
}
#: States of a snapshot in which it belongs to an action.
_WORKED_ON: dict[SnapshotState, type[Action]] = {
    SnapshotState.CREATING: SnapshotMachine,
    SnapshotState.RESTORING: RestoreMachine,
}


class World(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one moment: one consistent reading of the store, and what the hosts list."""

    #: All environments, ended ones included; by uid.
    environments: Mapping[str, Environment] = {}
    hosts: Mapping[str, Host] = {}
    #: Environment uid to (host id, what is booked there).
    placements: Mapping[str, tuple[str, Resources]] = {}
    #: Host id to its machines. Hosts that cannot be asked are left out.
    machines: Mapping[str, tuple[ObservedMachine, ...]] = {}
    #: Environment uid to its facts in order; the first ones may be kept no more. A uid that is left out is not checked.
    facts: Mapping[str, tuple[Fact, ...]] = {}
    #: By id.
    snapshots: Mapping[str, Snapshot] = {}


def violations(world: World, policy: Policy | None) -> list[str]:
    """Every broken rule in a sentence; empty: all is well.

    `policy` None: whether hosts are booked beyond their limits is not judged. Ratios and capacity may have become
    smaller since the bookings were made, each of which was held against the limits of its moment.
    """
    found: list[str] = []
    for env in world.environments.values():
        found += _actions(env)
        found += _waiting(env)
        found += _ending(env)
        found += _times(env)
        if env.uid in world.facts:
            found += _facts(env, world.facts[env.uid])
    found += _identities(world)
    found += _placements(world)
    found += _books(world, policy)
    found += _machines(world)
    found += _snapshots(world)
    return found


def _identities(world: World) -> Iterator[str]:
    live = Counter(env.task_id for env in world.environments.values() if not env.is_terminal)
    yield from (f"task {task_id} has {count} live environments" for task_id, count in live.items() if count > 1)
    machines = Counter(env.machine_id for env in world.environments.values())
    yield from (f"machine id {id_} belongs to {count} environments" for id_, count in machines.items() if count > 1)


def _actions(env: Environment) -> Iterator[str]:
    action, permitted = env.pending, _permitted(env)
    if (None if action is None else type(action)) not in permitted:
        wanted = " or ".join(sorted("nothing" if kind is None else kind.__name__ for kind in permitted))
        given = "nothing" if action is None else action_name(action)
        yield f"{env.uid}: {env.state} with {given} pending instead of {wanted}"
    if action is None:
        return
    if action.seq > env.action_seq:
        yield f"{env.uid}: pending action {action.seq} is beyond action_seq {env.action_seq}"
    if (action.host_id, action.machine_id, action.incarnation) != (env.host_id, env.machine_id, env.incarnation):
        yield f"{env.uid}: the pending action is about another machine"


def _permitted(env: Environment) -> frozenset[type[Action] | None]:
    if env.is_queued:
        return _NONE
    missing: set[type[Action] | None] = set()
    if not env.duties.setup:
        missing.add(SetUpMachine)
    if not env.duties.agent:
        missing.add(DrainAgent)
    return _ACTIONS[env.state] - missing


def _waiting(env: Environment) -> Iterator[str]:
    if env.is_queued and env.state is not State.PROVISIONING:
        yield f"{env.uid}: {env.state} while it waits for a place"
    if env.is_queued and (env.host_id or env.placed_at_ms is not None):
        yield f"{env.uid}: waits for a place and has one on {env.host_id}"
    if not env.is_queued and not env.is_terminal and not env.host_id:
        yield f"{env.uid}: {env.state} on no host"


def _ending(env: Environment) -> Iterator[str]:
    is_ending = env.is_terminal or env.state is State.DESTROYING
    if is_ending != (env.ending is not None):
        yield f"{env.uid}: {env.state} and ending {env.ending} do not fit"
    if is_ending != (env.desired is Desired.DESTROYED):
        yield f"{env.uid}: {env.state} but {env.desired} is desired"
    if (env.state is State.DRAINING) != (env.desired is Desired.DRAINED):
        yield f"{env.uid}: {env.state} but {env.desired} is desired"
    if env.ending is not None and env.ending.state not in TERMINAL:
        yield f"{env.uid}: is to end as {env.ending.state}, which is no end"
    if env.ending is not None and env.is_terminal and env.state is not env.ending.state:
        yield f"{env.uid}: ended as {env.state} instead of {env.ending.state}"


def _times(env: Environment) -> Iterator[str]:
    given = [
        time
        for time in (
            env.created_at_ms,
            env.placed_at_ms,
            env.running_at_ms,
            env.draining_at_ms,
            env.ended_at_ms,
            env.updated_at_ms,
        )
        if time is not None
    ]
    if given != sorted(given):
        yield f"{env.uid}: times out of order {given}"
    if env.last_activity_ms < env.created_at_ms:
        yield f"{env.uid}: active before it was created"
    if env.is_terminal != (env.ended_at_ms is not None):
        yield f"{env.uid}: {env.state} and ended_at {env.ended_at_ms} do not fit"
    if env.state in SETTLED and env.running_at_ms is None:
        yield f"{env.uid}: {env.state} but never came up"
    if env.state is State.DRAINING and env.draining_at_ms is None:
        yield f"{env.uid}: draining since never"


def _facts(env: Environment, facts: tuple[Fact, ...]) -> Iterator[str]:
    first = facts[0].seq if facts else 1
    if [fact.seq for fact in facts] != list(range(first, env.event_seq + 1)):
        yield f"{env.uid}: facts {[fact.seq for fact in facts]} have a gap before {env.event_seq}"
    if any(fact.uid != env.uid for fact in facts):
        yield f"{env.uid}: has a fact of another environment"
    for earlier, later in pairwise(facts):
        if later.at_ms < earlier.at_ms:
            yield f"{env.uid}: fact {later.seq} is older than fact {earlier.seq}"
        if earlier.state in TERMINAL:
            yield f"{env.uid}: fact {later.seq} comes after the end"
    if first == 1 and not (facts and facts[0].kind is Kind.STATE and facts[0].state is State.PROVISIONING):
        yield f"{env.uid}: its first state is not told"
    if not facts:
        return
    states = [facts[0].state, *(fact.state for fact in facts[1:] if fact.kind is Kind.STATE)]
    for before, after in pairwise(states):
        if after not in ALLOWED[before]:
            yield f"{env.uid}: facts go from {before} to {after}"
    if states[-1] is not env.state:
        yield f"{env.uid}: is {env.state}, its facts end with {states[-1]}"


def _placements(world: World) -> Iterator[str]:
    for env in world.environments.values():
        placement = world.placements.get(env.uid)
        if env.is_terminal and placement is not None:
            yield f"{env.uid}: {env.state} and still placed on {placement[0]}"
        if env.is_queued and placement is not None:
            yield f"{env.uid}: waits for a place and is booked on {placement[0]}"
        if not env.is_terminal and not env.is_queued and placement != (env.host_id, resources_of(env.spec)):
            yield f"{env.uid}: lives on {env.host_id} but is placed as {placement}"
    for uid in world.placements.keys() - world.environments.keys():
        yield f"{uid}: placed, but there is no such environment"


def _books(world: World, policy: Policy | None) -> Iterator[str]:
    for host in world.hosts.values():
        booked = Resources()
        for host_id, amount in world.placements.values():
            booked = booked.plus(amount) if host_id == host.id else booked
        if booked != host.allocated:
            yield f"host {host.id}: allocated is {host.allocated}, its placements are {booked}"
        if policy is not None:
            yield from _excess(host, policy)
    for host_id in {host_id for host_id, _ in world.placements.values()} - world.hosts.keys():
        yield f"host {host_id}: has placements and does not exist"


def _excess(host: Host, policy: Policy) -> Iterator[str]:
    most = limits(host, policy)
    for name in Resources.__struct_fields__:
        if getattr(host.allocated, name) > getattr(most, name):
            yield f"host {host.id}: {name} is booked beyond its limit of {getattr(most, name)}"


def _machines(world: World) -> Iterator[str]:
    # A lost host's machines are given up: two at once is what its fence resolves when it comes back.
    lost = {host.id for host in world.hosts.values() if host.health is HostHealth.LOST}
    alive: Counter[str] = Counter()
    for host_id, machines in world.machines.items():
        for machine in machines:
            env = world.environments.get(machine.uid)
            if env is not None and machine.incarnation > env.incarnation:
                yield f"{machine.uid}: incarnation {machine.incarnation} runs, the record knows {env.incarnation}"
            if machine.uid and machine.phase in _ALIVE and host_id not in lost:
                alive[machine.uid] += 1
    yield from (f"{uid}: {count} machines run at once" for uid, count in alive.items() if count > 1)


def _snapshots(world: World) -> Iterator[str]:
    for env in world.environments.values():
        action = env.pending
        if isinstance(action, SnapshotMachine | RestoreMachine):
            snapshot = world.snapshots.get(action.snapshot.id)
            if snapshot is None or _WORKED_ON.get(snapshot.state) is not type(action):
                state = "unknown" if snapshot is None else snapshot.state
                yield f"{env.uid}: {action_name(action)} is pending for snapshot {action.snapshot.id}, which is {state}"
    for snapshot in world.snapshots.values():
        wanted = _WORKED_ON.get(snapshot.state)
        if wanted is None:
            continue
        owner = world.environments.get(snapshot.uid)
        action = owner.pending if owner is not None else None
        if not (isinstance(action, wanted) and _is_about(action, snapshot)):
            yield f"snapshot {snapshot.id}: {snapshot.state}, and nobody is at it"


def _is_about(action: Action, snapshot: Snapshot) -> bool:
    return isinstance(action, SnapshotMachine | RestoreMachine) and action.snapshot.id == snapshot.id
