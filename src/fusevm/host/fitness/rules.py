"""Base chains of a host, as `nft -y list ruleset` shows them: who sees a packet first. Pure."""

import re
from collections.abc import Collection, Iterator
from typing import Final

import msgspec

#: Whose hooks see IPv4; machines have nothing else.
_FAMILIES: Final = ("ip", "inet")
_TABLE: Final = re.compile(r"table (\S+) (\S+) \{")
_CHAIN: Final = re.compile(r"\tchain (\S+) \{")
_HOOK: Final = re.compile(r"\t\ttype \w+ hook (\w+) .*?priority (-?\d+);")


class BaseChain(msgspec.Struct, frozen=True, kw_only=True):
    """A chain at a hook."""

    table: str
    #: As nft takes it: family, table, chain.
    name: str
    hook: str
    #: The lower, the earlier.
    priority: int
    #: One without rules does nothing that its policy does not.
    has_rules: bool


def find_earlier(ruleset: str, table: str, hooks: Collection[str]) -> BaseChain | None:
    """Another program's chain with rules that sees packets before those of `table` at one of the hooks, or None.

    Other host daemons of ours ask only for their own machines.
    """
    chains = list(base_chains(ruleset))
    first: dict[str, int] = {}
    for chain in chains:
        if chain.table == table and chain.hook in hooks:
            first[chain.hook] = min(chain.priority, first.get(chain.hook, chain.priority))
    others = [chain for chain in chains if chain.has_rules and not chain.table.startswith("fuse_")]
    return next((chain for chain in others if chain.hook in first and chain.priority < first[chain.hook]), None)


def base_chains(ruleset: str) -> Iterator[BaseChain]:
    """Every chain at a hook that IPv4 passes."""
    family = table = name = ""
    found: BaseChain | None = None
    for line in ruleset.splitlines():
        if match := _TABLE.fullmatch(line):
            family, table = match.groups()
        elif match := _CHAIN.fullmatch(line):
            name = match[1]
        elif line == "\t}":
            if found is not None:
                yield found
            found = None
        elif (match := _HOOK.match(line)) and family in _FAMILIES:
            whole = f"{family} {table} {name}"
            found = BaseChain(table=table, name=whole, hook=match[1], priority=int(match[2]), has_rules=False)
        elif found is not None and line.strip():
            found = msgspec.structs.replace(found, has_rules=True)
