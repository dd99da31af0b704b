"""The guest channel: streams to the agent of one machine over the socket of its virtio-serial port.

`GuestChannel` connects, agrees on an epoch with the guest and opens streams; all protocol is in `wire.mux`. When the
connection breaks, or the guest breaks the protocol, every stream fails with ConnectionError and the next `open_stream`
connects again with a new epoch. A greeting that the guest has read but not answered is repeated with another epoch.
`AgentClient` keeps HTTP connections for reuse. Nothing here has a deadline: callers put `asyncio.timeout` around what
they wait for.
"""

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import msgspec

from fusevm.wire.http1 import Body, Connection, Response
from fusevm.wire.mux import EPOCH_SIZE, MuxStream, MuxViolation, Session, StreamsExhausted
from fusevm.wire.streams import ByteStream

_READ_SIZE = 1 << 16
#: Bytes of frames that are made at once, and that may wait in our buffer and in the kernel's before we stop making
#: them. Small: what waits there is ahead of the next keystroke of an interactive stream.
_BATCH = 1 << 16
_MAX_IDLE = 8
#: How long the guest has to answer a greeting before it is repeated; doubled each time up to the second figure.
_ANSWER_S, _MAX_ANSWER_S = 1.0, 60.0
#: How long QEMU may take to accept while its backlog of one is full.
_ACCEPT_S = 5


class AgentStream(ByteStream, Protocol):
    """A stream to the agent that says whether it may be used once more."""

    @property
    def is_usable(self) -> bool:
        """False once either side has closed or broken it."""
        ...


class Lent(NamedTuple):
    """A connection and the stream below it, which knows whether the guest still listens."""

    stream: AgentStream
    connection: Connection


class TooManyStreams(ConnectionError):
    """The epoch has no stream left to open; the channel itself is whole."""


class ChannelStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the channel was made."""

    epochs: int = 0
    streams_opened: int = 0
    #: Bytes on the socket, frames included.
    bytes_in: int = 0
    bytes_out: int = 0
    violations: int = 0


class GuestStream:
    """One stream (a ByteStream). Any number of tasks may wait on it."""

    def __init__(self, link: "_Link", state: MuxStream) -> None:
        self._link = link
        self._state = state
        self._waiters: list[asyncio.Future[None]] = []
        self._is_closed = False

    @property
    def is_usable(self) -> bool:
        """False once either side has closed or broken it."""
        return self._state.can_send and not self._state.is_ended

    async def read(self, limit: int) -> bytes:
        """Return 1 to `limit` bytes, or b"" at the end. What arrived before a break is still returned."""
        state = self._state
        while not state.has_data:
            if state.is_ended:
                return b""
            self._check()
            await self._changed()
        data = state.read(limit)
        self._link.pump()
        return data

    async def write(self, data: bytes) -> None:
        """Send bytes; return when all have left for the socket. If cancelled, they may still be sent."""
        state = self._state
        while state.is_sending:  # a write that was cancelled, or another task's
            self._check()
            await self._changed()
        self._check()
        if not state.can_send:
            raise ConnectionError("the stream is closed for writing")
        if not data:
            return
        state.write(data)
        self._link.pump()
        while state.is_sending:
            await self._changed()
        self._check()

    async def close_write(self) -> None:
        """Half-close after what was written."""
        self._check()
        self._state.close_write()
        self._link.pump()

    async def close(self) -> None:
        """Reset the stream unless it is over in order."""
        self._is_closed = True
        self._state.reset()
        self.wake()
        self._link.forget(self._state.id)
        self._link.pump()

    def wake(self) -> None:
        """Let every waiting task look again."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _check(self) -> None:
        if self._is_closed:
            raise ConnectionError("the stream was closed")
        if self._state.is_gone:
            raise ConnectionResetError(self._link.failure or "the guest reset the stream")

    async def _changed(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter


class _Link(asyncio.BufferedProtocol):
    """One connection to the port, and its epoch."""

    def __init__(self, channel: "GuestChannel", answer_s: float) -> None:
        self._channel = channel
        self._session = Session(os.urandom(EPOCH_SIZE))
        self._answer_s = answer_s
        self._greeting: asyncio.TimerHandle | None = None
        self._streams: dict[int, GuestStream] = {}
        self._buffer = memoryview(bytearray(_READ_SIZE))
        self._transport: asyncio.Transport | None = None
        self._is_paused = False
        loop = asyncio.get_running_loop()
        #: Done when the guest has echoed the epoch; fails with the link.
        self.synced: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        #: Why the link broke; empty while it is good.
        self.failure = ""

    # -- asyncio.BufferedProtocol ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_BATCH)
        self._greet()

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._channel.bytes_in += nbytes
        try:
            changed = self._session.receive(self._buffer[:nbytes])
        except MuxViolation as e:
            self._channel.violations += 1
            self.abort(f"the guest broke the channel protocol: {e}")
            return
        if self._session.is_synced and not self.synced.done():
            self._stop_greeting()
            self.synced.set_result(None)
        for state in changed:
            self._wake(state)
        self.pump()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the guest channel broke ({exc})" if exc else "the guest channel was closed by the VMM")
        if not self.closed.done():
            self.closed.set_result(None)

    # -- for channel and streams -----------------------------------------------------------------------------------

    def open(self) -> GuestStream:
        """Open a stream. Raises StreamsExhausted."""
        state = self._session.open()
        stream = self._streams[state.id] = GuestStream(self, state)
        self._channel.streams_opened += 1
        self.pump()
        return stream

    def pump(self) -> None:
        """Send what streams have to say while the socket takes it."""
        session = self._session
        while session.has_output and not self._is_paused and session.is_synced and not self.failure:
            batch, done = session.output(_BATCH)
            for state in done:
                self._wake(state)
            self._write(batch)

    def forget(self, stream_id: int) -> None:
        """Drop the task side of a stream."""
        self._streams.pop(stream_id, None)

    def abort(self, failure: str) -> None:
        """Drop the connection now."""
        self._fail(failure)
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, failure: str) -> None:
        if self.failure:
            return
        self.failure = failure
        self._stop_greeting()
        self._session.fail()
        if not self.synced.done():
            self.synced.set_exception(ConnectionError(failure))
            self.synced.exception()  # nobody has to be waiting
        for stream in list(self._streams.values()):
            stream.wake()
        self._streams.clear()

    def _greet(self) -> None:
        """Send the greeting; if the guest has read it but does not answer, start over with another epoch.

        A guest may lose a HELLO: that its last host has gone is told to it beside the bytes, not between them.
        """
        if self._greeting is None or self._is_all_read():
            self._session = Session(os.urandom(EPOCH_SIZE))
            self._write(self._session.greeting)
        self._greeting = asyncio.get_running_loop().call_later(self._answer_s, self._greet)
        self._answer_s = min(2 * self._answer_s, _MAX_ANSWER_S)

    def _stop_greeting(self) -> None:
        if self._greeting is not None:
            self._greeting.cancel()

    def _is_all_read(self) -> bool:
        """True when nothing waits in the socket: a guest that is not up yet, or busy, has not read the greeting."""
        if self._transport is None or self._transport.get_write_buffer_size():
            return False
        unread = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return struct.unpack("i", unread) == (0,)

    def _wake(self, state: MuxStream) -> None:
        stream = self._streams.get(state.id)
        if stream is None:
            return
        stream.wake()
        if state.is_gone or state.is_over:
            self.forget(state.id)

    def _write(self, data: bytes | bytearray) -> None:
        if self._transport is not None:
            self._channel.bytes_out += len(data)
            self._transport.write(data)


class GuestChannel:
    """The channel of one machine. Owned by its driver; `close` it. Only one may be connected to a socket at a time."""

    def __init__(self, path: Path, *, answer_s: float = _ANSWER_S) -> None:
        self._path = path
        self._answer_s = answer_s
        self._link: _Link | None = None
        self._connecting = asyncio.Lock()
        self._is_closed = False
        self._epochs = 0
        self.streams_opened = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.violations = 0

    @property
    def is_connected(self) -> bool:
        """True while there is a connection, agreed on or not."""
        return self._link is not None and not self._link.failure

    @property
    def stats(self) -> ChannelStats:
        """Counters for metrics."""
        return ChannelStats(
            epochs=self._epochs,
            streams_opened=self.streams_opened,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            violations=self.violations,
        )

    async def connect(self, connected: socket.socket | None = None) -> None:
        """Connect unless that is done, without waiting for the guest. Raises ConnectionError.

        `connected` is a socket that is connected to the port already; the channel owns it from here on.
        """
        await self._connected(connected)

    async def open_stream(self) -> GuestStream:
        """Open a stream; waits until the guest serves. Raises ConnectionError when the connection breaks meanwhile."""
        link = await self._connected()
        await asyncio.shield(link.synced)
        try:
            return link.open()
        except StreamsExhausted:
            raise TooManyStreams("the machine has too many streams open at once") from None

    async def wait_ready(self) -> None:
        """Wait until the guest serves. Raises ConnectionError."""
        await asyncio.shield((await self._connected()).synced)

    async def disconnect(self) -> None:
        """Break the connection: all streams fail. The channel may be used again."""
        link, self._link = self._link, None
        if link is not None:
            link.abort("the daemon closed the guest channel")
            await asyncio.shield(link.closed)

    async def close(self) -> None:
        """Break the connection for good. Idempotent."""
        self._is_closed = True
        await self.disconnect()

    async def _connected(self, connected: socket.socket | None = None) -> _Link:
        async with self._connecting:
            if self._is_closed:
                if connected is not None:
                    connected.close()
                raise ConnectionError("the guest channel is closed")
            if self._link is None or self._link.failure:
                if self._link is not None:  # QEMU takes the next client when the last one has gone
                    await asyncio.shield(self._link.closed)
                self._link = await self._connect(connected)
            return self._link

    async def _connect(self, connected: socket.socket | None) -> _Link:
        link = _Link(self, self._answer_s)
        loop = asyncio.get_running_loop()
        try:
            sock = connected if connected is not None else await connect_unix(self._path)
            await loop.create_unix_connection(lambda: link, sock=sock)
        except OSError as e:
            raise ConnectionError(f"the guest channel {self._path} cannot be reached: {e.strerror or e}") from e
        self._epochs += 1
        return link


def connect_now(path: Path) -> socket.socket:
    """Connect to a listening Unix socket, whether or not its owner accepts. Raises OSError, at once."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


async def connect_unix(path: Path) -> socket.socket:
    """Connect to a Unix socket; waits in a thread for a place in its backlog (QEMU's has one). Raises OSError."""
    with contextlib.suppress(BlockingIOError):
        return connect_now(path)
    connecting = asyncio.ensure_future(asyncio.to_thread(_connect_patiently, path))
    try:
        return await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(connecting: "asyncio.Future[socket.socket]") -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


def _connect_patiently(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _ACCEPT_S, 0))
        sock.connect(str(path))
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class AgentClient:
    """HTTP requests to the agent of one machine over connections that are kept for reuse.

    A new connection costs the guest more than a small request does, in software emulation above all. `open_stream` is
    that of a Vmm. Connections that broke with their epoch are dropped, never used again.
    """

    def __init__(self, open_stream: Callable[[], Awaitable[AgentStream]], *, max_idle: int = _MAX_IDLE) -> None:
        self._open_stream = open_stream
        self._max_idle = max_idle
        self._idle: list[Lent] = []
        self._busy: list[Lent] = []

    async def request(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, body: Body = None
    ) -> Response:
        """Send a request and return the head of its answer (`http1.Connection.request`). Raises ConnectionError.

        Read the answer to its end, or use it as a context manager: its connection is then used again, or closed.
        """
        lent = await self.take()
        try:
            response = await lent.connection.request(method, target, headers=headers, body=body)
        except BaseException:
            await self.give_back(lent)
            raise
        self._busy.append(lent)
        return response

    async def open_stream(self) -> AgentStream:
        """Open a stream of the caller's own; waits until the guest serves. Raises ConnectionError."""
        return await self._open_stream()

    async def take(self) -> Lent:
        """Lend an idle connection, or else a new one: that waits until the guest serves. Raises ConnectionError."""
        await self._sort()
        if self._idle:
            return self._idle.pop()
        stream = await self._open_stream()
        return Lent(stream, Connection(stream))

    async def give_back(self, lent: Lent) -> None:
        """Keep it for the next request. One whose exchange is not over is closed: what ran for it in the guest ends."""
        if lent.connection.is_reusable and lent.stream.is_usable and len(self._idle) < self._max_idle:
            self._idle.append(lent)
        else:
            await asyncio.shield(lent.connection.close())

    async def close(self) -> None:
        """Close all connections, those in use among them."""
        connections = [connection for _stream, connection in (*self._idle, *self._busy)]
        self._idle, self._busy = [], []
        for connection in connections:
            await connection.close()

    async def _sort(self) -> None:
        """Find out which exchanges are over: a connection says so itself, there is nothing to give back."""
        busy, self._busy = self._busy, []
        for entry in busy:
            (self._idle if entry.connection.is_reusable else self._busy).append(entry)
        for stream, _connection in self._busy:
            if not stream.is_usable:
                # The guest has ended it; what it sent may still be read, but we have nothing more to say.
                with contextlib.suppress(ConnectionError):
                    await stream.close_write()
        self._busy = [entry for entry in self._busy if entry.stream.is_usable]
        usable = [entry for entry in self._idle if entry.stream.is_usable]
        surplus = [entry for entry in self._idle if not entry.stream.is_usable] + usable[self._max_idle :]
        self._idle = usable[: self._max_idle]
        for _stream, connection in surplus:
            with contextlib.suppress(ConnectionError):
                await connection.close()
