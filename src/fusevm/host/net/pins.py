"""Which addresses are pinned for which domain rules, and which are about to be. Pure: times are arguments.

Owns: the memory. Must not: apply anything (`firewall`).
"""

from collections.abc import Callable, Iterable, Mapping

import msgspec

from fusevm.host.net.nft import Json, Table
from fusevm.host.net.verdicts import render_pins, render_repinning

#: Expired pins are remembered that long, since the kernel may still have them. Seconds.
_MEMORY_S = 120.0


class PinBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses and seconds for one transaction, by slot and set."""

    fresh: dict[tuple[int, str], dict[str, int]]
    #: In their sets already, perhaps.
    again: dict[tuple[int, str], dict[str, int]]

    def render(self, table: Table) -> list[Json]:
        commands = [line for (_, name), pins in self.fresh.items() for line in render_pins(table, name, pins)]
        return commands + [
            line for (_, name), pins in self.again.items() for line in render_repinning(table, name, pins)
        ]


class Pinboard:
    """What is pinned and what waits."""

    def __init__(self) -> None:
        #: When a pin ends, by slot, set and address.
        self._ends: dict[int, dict[str, dict[str, float]]] = {}
        self._waiting: list[tuple[int, str, str, float, int]] = []

    def want(self, index: int, names: Iterable[str], addresses: Iterable[str], now: float, lifetime_s: int) -> bool:
        """Ask for pins that last; return whether any of them is not there for half of that already."""
        wanted = [(name, address) for name in names for address in addresses]
        missing = [
            (name, address)
            for name, address in wanted
            if self._ends.get(index, {}).get(name, {}).get(address, 0.0) < now + lifetime_s / 2
        ]
        self._waiting += [(index, name, address, now, lifetime_s) for name, address in missing]
        return bool(missing)

    def take(self, is_known: Callable[[int, str], bool]) -> PinBatch:
        """Take what waits, less what belongs to no rule any more; it counts as pinned from here on."""
        fresh: dict[tuple[int, str], dict[str, int]] = {}
        again: dict[tuple[int, str], dict[str, int]] = {}
        waiting, self._waiting = self._waiting, []
        for index, name, address, now, lifetime_s in waiting:
            if not is_known(index, name):
                continue
            ends = self._ends.setdefault(index, {}).setdefault(name, {})
            self._forget_old(ends, now)
            key = (index, name)
            target = again if address in ends and address not in fresh.get(key, {}) else fresh
            pins = target.setdefault(key, {})
            pins[address] = max(lifetime_s, pins.get(address, 0))
            ends[address] = max(now + lifetime_s, ends.get(address, 0.0))
        return PinBatch(fresh=fresh, again=again)

    def forget(self, batch: PinBatch) -> None:
        """A batch did not get into the kernel."""
        for pins in (batch.fresh, batch.again):
            for (index, name), addresses in pins.items():
                ends = self._ends.get(index, {}).get(name, {})
                for address in addresses:
                    ends.pop(address, None)

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

    def _forget_old(self, ends: dict[str, float], now: float) -> None:
        for address in [address for address, end in ends.items() if end < now - _MEMORY_S]:
            del ends[address]
