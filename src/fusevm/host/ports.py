"""Ports of the host that lead to machines: found free, and kept from other programs.

The forwarding is nftables' (`net.tables`); no byte passes through the daemon. What it holds is the port itself, bound
and silent, so that no program of the host gets it and then wonders why nobody connects.

Owns: the bound sockets. Must not: choose ports (`port_rows`) or forward.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable
from typing import TypeAlias

import structlog

from fusevm.model.errors import HostPortTaken
from fusevm.model.network import PublishedPort, Transport

log = structlog.get_logger()

_Key: TypeAlias = tuple[Transport, int]
_KINDS = {Transport.TCP: socket.SOCK_STREAM, Transport.UDP: socket.SOCK_DGRAM}
#: What binding to a port says when IPv6 is not there; that is no other program.
_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})


class PortHolder:
    """The ports that machines have, held by machine."""

    def __init__(self) -> None:
        self._held: dict[str, dict[_Key, list[socket.socket]]] = {}

    def hold(self, machine_id: str, ports: Iterable[PublishedPort]) -> list[PublishedPort]:
        """Hold exactly these ports for a machine; return those that another program has. Idempotent."""
        wanted = {(port.protocol, port.host_port): port for port in ports}
        held = self._held.setdefault(machine_id, {})
        for key in held.keys() - wanted.keys():
            _close(held.pop(key))
        missing = []
        for key, port in wanted.items():
            if key not in held:
                try:
                    held[key] = bind_port(*key)
                except OSError as e:
                    log.warning("port_not_held", machine=machine_id, port=key[1], protocol=key[0], problem=str(e))
                    missing.append(port)
        if not held:
            del self._held[machine_id]
        return missing

    def hold_all(self, machine_id: str, ports: Iterable[PublishedPort]) -> None:
        """As `hold`, but nothing is held, and HostPortTaken raised, if another program has one of them."""
        missing = self.hold(machine_id, ports)
        if missing:
            self.let_go(machine_id)
            raise HostPortTaken(port=missing[0].host_port, protocol=missing[0].protocol.value)

    def let_go(self, machine_id: str) -> None:
        """Let go of a machine's ports. Idempotent."""
        for sockets in self._held.pop(machine_id, {}).values():
            _close(sockets)

    def close(self) -> None:
        """Let go of everything."""
        for machine_id in list(self._held):
            self.let_go(machine_id)


def is_port_free(protocol: Transport, port: int) -> bool:
    """Tell whether no program of the host uses a port, on any of its addresses."""
    try:
        _close(bind_port(protocol, port))
    except OSError:
        return False
    return True


def bind_port(protocol: Transport, port: int) -> list[socket.socket]:
    """Bind a port on all addresses, without listening. OSError if another program has it."""
    bound: list[socket.socket] = []
    try:
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104 - nobody listens
            with contextlib.ExitStack() as stack:
                try:
                    made = stack.enter_context(socket.socket(family, _KINDS[protocol] | socket.SOCK_CLOEXEC))
                    if family == socket.AF_INET6:
                        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    made.bind((address, port))
                except OSError as e:
                    if family == socket.AF_INET6 and e.errno in _NO_IPV6:
                        continue
                    raise
                stack.pop_all()
                bound.append(made)
    except BaseException:
        _close(bound)
        raise
    return bound


def _close(sockets: Iterable[socket.socket]) -> None:
    for bound in sockets:
        bound.close()
