"""The edge of the API, once per listener: the token, request ids, the access log, and every error's way to the wire.

Owns: the only conversion of exceptions to answers. Must not: know routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from fusevm.host.metrics import Metrics
from fusevm.model.errors import Error, Internal, MethodNotAllowed, ShuttingDown, Unauthorized
from fusevm.wire.errors import render_flat

log = structlog.get_logger()

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
#: Served without a token: tells nothing but that somebody is there.
_OPEN = frozenset({"/health"})
_MACHINE = re.compile(r"/machines/([a-z0-9][a-z0-9-]{0,62})(?:/|$)")


def _subject(path: str) -> dict[str, str]:
    """Which machine a request is about, for the log."""
    match = _MACHINE.match(path)
    return {"machine": match[1]} if match else {}


class Boundary:
    """The ASGI application of one listener."""

    def __init__(self, app: ASGIApp, metrics: Metrics, *, secret: str | None) -> None:
        self._app = app
        self._metrics = metrics
        #: None: whoever can connect may do everything (the Unix socket).
        self._secret = hashlib.sha256(secret.encode()).digest() if secret is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return
        exchange = _Exchange(scope, send)
        with structlog.contextvars.bound_contextvars(request_id=exchange.id, **_subject(scope["path"])):
            try:
                self._check_token(scope)
                await self._app(scope, receive, exchange.send)
            except ClientDisconnect:
                pass
            except asyncio.CancelledError as e:
                # Only the server cancels a request: it stops, and has waited for its end long enough.
                await self._answer(ShuttingDown(), exchange, receive, cause=e)
            except Exception as e:  # noqa: BLE001 - the one conversion: every request ends in an answer
                await self._answer(e, exchange, receive)
            finally:
                self._note(exchange)

    def _check_token(self, scope: Scope) -> None:
        if self._secret is None or scope["path"] in _OPEN:
            return
        scheme, _, token = _header(scope, b"authorization").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized(problem="This host needs its token")
        # Hashed, so that neither length nor content can be measured.
        if not hmac.compare_digest(hashlib.sha256(_secret_of(token).encode()).digest(), self._secret):
            raise Unauthorized(problem="The token is not this host's")

    async def _answer(
        self, failure: Exception, exchange: _Exchange, receive: Receive, cause: BaseException | None = None
    ) -> None:
        error = failure if isinstance(failure, Error) else Internal(problem=type(failure).__name__)
        if not isinstance(failure, Error):
            log.error("request_broke", route=exchange.route, exc_info=failure)
        if exchange.status:
            # Half an answer must not pass for a whole one: the server cuts the connection.
            log.warning("answer_cut_off", route=exchange.route, problem=str(failure))
            raise CutOff from (cause or failure)
        response = Response(render_flat(error), error.status, _headers(error), media_type="application/json")
        if exchange.scope["type"] == "http":
            await response(exchange.scope, receive, exchange.send)
        else:
            await WebSocket(exchange.scope, receive, exchange.send).send_denial_response(response)

    def _note(self, exchange: _Exchange) -> None:
        duration_s = time.perf_counter() - exchange.began
        method = exchange.scope.get("method", "WEBSOCKET")
        status = exchange.status or 499
        self._metrics.requests.labels(exchange.route, method, str(status)).inc()
        self._metrics.request_seconds.labels(exchange.route).observe(duration_s)
        log.info(
            "request",
            method=method,
            path=exchange.scope["path"],
            status=status,
            duration_ms=round(duration_s * 1000, 1),
            request_id=exchange.id,
        )


class CutOff(Exception):
    """Tells the server to drop the connection; the reason was logged."""


class _Exchange:
    """One request and what has gone out of its answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope = scope
        self.began = time.perf_counter()
        self.status = 0
        asked = _header(scope, b"x-request-id")
        self.id = asked if _REQUEST_ID.fullmatch(asked) else secrets.token_hex(8)
        self._send = send

    @property
    def route(self) -> str:
        """Name of the route, once it is known."""
        return str(self.scope.get("fuse.route", "none"))

    async def send(self, message: Message) -> None:
        """Pass a message on, marking the head of the answer."""
        if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
            self.status = message.get("status", 101)
            headers = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
            message = {**message, "headers": headers}
        await self._send(message)


def _headers(error: Error) -> Mapping[str, str]:
    match error:
        case MethodNotAllowed():
            return {"allow": error.allowed}
        case Unauthorized():
            return {"www-authenticate": "Bearer"}
        case _:
            return {"retry-after": "1"} if error.retryable and error.status == 503 else {}


def _secret_of(token: str) -> str:
    """A client may send the printed token as a whole; the secret is what counts."""
    secret, dot, pin = token.strip().rpartition(".")
    return secret if dot and re.fullmatch(r"[0-9a-fA-F]{64}", pin) else token.strip()


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), "")
