"""Our nftables rules, rendered by pure functions.

On the host there is one table per daemon instance. Its chains never change with the number of machines: a machine is
one element of the set `sources` (veth . address), and one of the set `offline` if it must not reach the Internet. A
veth that carries our prefix and is not in `sources` reaches nothing: half-made slots are closed. To add an element
takes 2 ms, to remove one waits for the kernel's RCU grace period (16 ms measured), so the common case needs neither.

In each namespace there are two small tables: who may speak on the tap (netdev), and source NAT with a firewall for
the namespace itself (ip).

Owns: rules. Must not: apply them (`firewall`).
"""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, collapse_addresses

from fusevm.host.net.nft import (
    ACCEPT,
    BEFORE_FILTER,
    COUNT,
    DROP,
    FILTER,
    RAW,
    REJECT,
    SRCNAT,
    Json,
    Table,
    differs,
    equals,
    has_state,
    is_tcp_or_udp,
    limit,
    meta,
    payload,
    prefix,
)
from fusevm.host.net.plan import NetworkPlan, Slot
from fusevm.model.environment import Network

#: IPv4 that no machine reaches: what is not global unicast (RFC 6890, IANA special-purpose registry) save the three
#: documentation nets, and Azure's host agent, which hides behind a public address.
DENIED: tuple[str, ...] = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "168.63.129.16/32",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/3",
)
#: Plain DNS and DNS over TLS: both only through the forwarder at the gateway address.
DNS_PORTS = (53, 853)
DNS_PORT = 53

#: Connections a machine may have open at once; each takes an entry of the host's connection tracking table.
MAX_CONNECTIONS = 8192
#: Packets to the forwarder. Beyond it the kernel drops them, so a flood does not reach the daemon.
DNS_PACKETS_PER_S, DNS_PACKETS_BURST = 300, 300
DNS_CONNECTIONS_PER_S, DNS_CONNECTIONS_BURST = 20, 20

#: Name of both tables inside a namespace.
INSIDE_TABLE = "fuse"


# -- host -----------------------------------------------------------------------------------------------------------


def render_host_table(
    plan: NetworkPlan, uplinks: Sequence[str], machines: Iterable[tuple[Slot, Network]]
) -> list[Json]:
    """Render the whole host table, replacing one that exists.

    Connection tracking is not part of a table: established connections survive the replacement.
    """
    table = Table("inet", plan.table)
    # An interval set takes no overlapping elements.
    denied = collapse_addresses(IPv4Network(cidr) for cidr in (*DENIED, plan.range))
    return [
        *table.replace(),
        table.set("denied", "ipv4_addr", flags=["interval"], elem=[prefix(str(cidr)) for cidr in denied]),
        table.set("uplinks", "ifname", elem=list(uplinks)),
        table.set("sources", ["ifname", "ipv4_addr"]),
        table.set("offline", "ifname"),
        *_host_policy_chains(table),
        *_host_base_chains(table, plan),
        *render_machines(plan, machines),
    ]


def render_machines(plan: NetworkPlan, machines: Iterable[tuple[Slot, Network]]) -> list[Json]:
    """Render the elements of machines that the table does not have."""
    table = Table("inet", plan.table)
    pairs = list(machines)
    offline = [slot.veth for slot, policy in pairs if not policy.internet]
    return [
        *table.add_elements("offline", offline),
        *table.add_elements("sources", [_source(slot) for slot, _ in pairs]),
    ]


def render_policy_change(plan: NetworkPlan, slot: Slot, policy: Network) -> list[Json]:
    """Render the switch of one machine that the table has under the opposite policy."""
    table = Table("inet", plan.table)
    return (
        table.delete_elements("offline", [slot.veth]) if policy.internet else table.add_elements("offline", [slot.veth])
    )


def render_machines_removal(plan: NetworkPlan, machines: Iterable[tuple[Slot, Network]]) -> list[Json]:
    """Render the removal of machines that the table has under these policies."""
    table = Table("inet", plan.table)
    pairs = list(machines)
    offline = [slot.veth for slot, policy in pairs if not policy.internet]
    return [
        *table.delete_elements("sources", [_source(slot) for slot, _ in pairs]),
        *table.delete_elements("offline", offline),
    ]


def render_host_table_removal(plan: NetworkPlan) -> list[Json]:
    """Render the removal of the host table, whether or not it exists."""
    return Table("inet", plan.table).remove()


def _host_policy_chains(table: Table) -> list[Json]:
    """What forwarded packets of machines meet; both chains end every packet."""
    return [
        table.chain("from_machine"),
        table.rule("from_machine", equals(meta("iifname"), "@offline"), COUNT, REJECT),
        table.rule("from_machine", equals(payload("ip", "daddr"), "@denied"), COUNT, REJECT),
        table.rule("from_machine", is_tcp_or_udp(), equals(payload("th", "dport"), {"set": list(DNS_PORTS)}), REJECT),
        table.rule("from_machine", equals(meta("oifname"), "@uplinks"), ACCEPT),
        table.rule("from_machine", COUNT, REJECT),
        table.chain("to_machine"),
        table.rule("to_machine", equals(meta("oifname"), "@offline"), COUNT, DROP),
        table.rule("to_machine", has_state("established", "related"), ACCEPT),
        table.rule("to_machine", COUNT, DROP),
    ]


def _host_base_chains(table: Table, plan: NetworkPlan) -> list[Json]:
    from_machine = equals(meta("iifname"), plan.veth_pattern)
    to_machine = equals(meta("oifname"), plan.veth_pattern)
    source = {"concat": [meta("iifname"), payload("ip", "saddr")]}
    return [
        # Before connection tracking: packets with a wrong source cost no entry there.
        table.chain("guard", "prerouting", RAW),
        table.rule("guard", from_machine, equals(meta("nfproto"), "ipv6"), COUNT, DROP),
        table.rule("guard", from_machine, differs(source, "@sources"), COUNT, DROP),
        table.chain("forward", "forward", BEFORE_FILTER),
        table.rule("forward", from_machine, {"goto": {"target": "from_machine"}}),
        table.rule("forward", to_machine, {"goto": {"target": "to_machine"}}),
        # The host may open connections to a machine; the machine may not open any to the host.
        table.chain("input", "input", BEFORE_FILTER),
        table.rule("input", from_machine, has_state("established", "related"), ACCEPT),
        table.rule("input", from_machine, COUNT, REJECT),
        table.chain("masquerade", "postrouting", SRCNAT, kind="nat"),
        table.rule(
            "masquerade",
            equals(payload("ip", "saddr"), prefix(plan.range)),
            equals(meta("oifname"), "@uplinks"),
            {"masquerade": None},
        ),
    ]


def _source(slot: Slot) -> Json:
    return {"concat": [slot.veth, slot.address]}


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
        table.rule("forward", *out, has_state("new"), {"ct count": {"val": MAX_CONNECTIONS, "inv": True}}, COUNT, DROP),
        table.rule("forward", *out, ACCEPT),
        table.rule("forward", *back, has_state("established", "related"), ACCEPT),
        table.chain("translate", "postrouting", SRCNAT, kind="nat"),
        table.rule("translate", equals(meta("oifname"), slot.peer), {"snat": {"addr": slot.address}}),
    ]
