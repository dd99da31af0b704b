"""The nftables chains of a machine that has rules of its own, rendered from its policy.

Such a machine has two chains: `out_<slot>` judges what it sends, `in_<slot>` what comes back, by the same rules read
backwards. Every packet is judged, not only the first of a connection, so that a change of policy cuts what it no longer
allows, in one transaction.

A domain rule is a set of addresses, `pins_<slot>_<key>`, whose elements expire: the DNS forwarder puts an address in
before it tells the machine (`firewall.pin`). A connection that was opened while its address was pinned carries the
rule's conntrack mark and may go on after the pin has expired.

Owns: rules of single machines. Must not: know what all machines have in common (`tables`), or apply anything.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from fusevm.host.net.nft import ACCEPT, DROP, Json, Table, equals, goto, has_state, lasting, meta, payload, prefix
from fusevm.host.net.plan import Slot
from fusevm.host.net.terms import Terms
from fusevm.model.network import ANYWHERE, Network, Protocol, Rule, Verdict, port_ranges

#: Chains of `tables` that end a packet of a machine, and one of two chains for a machine without the Internet.
ALLOW_OUT, REFUSE_OUT = "allow_out", "refuse_out"
NOTHING_OUT, NOTHING_IN = "nothing_out", "nothing_in"
#: Addresses one domain rule may have pinned at a time.
MAX_PINS = 4096

Direction = Literal["out", "in"]
#: Address to seconds that it stays, by set.
Pins = Mapping[str, Mapping[str, int]]


def pin_set(slot: Slot, rule: Rule) -> str:
    """Name of the set of a domain rule's addresses."""
    return f"pins_{slot.index}_{rule.key}"


def verdict_chains(slot: Slot, terms: Terms) -> tuple[str, str] | None:
    """Where the packets of a slot are judged, outward and inward; None: nowhere but by what is true of all."""
    if terms.is_plain:
        return None
    if not terms.policy.rules:
        return NOTHING_OUT, NOTHING_IN
    return f"out_{slot.index}", f"in_{slot.index}"


def render_chains(table: Table, slot: Slot, policy: Network, pins: Pins, *, is_new: bool) -> list[Json]:
    """Render sets and chains of a policy with rules; without `is_new` the chains exist and are filled anew."""
    names = f"out_{slot.index}", f"in_{slot.index}"
    prepare = table.chain if is_new else table.flush_chain
    commands: list[Json] = [prepare(name) for name in names]
    for name in dict.fromkeys(pin_set(slot, rule) for rule in policy.domain_rules):
        commands.append(table.set(name, "ipv4_addr", flags=["timeout"], size=MAX_PINS))
        commands += render_pins(table, name, pins.get(name, {}))
    commands += [table.rule(names[0], *expressions) for expressions in _judge(slot, policy, "out")]
    commands += [table.rule(names[1], *expressions) for expressions in _judge(slot, policy, "in")]
    return commands


def render_chains_removal(table: Table, slot: Slot, policy: Network) -> list[Json]:
    """Render the removal of a policy's chains and sets, which nothing may refer to any more."""
    names = f"out_{slot.index}", f"in_{slot.index}"
    sets = dict.fromkeys(pin_set(slot, rule) for rule in policy.domain_rules)
    return [
        *(table.flush_chain(name) for name in names),
        *(table.delete_chain(name) for name in names),
        *(table.delete_set(name) for name in sets),
    ]


def render_pins(table: Table, name: str, addresses: Mapping[str, int]) -> list[Json]:
    """Render addresses that are not in a set, with the seconds that they stay."""
    elements: list[Json] = [lasting(address, seconds) for address, seconds in addresses.items()]
    return table.add_elements(name, elements)


def render_repinning(table: Table, name: str, addresses: Mapping[str, int]) -> list[Json]:
    """Render addresses that may be in a set: there is no other way to give an element more time."""
    fresh = render_pins(table, name, addresses)
    return [*fresh, *table.delete_elements(name, list(addresses)), *fresh]


def _judge(slot: Slot, policy: Network, direction: Direction) -> Iterable[Sequence[Json]]:
    """The expressions of each rule of a chain."""
    allow: Json = goto(ALLOW_OUT) if direction == "out" else ACCEPT
    refuse: Json = goto(REFUSE_OUT) if direction == "out" else DROP
    # Errors about connections (RFC 792) come from anybody on the way.
    yield has_state("related"), equals(meta("l4proto"), "icmp"), allow
    for rule in policy.rules:
        if rule.domain:
            yield equals(_MARK, rule.mark), allow
            if direction == "out":
                pinned = equals(payload("ip", "daddr"), f"@{pin_set(slot, rule)}")
                yield pinned, *_service(rule, "out"), _set_mark(rule.mark), allow
        else:
            yield *_addresses(rule, direction), *_service(rule, direction), allow if _is_allow(rule) else refuse
    yield (allow if policy.internet else refuse,)


def _is_allow(rule: Rule) -> bool:
    return rule.action is Verdict.ALLOW


def _addresses(rule: Rule, direction: Direction) -> list[Json]:
    field = "daddr" if direction == "out" else "saddr"
    # An empty selector would let a rule without ports match nothing but IPv4; there is nothing else (`guard`).
    return [] if rule.cidr in ("", ANYWHERE) else [equals(payload("ip", field), prefix(rule.cidr))]


def _service(rule: Rule, direction: Direction) -> list[Json]:
    """What selects protocol and ports."""
    ranges = port_ranges(rule)
    selected: list[Json] = []
    if rule.protocol is not Protocol.ANY:
        selected.append(equals(meta("l4proto"), rule.protocol.value))
    elif ranges:
        selected.append(equals(meta("l4proto"), {"set": ["tcp", "udp"]}))
    if ranges:
        ports: list[Json] = [first if first == last else {"range": [first, last]} for first, last in ranges]
        selected.append(equals(payload("th", "dport" if direction == "out" else "sport"), {"set": ports}))
    return selected


_MARK: Json = {"ct": {"key": "mark"}}


def _set_mark(value: int) -> Json:
    return {"mangle": {"key": _MARK, "value": value}}
