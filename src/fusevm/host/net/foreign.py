"""Forward chains of other programs that would drop the machines' packets (Docker, ufw, firewalld).

A packet passes only if every base chain at the forward hook lets it: our table's verdict cannot overrule another's
drop. So each such chain gets a pair of rules at its top, out and back, tagged with our name and removed with us.
They open nothing: what a machine may reach is decided in our own table, whose drop is just as final.

A chain that drops only some packets is left alone: that is what its administrator wants of machines, too.

Owns: the reading of foreign rules, the tagged pairs. Must not: apply anything (`firewall`).
"""

from collections.abc import Iterable, Sequence

import msgspec

from fusevm.host.net.nft import ACCEPT, COUNT, Json, Table, equals, meta
from fusevm.host.net.plan import NetworkPlan

#: Families whose forward hook sees IPv4.
_FAMILIES = ("ip", "inet")
#: Statements that neither select packets nor end a chain.
_PASSIVE = frozenset({"counter", "log", "nflog"})


class Chain(msgspec.Struct, frozen=True):
    """One chain as `nft -j list` shows it."""

    family: str
    table: str
    name: str
    #: Empty for a chain that is only jumped to.
    hook: str = ""
    policy: str = ""


class Rule(msgspec.Struct, frozen=True):
    """One rule as `nft -j list` shows it."""

    family: str
    table: str
    chain: str
    handle: int
    expr: list[dict[str, object]] = []
    comment: str = ""


class _Line(msgspec.Struct, frozen=True):
    chain: Chain | None = None
    rule: Rule | None = None


class _Listing(msgspec.Struct, frozen=True):
    nftables: list[_Line]


class Ruleset(msgspec.Struct, frozen=True):
    """Chains and rules of a host, in order."""

    chains: list[Chain]
    rules: list[Rule]


def parse_ruleset(listing: bytes) -> Ruleset:
    """Read the output of `nft -j -t list ruleset`."""
    lines = msgspec.json.decode(listing, type=_Listing).nftables
    chains = [line.chain for line in lines if line.chain is not None]
    return Ruleset(chains, [line.rule for line in lines if line.rule is not None])


def find_blocking_chains(ruleset: Ruleset) -> list[Chain]:
    """Return other programs' base chains that drop every forwarded packet they do not know."""
    hooks = [chain for chain in ruleset.chains if chain.hook == "forward" and chain.family in _FAMILIES]
    return [chain for chain in hooks if not chain.table.startswith("fuse_") and _blocks(ruleset, chain)]


def render_passage(plan: NetworkPlan, ruleset: Ruleset) -> list[Json]:
    """Render what is missing so that every blocking chain, and no other, has our tagged pair. Empty if all is well."""
    tag = _tag(plan)
    blocking = find_blocking_chains(ruleset)
    commands: list[Json] = []
    for chain in ruleset.chains:
        ours = [rule for rule in _rules_of(ruleset, chain) if rule.comment == tag]
        if len(ours) == (2 if chain in blocking else 0):
            continue
        table = Table(chain.family, chain.table)
        commands += _deletions(ours)
        if chain in blocking:
            commands += [table.insert_rule(chain.name, tag, *expressions) for expressions in _pair(plan)]
    return commands


def render_passage_removal(plan: NetworkPlan, ruleset: Ruleset) -> list[Json]:
    """Render the removal of all our tagged rules."""
    return _deletions(rule for rule in ruleset.rules if rule.comment == _tag(plan))


def count_tagged(plan: NetworkPlan, ruleset: Ruleset) -> int:
    return sum(rule.comment == _tag(plan) for rule in ruleset.rules)


def _tag(plan: NetworkPlan) -> str:
    return f"fuse:{plan.prefix}"


def _pair(plan: NetworkPlan) -> list[Sequence[Json]]:
    return [(equals(meta(key), plan.veth_pattern), COUNT, ACCEPT) for key in ("iifname", "oifname")]


def _deletions(rules: Iterable[Rule]) -> list[Json]:
    return [Table(rule.family, rule.table).delete_rule(rule.chain, rule.handle) for rule in rules]


def _rules_of(ruleset: Ruleset, chain: Chain) -> list[Rule]:
    place = (chain.family, chain.table, chain.name)
    return [rule for rule in ruleset.rules if (rule.family, rule.table, rule.chain) == place]


def _blocks(ruleset: Ruleset, chain: Chain, seen: frozenset[str] = frozenset()) -> bool:
    """Tell whether a packet that no selective rule matches ends in a drop."""
    for rule in _rules_of(ruleset, chain):
        statements = [(key, value) for part in rule.expr for key, value in part.items() if key not in _PASSIVE]
        if len(statements) != 1:
            continue  # selective, or without effect
        verdict, value = statements[0]
        if verdict in {"accept", "return"}:
            return False
        # `xt` alone is a target of iptables-nft that nft cannot name, such as REJECT.
        if verdict in {"drop", "reject", "xt"}:
            return True
        if verdict in {"jump", "goto"}:
            target = _target(ruleset, chain, value)
            if target is not None and target.name not in seen:
                if _blocks(ruleset, target, seen | {chain.name}):
                    return True
                if verdict == "goto":
                    return chain.policy == "drop"
    return chain.policy == "drop"


def _target(ruleset: Ruleset, chain: Chain, value: object) -> Chain | None:
    name = value.get("target") if isinstance(value, dict) else None
    same_table = [other for other in ruleset.chains if (other.family, other.table) == (chain.family, chain.table)]
    return next((other for other in same_table if other.name == name), None)
