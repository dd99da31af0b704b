"""HTTP/1.1 as a client, over any byte stream: to guest agents, host daemons and control planes alike.

One `Connection` carries one exchange at a time and may be used again when `is_reusable` says so. Bodies stream in both
directions; an answer that comes before the request body was sent ends the sending.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Self

import h11

from fusevm.wire.streams import ByteStream

CHUNK = 1 << 16
Body = bytes | AsyncIterator[bytes] | None


class ProtocolError(ConnectionError):
    """The peer does not speak HTTP/1.1 as it should."""


class TooLong(ProtocolError):
    """An answer has more bytes than its reader takes."""


class Response:
    """Head of an answer, and its body to be read once. Use as a context manager, or read to the end."""

    def __init__(self, connection: "Connection", head: h11.Response | h11.InformationalResponse) -> None:
        self._connection = connection
        self.status = head.status_code
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive. Raises ConnectionError when it is cut off."""
        while True:
            event = await self._connection.next_event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise ProtocolError(f"connection ended within a body ({type(event).__name__})")

    async def read(self, limit: int = 64 << 20) -> bytes:
        """The whole body. Raises TooLong (a ProtocolError) when it is longer than `limit` bytes."""
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise TooLong(f"answer is longer than {limit} bytes")
        return bytes(body)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._connection.is_reusable:
            await self._connection.close()


class Connection:
    """A client connection. Not for concurrent use."""

    def __init__(self, stream: ByteStream, authority: str = "fuse") -> None:
        self._stream = stream
        self._authority = authority
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 16)
        self._is_broken = False

    async def request(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, body: Body = None
    ) -> Response:
        """Send a request and return the head of its answer. Cancel: the connection is then broken.

        `target` is an absolute path with query, already percent-encoded. Raises ConnectionError (ProtocolError).
        """
        if self._h11.our_state is h11.DONE:
            self._h11.start_next_cycle()
        fields = {"host": self._authority, **(headers or {})}
        if isinstance(body, bytes):
            fields["content-length"] = str(len(body))
        elif body is not None and "content-length" not in {name.lower() for name in fields}:
            fields["transfer-encoding"] = "chunked"
        head = h11.Request(method=method, target=target, headers=[*fields.items()])
        try:
            first = self._h11.send(head) or b""
            if isinstance(body, bytes) or body is None:
                first += (self._h11.send(h11.Data(data=body)) or b"") if body else b""
                await self._stream.write(first + (self._h11.send(h11.EndOfMessage()) or b""))
                return await self._head()
            await self._stream.write(first)
            return await self._head_while_sending(body)
        except BaseException:
            self._is_broken = True
            raise

    async def _head_while_sending(self, body: AsyncIterator[bytes]) -> Response:
        sending = asyncio.ensure_future(self._send_body(body))
        answering = asyncio.ensure_future(self._head())
        try:
            await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and sending.done() and not isinstance(sending.exception(), ConnectionError | None):
                await sending
            response = await answering
            if not sending.done():
                self._is_broken = True
            return response
        finally:
            for task in (sending, answering):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await task

    async def _send_body(self, body: AsyncIterator[bytes]) -> None:
        async for chunk in body:
            data = self._h11.send(h11.Data(data=chunk))
            if data:
                await self._stream.write(data)
        await self._stream.write(self._h11.send(h11.EndOfMessage()) or b"")

    async def _head(self) -> Response:
        while True:
            event = await self.next_event()
            if isinstance(event, h11.Response) or (
                isinstance(event, h11.InformationalResponse) and event.status_code == 101
            ):
                return Response(self, event)
            if not isinstance(event, h11.InformationalResponse):
                raise ProtocolError(f"no answer ({type(event).__name__})")

    async def next_event(self) -> object:
        """The next h11 event of the answer. Raises ConnectionError."""
        try:
            while True:
                event = self._h11.next_event()
                if event is not h11.NEED_DATA:
                    return event
                data = await self._stream.read(CHUNK)
                self._h11.receive_data(data)
        except h11.RemoteProtocolError as error:
            self._is_broken = True
            raise ProtocolError(str(error)) from error
        except BaseException:
            self._is_broken = True
            raise

    def upgraded(self) -> tuple[ByteStream, bytes]:
        """After a 101: the raw stream and the bytes that came with the answer."""
        rest, _ = self._h11.trailing_data
        self._is_broken = True  # no further HTTP on it
        return self._stream, bytes(rest)

    @property
    def is_reusable(self) -> bool:
        """True when the exchange is over and another may follow."""
        return (
            not self._is_broken
            and self._h11.trailing_data == (b"", False)  # the peer has neither closed nor said more than was asked
            and self._h11.our_state in (h11.DONE, h11.IDLE)
            and self._h11.their_state in (h11.DONE, h11.IDLE)
        )

    async def close(self) -> None:
        """Drop the connection."""
        self._is_broken = True
        await self._stream.close()
