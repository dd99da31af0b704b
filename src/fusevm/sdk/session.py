"""Interactive sessions: a command's or a shell's streams over one WebSocket, synchronously.

Built on the sans-I/O half of `websockets`: its threaded client holds one lock while it sends and while it receives, so
a command that echoes a large input (`cat`) would stall both sides for ever. Here nothing blocks inside a lock. One
thread may read `frames()` while others send; or one thread does it all with `fileno`, `receive` and `flush` in a select
loop.
"""

import contextlib
import select
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus, ProtocolError, WebSocketException
from websockets.frames import Frame as WireFrame
from websockets.frames import Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from fusevm.model.errors import Timeout
from fusevm.sdk.address import Dialer, describe
from fusevm.sdk.core import Answer, raise_for_status
from fusevm.sdk.exchange import Exchange
from fusevm.sdk.failures import ConnectionLost, ProtocolBroken
from fusevm.wire.frames import Frame, FrameType
from fusevm.wire.guest import ExecRequest, Exit

_CHUNK = 1 << 16
#: Bytes of stdin per frame.
STDIN_CHUNK = 1 << 15
#: Unsent bytes at which a select loop stops reading input.
HIGH_WATER = 1 << 17
HANDSHAKE_TIMEOUT_S = 75.0
PING_INTERVAL_S = 20.0
_CLOSE_TIMEOUT_S = 1.0
#: Largest WebSocket message: one exec frame.
MAX_MESSAGE = (1 << 20) + 8


class Session:
    """A running command. Use as a context manager; leaving it before the end ends the command.

    `pid` is known after the first frame, `exit` after the last.
    """

    def __init__(self, dialer: Dialer, target: str, headers: Mapping[str, str], request: ExecRequest | None) -> None:
        """Connect. `request` is the command; None where the server starts it by itself."""
        self._url = dialer.address.url
        self._exchange = Exchange(self._url)
        self._lock = threading.Lock()
        self._out = bytearray()
        self._pings_at = time.monotonic() + PING_INTERVAL_S
        self._protocol = ClientProtocol(parse_uri(dialer.address.websocket_url(target)), max_size=MAX_MESSAGE)
        self._sock = dialer.connect()
        try:
            self._shake_hands(headers)
            if request is not None:
                self.send(self._exchange.start(request))
        except BaseException:
            self._sock.close()
            raise

    # -- for everybody ------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Process id in the machine."""
        return self._exchange.pid

    @property
    def exit(self) -> Exit | None:
        """How the command ended; None while it runs."""
        return self._exchange.exit

    def frames(self) -> Iterator[Frame]:
        """Output (STDOUT, STDERR) as it comes, until the command has ended.

        Raises the error with which the server refused or ended the command, or ConnectionLost.
        """
        yield from self.receive()  # what came along with the handshake
        while self._exchange.exit is None:
            events = self._poll(select.POLLIN, max(self._pings_at - time.monotonic(), 0))
            if events:
                yield from self.receive()
            self.ping_if_due()

    def wait(self) -> Exit:
        """Drop all further output and return how the command ended."""
        for _ in self.frames():
            pass
        return self._exchange.exit or Exit()

    def send_stdin(self, data: bytes) -> None:
        """Send input; blocks while the machine takes no more. Needs another thread in `frames()` meanwhile."""
        view = memoryview(data)
        for start in range(0, len(view), STDIN_CHUNK):
            self.send(Frame(FrameType.STDIN, bytes(view[start : start + STDIN_CHUNK])))

    def close_stdin(self) -> None:
        """End the command's input."""
        self.send(Frame(FrameType.STDIN_EOF))

    def resize(self, rows: int, cols: int) -> None:
        """Tell a terminal its new size."""
        self.send(self._exchange.resize(rows, cols))

    def signal(self, name: str) -> None:
        """Send a signal ("INT") to the command's process group, or to the foreground group of a terminal."""
        self.send(self._exchange.signal(name))

    def send(self, frame: Frame) -> None:
        """Send any frame; blocks until the system has taken it all. Raises ConnectionLost."""
        self.queue(frame)
        while self.unsent_bytes:
            self._poll(select.POLLOUT, None)
            self.flush()

    def close(self) -> None:
        """End the conversation; a command that still runs is ended by the server. Idempotent."""
        with contextlib.suppress(Exception), self._lock:
            self._protocol.send_close()
            self._collect()
            self._sock.settimeout(_CLOSE_TIMEOUT_S)
            self._sock.sendall(self._out)
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- for select loops: nothing below blocks -----------------------------------------------------------------

    def fileno(self) -> int:
        """For select: readable means call `receive`; writable, when `unsent_bytes`, call `flush`."""
        return self._sock.fileno()

    @property
    def unsent_bytes(self) -> int:
        """Bytes that wait for the socket. Feed no input while it is over HIGH_WATER."""
        return len(self._out)

    def queue(self, frame: Frame) -> None:
        """Add a frame to what is unsent and send what goes at once. Raises ConnectionLost."""
        with self._lock:
            try:
                self._protocol.send_binary(self._exchange.encode(frame))
            except (ProtocolError, WebSocketException) as error:
                raise self._lost("closed by the server") from error
            self._collect()
            self._write_some()

    def flush(self) -> None:
        """Send what the socket takes. Raises ConnectionLost."""
        with self._lock:
            self._write_some()

    def receive(self) -> list[Frame]:
        """Read what is there; output frames only. Raises like `frames`."""
        messages: list[bytes] = []
        with self._lock:
            is_open = self._read_some()
            messages += [
                self._exchange.join(bytes(event.data), is_last=event.fin)
                for event in self._protocol.events_received()
                if isinstance(event, WireFrame) and event.opcode in (Opcode.BINARY, Opcode.CONT)
            ]
            self._collect()
            self._write_some()
        frames = [frame for message in messages if message for frame in self._exchange.feed(message)]
        if self._exchange.exit is None and (not is_open or self._protocol.state is not State.OPEN):
            raise self._lost(self._close_reason())
        return frames

    def ping_if_due(self) -> None:
        """Keep the path open when nothing is said for long."""
        if time.monotonic() < self._pings_at:
            return
        self._pings_at = time.monotonic() + PING_INTERVAL_S
        with self._lock:
            if self._protocol.state is State.OPEN:
                self._protocol.send_ping(b"")
                self._collect()
                self._write_some()

    # -- inside -------------------------------------------------------------------------------------------------

    def _poll(self, event: int, timeout_s: float | None) -> bool:
        poller = select.poll()
        poller.register(self._sock, event)
        return bool(poller.poll(None if timeout_s is None else timeout_s * 1000))

    def _collect(self) -> None:
        for data in self._protocol.data_to_send():
            self._out += data  # b"" means half-close: the server's FIN follows, ours comes with close()

    def _write_some(self) -> None:
        try:
            while self._out:
                sent = self._sock.send(self._out)
                del self._out[:sent]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self._out.clear()
            # What the server said before it closed (an ERROR frame, an exit) may still wait to be read.
            if self._protocol.state is not State.OPEN:
                raise self._lost(describe(error)) from error

    def _read_some(self) -> bool:
        """Feed the protocol with what is there; False at the end of the stream."""
        try:
            while True:
                data = self._sock.recv(_CHUNK)
                if not data:
                    self._protocol.receive_eof()
                    return False
                self._protocol.receive_data(data)
                if not (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()):
                    return True
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return True
        except OSError:
            self._protocol.receive_eof()
            return False

    def _shake_hands(self, headers: Mapping[str, str]) -> None:
        request = self._protocol.connect()
        for name, value in headers.items():
            request.headers[name] = value
        self._protocol.send_request(request)
        self._collect()
        self._sock.settimeout(HANDSHAKE_TIMEOUT_S)
        try:
            self._sock.sendall(self._out)
            self._out.clear()
            while self._protocol.state is State.CONNECTING and self._protocol.handshake_exc is None:
                if not self._read_some():
                    break
        except TimeoutError as error:
            raise Timeout(what="opening the session", limit_s=round(HANDSHAKE_TIMEOUT_S)) from error
        except OSError as error:
            raise self._lost(describe(error)) from error
        self._check_handshake()
        self._sock.setblocking(False)

    def _check_handshake(self) -> None:
        refusal = self._protocol.handshake_exc
        if isinstance(refusal, InvalidStatus):
            raise_for_status(to_answer(refusal.response))
        if refusal is not None:
            raise ProtocolBroken(url=self._url, problem=str(refusal)) from refusal
        if self._protocol.state is not State.OPEN:
            raise self._lost("closed without an answer")

    def _close_reason(self) -> str:
        reason = self._protocol.close_reason
        return reason or "closed before the command ended"

    def _lost(self, problem: str) -> ConnectionLost:
        return ConnectionLost(url=self._url, problem=problem)


def to_answer(response: Response) -> Answer:
    """A refused handshake as an answer of the API."""
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    return Answer(status=response.status_code, headers=headers, body=bytes(response.body or b""))
