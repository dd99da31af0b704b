"""Where a request comes from: the TCP peer, or behind proxies that the settings trust, whom they name. Pure.

A proxy appends the address that it saw, so the list is read from the right: the first address that is no trusted proxy
is the client. What stands left of it was sent by the client itself and proves nothing.
"""

import ipaddress
import re
from collections.abc import Iterable, Sequence

from fusevm.model.errors import BadField

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_PAIR = re.compile(r'\s*for\s*=\s*("[^"]*"|[^;,\s]*)', re.IGNORECASE)


class Networks:
    """Addresses by network. IPv4 addresses within IPv6 (`::ffff:192.0.2.1`) count as IPv4."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(network) for network in networks)

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)


def parse_address(text: str) -> Address | None:
    """An address with or without port and brackets, or None."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def client_address(
    peer: str, *, forwarded: Sequence[str], forwarded_for: Sequence[str], trusted: Networks
) -> Address | None:
    """The client; None when a trusted proxy does not name it. The header lines are those of `Forwarded` (RFC 7239) and
    `X-Forwarded-For`. Raises BadField when both are there and disagree: one of them is the client's own invention."""
    direct = parse_address(peer)
    if direct is None or direct not in trusted:
        return direct
    standard = [match.group(1) if (match := _PAIR.search(item)) else "" for item in _items(forwarded)]
    found = [_first_untrusted(names, trusted) for names in (standard, _items(forwarded_for)) if names]
    if not found:
        return direct
    if any(other != found[0] for other in found):
        raise BadField(field="Forwarded", problem="it and X-Forwarded-For name different clients")
    return found[0]


def group_of(address: Address | None) -> str:
    """Whom to count together: one IPv4 address, or the /64 network that a client of IPv6 has to itself."""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address or "unknown")


def _items(lines: Sequence[str]) -> list[str]:
    return [item for line in lines for item in line.split(",")]


def _first_untrusted(names: Sequence[str], trusted: Networks) -> Address | None:
    """From the right; the outermost one when all are trusted, None at a name that is no address."""
    address: Address | None = None
    for name in reversed(names):
        address = parse_address(name)
        if address is None or address not in trusted:
            return address
    return address
