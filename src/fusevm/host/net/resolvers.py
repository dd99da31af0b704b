"""The host's DNS servers, as /etc/resolv.conf names them now.

Owns: the reading of that file. Must not: ask anybody.
"""

import ipaddress
import os
from pathlib import Path

import msgspec

RESOLV_CONF = Path("/etc/resolv.conf")
DNS_PORT = 53
#: resolv.conf(5): further ones are ignored.
_MAX_RESOLVERS = 3


class Resolver(msgspec.Struct, frozen=True):
    """One DNS server."""

    address: str
    port: int = DNS_PORT


def parse_resolvers(text: str) -> list[Resolver]:
    """Read the `nameserver` lines of resolv.conf(5); lines that are no address are ignored."""
    words = [line.split() for line in text.splitlines()]
    names = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver"]
    return [Resolver(name) for name in names if _is_address(name)][:_MAX_RESOLVERS]


class ResolverFile:
    """Reads the file again whenever it has changed."""

    def __init__(self, path: Path = RESOLV_CONF) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._resolvers: list[Resolver] = []

    def current(self) -> list[Resolver]:
        """Return the servers to ask, in order. One stat(2); empty while there is no file."""
        try:
            status = os.stat(self._path)  # noqa: PTH116 - a hot path
        except OSError:
            self._stamp, self._resolvers = None, []
            return []
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp != self._stamp:
            self._resolvers = parse_resolvers(self._path.read_text(errors="replace"))
            self._stamp = stamp
        return self._resolvers


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
