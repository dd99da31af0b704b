"""How the asynchronous client reaches the server: `wire.http1` over asyncio streams, typed calls with repetition.

The twin of `sdk.channel` and `sdk.transport`; what calls mean and when they may be repeated is `sdk.core`'s.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

from fusevm import __version__
from fusevm.model.errors import Error, Timeout
from fusevm.sdk import core
from fusevm.sdk.address import CONNECT_TIMEOUT_S, Dialer, check_tunnel, describe, tunnel_request
from fusevm.sdk.core import Answer, Call, Request, raise_for_status
from fusevm.sdk.failures import ConnectionLost, ProtocolBroken, ServerUnreachable
from fusevm.wire.http1 import Connection, ProtocolError, Response
from fusevm.wire.streams import SocketStream

T = TypeVar("T")
MAX_IDLE_S = 30.0
MAX_IDLE_CONNECTIONS = 64
_READ_LIMIT = 256 << 10


class _Pooled(Connection):
    """A connection that knows whether the server has closed it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, authority: str) -> None:
        super().__init__(SocketStream(reader, writer), authority)
        self._reader = reader
        self._writer = writer
        self.idle_since = 0.0

    @property
    def is_usable(self) -> bool:
        is_fresh = time.monotonic() - self.idle_since < MAX_IDLE_S
        return is_fresh and not self._reader.at_eof() and not self._writer.transport.is_closing()


class AsyncStream:
    """An answer whose body is read as it arrives."""

    def __init__(self, response: Response, url: str, silence_s: float | None) -> None:
        self._response = response
        self._url = url
        self._silence_s = silence_s
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes. Raises ConnectionLost when it is cut off, Timeout after too long a silence."""
        pieces = aiter(self._response.chunks())
        while True:
            with translated(self._url, "the answer's body", self._silence_s):
                async with asyncio.timeout(self._silence_s):
                    piece = await anext(pieces, None)
            if piece is None:
                return
            yield piece

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.chunks()])


class AsyncChannel:
    """One server and one token, for one event loop."""

    def __init__(self, dialer: Dialer, token: str) -> None:
        self.dialer = dialer
        self.headers = {"User-Agent": f"fuse-python/{__version__}", "Accept-Encoding": "identity"}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self._idle: list[_Pooled] = []

    @property
    def url(self) -> str:
        """The server's base URL."""
        return self.dialer.address.url

    async def call(self, call: Call[T], body: AsyncIterator[bytes] | None = None) -> T | None:
        """Carry out a call. None only where a repetition found the work done (`done_by`)."""
        attempt = 0
        while True:
            try:
                return call.result(await self._send(call.request, call.timeout_s, body))
            except Error as error:
                if core.is_done(call, error, attempt):
                    return None
                attempt += 1
                pause = core.pause_s(call, error, attempt, random.random())  # noqa: S311 - spreads load, hides nothing
                if pause is None or body is not None:
                    raise
                await asyncio.sleep(pause)

    async def get(self, call: Call[T]) -> T:
        """Carry out a call that always has a result."""
        result = await self.call(call)
        assert result is not None  # noqa: S101 - only calls with `done_by` give None
        return result

    async def put(self, call: Call[T], body: AsyncIterator[bytes]) -> T:
        """Carry out a call with a streamed body, once."""
        result = await self.call(call, body)
        assert result is not None  # noqa: S101 - see get
        return result

    async def _send(self, request: Request, timeout_s: float, body: AsyncIterator[bytes] | None) -> Answer:
        async with self._open(request, timeout_s, body) as stream:
            return Answer(status=stream.status, headers=stream.headers, body=await stream.read())

    @contextlib.asynccontextmanager
    async def stream(self, request: Request, silence_s: float | None) -> AsyncIterator[AsyncStream]:
        """Begin an answer that is read as it comes. Raises the server's error for a bad status."""
        async with self._open(request, silence_s, None) as stream:
            if not 200 <= stream.status < 300:
                raise_for_status(Answer(status=stream.status, headers=stream.headers, body=await stream.read()))
            yield stream

    @contextlib.asynccontextmanager
    async def _open(
        self, request: Request, timeout_s: float | None, body: AsyncIterator[bytes] | None
    ) -> AsyncIterator[AsyncStream]:
        connection = await self._take()
        try:
            headers = self.headers | dict(request.headers)
            content = request.body if body is None else body
            if content is None and request.method in ("POST", "PUT"):
                content = b""
            target = self.dialer.address.prefix + request.target
            with translated(self.url, f"{request.method} {request.target.partition('?')[0]}", timeout_s):
                async with asyncio.timeout(timeout_s):
                    response = await connection.request(request.method, target, headers=headers, body=content)
            yield AsyncStream(response, self.url, timeout_s)
        finally:
            await self._give_back(connection)

    async def _take(self) -> _Pooled:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            await connection.close()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await self._connect()
        except (OSError, TimeoutError) as error:
            raise ServerUnreachable(url=self.url, problem=describe(error)) from error
        return _Pooled(reader, writer, self.dialer.address.authority)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address, proxy, tls = self.dialer.address, self.dialer.proxy, self.dialer.tls
        if proxy is None:
            name = address.host if tls is not None else None
            return await asyncio.open_connection(
                address.host, address.port, ssl=tls, server_hostname=name, limit=_READ_LIMIT
            )
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port, limit=_READ_LIMIT)
        try:
            writer.write(tunnel_request(address, proxy))
            check_tunnel(await reader.readuntil(b"\r\n\r\n"))
            if tls is not None:
                await writer.start_tls(tls, server_hostname=address.host)
        except asyncio.IncompleteReadError as error:
            writer.transport.abort()
            raise ConnectionError("the proxy closed the connection") from error
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer

    async def _give_back(self, connection: _Pooled) -> None:
        if connection.is_reusable and len(self._idle) < MAX_IDLE_CONNECTIONS:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            await connection.close()

    async def close(self) -> None:
        """Close idle connections."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.close()


@contextlib.contextmanager
def translated(url: str, what: str, limit_s: float | None) -> Iterator[None]:
    """Turn what sockets and the HTTP client raise into our errors."""
    try:
        yield
    except TimeoutError as error:
        raise Timeout(what=what, limit_s=round(limit_s or 0)) from error
    except ProtocolError as error:
        if "illegal" in str(error):  # h11's word for bytes that are no HTTP
            raise ProtocolBroken(url=url, problem=str(error)) from error
        raise ConnectionLost(url=url, problem=str(error)) from error
    except OSError as error:
        raise ConnectionLost(url=url, problem=describe(error)) from error
