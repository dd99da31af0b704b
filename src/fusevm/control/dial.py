"""Connections to host daemons: TLS with a pinned public key, plain HTTP on loopback, or a Unix socket.

Nothing secret is sent before the pin was compared. Idle connections are kept for the next request; proxies are never
used.
"""

import asyncio
import contextlib
import hmac
import ssl
import time
from collections import deque
from typing import NamedTuple
from urllib.parse import urlsplit

from fusevm.control.config import check_host_url
from fusevm.model.errors import HostUnproven, HostUnreachable
from fusevm.wire.http1 import Connection
from fusevm.wire.pin import parse_host_token, spki_sha256
from fusevm.wire.streams import SocketStream

CONNECT_TIMEOUT_S = 5.0
#: Servers close idle connections (uvicorn after 5 s); ours are let go before that.
IDLE_S = 3.0
MAX_IDLE = 64
_PORTS = {"https": 443, "http": 80}


class Lane(NamedTuple):
    """A connection and what is needed to see whether its peer has hung up."""

    connection: Connection
    stream: SocketStream
    reader: asyncio.StreamReader


class Endpoint:
    """One host daemon's address and the key it must prove."""

    def __init__(self, host_id: str, url: str, token: str) -> None:
        """Raises BadSetting."""
        check_host_url(url, token)
        parts = urlsplit(url)
        self.host_id = host_id
        self.is_tls = parts.scheme == "https"
        self.secret, self._pin = parse_host_token(token) if self.is_tls else (token, "")
        self._path = parts.path if parts.scheme == "unix" else ""
        self._host = parts.hostname or ""
        self._port = parts.port or _PORTS.get(parts.scheme, 0)
        #: Where ports of its machines are; a Unix socket is of this machine.
        self.address = self._host or "127.0.0.1"
        self.authority = parts.netloc or "localhost"
        self._tls = _tls_context() if self.is_tls else None

    async def open(self) -> Lane:
        """Connect and compare the pin. Raises HostUnreachable, HostUnproven."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await self._connect()
        except TimeoutError as error:
            problem = f"no connection within {CONNECT_TIMEOUT_S:.0f} s"
            raise HostUnreachable(id=self.host_id, problem=problem) from error
        except OSError as error:
            raise HostUnreachable(id=self.host_id, problem=str(error) or type(error).__name__) from error
        stream = SocketStream(reader, writer)
        if self._tls is not None and not self._is_pinned(stream):
            await stream.close()
            raise HostUnproven(id=self.host_id)
        return Lane(Connection(stream, self.authority), stream, reader)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._path:
            return await asyncio.open_unix_connection(self._path)
        if self._tls is None:
            return await asyncio.open_connection(self._host, self._port)
        return await asyncio.open_connection(self._host, self._port, ssl=self._tls, server_hostname="")

    def _is_pinned(self, stream: SocketStream) -> bool:
        certificate = stream.peer_certificate
        return certificate is not None and hmac.compare_digest(spki_sha256(certificate), self._pin)


class Pool:
    """Idle connections to one endpoint, newest first."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._idle: deque[tuple[float, Lane]] = deque()
        self._is_closed = False

    async def take(self) -> Lane:
        """A connection that is ready for a request. Raises HostUnreachable, HostUnproven."""
        while self._idle:
            since, lane = self._idle.pop()
            if time.monotonic() - since < IDLE_S and not lane.reader.at_eof():
                return lane
            await lane.connection.close()
        return await self._endpoint.open()

    async def give_back(self, lane: Lane) -> None:
        """Keep it for the next request, or close it when it cannot be used again."""
        if self._is_closed or not lane.connection.is_reusable or len(self._idle) >= MAX_IDLE:
            await lane.connection.close()
            return
        self._idle.append((time.monotonic(), lane))
        while self._idle and time.monotonic() - self._idle[0][0] >= IDLE_S:
            await self._idle.popleft()[1].connection.close()

    async def close(self) -> None:
        """Close what is idle; what is in use is closed when it comes back."""
        self._is_closed = True
        while self._idle:
            with contextlib.suppress(OSError):
                await self._idle.pop()[1].connection.close()


def _tls_context() -> ssl.SSLContext:
    """TLS 1.2 or newer without certificate authorities: the pin is compared instead."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
