"""The vocabulary of nftables rule sets as JSON (libnftables-json(5)).

Commands on a table, the few expressions and statements our rules are made of, and the document that carries them.

Must not: know what the rules are for (`tables`, `foreign`) or apply them (`firewall`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec

Json: TypeAlias = "bool | int | str | Sequence[Json] | Mapping[str, Json] | None"

#: Priorities of base chains (linux/netfilter_ipv4.h); `BEFORE_FILTER` comes ahead of other programs' filters.
RAW, DSTNAT, BEFORE_FILTER, FILTER, SRCNAT = -300, -100, -10, 0, 100


def render_document(commands: Iterable[Json]) -> bytes:
    """Make one transaction: `nft -j -f -` applies all of it or nothing."""
    return msgspec.json.encode({"nftables": list(commands)})


ACCEPT: Json = {"accept": None}
DROP: Json = {"drop": None}
COUNT: Json = {"counter": None}
#: An answer at once beats a timeout: the guest's program sees EHOSTUNREACH.
REJECT: Json = {"reject": {"type": "icmpx", "expr": "admin-prohibited"}}
#: Ends an open connection at once; an ICMP error would not.
RESET: Json = {"reject": {"type": "tcp reset"}}


class Table:
    """Commands on one table."""

    def __init__(self, family: str, name: str) -> None:
        self._family = family
        self._name = name

    def remove(self) -> list[Json]:
        """Remove the table; unlike a bare `delete` this does not mind a missing one."""
        return [{"add": self._table()}, {"delete": self._table()}]

    def replace(self) -> list[Json]:
        """Start anew with an empty table."""
        return [*self.remove(), {"add": self._table()}]

    def set(
        self,
        name: str,
        kind: str | list[str],
        flags: Sequence[str] = (),
        elem: Sequence[Json] = (),
        *,
        size: int = 0,
        counts: bool = False,
    ) -> Json:
        """Add a set; with `counts` each element counts the packets that match it."""
        body: dict[str, Json] = {**self._within(), "name": name, "type": kind}
        if flags:
            body["flags"] = flags
        if elem:
            body["elem"] = elem
        if size:
            body["size"] = size
        if counts:
            body["stmt"] = [COUNT]
        return {"add": {"set": body}}

    def map(self, name: str, kind: str | list[str], value: str) -> Json:
        return {"add": {"map": {**self._within(), "name": name, "type": kind, "map": value}}}

    def delete_set(self, name: str) -> Json:
        return {"delete": {"set": {**self._within(), "name": name}}}

    def chain(
        self,
        name: str,
        hook: str = "",
        priority: int = 0,
        *,
        kind: str = "filter",
        policy: str = "accept",
        device: str = "",
    ) -> Json:
        body: dict[str, Json] = {**self._within(), "name": name}
        if hook:
            body |= {"type": kind, "hook": hook, "prio": priority, "policy": policy}
        if device:
            body["dev"] = device
        return {"add": {"chain": body}}

    def flush_chain(self, name: str) -> Json:
        return {"flush": {"chain": {**self._within(), "name": name}}}

    def delete_chain(self, name: str) -> Json:
        return {"delete": {"chain": {**self._within(), "name": name}}}

    def rule(self, chain: str, *expressions: Json) -> Json:
        return {"add": {"rule": {**self._within(), "chain": chain, "expr": list(expressions)}}}

    def insert_rule(self, chain: str, comment: str, *expressions: Json) -> Json:
        """Put a rule at the top of a chain."""
        return {"insert": {"rule": {**self._within(), "chain": chain, "comment": comment, "expr": list(expressions)}}}

    def delete_rule(self, chain: str, handle: int) -> Json:
        return {"delete": {"rule": {**self._within(), "chain": chain, "handle": handle}}}

    def add_elements(self, name: str, elements: Sequence[Json]) -> list[Json]:
        """Add elements to a set; nothing if there are none, which nft would not take."""
        return [{"add": {"element": {**self._within(), "name": name, "elem": elements}}}] if elements else []

    def delete_elements(self, name: str, elements: Sequence[Json]) -> list[Json]:
        """Delete elements, which must exist, from a set."""
        return [{"delete": {"element": {**self._within(), "name": name, "elem": elements}}}] if elements else []

    def _table(self) -> Json:
        return {"table": {"family": self._family, "name": self._name}}

    def _within(self) -> dict[str, Json]:
        return {"family": self._family, "table": self._name}


def equals(left: Json, right: Json) -> Json:
    return {"match": {"op": "==", "left": left, "right": right}}


def differs(left: Json, right: Json) -> Json:
    return {"match": {"op": "!=", "left": left, "right": right}}


def has_state(*states: str) -> Json:
    right: Json = states[0] if len(states) == 1 else list(states)
    return {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": right}}


def has_direction(direction: str) -> Json:
    return equals({"ct": {"key": "direction"}}, direction)


def has_status(status: str) -> Json:
    return {"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": status}}


def has_no_entry() -> Json:
    """Selects packets whose connection is not in connection tracking's table yet: they put it there if they pass."""
    return equals({"&": [{"ct": {"key": "status"}}, "confirmed"]}, 0)


def is_tcp_or_udp() -> Json:
    return equals(meta("l4proto"), {"set": ["tcp", "udp"]})


def is_within_tcp() -> Json:
    """Selects TCP but for what opens a connection, also where connection tracking has forgotten it."""
    return equals({"&": [payload("tcp", "flags"), "syn"]}, 0)


def has_reset() -> Json:
    """Selects TCP packets that end a connection at once, or answer to one that is not known."""
    return equals({"&": [payload("tcp", "flags"), "rst"]}, "rst")


def remember(key: Json, set_name: str, timeout_s: int) -> Json:
    """Put a packet's key into a set with timeouts, where it stays for so long after the last such packet."""
    return {"set": {"op": "update", "elem": {"elem": {"val": key, "timeout": timeout_s}}, "set": f"@{set_name}"}}


def are_above(count: int) -> Json:
    """Counts the connections whose packets get here, in the table of this namespace; selects those above a number."""
    return {"ct count": {"val": count, "inv": True}}


def are_above_each(key: Json, set_name: str, count: int) -> Json:
    """The same, by a packet's key, in the elements of a set."""
    return {"set": {"op": "add", "elem": key, "set": f"@{set_name}", "stmt": [are_above(count)]}}


def lasting(value: Json, timeout_s: int) -> Json:
    """An element that leaves its set after so long."""
    return {"elem": {"val": value, "timeout": timeout_s}}


def goto(chain: str) -> Json:
    return {"goto": {"target": chain}}


def concat(*parts: Json) -> Json:
    return {"concat": list(parts)}


def meta(key: str) -> Json:
    return {"meta": {"key": key}}


def payload(protocol: str, field: str) -> Json:
    return {"payload": {"protocol": protocol, "field": field}}


def limit(rate: int, burst: int) -> Json:
    return {"limit": {"rate": rate, "per": "second", "burst": burst}}


def prefix(cidr: str) -> Json:
    address, _, length = cidr.partition("/")
    return {"prefix": {"addr": address, "len": int(length)}}
