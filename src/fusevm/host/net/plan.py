"""What a network slot is, as pure functions of (plan, index).

A slot is a number; which numbers are taken is the journal's business. Every name and address of a slot follows from
its number, so nothing about slots is ever stored and a sweep can tell ours from foreign objects by name alone.

Inside a slot's namespace everything is the same in every slot and on every host (a restored machine remembers its
tap's MAC and addresses); outside, everything is unique. Constants here are part of the snapshot format: changing one
makes existing live snapshots deaf.

Owns: names and addresses. Must not: touch the kernel.
"""

import re
from collections.abc import Iterable
from ipaddress import IPv4Network

import msgspec

from fusevm.host.net.tracking import MAX_CONNECTIONS
from fusevm.model.errors import BadSetting, NetworkRangeConflict

#: Settings that the errors here name.
PREFIX_SETTING = "network_prefix"
RANGE_SETTING = "network_range"
MTU_SETTING = "network_mtu"

# -- the same in every namespace ------------------------------------------------------------------------------------

TAP = "tap0"
#: The namespace's end of the veth pair.
PEER = "uplink0"
INSIDE = IPv4Network("10.208.0.0/30")
GATEWAY = "10.208.0.1"
GUEST_ADDRESS = "10.208.0.2"
#: Locally administered; the last four bytes are the IPv4 address.
GATEWAY_MAC = "06:00:0a:d0:00:01"
GUEST_MAC = "06:00:0a:d0:00:02"

# -- unique outside -------------------------------------------------------------------------------------------------

#: Every slot takes one /30 of the range: host end is the second, namespace end the third address.
SLOT_PREFIX_LENGTH = 30
_SLOT_ADDRESSES = 4
#: IFNAMSIZ - 1 (linux/if.h).
_MAX_INTERFACE_NAME = 15
_PREFIX = re.compile(r"[a-z][a-z0-9]{0,7}")
#: Where `ip netns` (iproute2) keeps named namespaces.
NAMESPACE_DIRECTORY = "/run/netns"
#: Every IPv4 host takes 576 bytes (RFC 791); 9000 is the usual jumbo frame.
_MIN_MTU, _MAX_MTU = 576, 9000
#: Destinations of routes that cover half of the world or all of it are no claim on the range.
_WIDE_PREFIX_LENGTH = 1


class NetworkPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What an administrator chooses about the machines' network. Raises BadSetting."""

    #: Starts the name of every kernel object of this daemon instance; two daemons on one host need two.
    prefix: str = "fuse"
    #: IPv4 network whose addresses the slots take, four each; nothing else on the host may use it.
    range: str = "10.210.0.0/16"
    #: Bytes; of taps, veths and guests. Part of a live snapshot.
    mtu: int = 1500
    #: Connections that a machine may have open at once, its own and those of its published ports' clients.
    max_connections: int = MAX_CONNECTIONS

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            problem = f"{self.prefix!r} must be 1 to 8 lower-case letters and digits, a letter first"
            raise BadSetting(setting=PREFIX_SETTING, problem=problem)
        if not _MIN_MTU <= self.mtu <= _MAX_MTU:
            raise BadSetting(setting=MTU_SETTING, problem=f"{self.mtu} is not within {_MIN_MTU}..{_MAX_MTU}")
        _check_range(self.range)

    @property
    def network(self) -> IPv4Network:
        return IPv4Network(self.range)

    @property
    def capacity(self) -> int:
        """Number of slots: bounded by the range and by the length of an interface name."""
        digits = _MAX_INTERFACE_NAME - len(f"{self.prefix}-v")
        return min(self.network.num_addresses // _SLOT_ADDRESSES, int("9" * digits) + 1)

    @property
    def table(self) -> str:
        """Name of the instance's nftables table (family inet) in the host's namespace."""
        return f"fuse_{self.prefix}"

    @property
    def limits_table(self) -> str:
        """Name of its other table there, which outlives the first one (`limits`)."""
        return f"{self.table}_limits"

    @property
    def veth_pattern(self) -> str:
        """Matches every veth of this instance, in nftables notation."""
        return f"{self.prefix}-v*"


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """All names and addresses of one slot."""

    index: int
    namespace: str
    #: For setns(2), `nsenter --net=` and the jailer's `--netns`.
    namespace_path: str
    #: The host's end of the veth pair and its address.
    veth: str
    host_address: str
    #: The namespace's address on the veth: what the host sees the guest as.
    address: str
    mtu: int
    max_connections: int
    peer: str = PEER
    prefix_length: int = SLOT_PREFIX_LENGTH
    tap: str = TAP
    gateway: str = GATEWAY
    gateway_mac: str = GATEWAY_MAC
    guest_address: str = GUEST_ADDRESS
    guest_prefix_length: int = INSIDE.prefixlen
    guest_mac: str = GUEST_MAC


def namespace_name(plan: NetworkPlan, index: int) -> str:
    return f"{plan.prefix}-{index}"


def veth_name(plan: NetworkPlan, index: int) -> str:
    return f"{plan.prefix}-v{index}"


def plan_slot(plan: NetworkPlan, index: int) -> Slot:
    """Work out slot `index`. Raises ValueError beyond the plan's capacity: the journal hands out only lower numbers."""
    if not 0 <= index < plan.capacity:
        raise ValueError(f"slot {index} is not within 0..{plan.capacity - 1} of {plan.range}")
    first = plan.network.network_address + index * _SLOT_ADDRESSES
    namespace = namespace_name(plan, index)
    return Slot(
        index=index,
        namespace=namespace,
        namespace_path=f"{NAMESPACE_DIRECTORY}/{namespace}",
        veth=veth_name(plan, index),
        host_address=str(first + 1),
        address=str(first + 2),
        mtu=plan.mtu,
        max_connections=plan.max_connections,
    )


def parse_namespace(plan: NetworkPlan, name: str) -> int | None:
    """Return the slot that a namespace's name belongs to, None for a foreign one."""
    return _parse_index(rf"{plan.prefix}-(\d+)", name)


def parse_veth(plan: NetworkPlan, name: str) -> int | None:
    """Return the slot that an interface of the host belongs to, None for a foreign one."""
    return _parse_index(rf"{plan.prefix}-v(\d+)", name)


def render_kernel_arguments(slot: Slot) -> str:
    """Render the network part of the guest's kernel command line (docs/guest-protocol.md section 5)."""
    address = f"{slot.guest_address}/{slot.guest_prefix_length}"
    return f"fuse.ip={address},{slot.gateway},{slot.mtu} fuse.dns={slot.gateway}"


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One IPv4 route of the host; its own addresses are routes of type local."""

    destination: str
    device: str = ""


def check_range(plan: NetworkPlan, routes: Iterable[Route]) -> None:
    """Raise NetworkRangeConflict if any route that is not ours, nor a default route, overlaps the plan's range."""
    for route in routes:
        if parse_veth(plan, route.device) is not None:
            continue
        destination = IPv4Network(route.destination)
        if destination.prefixlen > _WIDE_PREFIX_LENGTH and destination.overlaps(plan.network):
            text = f"the route to {destination}" + (f" on {route.device}" if route.device else "")
            raise NetworkRangeConflict(range=plan.range, route=text, setting=RANGE_SETTING)


def _check_range(text: str) -> None:
    try:
        network = IPv4Network(text)
    except ValueError as e:
        raise BadSetting(setting=RANGE_SETTING, problem=f"{text!r} is no IPv4 network ({e})") from e
    if network.prefixlen > SLOT_PREFIX_LENGTH:
        raise BadSetting(setting=RANGE_SETTING, problem=f"{text} has no room for one slot (a /30)")
    if network.overlaps(INSIDE):
        raise BadSetting(setting=RANGE_SETTING, problem=f"{text} overlaps {INSIDE}, which every machine has inside")


def _parse_index(pattern: str, name: str) -> int | None:
    match = re.fullmatch(pattern, name, re.ASCII)
    if match is None or (match[1] != "0" and match[1].startswith("0")):
        return None
    return int(match[1])
