"""A WebSocket client over an open connection: the protocol by `websockets` (sans I/O), the bytes by ours, so that the
pinned connection of `dial` is used for it too."""

from collections.abc import Mapping
from typing import Self

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from fusevm.wire.frames import HEADER, MAX_PAYLOAD
from fusevm.wire.streams import ByteStream

_READ = 1 << 16
_MAX_MESSAGE = HEADER.size + MAX_PAYLOAD


class HandshakeRefused(Exception):
    """The server answered the upgrade with something else."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.body = body


class WebSocketClient:
    """Binary messages both ways. One reader and one writer at a time."""

    def __init__(self, stream: ByteStream, protocol: ClientProtocol) -> None:
        self._stream = stream
        self._protocol = protocol
        self._parts: list[bytes] = []
        self._messages: list[bytes] = []

    @classmethod
    async def connect(cls, stream: ByteStream, authority: str, path: str, headers: Mapping[str, str]) -> Self:
        """Shake hands. Raises HandshakeRefused, ConnectionError. The stream stays the caller's to close on failure."""
        protocol = ClientProtocol(parse_uri(f"ws://{authority}{path}"), max_size=_MAX_MESSAGE)
        request = protocol.connect()
        for name, value in headers.items():
            request.headers[name] = value
        protocol.send_request(request)
        self = cls(stream, protocol)
        await self._flush()
        while protocol.state is State.CONNECTING:
            await self._feed()
        failure = protocol.handshake_exc
        if isinstance(failure, InvalidStatus):
            raise HandshakeRefused(failure.response.status_code, bytes(failure.response.body or b"")) from failure
        if failure is not None:
            raise ConnectionError(f"no WebSocket handshake: {failure}") from failure
        return self

    async def send(self, message: bytes) -> None:
        """Raises ConnectionError."""
        if self._protocol.state is not State.OPEN:
            raise ConnectionError("the WebSocket is closed")
        self._protocol.send_binary(message)
        await self._flush()

    async def receive(self) -> bytes | None:
        """The next message; None after a close. Raises ConnectionError when it is cut off."""
        while not self._messages:
            if self._protocol.state is State.CLOSED or self._protocol.close_rcvd is not None:
                return None
            await self._feed()
        return self._messages.pop(0)

    async def close(self) -> None:
        """Send a close frame if possible, and drop the connection."""
        try:
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(1000)
                await self._flush()
        except OSError:
            pass
        finally:
            await self._stream.close()

    async def _feed(self) -> None:
        data = await self._stream.read(_READ)
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        await self._flush()
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                self._frame(event)
        broken = self._protocol.parser_exc
        if (
            broken is not None
            and not isinstance(broken, InvalidHandshake)
            and self._protocol.state is not State.CONNECTING
        ):
            raise ConnectionError(f"the WebSocket broke: {broken}") from broken
        if not data and self._protocol.close_rcvd is None and self._protocol.handshake_exc is None:
            raise ConnectionError("the WebSocket was cut off")

    def _frame(self, frame: Frame) -> None:
        if frame.opcode in (Opcode.BINARY, Opcode.TEXT, Opcode.CONT):
            self._parts.append(bytes(frame.data))
            if frame.fin:
                self._messages.append(b"".join(self._parts))
                self._parts.clear()

    async def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                await self._stream.write(data)
