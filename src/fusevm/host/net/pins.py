"""Which addresses are pinned for which domain rules, and which are about to be. Pure: times are arguments.

What a set cannot hold is not asked of the kernel: nftables refuses a whole transaction for one address too many, and a
transaction carries the pins of many machines.

Owns: the memory. Must not: apply anything (`firewall`).
"""

from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec

from fusevm.host.net.nft import Json, Table
from fusevm.host.net.verdicts import MAX_PINS, render_pins, render_repinning

#: Expired pins are remembered that long, since the kernel may still have them. Seconds.
_MEMORY_S = 120.0


class PinBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses and seconds for one transaction, by slot and set."""

    fresh: dict[tuple[int, str], dict[str, int]]
    #: In their sets already, perhaps.
    again: dict[tuple[int, str], dict[str, int]]
    #: When those would end without this batch.
    before: dict[tuple[int, str], dict[str, float]]

    @property
    def slots(self) -> list[int]:
        return sorted({index for index, _ in (*self.fresh, *self.again)})

    def has(self, key: tuple[int, str], addresses: Collection[str]) -> bool:
        """Is any of these in it?"""
        mine = self.fresh.get(key, {}).keys() | self.again.get(key, {}).keys()
        return not mine.isdisjoint(addresses)

    def of(self, slot: int) -> "PinBatch":
        """What one slot has in it."""
        return PinBatch(
            fresh={key: pins for key, pins in self.fresh.items() if key[0] == slot},
            again={key: pins for key, pins in self.again.items() if key[0] == slot},
            before={key: ends for key, ends in self.before.items() if key[0] == slot},
        )

    def render(self, table: Table) -> list[Json]:
        commands = [line for (_, name), pins in self.fresh.items() for line in render_pins(table, name, pins)]
        return commands + [
            line for (_, name), pins in self.again.items() for line in render_repinning(table, name, pins)
        ]


_NOTHING = PinBatch(fresh={}, again={}, before={})


class Pinboard:
    """What is pinned and what waits."""

    def __init__(self) -> None:
        #: When a pin ends, by slot, set and address.
        self._ends: dict[int, dict[str, dict[str, float]]] = {}
        #: Since when, and for how many seconds, by slot and set, and address.
        self._waiting: dict[tuple[int, str], dict[str, tuple[float, int]]] = {}
        #: What was taken, until it is known whether the kernel has it.
        self._under_way = _NOTHING

    def want(self, index: int, names: Iterable[str], addresses: Collection[str], now: float, lifetime_s: int) -> bool:
        """Ask for pins that last; return whether any of them has to be waited for.

        One that is there for half of that already is left as it is, and waited for while the kernel may not have it
        yet. Nothing is asked of a set without room for all.
        """
        is_waiting = False
        for name in names:
            is_waiting |= self._under_way.has((index, name), addresses)
            ends = self._ends.get(index, {}).get(name, {})
            _forget_old(ends, now)
            waiting = self._waiting.get((index, name), {})
            missing = [address for address in addresses if ends.get(address, 0.0) < now + lifetime_s / 2]
            # Those that have expired count: the kernel may not have removed them yet.
            if missing and len({*ends, *waiting, *missing}) <= MAX_PINS:
                asked = (now, lifetime_s)
                later = {address: max(asked, waiting.get(address, asked), key=sum) for address in missing}
                self._waiting[index, name] = waiting | later
                is_waiting = True
        return is_waiting

    def holds(self, index: int, names: Iterable[str], addresses: Collection[str], now: float) -> bool:
        """Is every address pinned in every set?"""
        sets = self._ends.get(index, {})
        return all(sets.get(name, {}).get(address, 0.0) > now for name in names for address in addresses)

    def take(self, is_known: Callable[[int, str], bool]) -> PinBatch:
        """Take what waits, less what belongs to no rule any more; it counts as pinned from here on.

        It is under way until `settle`: one batch at a time.
        """
        batch = PinBatch(fresh={}, again={}, before={})
        waiting, self._waiting = self._waiting, {}
        for key, pins in waiting.items():
            index, name = key
            if not is_known(index, name):
                continue
            ends = self._ends.setdefault(index, {}).setdefault(name, {})
            for address, (now, lifetime_s) in pins.items():
                target = batch.fresh
                if address in ends:
                    target = batch.again
                    batch.before.setdefault(key, {})[address] = ends[address]
                target.setdefault(key, {})[address] = lifetime_s
                ends[address] = max(now + lifetime_s, ends.get(address, 0.0))
        self._under_way = batch
        return batch

    def settle(self) -> None:
        """What was under way is in the kernel, or forgotten."""
        self._under_way = _NOTHING

    def forget(self, batch: PinBatch) -> None:
        """A batch did not get into the kernel: everything is as it was."""
        for (index, name), addresses in batch.fresh.items():
            ends = self._ends.get(index, {}).get(name, {})
            for address in addresses:
                ends.pop(address, None)
        for (index, name), before in batch.before.items():
            self._ends.get(index, {}).get(name, {}).update(before)

    def keep(self, index: int, names: set[str]) -> None:
        """A slot's rules have changed: only these sets are left."""
        left = {name: ends for name, ends in self._ends.get(index, {}).items() if name in names}
        if left:
            self._ends[index] = left
        else:
            self._ends.pop(index, None)

    def restore(self, index: int, name: str, addresses: Mapping[str, int], now: float) -> None:
        """Remember what the kernel has, with the seconds that are left."""
        ends = {address: now + seconds for address, seconds in addresses.items()}
        self._ends.setdefault(index, {}).setdefault(name, {}).update(ends)

    def remaining(self, now: float) -> dict[str, dict[str, int]]:
        """Seconds left of each pin, by set and address."""
        sets = [item for sets in self._ends.values() for item in sets.items()]
        left = {name: {address: int(end - now) for address, end in ends.items()} for name, ends in sets}
        return {name: {address: s for address, s in ends.items() if s > 0} for name, ends in left.items()}


def _forget_old(ends: dict[str, float], now: float) -> None:
    for address in [address for address, end in ends.items() if end < now - _MEMORY_S]:
        del ends[address]
