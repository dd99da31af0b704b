"""What a machine may reach, and which of its ports are published: the policy as data, its checks, and its one judge.

`check_network` makes a policy complete and refuses what cannot be enforced. `permits` says in Python what the host's
nftables rules say in the kernel; it decides which open connections end when a policy changes.

The order of rules counts: the first that matches decides, `internet` decides the rest. Whatever the rules say, no
machine reaches `DENIED`, other machines, its host, or a DNS server other than its gateway.
"""

import re
from collections.abc import Iterable
from enum import StrEnum
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import TypeAlias
from zlib import crc32

import msgspec

from fusevm.model.errors import BadField

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
MAX_RULES = 64
MAX_PORTS = 64
#: Ports one machine may publish.
MAX_PUBLISHED = 64
MIN_KBIT, MAX_KBIT = 64, 100_000_000
ANYWHERE = "0.0.0.0/0"

_DENIED = tuple(IPv4Network(cidr) for cidr in DENIED)
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
#: A name of two labels or more; `*.` in front: every name below it, and not itself.
_DOMAIN = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})+")
_MAX_DOMAIN = 253
_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)
_MAX_PORT = 65_535
#: Ours are the connection marks that begin with this byte.
_MARK = 0xF500_0000


class Verdict(StrEnum):
    """What a rule says."""

    ALLOW = "allow"
    DENY = "deny"


class Protocol(StrEnum):
    """What a rule is about; `any` with ports means TCP and UDP."""

    ANY = "any"
    TCP = "tcp"
    UDP = "udp"
    ICMP = "icmp"


class Transport(StrEnum):
    """What has ports."""

    TCP = "tcp"
    UDP = "udp"


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One rule about where connections may go. `cidr` or `domain`, not both; neither: any address."""

    action: Verdict = Verdict.ALLOW
    #: IPv4 network or address.
    cidr: str = ""
    #: `example.org`, or `*.example.org` for all names below it. Allows only.
    domain: str = ""
    protocol: Protocol = Protocol.ANY
    #: Numbers (`443`) and ranges (`8000-8100`); none: every port.
    ports: tuple[int | str, ...] = ()

    @property
    def key(self) -> str:
        """Names a domain rule within its machine: rules that say the same have the same."""
        return f"{crc32(msgspec.json.encode(self)):08x}"

    @property
    def mark(self) -> int:
        """Conntrack mark of the connections that a domain rule has let through."""
        return _MARK | int(self.key, 16) & 0x00FF_FFFF


class Network(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Network policy of an environment. Other machines, the host, link-local and private ranges are always denied."""

    #: May the machine open connections to the Internet, where no rule says otherwise?
    internet: bool = True
    #: In order; the first that matches decides.
    rules: tuple[Rule, ...] = ()
    #: Bandwidth to and from the machine in kbit/s; 0: no limit.
    ingress_kbit: int = 0
    egress_kbit: int = 0

    @property
    def domain_rules(self) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.rules if rule.domain)


class Exposure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A port that is to be published when the machine is made."""

    port: int
    protocol: Transport = Transport.TCP
    name: str = ""
    #: Wanted on the host; 0: any free one of the host's range.
    host_port: int = 0


class PublishedPort(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A port of a machine that its host forwards."""

    #: Unique on the host.
    id: str
    name: str = ""
    port: int
    host_port: int
    protocol: Transport = Transport.TCP
    created_at_ms: int = 0


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that a machine has opened."""

    #: IP protocol number.
    protocol: int
    address: str
    #: 0 for protocols without ports.
    port: int = 0
    mark: int = 0


PortRange: TypeAlias = tuple[int, int]
_NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.ICMP: 1}


def check_network(network: Network, field: str = "network") -> Network:
    """Return the policy in its normal form. Raises BadField, naming the rule, for what means nothing or cannot be held.

    Idempotent.
    """
    if len(network.rules) > MAX_RULES:
        raise BadField(field=f"{field}.rules", problem=f"{len(network.rules)} rules are more than {MAX_RULES}")
    for name, value in (("ingress_kbit", network.ingress_kbit), ("egress_kbit", network.egress_kbit)):
        if value and not MIN_KBIT <= value <= MAX_KBIT:
            raise BadField(field=f"{field}.{name}", problem=f"{value} is not within {MIN_KBIT} to {MAX_KBIT}")
    rules = tuple(_check_rule(rule, f"{field}.rules[{number}]") for number, rule in enumerate(network.rules))
    if network.internet and any(rule.domain for rule in rules):
        problem = "a rule by domain would say nothing while `internet` is on; set it to false"
        raise BadField(field=f"{field}.internet", problem=problem)
    return msgspec.structs.replace(network, rules=rules)


def check_exposures(exposures: Iterable[Exposure], field: str = "expose") -> tuple[Exposure, ...]:
    """Return what is to be published, each port once. Raises BadField."""
    kept: dict[tuple[Transport, int], Exposure] = {}
    for number, exposure in enumerate(exposures):
        place = f"{field}[{number}]"
        check_port(exposure.port, f"{place}.port")
        if exposure.host_port:
            check_port(exposure.host_port, f"{place}.host_port")
        check_port_name(exposure.name, f"{place}.as")
        if kept.setdefault((exposure.protocol, exposure.port), exposure) != exposure:
            raise BadField(field=place, problem=f"port {exposure.port}/{exposure.protocol} is there twice")
    if len(kept) > MAX_PUBLISHED:
        raise BadField(field=field, problem=f"{len(kept)} ports are more than {MAX_PUBLISHED}")
    return tuple(kept.values())


def check_port(port: int, field: str) -> int:
    """Return a port number. Raises BadField."""
    if not 1 <= port <= _MAX_PORT:
        raise BadField(field=field, problem=f"{port} is not within 1 to {_MAX_PORT}")
    return port


def check_port_name(name: str, field: str) -> str:
    """Return the name of a port. Raises BadField."""
    if len(name) > 64 or not name.isprintable():
        raise BadField(field=field, problem="use at most 64 printable characters")
    return name


def port_ranges(rule: Rule) -> list[PortRange]:
    """The ports of a checked rule, first and last of each range; empty: every port."""
    return [_parse_ports(str(ports)) for ports in rule.ports]


def matches_domain(rule: Rule, name: str) -> bool:
    """Tell whether a name (lower case, no dot at the end) is one of a domain rule."""
    if rule.domain.startswith("*."):
        return name.endswith(rule.domain[1:]) and len(name) > len(rule.domain) - 1
    return bool(rule.domain) and name == rule.domain


def is_denied(address: str, more: Iterable[IPv4Network] = ()) -> bool:
    """Tell whether no machine may reach an IPv4 address."""
    number = IPv4Address(address)
    return any(number in network for network in (*_DENIED, *more))


def permits(network: Network, flow: Flow) -> bool:
    """Judge a connection that is open: the first rule that matches decides. A domain rule knows its own by the mark."""
    if is_denied(flow.address) or (flow.protocol in (6, 17) and flow.port in DNS_PORTS):
        return False
    for rule in network.rules:
        if rule.domain:
            if flow.mark == rule.mark:
                return True
        elif _covers(rule, flow):
            return rule.action is Verdict.ALLOW
    return network.internet


def _covers(rule: Rule, flow: Flow) -> bool:
    ranges = port_ranges(rule)
    if rule.protocol is Protocol.ANY:
        fits = not ranges or flow.protocol in (6, 17)
    else:
        fits = flow.protocol == _NUMBERS[rule.protocol]
    in_ports = not ranges or any(first <= flow.port <= last for first, last in ranges)
    return fits and in_ports and IPv4Address(flow.address) in IPv4Network(rule.cidr or ANYWHERE)


def _check_rule(rule: Rule, field: str) -> Rule:
    if rule.cidr and rule.domain:
        raise BadField(field=field, problem="give either cidr or domain")
    ranges = sorted(_check_ports(str(ports), f"{field}.ports") for ports in rule.ports)
    if len(ranges) > MAX_PORTS:
        raise BadField(field=f"{field}.ports", problem=f"{len(ranges)} ranges are more than {MAX_PORTS}")
    if ranges and rule.protocol is Protocol.ICMP:
        raise BadField(field=f"{field}.ports", problem="icmp has no ports")
    if rule.action is Verdict.ALLOW and any(_is_dns(ports) for ports in ranges):
        problem = "names are answered at the gateway only; allow names by `domain` rules"
        raise BadField(field=f"{field}.ports", problem=problem)
    ports = tuple(first if first == last else f"{first}-{last}" for first, last in _merge(ranges))
    if rule.domain:
        return msgspec.structs.replace(rule, domain=_check_domain(rule, f"{field}.domain"), ports=ports)
    return msgspec.structs.replace(rule, cidr=_check_cidr(rule, f"{field}.cidr"), ports=ports)


def _check_domain(rule: Rule, field: str) -> str:
    if rule.action is not Verdict.ALLOW:
        problem = "an address has many names, so a name cannot be denied; leave `internet` off and allow what is wanted"
        raise BadField(field=field, problem=problem)
    try:
        name = rule.domain.removesuffix(".").lower().encode("idna").decode() if not rule.domain.isascii() else ""
    except UnicodeError as e:
        raise BadField(field=field, problem=f"{rule.domain[:80]!r} is no domain name") from e
    name = name or rule.domain.removesuffix(".").lower()
    if len(name) > _MAX_DOMAIN or not _DOMAIN.fullmatch(name) or name.rpartition(".")[2].isdecimal():
        problem = f"{rule.domain[:80]!r} is neither a name such as example.org nor *.example.org"
        raise BadField(field=field, problem=problem)
    return name


def _check_cidr(rule: Rule, field: str) -> str:
    if ":" in rule.cidr:
        raise BadField(field=field, problem="machines have no IPv6, so nothing of it is reachable anyway")
    try:
        network = IPv4Network(rule.cidr or ANYWHERE, strict=False)
    except (AddressValueError, ValueError) as e:
        raise BadField(field=field, problem=f"{rule.cidr[:80]!r} is no IPv4 network such as 192.0.2.0/24") from e
    if rule.action is Verdict.ALLOW and any(network.subnet_of(denied) for denied in _DENIED):
        problem = f"{network} is private, link-local or special, and no machine may reach that"
        raise BadField(field=field, problem=problem)
    return str(network)


def _check_ports(text: str, field: str) -> PortRange:
    if not _PORTS.fullmatch(text):
        raise BadField(field=field, problem=f"{text[:40]!r} is neither a port nor a range such as 8000-8100")
    first, last = _parse_ports(text)
    for port in (first, last):
        check_port(port, field)
    if first > last:
        raise BadField(field=field, problem=f"{text} ends before it begins")
    return first, last


def _parse_ports(text: str) -> PortRange:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _is_dns(ports: PortRange) -> bool:
    return ports[0] == ports[1] and ports[0] in DNS_PORTS


def _merge(ranges: Iterable[PortRange]) -> list[PortRange]:
    """Join ranges that overlap or touch: an interval set takes no overlapping elements."""
    merged: list[PortRange] = []
    for first, last in ranges:
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged
