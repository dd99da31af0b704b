"""Passing users' requests on to a guest agent: HTTP with bodies streamed both ways, and exec frames over a WebSocket.

Each has a stream to the agent of its own; that of an HTTP request is kept for the next one. Backpressure goes all the
way: who does not read stops who writes. If the client goes away the guest's stream is reset, which ends what ran there.
The guest is not trusted: only known headers and whole frames of it get through, and its errors are read and rendered
anew.

Owns: the streams it uses. Must not: know machines beyond the agent that is handed in.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from fusevm.host.channel import AgentClient
from fusevm.host.tasks import Stopped, run_unless
from fusevm.model.errors import AgentFailure, Error, GuestUnreachable
from fusevm.wire.errors import parse_error, render_flat
from fusevm.wire.frames import BadFrame, Frame, FrameDecoder, FrameType, decode_message, encode_frame
from fusevm.wire.guest import UPGRADE
from fusevm.wire.http1 import Connection, Response
from fusevm.wire.streams import ByteStream

T = TypeVar("T")

#: How long a running guest may take to accept a stream.
_OPEN_TIMEOUT_S = 10.0
_MAX_ERROR_BYTES = 1 << 20
_CHUNK = 64 << 10
#: Messages of a client that wait for the guest: while there is room, a client that goes away is noticed.
_WAITING = 4
#: WebSocket close codes (RFC 6455, section 7.4.1).
NORMAL, GOING_AWAY, PROTOCOL_ERROR, INTERNAL = 1000, 1001, 1002, 1011

_REQUEST_HEADERS = frozenset({"accept", "content-length", "content-type", "range", "if-range", "if-modified-since"})
_RESPONSE_HEADERS = frozenset(
    {"accept-ranges", "content-length", "content-range", "content-type", "etag", "last-modified"}
)
_OWN_PREFIX = "x-fuse-"


class Incoming:
    """A request's body, to be read once, and then the news that the client has gone away."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_read = asyncio.Event()
        self._is_gone = asyncio.Event()

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. A client that goes away within it ends it with ConnectionError."""
        try:
            while True:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    self._is_gone.set()
                    raise ConnectionResetError("the client went away")
                if message.get("body"):
                    yield message["body"]
                if not message.get("more_body", False):
                    return
        finally:
            self._is_read.set()

    def ignore_rest(self) -> None:
        """The body, or what is left of it, is of no interest."""
        self._is_read.set()

    async def wait_gone(self) -> None:
        """Return when the client has gone away. What is left of the body is dropped."""
        await self._is_read.wait()
        while not self._is_gone.is_set():
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._is_gone.set()


async def run_for_client(receive: Receive, machine_id: str, work: Awaitable[T]) -> T | None:
    """Run `work` for a client whose request was read; None when the client goes away first: the work is cancelled."""
    incoming = Incoming(receive)
    incoming.ignore_rest()
    try:
        return await run_unless(incoming.wait_gone(), _as_guest_errors(machine_id, work))
    except Stopped:
        return None


async def relay_request(
    agent: AgentClient, machine_id: str, target: str, scope: Scope, receive: Receive, send: Send
) -> None:
    """Send a request to the agent and its answer to the client. Raises the agent's error, or GuestUnreachable."""
    incoming = Incoming(receive)
    try:
        await run_unless(
            incoming.wait_gone(), _as_guest_errors(machine_id, _exchange(agent, target, scope, incoming, send))
        )
    except Stopped:
        return


async def relay_frames(agent: AgentClient, machine_id: str, websocket: WebSocket) -> None:
    """Join a client's WebSocket and an interactive command. Raises, before it accepts, what the agent answers."""
    stream, rest = await _as_guest_errors(machine_id, _upgrade(agent))
    try:
        await websocket.accept()
        session = _FrameSession(stream, machine_id, websocket)
        await session.run(rest)
    finally:
        await asyncio.shield(stream.close())


# -- HTTP ------------------------------------------------------------------------------------------------------------


async def _exchange(agent: AgentClient, target: str, scope: Scope, incoming: Incoming, send: Send) -> None:
    method = scope["method"]
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    passed = {name: value for name, value in headers.items() if name in _REQUEST_HEADERS}
    has_body = "content-length" in headers or "transfer-encoding" in headers
    if not has_body:
        incoming.ignore_rest()
    async with asyncio.timeout(_OPEN_TIMEOUT_S):
        lent = await agent.take()
    try:
        body = incoming.body() if has_body else None
        response = await lent.connection.request(method, target, headers=passed, body=body)
        incoming.ignore_rest()
        await _answer(response, method, send)
    finally:
        await agent.give_back(lent)


async def _answer(response: Response, method: str, send: Send) -> None:
    # The error of a HEAD has no body to be told in: its status says what there is to say.
    if not 200 <= response.status < 300 and method != "HEAD":
        raise parse_error(response.status, await response.read(_MAX_ERROR_BYTES))
    headers = [(name.encode(), value.encode("latin-1")) for name, value in _passed_back(response.headers).items()]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    if method != "HEAD":
        async for chunk in response.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _passed_back(headers: Mapping[str, str]) -> dict[str, str]:
    lower = {name.lower(): value for name, value in headers.items()}
    return {name: value for name, value in lower.items() if name in _RESPONSE_HEADERS or name.startswith(_OWN_PREFIX)}


async def _as_guest_errors(machine_id: str, work: Awaitable[T]) -> T:
    """What goes wrong on the way to the guest is GuestUnreachable."""
    try:
        return await work
    except TimeoutError as e:
        raise GuestUnreachable(id=machine_id, problem="it does not accept a stream") from e
    except ConnectionError as e:
        raise GuestUnreachable(id=machine_id, problem=str(e) or type(e).__name__) from e


# -- frames ----------------------------------------------------------------------------------------------------------


async def _upgrade(agent: AgentClient) -> tuple[ByteStream, bytes]:
    async with asyncio.timeout(_OPEN_TIMEOUT_S):
        stream = await agent.open_stream()
    try:
        async with asyncio.timeout(_OPEN_TIMEOUT_S):
            connection = Connection(stream)
            headers = {"connection": "upgrade", "upgrade": UPGRADE}
            await _check_upgraded(await connection.request("GET", "/exec", headers=headers))
            return connection.upgraded()
    except BaseException:
        await asyncio.shield(stream.close())
        raise


async def _check_upgraded(response: Response) -> None:
    if response.status != 101:
        raise parse_error(response.status, await response.read(_MAX_ERROR_BYTES))


class _FrameSession:
    """An accepted WebSocket and the guest's stream."""

    def __init__(self, stream: ByteStream, machine_id: str, websocket: WebSocket) -> None:
        self._stream = stream
        self._machine_id = machine_id
        self._websocket = websocket
        self._from_client: asyncio.Queue[bytes] = asyncio.Queue(_WAITING)
        self._is_over = False

    async def run(self, first: bytes) -> None:
        """Pass frames on until the command has ended, one side goes away, or somebody breaks the protocol."""
        try:
            await run_unless(self._read_client(), self._talk(first))
        except Stopped:
            return  # the client has gone
        except BadFrame as e:
            await self._close(PROTOCOL_ERROR, str(e))
        except Error as e:
            await self._give_up(e)
        else:
            await self._close(NORMAL)

    async def _talk(self, first: bytes) -> None:
        """Guest to client, until the last frame; client to guest beside it."""
        try:
            await run_unless(self._feed_guest(), self._read_guest(first))
        except ConnectionError as e:
            raise GuestUnreachable(id=self._machine_id, problem=str(e) or type(e).__name__) from e

    async def _read_client(self) -> None:
        """Take frames from the client; return when it has gone. Raises BadFrame."""
        while True:
            try:
                message = await self._websocket.receive()
            except WebSocketDisconnect:
                return
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            if data is None:
                raise BadFrame("frames are binary messages")
            decode_message(data)
            await self._from_client.put(data)

    async def _feed_guest(self) -> None:
        """Send the client's frames to the guest. Ends with the session: a guest that reads no more may still talk."""
        try:
            while True:
                await self._stream.write(await self._from_client.get())
        except ConnectionError:
            # Whatever broke is also seen, with its reason, by the side that reads.
            while True:
                await self._from_client.get()

    async def _read_guest(self, first: bytes) -> None:
        """Send the guest's frames to the client, until its last."""
        decoder = FrameDecoder()
        data = first
        while True:
            for frame in self._decode(decoder, data):
                await self._websocket.send_bytes(encode_frame(frame))
                if frame.type in (FrameType.EXIT, FrameType.ERROR):
                    return
            data = await self._stream.read(_CHUNK)
            if not data:
                raise ConnectionResetError("the command's stream ended before its exit")

    def _decode(self, decoder: FrameDecoder, data: bytes) -> list[Frame]:
        try:
            return decoder.feed(data)
        except BadFrame as e:
            raise AgentFailure(problem=f"it sent something that is no frame ({e})") from e

    async def _give_up(self, error: Error) -> None:
        """Tell the client why: as the last frame, and by the close code."""
        await self._send(encode_frame(Frame(FrameType.ERROR, render_flat(error))))
        await self._close(INTERNAL, error.reason)

    async def _send(self, data: bytes) -> None:
        await _unless_gone(lambda: self._websocket.send_bytes(data))

    async def _close(self, code: int, reason: str = "") -> None:
        if not self._is_over:
            self._is_over = True
            # The reason of a close frame has at most 123 bytes.
            await _unless_gone(lambda: self._websocket.close(code, reason.encode()[:120].decode(errors="ignore")))


async def _unless_gone(action: Callable[[], Awaitable[None]]) -> None:
    """A client that has gone away misses nothing."""
    try:
        await action()
    except (WebSocketDisconnect, RuntimeError, OSError):
        return
