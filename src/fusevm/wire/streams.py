"""Byte streams: the one shape in which connections of every kind (TCP, TLS, Unix socket, guest channel) are used."""

import asyncio
import contextlib
import ssl
from typing import Protocol

_CHUNK = 1 << 16


class ByteStream(Protocol):
    """A connection. All methods are cancel-safe; after `close` or an error the stream is not used again."""

    async def read(self, limit: int) -> bytes:
        """Return 1 to `limit` bytes, or b"" at the end of the peer's data. Raises ConnectionError."""
        ...

    async def write(self, data: bytes) -> None:
        """Send all bytes; returns when the peer has room for more. Raises ConnectionError."""
        ...

    async def close_write(self) -> None:
        """Say that nothing more will be sent; reading goes on. Raises ConnectionError."""
        ...

    async def close(self) -> None:
        """Drop the connection, both ways, at once. Idempotent, raises nothing."""
        ...


class SocketStream:
    """A ByteStream over asyncio's stream pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's certificate (DER) on TLS, else None."""
        tls = self._writer.get_extra_info("ssl_object")
        return tls.getpeercert(binary_form=True) if tls is not None else None

    async def read(self, limit: int) -> bytes:
        return await self._reader.read(limit)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def close_write(self) -> None:
        if self._writer.can_write_eof():
            self._writer.write_eof()

    async def close(self) -> None:
        self._writer.transport.abort()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._writer.wait_closed()


async def open_unix(path: str) -> SocketStream:
    """Connect to a Unix socket. Raises OSError."""
    return SocketStream(*await asyncio.open_unix_connection(path, limit=_CHUNK * 4))


async def open_tcp(host: str, port: int, tls: ssl.SSLContext | None = None) -> SocketStream:
    """Connect over TCP, with TLS when a context is given. Raises OSError (ssl.SSLError among them)."""
    name = host if tls is not None and tls.check_hostname else None
    pair = await asyncio.open_connection(
        host, port, ssl=tls, server_hostname=name or ("" if tls else None), limit=_CHUNK * 4
    )
    return SocketStream(*pair)
