"""Everything that can happen in a small cluster: no rule is ever broken, and nothing is ever stuck.

The numbers of worlds are printed with `-s`; a failing search prints the shortest way to the broken rule.
"""

import functools
import random

import pytest
from search import Found, explore, stuck
from small_world import EVERYTHING, Cluster, World

from fusevm.model.environment import State

#: Each is searched completely.
CLUSTERS = {
    "lost, repeated and late answers": Cluster(faults=frozenset({"boot", "unknown", "time", "drain"})),
    "a task that is created anew": Cluster(tasks=("a", "b", "a"), hosts=1, room=2, faults=frozenset({"unknown"})),
    "one host for the same task": Cluster(
        tasks=("a", "a"), hosts=1, room=2, faults=frozenset({"boot", "unknown", "time"})
    ),
    "one environment and every fault": Cluster(tasks=("a",), faults=EVERYTHING - {"glitch"}),
    "a host that never comes back": Cluster(tasks=("a",), comes_back=False, faults=EVERYTHING - {"glitch"}),
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


def test_the_search_sees_every_state_and_every_way_to_end():
    found = search("one environment and every fault")
    envs = [slot.env for world in found.worlds for slot in world.slots if slot.env is not None]
    # Nothing pauses an environment yet.
    assert {env.state for env in envs} == set(State) - {State.PAUSED}
    assert any(slot.is_forgotten for world in found.worlds for slot in world.slots)
    assert {env.ending.reason for env in envs if env.ending is not None} == {
        "deleted",
        "boot_failed",
        "boot_timeout",
        "max_runtime",
        "linger",
        "machine_exited",
        "machine_missing",
        "host_lost",
    }


@pytest.mark.parametrize("seed", range(20))
def test_a_larger_world_holds_on_long_random_walks(seed: int):
    cluster = Cluster(tasks=("a", "b", "a"), faults=EVERYTHING)
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
            problems = cluster.problems(world)
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
