"""Where a download may lead: to public addresses, and into networks that a setting names.

A URL of a request must not reach what only this host reaches: its own services, its neighbours, the cloud's metadata
address. The check is on the address that is connected to, not on the name, which may say something else a moment later.

Owns: the decision. Must not: resolve names or connect (`fetch` does).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Final, TypeAlias

from fusevm.model.errors import BadSetting

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

#: IPv6 addresses that carry an IPv4 one in their last 32 bits: NAT64 (RFC 6052), IPv4-compatible (RFC 4291).
_LAST_32: Final = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Parse networks in CIDR form. Raises BadSetting."""
    found: list[Network] = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text))
        except ValueError as e:
            raise BadSetting(setting="artifact_networks", problem=f"{text!r} is no network ({e})") from e
    return tuple(found)


def refusal(address: Address, allowed: Iterable[Network] = ()) -> str:
    """Say what kind of forbidden address this is; empty for one that may be connected to. Pure.

    An IPv6 address that stands for an IPv4 one (mapped, 6to4, Teredo, NAT64) is as good as that.
    """
    meant = _unwrap(address)
    networks = tuple(allowed)
    if any(one in network for one in (address, meant) for network in networks if network.version == one.version):
        return ""
    return _kind(meant)


def _kind(address: Address) -> str:
    kinds = (
        (address.is_unspecified, "no address"),
        (address.is_loopback, "this host itself"),
        (address.is_link_local, "link-local (metadata services are there)"),
        (address.is_multicast, "multicast"),
        (address.is_private, "in a private network"),
        (address.is_reserved, "reserved"),
        # What is left is shared (RFC 6598) or set aside in another way.
        (not address.is_global, "not public"),
    )
    return next((name for is_so, name in kinds if is_so), "")


def _unwrap(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in _LAST_32) and int(address) > 0xFFFF:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def is_own(address: Address) -> bool:
    """Has this host this address? A public one leads to its own services just as 127.0.0.1 does."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True
