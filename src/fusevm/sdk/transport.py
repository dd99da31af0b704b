"""Requests over sockets, synchronously, with the standard library: keep-alive, streams both ways, deadlines.

Knows bytes and statuses only; what they mean is `sdk.core`'s. Safe to use from several threads: each exchange has a
connection of its own, idle ones are kept for the next.
"""

import contextlib
import http.client
import select
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

from fusevm.model.errors import Timeout
from fusevm.sdk.address import Dialer, describe
from fusevm.sdk.core import Answer, Request, raise_for_status
from fusevm.sdk.failures import ConnectionLost, ProtocolBroken

CHUNK = 1 << 16
#: Servers close idle connections; one that lay longer is not trusted.
MAX_IDLE_S = 30.0
MAX_IDLE_CONNECTIONS = 8
MAX_BODY_BYTES = 256 << 20
Body = bytes | Iterable[bytes] | None


class _Connection(http.client.HTTPConnection):
    """http.client over a socket that our Dialer made."""

    def __init__(self, dialer: Dialer) -> None:
        super().__init__(dialer.address.host, dialer.address.port)
        self.sock = dialer.connect()
        self.idle_since = 0.0

    def is_usable(self, now: float) -> bool:
        """False when the server has closed it meanwhile, or is likely to do so now."""
        if self.sock is None or now - self.idle_since > MAX_IDLE_S:
            return False
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return not poller.poll(0)


class ResponseStream:
    """Head of an answer, and its body to be read once. Use as a context manager."""

    def __init__(self, transport: "HttpTransport", connection: _Connection, response: http.client.HTTPResponse) -> None:
        self._transport = transport
        self._connection = connection
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.getheaders()}

    @property
    def size_bytes(self) -> int | None:
        """Length of the body if it was announced."""
        length = self.headers.get("content-length", "")
        return int(length) if length.isdecimal() else None

    def chunks(self) -> Iterator[bytes]:
        """The body's bytes as they arrive. Raises ConnectionLost when it is cut off, Timeout after silence."""
        received = 0
        with self._transport.translated():
            while chunk := self._response.read1(CHUNK):
                received += len(chunk)
                yield chunk
            if self.size_bytes is not None and self._has_body and received < self.size_bytes:
                raise http.client.IncompleteRead(b"", self.size_bytes - received)
        self._response.close()  # the whole body was read: the connection itself goes on
        self._transport.give_back(self._connection, self._response)

    def read(self, limit: int = MAX_BODY_BYTES) -> bytes:
        """The whole body. Raises ProtocolBroken when it is longer than `limit`."""
        body = bytearray()
        for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise ProtocolBroken(url=self._transport.url, problem=f"its answer is longer than {limit} bytes")
        return bytes(body)

    @property
    def _has_body(self) -> bool:
        return self.status not in (204, 304)

    def close(self) -> None:
        """Let go of the connection; it is reused only when the body was read to its end. Idempotent."""
        self._transport.give_back(self._connection, self._response)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HttpTransport:
    """Carries requests to one server. Errors: ServerUnreachable, ConnectionLost, Timeout, ProtocolBroken."""

    def __init__(self, dialer: Dialer, headers: Mapping[str, str]) -> None:
        self._dialer = dialer
        self._headers = {"Host": dialer.address.authority, **headers}
        self._idle: list[_Connection] = []
        self._in_use: set[_Connection] = set()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The server's base URL."""
        return self._dialer.address.url

    def send(self, request: Request, timeout_s: float, body: Iterable[bytes] | None = None) -> Answer:
        """One exchange with the whole answer in memory. Whatever the status, it is returned."""
        with self.open(request, timeout_s, body) as response:
            return Answer(status=response.status, headers=response.headers, body=response.read())

    def stream(self, request: Request, timeout_s: float | None) -> ResponseStream:
        """Begin an exchange whose answer is read as it arrives. Raises the server's error for a bad status."""
        response = self.open(request, timeout_s)
        if not 200 <= response.status < 300:
            with response:
                raise_for_status(Answer(status=response.status, headers=response.headers, body=response.read(1 << 20)))
        return response

    def open(self, request: Request, timeout_s: float | None, body: Iterable[bytes] | None = None) -> ResponseStream:
        """Send a request and return the head of its answer. `timeout_s` bounds each silence, not the whole."""
        connection = self._take()
        try:
            with self.translated(request, timeout_s):
                if connection.sock is not None:
                    connection.sock.settimeout(timeout_s)
                self._send(connection, request, body)
                response = connection.getresponse()
        except BaseException:
            self._drop(connection)
            raise
        return ResponseStream(self, connection, response)

    def _send(self, connection: _Connection, request: Request, body: Iterable[bytes] | None) -> None:
        headers = self._headers | dict(request.headers)
        content: bytes | Iterable[bytes] | None = request.body if body is None else body
        is_chunked = body is not None and "Content-Length" not in headers
        if is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        target = self._dialer.address.prefix + request.target
        try:
            connection.request(request.method, target, content, headers, encode_chunked=is_chunked)
        except (BrokenPipeError, ConnectionResetError):
            if content is None:
                raise
            # The server may have answered (too large, not found) and closed before it took the whole body.

    @contextlib.contextmanager
    def translated(self, request: Request | None = None, timeout_s: float | None = None) -> Iterator[None]:
        """Turn what sockets and http.client raise into our errors."""
        try:
            yield
        except TimeoutError as error:
            raise Timeout(what=_name(request), limit_s=round(timeout_s or 0)) from error
        except http.client.RemoteDisconnected as error:
            raise ConnectionLost(url=self.url, problem="closed without an answer") from error
        except http.client.IncompleteRead as error:
            raise ConnectionLost(url=self.url, problem="the answer was cut off") from error
        except http.client.HTTPException as error:
            raise ProtocolBroken(url=self.url, problem=str(error) or type(error).__name__) from error
        except OSError as error:
            raise ConnectionLost(url=self.url, problem=describe(error)) from error

    def _take(self) -> _Connection:
        now = time.monotonic()
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = _Connection(self._dialer)
            elif not connection.is_usable(now):
                connection.close()
                continue
            with self._lock:
                self._in_use.add(connection)
            return connection

    def give_back(self, connection: _Connection, response: http.client.HTTPResponse) -> None:
        """Keep a connection whose exchange is over, close any other. Idempotent."""
        with self._lock:
            if connection not in self._in_use:
                return
            self._in_use.discard(connection)
            is_kept = response.isclosed() and not response.will_close and connection.sock is not None
            if is_kept and len(self._idle) < MAX_IDLE_CONNECTIONS:
                connection.idle_since = time.monotonic()
                self._idle.append(connection)
                return
        response.close()
        connection.close()

    def _drop(self, connection: _Connection) -> None:
        with self._lock:
            self._in_use.discard(connection)
        connection.close()

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _name(request: Request | None) -> str:
    return "the answer's body" if request is None else f"{request.method} {request.target.partition('?')[0]}"
