"""Our nftables rules, rendered by pure functions.

On the host there is one table per daemon instance, beside that of `limits`. A machine is one element of the set
`sources` (veth . address), one in each set that counts, and only if its policy is not the default one of the verdict
maps `outward` and `inward`, with chains of its own where it has rules (`verdicts`). A published port is an element of
two maps and of `exposed`; the set `used` holds whose ports clients use, put there by their packets and gone some time
after the last one. A veth that carries our prefix and is not in `sources` reaches nothing: half-made slots are closed.
To add an element takes 2 ms, to remove one waits for the kernel's RCU grace period (16 ms measured), so the common case
needs neither.

In each namespace there are two small tables: who may speak on the tap (netdev), and source NAT with a firewall for
the namespace itself (ip).

Owns: rules. Must not: apply them (`firewall`).
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from ipaddress import IPv4Network, collapse_addresses
from types import MappingProxyType

from fusevm.host.net.nft import (
    ACCEPT,
    BEFORE_FILTER,
    COUNT,
    DROP,
    DSTNAT,
    FILTER,
    RAW,
    REJECT,
    RESET,
    SRCNAT,
    Json,
    Table,
    are_above,
    concat,
    differs,
    equals,
    goto,
    has_direction,
    has_no_entry,
    has_reset,
    has_state,
    has_status,
    is_tcp_or_udp,
    is_within_tcp,
    lasting,
    limit,
    meta,
    payload,
    prefix,
    remember,
)
from fusevm.host.net.plan import NetworkPlan, Slot
from fusevm.host.net.terms import Forward, Terms
from fusevm.host.net.verdicts import (
    ALLOW_OUT,
    NOTHING_IN,
    NOTHING_OUT,
    REFUSE_OUT,
    Pins,
    pin_set,
    render_chains,
    render_chains_removal,
    verdict_chains,
)
from fusevm.model.network import DENIED, DNS_PORTS

DNS_PORT = 53

#: Packets to the forwarder. Beyond it the kernel drops them, so a flood does not reach the daemon.
DNS_PACKETS_PER_S, DNS_PACKETS_BURST = 300, 300
DNS_CONNECTIONS_PER_S, DNS_CONNECTIONS_BURST = 20, 20

#: Sets that count, by veth: connections opened by the machine and accepted by it, and its packets that were refused.
COUNTERS = ("opened", "accepted", "refused")

#: By veth, with the time that is left of `USE_MEMORY_S` since a client last sent to a published port.
USED = "used"
#: Longer than anybody goes without asking, who wants to know it exactly.
USE_MEMORY_S = 7 * 86_400

#: Name of both tables inside a namespace.
INSIDE_TABLE = "fuse"


# -- host -----------------------------------------------------------------------------------------------------------


def render_host_table(
    plan: NetworkPlan,
    uplinks: Sequence[str],
    machines: Iterable[tuple[Slot, Terms]],
    pins: Pins = MappingProxyType({}),
    uses: Mapping[int, int] = MappingProxyType({}),
) -> list[Json]:
    """Render the whole host table, replacing one that exists.

    Connection tracking is not part of a table: established connections survive the replacement. `uses` are the
    seconds since clients sent something, by slot.
    """
    table = Table("inet", plan.table)
    pairs = list(machines)
    # An interval set takes no overlapping elements.
    denied = collapse_addresses(IPv4Network(cidr) for cidr in (*DENIED, plan.range))
    return [
        *table.replace(),
        table.set("denied", "ipv4_addr", flags=["interval"], elem=[prefix(str(cidr)) for cidr in denied]),
        table.set("uplinks", "ifname", elem=list(uplinks)),
        table.set("sources", ["ifname", "ipv4_addr"]),
        *(table.set(name, "ifname", counts=True) for name in COUNTERS),
        # The machine's port; and by the host's port, the machine's address and port.
        table.set("exposed", ["ifname", "inet_proto", "inet_service"]),
        table.map("forward_address", ["inet_proto", "inet_service"], "ipv4_addr"),
        table.map("forward_port", ["inet_proto", "inet_service"], "inet_service"),
        table.set(USED, "ifname", flags=["timeout"]),
        *_endings(table),
        *(table.map(name, "ifname", "verdict") for name in ("outward", "inward")),
        *_host_policy_chains(table),
        *_host_base_chains(table, plan),
        *_host_nat_chains(table, plan),
        *render_machines(plan, pairs, pins),
        *table.add_elements(USED, _uses([slot for slot, terms in pairs if terms.forwards], uses)),
    ]


def render_machines(
    plan: NetworkPlan, machines: Iterable[tuple[Slot, Terms]], pins: Pins = MappingProxyType({})
) -> list[Json]:
    """Render what belongs to machines that the table does not have."""
    table = Table("inet", plan.table)
    pairs = list(machines)
    veths = [slot.veth for slot, _ in pairs]
    return [
        *(command for slot, terms in pairs for command in _render_terms(table, slot, terms, pins)),
        *(command for name in COUNTERS for command in table.add_elements(name, veths)),
        *table.add_elements("sources", [_source(slot) for slot, _ in pairs]),
    ]


def render_terms_change(plan: NetworkPlan, slot: Slot, old: Terms, new: Terms) -> list[Json]:
    """Render the change of one machine's terms; addresses of domain rules in both stay pinned."""
    table = Table("inet", plan.table)
    return [
        *_render_policy_change(table, slot, old, new),
        *_render_forwards_removal(table, slot, old.forwards, new.forwards),
        *_render_forwards(table, slot, new.forwards, old.forwards),
    ]


def render_machines_removal(plan: NetworkPlan, machines: Iterable[tuple[Slot, Terms]]) -> list[Json]:
    """Render the removal of machines that the table has under these terms."""
    table = Table("inet", plan.table)
    pairs = list(machines)
    veths = [slot.veth for slot, _ in pairs]
    return [
        *table.delete_elements("sources", [_source(slot) for slot, _ in pairs]),
        *(command for name in COUNTERS for command in table.delete_elements(name, veths)),
        *(command for slot, terms in pairs for command in _render_terms_removal(table, slot, terms)),
    ]


def render_host_table_removal(plan: NetworkPlan) -> list[Json]:
    """Render the removal of the host table, whether or not it exists."""
    return Table("inet", plan.table).remove()


def _render_terms(table: Table, slot: Slot, terms: Terms, pins: Pins) -> list[Json]:
    chains = verdict_chains(slot, terms)
    own = render_chains(table, slot, terms.policy, pins, is_new=True) if terms.policy.rules else []
    return [*own, *_verdict_elements(table, slot, chains), *_render_forwards(table, slot, terms.forwards)]


def _render_terms_removal(table: Table, slot: Slot, terms: Terms) -> list[Json]:
    chains = verdict_chains(slot, terms)
    own = render_chains_removal(table, slot, terms.policy) if terms.policy.rules else []
    return [*_no_verdict_elements(table, slot, chains), *own, *_render_forwards_removal(table, slot, terms.forwards)]


def _render_policy_change(table: Table, slot: Slot, old: Terms, new: Terms) -> list[Json]:
    if old.policy == new.policy:
        return []
    before, after = verdict_chains(slot, old), verdict_chains(slot, new)
    commands: list[Json] = []
    if new.policy.rules:
        commands += render_chains(table, slot, new.policy, {}, is_new=not old.policy.rules)
    if before != after:
        commands += [*_no_verdict_elements(table, slot, before), *_verdict_elements(table, slot, after)]
    if old.policy.rules and not new.policy.rules:
        commands += render_chains_removal(table, slot, old.policy)
    elif old.policy.rules:
        kept = {rule.key for rule in new.policy.domain_rules}
        gone = dict.fromkeys(pin_set(slot, rule) for rule in old.policy.domain_rules if rule.key not in kept)
        commands += [table.delete_set(name) for name in gone]
    return commands


def _verdict_elements(table: Table, slot: Slot, chains: tuple[str, str] | None) -> list[Json]:
    if chains is None:
        return []
    pairs = zip(("outward", "inward"), chains, strict=True)
    return [command for name, chain in pairs for command in table.add_elements(name, [[slot.veth, goto(chain)]])]


def _no_verdict_elements(table: Table, slot: Slot, chains: tuple[str, str] | None) -> list[Json]:
    if chains is None:
        return []
    # nft 1.0.6 wants the data of a map's element also to delete it.
    pairs = zip(("outward", "inward"), chains, strict=True)
    return [command for name, chain in pairs for command in table.delete_elements(name, [[slot.veth, goto(chain)]])]


def _render_forwards(
    table: Table, slot: Slot, forwards: AbstractSet[Forward], others: AbstractSet[Forward] = frozenset()
) -> list[Json]:
    """Render the forwards that the others are not."""
    fresh = sorted(forwards - others)
    return [
        *table.add_elements("exposed", _exposed(slot, _guest_ports(forwards) - _guest_ports(others))),
        *table.add_elements("forward_address", [[_host_port(forward), slot.address] for forward in fresh]),
        *table.add_elements("forward_port", [[_host_port(forward), forward.port] for forward in fresh]),
    ]


def _render_forwards_removal(
    table: Table, slot: Slot, forwards: AbstractSet[Forward], others: AbstractSet[Forward] = frozenset()
) -> list[Json]:
    gone = sorted(forwards - others)
    return [
        *table.delete_elements("forward_address", [[_host_port(forward), slot.address] for forward in gone]),
        *table.delete_elements("forward_port", [[_host_port(forward), forward.port] for forward in gone]),
        *table.delete_elements("exposed", _exposed(slot, _guest_ports(forwards) - _guest_ports(others))),
    ]


def _guest_ports(forwards: Iterable[Forward]) -> set[tuple[str, int]]:
    """Several ports of the host may lead to one of the machine."""
    return {(forward.protocol.value, forward.port) for forward in forwards}


def _exposed(slot: Slot, ports: Iterable[tuple[str, int]]) -> list[Json]:
    return [concat(slot.veth, protocol, port) for protocol, port in sorted(ports)]


def _host_port(forward: Forward) -> Json:
    return concat(forward.protocol.value, forward.host_port)


def _endings(table: Table) -> list[Json]:
    """The chains where packets of machines end."""
    return [
        table.chain(ALLOW_OUT),
        table.rule(ALLOW_OUT, has_state("new"), equals(meta("iifname"), "@opened")),
        table.rule(ALLOW_OUT, ACCEPT),
        table.chain(REFUSE_OUT),
        table.rule(REFUSE_OUT, equals(meta("iifname"), "@refused")),
        table.rule(REFUSE_OUT, is_within_tcp(), RESET),
        table.rule(REFUSE_OUT, REJECT),
        table.chain(NOTHING_OUT),
        table.rule(NOTHING_OUT, goto(REFUSE_OUT)),
        table.chain(NOTHING_IN),
        table.rule(NOTHING_IN, DROP),
    ]


def _host_policy_chains(table: Table) -> list[Json]:
    """What forwarded packets of machines meet; both chains end every packet."""
    answer = [has_direction("reply"), has_status("dnat")]
    return [
        table.chain("from_machine"),
        # Clients of published ports may be anywhere, private ranges included.
        table.rule("from_machine", *answer, equals(_service("iifname", "sport"), "@exposed"), ACCEPT),
        table.rule("from_machine", *_icmp_errors(), ACCEPT),
        table.rule("from_machine", equals(payload("ip", "daddr"), "@denied"), goto(REFUSE_OUT)),
        table.rule(
            "from_machine",
            is_tcp_or_udp(),
            equals(payload("th", "dport"), {"set": list(DNS_PORTS)}),
            goto(REFUSE_OUT),
        ),
        table.rule("from_machine", differs(meta("oifname"), "@uplinks"), goto(REFUSE_OUT)),
        table.rule("from_machine", {"vmap": {"key": meta("iifname"), "data": "@outward"}}),
        table.rule("from_machine", goto(ALLOW_OUT)),
        table.chain("to_machine"),
        table.rule("to_machine", *_published("oifname"), ACCEPT),
        # What becomes of the machine's answers to clients: they do not fit their way, or nobody is there.
        table.rule("to_machine", *_icmp_errors(), ACCEPT),
        table.rule("to_machine", has_direction("original"), COUNT, DROP),
        table.rule("to_machine", has_state("new", "invalid", "untracked"), COUNT, DROP),
        table.rule("to_machine", {"vmap": {"key": meta("oifname"), "data": "@inward"}}),
        table.rule("to_machine", ACCEPT),
    ]


def _host_base_chains(table: Table, plan: NetworkPlan) -> list[Json]:
    from_machine = equals(meta("iifname"), plan.veth_pattern)
    to_machine = equals(meta("oifname"), plan.veth_pattern)
    source = concat(meta("iifname"), payload("ip", "saddr"))
    return [
        # Before connection tracking: packets with a wrong source cost no entry there.
        table.chain("guard", "prerouting", RAW),
        table.rule("guard", from_machine, equals(meta("nfproto"), "ipv6"), COUNT, DROP),
        table.rule("guard", from_machine, differs(source, "@sources"), COUNT, DROP),
        table.chain("forward", "forward", BEFORE_FILTER),
        table.rule("forward", from_machine, goto("from_machine")),
        table.rule("forward", to_machine, goto("to_machine")),
        # The host's root may open connections to a machine; the machine may not open any to the host.
        table.chain("input", "input", BEFORE_FILTER),
        table.rule("input", from_machine, has_state("established", "related"), ACCEPT),
        table.rule("input", from_machine, equals(meta("iifname"), "@refused")),
        table.rule("input", from_machine, COUNT, REJECT),
        # What goes to a published port is still on its way to the host's own address here.
        table.chain("output", "output", BEFORE_FILTER),
        table.rule("output", to_machine, has_state("new"), differs(meta("skuid"), 0), COUNT, REJECT),
    ]


def _host_nat_chains(table: Table, plan: NetworkPlan) -> list[Json]:
    """Published ports, on every address of the host, and the machines' way out."""
    key = concat(meta("l4proto"), payload("th", "dport"))
    translate: Json = {
        "dnat": {
            "family": "ip",
            "addr": {"map": {"key": key, "data": "@forward_address"}},
            "port": {"map": {"key": key, "data": "@forward_port"}},
        }
    }
    to_host: Json = equals({"fib": {"result": "type", "flags": ["daddr"]}}, "local")
    to_machine = equals(meta("oifname"), plan.veth_pattern)
    return [
        table.chain("use"),
        table.rule("use", has_state("new"), equals(meta("oifname"), "@accepted")),
        # Nobody is there: a machine that goes on sending to who has left gets these, and is not used by that.
        table.rule("use", has_reset(), ACCEPT),
        table.rule("use", *_published("oifname"), remember(meta("oifname"), USED, USE_MEMORY_S)),
        # What the host itself sends is on its way to a machine only here: it was translated on the way out.
        table.chain("arrivals", "postrouting", FILTER),
        table.rule("arrivals", to_machine, has_status("dnat"), goto("use")),
        table.chain("publish", "prerouting", DSTNAT, kind="nat"),
        # No machine reaches another one, not even by way of the host.
        table.rule("publish", differs(meta("iifname"), plan.veth_pattern), to_host, is_tcp_or_udp(), translate),
        table.chain("publish_local", "output", DSTNAT, kind="nat"),
        table.rule("publish_local", to_host, is_tcp_or_udp(), translate),
        table.chain("masquerade", "postrouting", SRCNAT, kind="nat"),
        table.rule(
            "masquerade",
            equals(payload("ip", "saddr"), prefix(plan.range)),
            equals(meta("oifname"), "@uplinks"),
            {"masquerade": None},
        ),
        # From the host's loopback address to a published port.
        table.rule(
            "masquerade", equals(payload("ip", "saddr"), prefix("127.0.0.0/8")), to_machine, {"masquerade": None}
        ),
    ]


def _published(interface: str) -> list[Json]:
    """Selects what clients send to published ports, already translated."""
    return [has_direction("original"), has_status("dnat"), equals(_service(interface, "dport"), "@exposed")]


def _icmp_errors() -> list[Json]:
    """Selects what ICMP has to say about connections to published ports."""
    return [has_state("related"), has_status("dnat"), equals(meta("l4proto"), "icmp")]


def _service(interface: str, field: str) -> Json:
    return concat(meta(interface), meta("l4proto"), payload("th", field))


def _uses(slots: Iterable[Slot], uses: Mapping[int, int]) -> list[Json]:
    """Elements of `used` that end when those of an earlier table would have."""
    left = [(slot.veth, USE_MEMORY_S - uses[slot.index]) for slot in slots if slot.index in uses]
    return [lasting(veth, seconds) for veth, seconds in left if seconds > 0]


def _source(slot: Slot) -> Json:
    return concat(slot.veth, slot.address)


# -- inside a namespace ---------------------------------------------------------------------------------------------


def render_namespace_tables(slot: Slot) -> list[Json]:
    """Render both tables of a slot's namespace, replacing what exists. The tap must exist."""
    return [*_tap_table(slot), *_nat_table(slot)]


def _tap_table(slot: Slot) -> list[Json]:
    """Anti-spoofing at the earliest point: IPv4 and ARP of the one guest enter, nothing else does."""
    table = Table("netdev", INSIDE_TABLE)
    # A probe for duplicate addresses has no sender yet (RFC 5227).
    senders = {"set": ["0.0.0.0", slot.guest_address]}  # noqa: S104
    return [
        *table.replace(),
        table.chain("tap", "ingress", RAW, policy="drop", device=slot.tap),
        table.rule("tap", differs(payload("ether", "saddr"), slot.guest_mac), DROP),
        table.rule(
            "tap",
            equals(payload("arp", "saddr ether"), slot.guest_mac),
            equals(payload("arp", "saddr ip"), senders),
            ACCEPT,
        ),
        table.rule("tap", equals(payload("ip", "saddr"), slot.guest_address), ACCEPT),
    ]


def _nat_table(slot: Slot) -> list[Json]:
    table = Table("ip", INSIDE_TABLE)
    from_guest = equals(meta("iifname"), slot.tap)
    to_gateway = equals(payload("ip", "daddr"), slot.gateway)
    out = [from_guest, equals(meta("oifname"), slot.peer)]
    back = [equals(meta("iifname"), slot.peer), equals(meta("oifname"), slot.tap)]
    return [
        *table.replace(),
        table.chain("input", "input", FILTER, policy="drop"),
        table.rule("input", has_state("established", "related"), differs(meta("l4proto"), "udp"), ACCEPT),
        table.rule(
            "input",
            from_guest,
            to_gateway,
            equals(payload("udp", "dport"), DNS_PORT),
            limit(DNS_PACKETS_PER_S, DNS_PACKETS_BURST),
            ACCEPT,
        ),
        table.rule(
            "input",
            from_guest,
            to_gateway,
            equals(payload("tcp", "dport"), DNS_PORT),
            limit(DNS_CONNECTIONS_PER_S, DNS_CONNECTIONS_BURST),
            ACCEPT,
        ),
        table.rule("input", from_guest, to_gateway, equals(payload("icmp", "type"), "echo-request"), ACCEPT),
        table.chain("forward", "forward", FILTER, policy="drop"),
        # What connection tracking cannot place would leave without translation.
        table.rule("forward", has_state("invalid"), DROP),
        # For the sake of the namespace's own table, which is the host's memory; one rule, so that it is one count. What
        # the machine may have in the host's is not told by this one (`limits`).
        table.rule("forward", has_no_entry(), are_above(slot.max_connections), COUNT, DROP),
        table.rule("forward", *out, ACCEPT),
        table.rule("forward", *back, has_state("established", "related"), ACCEPT),
        # Who may open a connection to the machine is decided on the host.
        table.rule("forward", *back, has_status("dnat"), ACCEPT),
        table.chain("arrive", "prerouting", DSTNAT, kind="nat"),
        table.rule(
            "arrive",
            equals(meta("iifname"), slot.peer),
            equals(payload("ip", "daddr"), slot.address),
            is_tcp_or_udp(),
            {"dnat": {"addr": slot.guest_address}},
        ),
        table.chain("translate", "postrouting", SRCNAT, kind="nat"),
        table.rule("translate", equals(meta("oifname"), slot.peer), {"snat": {"addr": slot.address}}),
    ]
