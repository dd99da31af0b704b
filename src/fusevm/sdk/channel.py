"""How the parts of the synchronous client reach the server: typed calls with repetition, streams, sessions."""

import random
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from fusevm import __version__
from fusevm.model.errors import Error
from fusevm.sdk import core
from fusevm.sdk.address import Dialer
from fusevm.sdk.core import Call, Request
from fusevm.sdk.transport import HttpTransport, ResponseStream
from fusevm.wire.guest import ExecRequest

if TYPE_CHECKING:
    from fusevm.sdk.session import Session

T = TypeVar("T")


class Channel:
    """One server and one token."""

    def __init__(self, dialer: Dialer, token: str) -> None:
        self._dialer = dialer
        self.headers = make_headers(token)
        self._transport = HttpTransport(dialer, self.headers)

    def call(self, call: Call[T], body: Iterable[bytes] | None = None) -> T | None:
        """Carry out a call. None only where a repetition found the work done (`done_by`)."""
        attempt = 0
        while True:
            try:
                return call.result(self._transport.send(call.request, call.timeout_s, body))
            except Error as error:
                if core.is_done(call, error, attempt):
                    return None
                attempt += 1
                pause = core.pause_s(call, error, attempt, random.random())  # noqa: S311 - spreads load, hides nothing
                if pause is None or body is not None:
                    raise
                time.sleep(pause)

    def get(self, call: Call[T]) -> T:
        """Carry out a call that always has a result."""
        result = self.call(call)
        assert result is not None  # noqa: S101 - only calls with `done_by` give None
        return result

    def put(self, call: Call[T], body: Iterable[bytes]) -> T:
        """Carry out a call with a streamed body, once."""
        result = self.call(call, body)
        assert result is not None  # noqa: S101 - see get
        return result

    def stream(self, request: Request, silence_s: float | None) -> ResponseStream:
        """Begin an answer that is read as it comes; `silence_s` bounds each wait for more."""
        return self._transport.stream(request, silence_s)

    def session(self, target: str, request: ExecRequest | None) -> "Session":
        """Open an interactive session."""
        from fusevm.sdk.session import Session  # noqa: PLC0415 - 40 ms of websockets that most calls do without

        return Session(self._dialer, target, self.headers, request)

    def close(self) -> None:
        """Close idle connections."""
        self._transport.close()


def make_headers(token: str) -> dict[str, str]:
    """The headers of every request."""
    headers = {"User-Agent": f"fuse-python/{__version__}", "Accept-Encoding": "identity"}
    return headers | ({"Authorization": f"Bearer {token}"} if token else {})
