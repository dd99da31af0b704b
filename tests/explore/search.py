"""Breadth-first search over all worlds, with the shortest way to a broken rule, and a check that nothing is stuck."""

from collections import deque
from collections.abc import Callable, Iterable

import msgspec
from small_world import Cluster
from worlds import Broken, World, find_problems

_encode = msgspec.msgpack.Encoder().encode


class Found(msgspec.Struct):
    """What a search has seen."""

    worlds: list[World]
    #: (kind, index of the world it leads to) per world.
    moves: list[list[tuple[str, int]]]
    #: The rules broken in the first bad world, and the moves that lead to it.
    problem: str = ""
    path: tuple[str, ...] = ()


def explore(cluster: Cluster, limit: int = 300_000) -> Found:
    """Visit every reachable world once; stop at the first broken rule."""
    start = cluster.start()
    found = Found([start], [[]])
    index = {cluster.key(start): 0}
    came: list[tuple[int, str]] = [(-1, "")]
    checked: dict[bytes, list[str]] = {}
    todo = deque([0])

    def broken(number: int, problem: str, last: str = "") -> Found:
        path = [last] if last else []
        while number > 0:
            number, name = came[number]
            path.append(name)
        found.problem, found.path = problem, tuple(reversed(path))
        return found

    while todo:
        number = todo.popleft()
        try:
            here = found.worlds[number]
            for kind, name, world in cluster.moves(here):
                if world is here:
                    continue
                key = cluster.key(world)
                target = index.setdefault(key, len(found.worlds))
                if target == len(found.worlds):
                    found.worlds.append(world)
                    found.moves.append([])
                    came.append((number, name))
                    todo.append(target)
                    problems = _problems(world, checked)
                    if problems:
                        return broken(target, "\n".join(problems))
                found.moves[number].append((kind, target))
        except Broken as error:
            return broken(number, str(error), "the last straw")
        assert len(found.worlds) <= limit, f"more than {limit} worlds"
    return found


def _problems(world: World, checked: dict[bytes, list[str]]) -> list[str]:
    """The broken rules of a world; messages play no part in them, so many worlds share one check."""
    key = _encode([world.slots, [[server.record, server.machines] for server in world.servers]])
    if key not in checked:
        checked[key] = find_problems(world)
    return checked[key]


def stuck(found: Found, is_goal: Callable[[World], bool], kinds: Iterable[str]) -> list[World]:
    """The worlds from which no goal can be reached by moves of these kinds."""
    allowed = set(kinds)
    sources: list[list[int]] = [[] for _ in found.worlds]
    for number, moves in enumerate(found.moves):
        for kind, target in moves:
            if kind in allowed:
                sources[target].append(number)
    good = {number for number, world in enumerate(found.worlds) if is_goal(world)}
    todo = list(good)
    while todo:
        for source in sources[todo.pop()]:
            if source not in good:
                good.add(source)
                todo.append(source)
    return [world for number, world in enumerate(found.worlds) if number not in good]
