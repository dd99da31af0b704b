"""A guest without a machine: the agent's side of the channel on a Unix socket, as QEMU offers it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from fusevm.wire.mux import INITIAL_CREDIT, MAX_PAYLOAD, Decoder, Frame, FrameType, encode_frame


class GuestSide:
    """One stream as the guest sees it."""

    def __init__(self, guest: "FakeGuest", stream_id: int) -> None:
        self.guest = guest
        self.id = stream_id
        self.received = bytearray()
        self.is_ended = False
        self.is_gone = False
        self.credit = INITIAL_CREDIT
        self.changed = asyncio.Event()

    async def wait(self) -> None:
        self.changed.clear()
        await self.changed.wait()

    async def read(self) -> bytes:
        """Return what has come (waits), b"" at the end, and give the credit back."""
        while not self.received:
            if self.is_gone:
                raise ConnectionResetError
            if self.is_ended:
                return b""
            await self.wait()
        data = bytes(self.received)
        self.received.clear()
        if not self.is_ended:
            self.guest.send(Frame(FrameType.WINDOW, self.id, len(data).to_bytes(4, "big")))
        return data

    async def write(self, data: bytes) -> None:
        while data:
            while not self.credit:
                if self.is_gone:
                    raise ConnectionResetError
                await self.wait()
            size = min(len(data), self.credit, MAX_PAYLOAD)
            self.credit -= size
            self.guest.send(Frame(FrameType.DATA, self.id, data[:size]))
            data = data[size:]
            await self.guest.drain()

    def close_write(self) -> None:
        self.guest.send(Frame(FrameType.CLOSE, self.id))

    def reset(self) -> None:
        self.guest.send(Frame(FrameType.RESET, self.id))


Handler = Callable[[GuestSide], Awaitable[None]]


class FakeGuest:
    """Accepts one client at a time; runs `handler` for each stream. Switches make it misbehave."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path = path
        self.handler = handler
        self.is_mute = False
        self.streams: dict[int, GuestSide] = {}
        self.frames: list[Frame] = []
        self.epochs: list[bytes] = []
        self.connections = 0
        self._turn = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))

    async def stop(self) -> None:
        self._server.close()
        self.drop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def drop(self) -> None:
        """Break the connection, as a VMM that dies does."""
        if self._writer is not None:
            self._writer.transport.abort()

    def send(self, frame: Frame) -> None:
        self.send_raw(encode_frame(frame))

    def send_raw(self, data: bytes) -> None:
        if self._writer is not None:
            self._writer.write(data)

    async def drain(self) -> None:
        await self._writer.drain()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        async with self._turn:
            self._writer = writer
            self.connections += 1
            decoder = Decoder()
            with contextlib.suppress(ConnectionError):
                while chunk := await reader.read(1 << 16):
                    for frame in decoder.feed(chunk):
                        self._handle(frame)
            self._reset_all()
            writer.transport.abort()

    def _handle(self, frame: Frame) -> None:
        self.frames.append(frame)
        stream = self.streams.get(frame.stream)
        match frame.type:
            case FrameType.HELLO:
                self._reset_all()
                self.epochs.append(frame.payload)
                if not self.is_mute:
                    self.send(frame)
            case FrameType.OPEN:
                stream = self.streams[frame.stream] = GuestSide(self, frame.stream)
                task = asyncio.ensure_future(self._run(stream))
                self._tasks.add(task)
            case FrameType.DATA if stream:
                stream.received += frame.payload
                assert len(stream.received) <= INITIAL_CREDIT
            case FrameType.WINDOW if stream:
                stream.credit += int.from_bytes(frame.payload, "big")
            case FrameType.CLOSE if stream:
                stream.is_ended = True
            case FrameType.RESET if stream:
                stream.is_gone = True
                del self.streams[frame.stream]
        if stream is not None:
            stream.changed.set()

    async def _run(self, stream: GuestSide) -> None:
        with contextlib.suppress(ConnectionError):
            await self.handler(stream)

    def _reset_all(self) -> None:
        for stream in self.streams.values():
            stream.is_gone = True
            stream.changed.set()
        self.streams.clear()


async def echo(stream: GuestSide) -> None:
    """Send back what comes, then close."""
    while data := await stream.read():
        await stream.write(data)
    stream.close_write()


async def serve_http(stream: GuestSide) -> None:
    """Answer each request with what was asked; `/close` ends the connection after the answer, `/hang` never answers."""
    buffer = b""
    count = 0
    while True:
        while b"\r\n\r\n" not in buffer:
            data = await stream.read()
            if not data:
                return
            buffer += data
        head, _, buffer = buffer.partition(b"\r\n\r\n")
        method, target = head.split(b" ")[:2]
        fields = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in head.split(b"\r\n")[1:])}
        length = int(fields.get(b"content-length", b"0"))
        while len(buffer) < length:
            buffer += await stream.read()
        body, buffer = buffer[:length], buffer[length:]
        count += 1
        if target == b"/hang":
            await asyncio.Event().wait()
        answer = {"stream": stream.id, "count": count, "method": method.decode(), "body": body.decode()}
        payload = json.dumps(answer).encode()
        extra = b"connection: close\r\n" if target == b"/close" else b""
        await stream.write(b"HTTP/1.1 200 OK\r\n%scontent-length: %d\r\n\r\n%s" % (extra, len(payload), payload))
        if target == b"/close":
            stream.close_write()
            return


@pytest.fixture
async def make_guest(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[FakeGuest]]]:
    guests: list[FakeGuest] = []

    async def make(handler: Handler = echo) -> FakeGuest:
        guest = FakeGuest(tmp_path / "agent.sock", handler)
        await guest.start()
        guests.append(guest)
        return guest

    yield make
    for guest in guests:
        await guest.stop()


@pytest.fixture
def http_handler() -> Handler:
    return serve_http
