"""The edge: everything that holds for every request, and the one conversion of errors to answers.

Request id, Server and CORS headers on every answer; routing, the gate, Idempotency-Key, ETags, metrics, the access log.
A handler returns a response or raises; what it raises after the answer has begun cuts the connection: nobody takes half
an answer for a whole.
"""

import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from fusevm.control import etag, idempotency
from fusevm.control.call import Call
from fusevm.control.cors import Cors, Headers
from fusevm.control.gate import Gate
from fusevm.control.plane import Plane
from fusevm.control.router import Found, Router
from fusevm.model.errors import BadField, Error, Internal, MethodNotAllowed, RateLimited, Unimplemented
from fusevm.wire.decode import render_warning
from fusevm.wire.errors import render_envelope
from fusevm.wire.rest import SERVICE
from fusevm.wire.routes import Route

log = structlog.get_logger()
Handler = Callable[[Plane, Call], Awaitable[Response]]
SocketHandler = Callable[[Plane, Call, WebSocket], Awaitable[None]]
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_NO_ROUTE = "none"


class _Sent:
    """What has gone out of an answer."""

    def __init__(self) -> None:
        self.status = 0
        self.route = _NO_ROUTE
        self.call: Call | None = None


class Edge:
    """The ASGI application."""

    def __init__(
        self,
        plane: Plane,
        router: Router,
        gate: Gate,
        cors: Cors,
        handlers: Mapping[str, Handler],
        sockets: Mapping[str, SocketHandler],
    ) -> None:
        self._plane = plane
        self._router = router
        self._gate = gate
        self._cors = cors
        self._handlers = handlers
        self._sockets = sockets
        self._server = f"{SERVICE}/{plane.version}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            raise RuntimeError(f"unexpected scope {scope['type']}")
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        sent = _Sent()
        began = time.perf_counter()
        cors = self._cors.answer_headers(headers.get(b"origin", b"").decode("latin-1"))
        marked = self._marking(send, sent, [(b"x-request-id", request_id.encode()), (b"server", self._server), *cors])
        structlog.contextvars.bind_contextvars(request_id=request_id)
        self._plane.metrics.in_flight.inc()
        try:
            if scope["type"] == "http":
                await self._http(scope, receive, marked, sent, request_id)
            else:
                await self._websocket(scope, receive, marked, sent, request_id)
        finally:
            structlog.contextvars.unbind_contextvars("request_id")
            self._plane.metrics.in_flight.dec()
            self._count(scope, sent, time.perf_counter() - began)

    # -- HTTP -----------------------------------------------------------------------------------------------------

    async def _http(self, scope: Scope, receive: Receive, send: Send, sent: _Sent, request_id: str) -> None:
        try:
            response = await self._answer(Request(scope, receive, send), sent, request_id)
            await response(scope, receive, send)
        except ClientDisconnect:
            return
        except Exception as error:  # the one conversion: every request ends in an answer
            if sent.status:
                log.warning("answer_cut_off", route=sent.route, problem=_text(error))
                raise
            await self._refusal(error, sent)(scope, receive, send)

    async def _answer(self, request: Request, sent: _Sent, request_id: str) -> Response:
        self._gate.admit(request)
        if request.method == "OPTIONS":
            return self._options(request)
        found = self._router.find(request.method, request.scope["raw_path"], dict(request.query_params))
        return await self._routed(request, found, sent, request_id)

    async def _routed(self, request: Request, found: Found, sent: _Sent, request_id: str) -> Response:
        route = found.route
        sent.route = route.name
        caller = await self._gate.check(request, route)
        if route.unimplemented:
            raise _unimplemented(route)
        if route.is_websocket:
            raise BadField(field="Upgrade", problem="this route speaks WebSocket")
        sent.call = call = Call(request, route, found.params, request_id, caller)
        handler = self._handlers[route.name]
        if idempotency.check_header(call):
            return _tagged(call, await idempotency.once(self._plane, call, handler))
        return _tagged(call, await handler(self._plane, call))

    def _options(self, request: Request) -> Response:
        """What a path takes; to a browser, whether a page may. Before any token, since browsers send none here."""
        methods = self._router.methods(request.scope["raw_path"])
        response = Response(None, 204, {"allow": ", ".join(methods)})
        response.raw_headers += self._cors.preflight_headers(request.headers, methods)
        return response

    def _refusal(self, failure: Exception, sent: _Sent) -> Response:
        error = failure if isinstance(failure, Error) else Internal(problem=type(failure).__name__)
        if not isinstance(failure, Error):
            log.error("request_broke", route=sent.route, exc_info=failure)
        self._plane.metrics.errors.labels(sent.route, error.reason).inc()
        response = Response(render_envelope(error), error.status, media_type="application/json")
        if isinstance(error, MethodNotAllowed):
            response.headers["allow"] = error.allowed
        if error.status == 401:
            response.headers["www-authenticate"] = "Bearer"
        if isinstance(error, RateLimited):
            response.headers["retry-after"] = str(error.retry_after_s)
        elif error.status == 503:
            response.headers["retry-after"] = "1"
        return response

    # -- WebSocket ------------------------------------------------------------------------------------------------

    async def _websocket(self, scope: Scope, receive: Receive, send: Send, sent: _Sent, request_id: str) -> None:
        socket = WebSocket(scope, receive, send)
        try:
            self._gate.admit(socket)
            found = self._router.find_socket(scope["raw_path"])
            sent.route = found.route.name
            caller = await self._gate.check(socket, found.route)
            sent.call = call = Call(socket, found.route, found.params, request_id, caller)
            idempotency.check_header(call)
            await self._sockets[found.route.name](self._plane, call, socket)
        except Exception as error:  # the one conversion, before the handshake
            if sent.status:
                log.warning("socket_broke", route=sent.route, problem=_text(error))
                raise
            await socket.send_denial_response(self._refusal(error, sent))

    # -- marks ----------------------------------------------------------------------------------------------------

    def _marking(self, send: Send, sent: _Sent, ours: Headers) -> Send:
        """Add our headers to the start of every answer."""

        async def marked(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                sent.status = message.get("status", 101)
                warnings = [
                    (b"warning", render_warning(text).encode()) for text in (sent.call.warnings if sent.call else ())
                ]
                message = {**message, "headers": [*message.get("headers", ()), *ours, *warnings]}
            await send(message)

        return marked

    def _count(self, scope: Scope, sent: _Sent, seconds: float) -> None:
        method = scope.get("method", "GET")
        self._plane.metrics.answered(sent.route, method, sent.status, seconds)
        log.debug("request", method=method, route=sent.route, status=sent.status, ms=round(seconds * 1000, 1))


def _request_id(sent: bytes) -> str:
    text = sent.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else f"req_{random.getrandbits(128):032x}"


def _tagged(call: Call, response: Response) -> Response:
    """With the ETag of what it shows; without the body for a GET that has it already (RFC 9110 section 13.1.2)."""
    if not call.etag or not 200 <= response.status_code < 300:
        return response
    known = call.header("if-none-match") if call.route.method == "GET" else ""
    if known and etag.matches(known, call.etag):
        response = Response(None, 304)
    response.headers["etag"] = call.etag
    return response


def _unimplemented(route: Route) -> Unimplemented:
    query = f"?{route.selector}={route.value}" if route.selector else ""
    return Unimplemented(feature=f"{route.method} {route.path}{query}", why=route.unimplemented)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
