"""The nftables table that limits how many connections each machine has in the host's connection tracking.

The kernel counts what is open in the host's own table (linux/net/netfilter/nf_conncount.c), by veth: what the machine
opens and what clients of its published ports do, together. A namespace's count would not do: its guest can close a
connection there, by a packet that does not travel on (a reset with TTL 1), which the host goes on holding for days.

The chain comes last, so that what is refused elsewhere costs nothing, and sees only what would get an entry: packets
of a connection that has one pass by. A machine's element of the set appears with its first connection, and the kernel
removes it some time after the last one has ended.

What was counted is lost with the set. So this is a table of its own, which outlives repairs of the other one and
restarts of the daemon: only its rules are made anew. An element keeps the limit with which it appeared.

Owns: these rules. Must not: apply them (`firewall`).
"""

from fusevm.host.net.nft import (
    BEFORE_FILTER,
    COUNT,
    DROP,
    Json,
    Table,
    are_above_each,
    equals,
    has_no_entry,
    has_status,
    meta,
)
from fusevm.host.net.plan import NetworkPlan

_OPEN = "open"
_CHAIN = "bound"
#: Of elements; more than there are slots: beyond it the kernel would limit nothing.
_SIZE = 65_536


def render_limits(plan: NetworkPlan) -> list[Json]:
    """Render the rules anew into a table that exists; nft refuses it where any part is missing."""
    table = Table("inet", plan.limits_table)
    return [table.flush_chain(_CHAIN), *_rules(table, plan)]


def render_new_limits(plan: NetworkPlan) -> list[Json]:
    """Render the whole table, replacing what there is."""
    table = Table("inet", plan.limits_table)
    return [
        *table.replace(),
        # nft 1.0.6 makes it dynamic for the rules' sake, but has no word for that in JSON: it cannot be added twice.
        table.set(_OPEN, "ifname", size=_SIZE),
        table.chain(_CHAIN, "postrouting", BEFORE_FILTER),
        *_rules(table, plan),
    ]


def render_limits_removal(plan: NetworkPlan) -> list[Json]:
    """Render the removal of the table, whether or not it exists."""
    return Table("inet", plan.limits_table).remove()


def _rules(table: Table, plan: NetworkPlan) -> list[Json]:
    ways: tuple[tuple[str, list[Json]], ...] = (("iifname", []), ("oifname", [has_status("dnat")]))
    return [
        table.rule(
            _CHAIN,
            has_no_entry(),
            equals(meta(interface), plan.veth_pattern),
            *selected,
            are_above_each(meta(interface), _OPEN, plan.max_connections),
            COUNT,
            DROP,
        )
        for interface, selected in ways
    ]
