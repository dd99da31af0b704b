"""Everything that can happen in a small cluster: no rule is ever broken, and nothing is ever stuck.

The numbers of worlds are printed with `-s`; a failing search prints the shortest way to the broken rule.
"""

import functools
import random

import msgspec
import pytest
from search import Found, explore, stuck
from small_world import Cluster
from worlds import EVERYTHING, World, find_problems

from fusevm.core.record import action_name
from fusevm.model.environment import State
from fusevm.model.setup import Duties
from fusevm.model.snapshot import SnapshotState

DAEMON = Duties(setup=True, agent=True)
#: Two places for three environments, on two hosts.
CROWD = {"tasks": ("a", "b", "c"), "is_symmetric": True}
#: Each is searched completely.
CLUSTERS = {
    "three on two hosts: setups, lost and repeated answers, machines that end, late deletes": Cluster(
        **CROWD, duties=Duties(setup=True), faults=frozenset({"queue", "boot", "unknown", "exit", "drain"})
    ),
    "three on two hosts with room for all": Cluster(**CROWD, room=2, faults=frozenset({"unknown"})),
    "three on two hosts: limits of time": Cluster(**CROWD, faults=frozenset({"queue", "unknown", "time"})),
    "three on two hosts that may be lost for ever": Cluster(
        **CROWD, comes_back=False, faults=frozenset({"queue", "host"})
    ),
    "three on two hosts: setups, drains and snapshots": Cluster(
        **CROWD, duties=DAEMON, faults=frozenset({"queue", "drain"}), wishes=frozenset({"snapshot"})
    ),
    "everything that can be done to one machine": Cluster(
        tasks=("a",),
        duties=DAEMON,
        faults=frozenset({"boot", "unknown", "drain", "refuse", "time"}),
        wishes=frozenset({"rotate", "snapshot"}),
        most_wishes=2,
    ),
    "a machine whose network is changed": Cluster(
        tasks=("a",),
        hosts=1,
        faults=frozenset({"unknown", "drain", "refuse", "time", "exit"}),
        wishes=frozenset({"rotate", "network"}),
        most_wishes=2,
    ),
    "a machine that is put back, and ends by itself": Cluster(
        tasks=("a",),
        hosts=1,
        duties=DAEMON,
        faults=frozenset({"exit", "refuse", "reconcile", "unknown"}),
        wishes=frozenset({"snapshot", "restore"}),
        most_wishes=2,
    ),
    "a machine that is put back, on a host that is lost and comes back": Cluster(
        tasks=("a",),
        hosts=1,
        duties=DAEMON,
        faults=frozenset({"host", "drain", "reconcile"}),
        wishes=frozenset({"snapshot", "restore"}),
        most_wishes=2,
    ),
    "a machine whose snapshots are restored and dropped at the same time": Cluster(
        tasks=("a",),
        hosts=1,
        faults=frozenset({"refuse", "drain"}),
        wishes=frozenset({"snapshot", "restore", "drop"}),
        most_wishes=3,
    ),
    "three on two hosts: lists, machines deleted by hand": Cluster(**CROWD, faults=frozenset({"reconcile", "delete"})),
    "three on two hosts, of which one is lost and comes back: lists": Cluster(
        **CROWD, faults=frozenset({"host", "reconcile"}), most_lost=1
    ),
    "three on a host that is lost and comes back: lists, machines deleted by hand": Cluster(
        **CROWD, hosts=1, faults=frozenset({"host", "reconcile", "delete"})
    ),
    "lost, repeated and late answers": Cluster(faults=frozenset({"boot", "unknown", "time", "drain"})),
    "a task that is created anew": Cluster(tasks=("a", "b", "a"), hosts=1, room=2, faults=frozenset({"unknown"})),
    "one host for the same task": Cluster(
        tasks=("a", "a"), hosts=1, room=2, faults=frozenset({"boot", "unknown", "time"})
    ),
    "one environment and every fault": Cluster(tasks=("a",), faults=EVERYTHING - {"glitch", "queue"}),
    "a host that never comes back": Cluster(tasks=("a",), comes_back=False, faults=EVERYTHING - {"glitch", "queue"}),
    "machines that end by themselves": Cluster(hosts=1, room=2, faults=frozenset({"exit", "reconcile"})),
    "lists that lie once": Cluster(tasks=("a",), faults=frozenset({"exit", "delete", "glitch", "reconcile"})),
    "a host that is lost and comes back": Cluster(faults=frozenset({"host", "reconcile"})),
}


@functools.cache
def search(name: str) -> Found:
    return explore(CLUSTERS[name])


@pytest.fixture(params=CLUSTERS)
def searched(request: pytest.FixtureRequest) -> tuple[Cluster, Found]:
    return CLUSTERS[request.param], search(request.param)


def test_no_rule_is_broken_in_any_world(searched: tuple[Cluster, Found]):
    _, found = searched
    assert not found.problem, "\n".join([found.problem, *found.path])


def test_the_system_comes_to_rest_by_itself_from_every_world(searched: tuple[Cluster, Found]):
    cluster, found = searched
    assert stuck(found, cluster.is_settled, {"progress"}) == []


def test_every_world_can_end_with_nothing_left_behind(searched: tuple[Cluster, Found]):
    cluster, found = searched
    assert stuck(found, cluster.is_over, {"progress", "user"}) == []


def test_the_searches_see_every_state_every_action_and_every_way_to_end():
    worlds = [world for name in CLUSTERS for world in search(name).worlds]
    envs = [slot.env for world in worlds for slot in world.slots if slot.env is not None]
    # Nothing pauses an environment yet; one that ends while it waits leaves nothing behind to be seen here.
    assert {env.state for env in envs} == set(State) - {State.PAUSED}
    assert any(env.is_queued for env in envs)
    assert any(slot.is_forgotten for world in worlds for slot in world.slots)
    assert {env.ending.reason for env in envs if env.ending is not None} == {
        "deleted",
        "boot_failed",
        "boot_timeout",
        "setup_timeout",
        "no_space",
        "max_runtime",
        "linger",
        "machine_exited",
        "machine_missing",
        "host_lost",
    }
    assert {action_name(env.pending) for env in envs if env.pending is not None} == {
        "boot_machine",
        "set_up_machine",
        "rotate_token",
        "change_network",
        "snapshot_machine",
        "restore_machine",
        "drain_agent",
        "destroy_machine",
    }
    states = {snapshot.state for world in worlds for slot in world.slots for snapshot in slot.snapshots}
    assert states == set(SnapshotState)


class WithNames(Cluster):
    """The same moves, and every world by its own name."""

    def key(self, world: World) -> bytes:
        return msgspec.json.encode(world)


@pytest.mark.parametrize(
    "settings",
    [
        {"tasks": ("a", "b"), "faults": frozenset({"boot", "unknown"})},
        {"tasks": ("a", "b"), "room": 2, "faults": frozenset({"exit"})},
        {"tasks": ("a", "b"), "duties": DAEMON, "wishes": frozenset({"snapshot"})},
        {"tasks": ("a", "b", "c"), "faults": frozenset({"queue"})},
        {"tasks": ("a", "b"), "hosts": 1, "room": 2, "faults": frozenset({"reconcile", "delete"})},
        {"tasks": ("a", "b"), "faults": frozenset({"reconcile", "host"}), "most_lost": 1},
    ],
)
def test_worlds_that_differ_by_names_only_have_the_same_future(settings: dict[str, object]):
    """The searches that forget names (`is_symmetric`) miss nothing."""
    one, all_ = Cluster(**settings, is_symmetric=True), WithNames(**settings, is_symmetric=True)
    few, many = explore(one), explore(all_)
    assert {one.key(world) for world in few.worlds} == {one.key(world) for world in many.worlds}
    assert len(few.worlds) < len(many.worlds)


@pytest.mark.parametrize("seed", range(20))
def test_a_larger_world_holds_on_long_random_walks(seed: int):
    wishes = frozenset({"rotate", "network", "snapshot", "restore"})
    cluster = Cluster(tasks=("a", "b", "a"), faults=EVERYTHING, duties=DAEMON, wishes=wishes, most_wishes=4)
    dice = random.Random(seed)
    for _ in range(10):
        world, path = cluster.start(), []
        for _ in range(60):
            moves = list(cluster.moves(world))
            if not moves:
                break
            move = dice.choice(moves)
            world = move.world
            path.append(move.name)
            problems = find_problems(world)
            assert not problems, "\n".join([f"seed {seed}", *problems, *path])
        end(cluster, world, dice)


def end(cluster: Cluster, world: World, dice: random.Random) -> None:
    """From wherever a walk has led, the system's own moves and deletes lead to the end."""
    for _ in range(500):
        if cluster.is_over(world):
            return
        moves = [
            move
            for move in cluster.moves(world)
            if move.kind == "progress" or (move.kind == "user" and move.name.startswith("delete"))
        ]
        world = dice.choice(moves).world
    raise AssertionError("still not over after 500 moves")
