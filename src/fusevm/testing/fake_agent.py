"""A guest agent without a guest, for tests of the host daemon: docs/guest-protocol.md over in-memory streams.

Commands: `fake_commands`. Files: `fake_files`. Setup, background processes, daemon and health check: `fake_duties`.
What is asked of it, and what clients abandon, is recorded.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Callable
from urllib.parse import parse_qs, urlsplit

import h11
import msgspec

from fusevm.model.errors import BadRequest, CommandNotFound, Error, RouteNotFound
from fusevm.testing.fake_answer import decode
from fusevm.testing.fake_duties import FakeDuties
from fusevm.testing.fake_files import FakeFiles
from fusevm.wire.errors import render_flat
from fusevm.wire.frames import Frame, FrameDecoder, FrameType, encode_frame
from fusevm.wire.guest import AgentHealth, Configure, ExecRequest, ExecResult, Exit, LoginStatus, StreamTotals, Thawed
from fusevm.wire.streams import ByteStream

_CHUNK = 1 << 16
#: Bytes that may wait in one direction of a `MemoryStream` pair, as on the real channel.
WINDOW = 256 << 10


class _Pipe:
    """One direction: bounded, closable, breakable."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.is_ended = False
        self.is_broken = False
        self._changed = asyncio.Condition()

    async def put(self, data: bytes) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.data) < WINDOW or self.is_broken)
            if self.is_broken or self.is_ended:
                raise ConnectionResetError("the stream is gone")
            self.data += data
            self._changed.notify_all()

    async def get(self, limit: int) -> bytes:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self.data) or self.is_ended or self.is_broken)
            if self.is_broken and not self.data:
                raise ConnectionResetError("the stream was reset")
            taken = bytes(self.data[:limit])
            del self.data[:limit]
            self._changed.notify_all()
            return taken

    async def end(self, *, is_broken: bool) -> None:
        async with self._changed:
            self.is_ended = True
            self.is_broken = self.is_broken or is_broken
            self._changed.notify_all()


class MemoryStream:
    """One end of an in-memory connection (a ByteStream)."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    @property
    def is_usable(self) -> bool:
        """False once either side has closed or broken it."""
        return not (self._incoming.is_ended or self._outgoing.is_ended)

    async def read(self, limit: int) -> bytes:
        """Return bytes, or b"" at the end."""
        return await self._incoming.get(limit)

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while the peer is behind."""
        await self._outgoing.put(data)

    async def close_write(self) -> None:
        """Half-close."""
        await self._outgoing.end(is_broken=False)

    async def close(self) -> None:
        """Reset what is not over in order. What was sent before can still be read."""
        await self._incoming.end(is_broken=True)
        await self._outgoing.end(is_broken=not self._outgoing.is_ended)


def memory_pair() -> tuple[MemoryStream, MemoryStream]:
    """Two connected ends."""
    forth, back = _Pipe(), _Pipe()
    return MemoryStream(back, forth), MemoryStream(forth, back)


class FakeAgent:
    """The agent of one fake machine."""

    def __init__(
        self, nonce: str, on_shutdown: Callable[[], None], *, protocol: str = "1.2", disk: FakeFiles | None = None
    ) -> None:
        self.nonce = nonce
        self.protocol = protocol
        self.configured: list[Configure] = []
        #: None: a disk of its own.
        self._disk = disk or FakeFiles({})
        self.files = self._disk.content
        self.duties = FakeDuties(self.files)
        #: `METHOD target` of every request.
        self.requests: list[str] = []
        #: Commands that ended because their client went away.
        self.abandoned: list[str] = []
        self.abandoned_changed = asyncio.Event()
        #: The host key that is on its disk; empty: the one that it was given.
        self.host_public_key = ""
        #: Writes to the disk are held; and what the next thaw finds the limit of the freeze to be.
        self.is_frozen = False
        self.freeze_expires = False
        #: An agent of before there were freezes.
        self.cannot_freeze = False
        #: When set, /shutdown is acknowledged and nothing happens.
        self.ignores_shutdown = False
        self._on_shutdown = on_shutdown

    async def serve(self, stream: ByteStream) -> None:
        """Speak HTTP on a stream until it ends."""
        connection = _Server(stream)
        with contextlib.suppress(ConnectionError, h11.RemoteProtocolError):
            while request := await connection.next_request():
                method, target = request.method.decode(), request.target.decode()
                self.requests.append(f"{method} {target}")
                try:
                    if not await self._answer(connection, method, target):
                        return
                except Error as error:
                    await connection.answer(error.status, render_flat(error))

    async def _answer(self, connection: _Server, method: str, target: str) -> bool:
        """Answer one request; False when the connection was upgraded and is over."""
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        match method, parts.path:
            case "GET", "/health":
                await connection.answer(200, msgspec.json.encode(self._health()))
            case "POST", "/configure":
                self.configured.append(msgspec.json.decode(await connection.body(), type=Configure))
                await connection.answer(200, msgspec.json.encode(self._health()))
            case "POST", "/exec":
                await self._exec(connection)
            case "GET", "/exec":
                await self._interactive(connection)
                return False
            case "GET", "/endless":
                await connection.stream(_endless())
            case "POST", "/quiesce" if not self.cannot_freeze:
                await connection.body()
                self.is_frozen = True
                await connection.answer(200, b'{"took_ms":1}')
            case "POST", "/thaw" if not self.cannot_freeze:
                await connection.body()
                was_frozen, self.is_frozen = self.is_frozen and not self.freeze_expires, False
                await connection.answer(200, msgspec.json.encode(Thawed(was_frozen=was_frozen)))
            case "POST", "/shutdown":
                await connection.answer(202, b"{}")
                if not self.ignores_shutdown:
                    self._on_shutdown()
            case _:
                await self._answer_duty(connection, method, parts.path, query)
        return True

    async def _answer_duty(self, connection: _Server, method: str, path: str, query: dict[str, str]) -> None:
        headers, body = connection.headers, await connection.body()
        answer = self._disk.answer(method, path, query, headers, body)
        answer = answer or await self.duties.answer(method, path, query, body)
        if answer is None:
            raise RouteNotFound(method=method, path=path)
        if answer.chunks is not None:
            await connection.stream(answer.chunks, answer.headers)
        else:
            await connection.answer(answer.status, answer.body, answer.headers)

    def close(self) -> None:
        """The machine is no more."""
        self.duties.close()

    def _health(self) -> AgentHealth:
        keys = self.configured[-1].login if self.configured else None
        shown = LoginStatus(host_public_key=self.host_public_key or keys.host_public_key, served=True) if keys else None
        return AgentHealth(protocol=self.protocol, version="fake", nonce=self.nonce, login=shown)

    async def _exec(self, connection: _Server) -> None:
        request = decode(await connection.body(), ExecRequest)
        if request.cmd == ["hang"]:
            await self._hang(connection, "hang")
            return
        ran = self.duties.run(request, self.configured[-1].env if self.configured else {})
        result = ExecResult(
            exit_code=ran.code or 0,
            stdout_b64=base64.b64encode(ran.stdout).decode(),
            stderr_b64=base64.b64encode(ran.stderr).decode(),
            total=StreamTotals(stdout=len(ran.stdout), stderr=len(ran.stderr)),
        )
        await connection.answer(200, msgspec.json.encode(result))

    async def _hang(self, connection: _Server, name: str) -> None:
        """Wait until the client goes away, which ends a command."""
        try:
            while await connection.raw.read(_CHUNK):
                pass
        except ConnectionError:
            pass
        self.abandoned.append(name)
        self.abandoned_changed.set()

    async def _interactive(self, connection: _Server) -> None:
        """Echo: what comes as STDIN goes back as STDOUT; the end of stdin is exit 0, a signal exit 130."""
        stream, rest = await connection.upgrade()
        decoder = FrameDecoder()
        frames = decoder.feed(rest)
        try:
            while True:
                for frame in frames:
                    if await self._on_frame(stream, frame):
                        return
                data = await stream.read(_CHUNK)
                if not data:
                    raise ConnectionResetError("the client went away")
                frames = decoder.feed(data)
        except ConnectionError:
            self.abandoned.append("interactive")
            self.abandoned_changed.set()

    async def _on_frame(self, stream: ByteStream, frame: Frame) -> bool:
        match frame.type:
            case FrameType.START:
                request = msgspec.json.decode(frame.payload, type=ExecRequest)
                command = self.configured[-1].image.command if self.configured and self.configured[-1].image else []
                if request.image_command and not command:
                    refusal = BadRequest(field="image_command")
                    await stream.write(encode_frame(Frame(FrameType.ERROR, render_flat(refusal))))
                    await stream.close_write()
                    return True
                if request.cmd == ["missing"]:
                    error = render_flat(CommandNotFound(command="missing"))
                    await stream.write(encode_frame(Frame(FrameType.ERROR, error)))
                    await stream.close_write()
                    return True
                await stream.write(encode_frame(Frame(FrameType.STARTED, b'{"pid":42}')))
                if request.cmd == ["flood"]:
                    while True:
                        await stream.write(encode_frame(Frame(FrameType.STDOUT, bytes(_CHUNK))))
            case FrameType.STDIN:
                await stream.write(encode_frame(Frame(FrameType.STDOUT, frame.payload)))
            case FrameType.STDIN_EOF | FrameType.SIGNAL:
                code = 0 if frame.type is FrameType.STDIN_EOF else 130
                await stream.write(encode_frame(Frame(FrameType.EXIT, msgspec.json.encode(Exit(exit_code=code)))))
                await stream.close_write()
                return True
            case _:
                pass
        return False


async def _endless() -> AsyncIterator[bytes]:
    while True:
        yield bytes(_CHUNK)


class _Server:
    """HTTP/1.1 as a server over a byte stream."""

    def __init__(self, stream: ByteStream) -> None:
        self.raw = stream
        self.headers: dict[str, str] = {}
        self._h11 = h11.Connection(h11.SERVER)
        self._is_head = False

    async def next_request(self) -> h11.Request | None:
        if self._h11.our_state is h11.DONE:
            while not isinstance(await self._event(), h11.EndOfMessage | h11.ConnectionClosed):
                if self._h11.their_state is h11.DONE:
                    break
            self._h11.start_next_cycle()
        event = await self._event()
        if not isinstance(event, h11.Request):
            return None
        self.headers = {name.decode(): value.decode() for name, value in event.headers}
        self._is_head = event.method == b"HEAD"
        return event

    async def body(self) -> bytes:
        if self._h11.their_state is not h11.SEND_BODY:
            return b""
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
        return bytes(body)

    async def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if self._h11.their_state is h11.SEND_BODY:
            await self.body()
        fields = {"content-type": "application/json", **(headers or {}), "content-length": str(len(body))}
        await self._send(h11.Response(status_code=status, headers=[*fields.items()]))
        if not self._is_head:
            await self._send(h11.Data(data=body))
        await self._send(h11.EndOfMessage())

    async def stream(self, chunks: AsyncIterator[bytes], headers: dict[str, str] | None = None) -> None:
        if self._h11.their_state is h11.SEND_BODY:
            await self.body()
        fields = {**(headers or {}), "transfer-encoding": "chunked"}
        await self._send(h11.Response(status_code=200, headers=[*fields.items()]))
        async for chunk in chunks:
            await self._send(h11.Data(data=chunk))
        await self._send(h11.EndOfMessage())

    async def upgrade(self) -> tuple[ByteStream, bytes]:
        await self._event()
        headers = [("connection", "upgrade"), ("upgrade", "fuse-frames/1")]
        await self._send(h11.InformationalResponse(status_code=101, headers=headers))
        rest, _ = self._h11.trailing_data
        return self.raw, bytes(rest)

    async def _send(self, event: h11.Event) -> None:
        data = self._h11.send(event)
        if data:
            await self.raw.write(data)

    async def _event(self) -> object:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._h11.receive_data(await self.raw.read(_CHUNK))
        return event
