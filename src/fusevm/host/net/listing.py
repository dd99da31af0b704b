"""What `nft -j list table` says about our own table: machines, published ports and their use, pinned addresses, counts.

Pure.

Owns: the reading. Must not: run nft (`firewall`).
"""

from collections.abc import Iterator

import msgspec

from fusevm.host.net.plan import NetworkPlan, parse_veth
from fusevm.host.net.tables import USE_MEMORY_S, USED
from fusevm.host.net.terms import Forward
from fusevm.model.network import Transport

_PINS = "pins_"


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted of one slot."""

    #: Connections that the machine has opened, and that were opened to its published ports.
    opened: int = 0
    accepted: int = 0
    #: Packets of the machine that were refused.
    refused: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            opened=self.opened + other.opened,
            accepted=self.accepted + other.accepted,
            refused=self.refused + other.refused,
        )


class TableListing(msgspec.Struct, frozen=True, kw_only=True):
    """The elements of our table."""

    exists: bool
    #: Slots and whether they have no policy of their own.
    machines: dict[int, bool] = {}
    #: With the address that they lead to.
    forwards: frozenset[tuple[str, Forward]] = frozenset()
    #: Seconds that are left, by set and address.
    pins: dict[str, dict[str, int]] = {}
    counts: dict[int, Counts] = {}
    #: Seconds since a client sent something to a published port, by slot.
    uses: dict[int, int] = {}


class _Set(msgspec.Struct, frozen=True):
    name: str
    elem: list[object] = []


class _Line(msgspec.Struct, frozen=True):
    set: _Set | None = None
    map: _Set | None = None


class _Listing(msgspec.Struct, frozen=True):
    nftables: list[_Line]


class _Concatenation(msgspec.Struct, frozen=True):
    concat: list[str | int]


class _Counter(msgspec.Struct, frozen=True):
    packets: int = 0


class _Element(msgspec.Struct, frozen=True):
    val: str
    counter: _Counter = _Counter()
    expires: int = 0


class _Wrapped(msgspec.Struct, frozen=True):
    elem: _Element


def parse_table(plan: NetworkPlan, listing: bytes) -> TableListing:
    """Read the output of `nft -j list table inet <ours>`; empty output: there is none."""
    if not listing:
        return TableListing(exists=False)
    sets = _parse_sets(listing)
    return TableListing(
        exists=True,
        machines=_parse_machines(plan, sets),
        forwards=frozenset(_parse_forwards(sets)),
        pins={name: dict(_parse_pins(elements)) for name, elements in sets.items() if name.startswith(_PINS)},
        counts=_parse_counts(plan, sets),
        uses=_parse_uses(plan, sets),
    )


def parse_uses(plan: NetworkPlan, listing: bytes) -> dict[int, int]:
    """Read the output of `nft -j list set inet <ours> used` alone."""
    return _parse_uses(plan, _parse_sets(listing)) if listing else {}


def _parse_sets(listing: bytes) -> dict[str, list[object]]:
    lines = msgspec.json.decode(listing, type=_Listing).nftables
    return {found.name: found.elem for line in lines for found in (line.set, line.map) if found is not None}


def _parse_machines(plan: NetworkPlan, sets: dict[str, list[object]]) -> dict[int, bool]:
    judged = {str(pair[0]) for pair in msgspec.convert(sets.get("outward", []), list[tuple[str, object]])}
    sources = msgspec.convert(sets.get("sources", []), list[_Concatenation])
    names = [str(source.concat[0]) for source in sources]
    return {index: name not in judged for name in names if (index := parse_veth(plan, name)) is not None}


def _parse_forwards(sets: dict[str, list[object]]) -> Iterator[tuple[str, Forward]]:
    addresses = msgspec.convert(sets.get("forward_address", []), list[tuple[_Concatenation, str]])
    ports = msgspec.convert(sets.get("forward_port", []), list[tuple[_Concatenation, int]])
    by_key = {tuple(key.concat): port for key, port in ports}
    for key, address in addresses:
        protocol, host_port = key.concat
        port = by_key.get((protocol, host_port), 0)
        yield address, Forward(protocol=Transport(str(protocol)), host_port=int(host_port), port=port)


def _parse_pins(elements: list[object]) -> Iterator[tuple[str, int]]:
    for element in msgspec.convert(elements, list[_Wrapped]):
        yield element.elem.val, element.elem.expires


def _parse_counts(plan: NetworkPlan, sets: dict[str, list[object]]) -> dict[int, Counts]:
    found: dict[int, dict[str, int]] = {}
    for name in ("opened", "accepted", "refused"):
        for element in msgspec.convert(sets.get(name, []), list[_Wrapped]):
            index = parse_veth(plan, element.elem.val)
            if index is not None:
                found.setdefault(index, {})[name] = element.elem.counter.packets
    return {index: Counts(**counts) for index, counts in found.items()}


def _parse_uses(plan: NetworkPlan, sets: dict[str, list[object]]) -> dict[int, int]:
    """An element whose time is over may still be listed, without its `expires`."""
    elements = msgspec.convert(sets.get(USED, []), list[_Wrapped])
    found = ((parse_veth(plan, element.elem.val), element.elem.expires) for element in elements)
    return {index: USE_MEMORY_S - left_s for index, left_s in found if index is not None}
