"""uvicorn's HTTP/1.1 protocol, with limits that it lacks: bytes and seconds of a request's head, and bytes of what
follows the last piece of a body (its trailers; they have no limit of time).

Without them, a client that sends a byte now and then holds a connection for ever, and one header without an end fills
the memory, all before anybody has looked at a token. Bodies have their limits by route.
"""

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fusevm.wire.errors import Envelope, EnvelopeError, FlatError

#: All headers together, names and values; all trailers.
MAX_HEAD = 64 << 10
#: Seconds for the head of a request, from the connection or from its first byte on.
HEAD_TIMEOUT_S = 10.0
#: Seconds for which what is still sent after a refusal is thrown away: closing at once could lose the answer.
LINGER_S = 0.5
_HEAD = "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"


class LimitedHttp(HttpToolsProtocol):
    """One connection to the public API."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        #: Received since the beginning of the head, or since there was a piece of body.
        self._bare_bytes = 0
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the base class has it
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._got_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._bare_bytes += len(data)
        super().data_received(data)
        if self._bare_bytes > MAX_HEAD:
            self._refuse_head()

    def on_message_begin(self) -> None:
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._got_head()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD:
            self._refuse_head()
            return
        self._bare_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._bare_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._bare_bytes = 0

    def send_400_response(self, msg: str) -> None:
        self._refuse("400 Bad Request", "invalid_argument", "bad_request", msg)

    def _expect_head(self) -> None:
        self._got_head()
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _got_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_answering(self) -> bool:
        """Is the answer to an earlier request of this connection under way? Nothing may be written into it."""
        return self.cycle is not None and not self.cycle.response_complete

    def _head_is_late(self) -> None:
        if self._is_answering():
            self._expect_head()
            return
        problem = f"The head of the request took longer than {HEAD_TIMEOUT_S:g} s"
        self._refuse("408 Request Timeout", "timeout", "timeout", problem)

    def _refuse_head(self) -> None:
        problem = f"The headers are larger than {MAX_HEAD} bytes"
        self._refuse("431 Request Header Fields Too Large", "payload_too_large", "payload_too_large", problem)

    def _refuse(self, status: str, code: str, reason: str, message: str) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._got_head()
        body = self._render(code, message, {"reason": reason})
        if not self._is_answering():
            self.transport.write(_HEAD.format(status=status, length=len(body)).encode() + body)
        self.loop.call_later(LINGER_S, self.transport.close)

    def _render(self, code: str, message: str, details: dict[str, str]) -> bytes:
        return msgspec.json.encode(Envelope(EnvelopeError(code, message, details)))


class LimitedHostHttp(LimitedHttp):
    """One connection to a host daemon, whose errors are flat."""

    def _render(self, code: str, message: str, details: dict[str, str]) -> bytes:
        return msgspec.json.encode(FlatError(message, code, details))
