"""When two worlds are the same: what is only a name in them is forgotten, so that searches see each world once."""

import functools
from itertools import permutations

import msgspec
from msgspec.structs import replace
from worlds import Server, Slot, World

from fusevm.model.environment import Action
from fusevm.model.event import Event

_encode = msgspec.json.Encoder().encode


class Naming:
    """Names environments after their task where `tasks` differ and hosts are alike."""

    def __init__(self, tasks: tuple[str, ...], most_wishes: int) -> None:
        self._tasks = tasks
        self._most_wishes = most_wishes
        #: What was found out about environments (`_about`).
        self._known: dict[bytes, bytes] = {}

    def key(self, world: World) -> bytes:
        """Describe each environment with all that is about it; the smallest of all ways to write them down counts."""
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
        names = [uid, f"m-{index}", self._tasks[index]]
        snapshots = [
            (f"snap-{uid}-{number}".encode(), f"snap-{number}".encode()) for number in range(self._most_wishes)
        ]
        return _renamed(about, [(name.encode(), b"*") for name in names] + snapshots)


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
        [(seq, internet) for owner, seq, internet in server.held if owner == uid],
        [(what.split()[0], count) for what, count in server.strikes if what.endswith(machine_name)],
    )
    return (server.record.id, *found) if any(found) else ()


def _renamed(text: bytes, names: list[tuple[bytes, bytes]]) -> bytes:
    """Another name for what is called so, as a value of its own and in sentences about a host."""
    for old, new in names:
        text = text.replace(b'"' + old + b'"', b'"' + new + b'"').replace(b"host " + old, b"host " + new)
    return text
