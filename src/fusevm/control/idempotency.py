"""Idempotency-Key: the same key and request within a day get the answer of the first, and act once. For every POST.

A row that binds its key (create) ties it to what it makes in the same transaction: a repetition after a crash finds it.
Others have no such tie: a key whose request got no answer stays refused, since the request may have had its effect.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NoReturn

from starlette.responses import Response
from starlette.types import Message

from fusevm.control.call import Call
from fusevm.control.caller import Caller
from fusevm.control.host_api import ReplyLost
from fusevm.control.plane import Plane
from fusevm.control.store.protocol import RequestKey, StoredRequest
from fusevm.model.errors import (
    AgentFailure,
    BadField,
    Error,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    Internal,
    NoEncryptionKey,
    Timeout,
)
from fusevm.wire.errors import render_envelope
from fusevm.wire.routes import Route

HEADER = "idempotency-key"
MAX_KEY = 255
#: Larger answers are not kept; a repetition is then refused as one whose answer is unknown.
MAX_KEPT = 4 << 20
#: An answer that is collected to be kept may be this long.
MAX_COLLECTED = 64 << 20
#: A request that binds what it makes, and has bound nothing for this long, is dead and had no effect.
STALE_MS = 30_000
#: After these the request may have had its effect. After every other error it had none, and may be sent again.
_UNKNOWN = (ReplyLost, Timeout, Internal, AgentFailure)
Handler = Callable[[Plane, Call], Awaitable[Response]]


def check_header(call: Call) -> bool:
    """Is there a key to honour? Raises BadField where none can be."""
    if not call.header(HEADER):
        return False
    if call.route.is_websocket or (call.route.method == "POST" and not call.route.takes_key):
        raise BadField(field="Idempotency-Key", problem="this route streams, so no answer can be kept; leave it out")
    return call.route.takes_key


async def once(plane: Plane, call: Call, handler: Handler) -> Response:
    """Handle a request that has a key, unless it came before. Raises IdempotencyKeyReused, IdempotencyInProgress,
    NoEncryptionKey, and what the handler raises."""
    key = request_key(call, await call.body())
    if call.route.tells_secret and not plane.sealer.has_key:
        raise NoEncryptionKey(what="the answer under an Idempotency-Key")
    before = await plane.store.claim_request(key, round(plane.config.idempotency_s * 1000))
    if before is not None and before.fingerprint != key.fingerprint:
        raise IdempotencyKeyReused(key=key.key)
    call.request_key = key
    if before is not None and call.route.binds_key and not before.status:
        call.bound_uid = before.uid
        if not before.uid and plane.clock.now_ms() - before.claimed_at_ms <= STALE_MS:
            raise IdempotencyInProgress(key=key.key)
    elif before is not None:
        return _replayed(plane, call.route, key, before)
    return await _kept(plane, call, key, handler)


def request_key(call: Call, body: bytes) -> RequestKey:
    """The key of a request, in the scope of its caller. Raises BadField."""
    key = call.header(HEADER)
    if len(key) > MAX_KEY or not key.isprintable():
        raise BadField(field="Idempotency-Key", problem=f"use 1 to {MAX_KEY} printable characters")
    seen = fingerprint_of(call.params, call.connection.query_params.multi_items(), body)
    return RequestKey(scope_of(call.caller), call.route.name, key, seen)


def fingerprint_of(params: Mapping[str, str], query: Iterable[tuple[str, str]], body: bytes) -> str:
    """What makes a request another one: the ids in its path, its query and its body."""
    place = repr((sorted(params.items()), sorted(query))).encode("utf-8", "surrogatepass")
    return hashlib.sha256(place + b"\0" + body).hexdigest()


def scope_of(caller: Caller) -> str:
    """Who shares keys: the callers of a tenant; each key that belongs to no tenant has its own."""
    if caller.tenant:
        return f"tenant:{caller.tenant}"
    return f"key:{caller.key_id}" if caller.key_id else ""


async def _kept(plane: Plane, call: Call, key: RequestKey, handler: Handler) -> Response:
    try:
        response = await _collected(call, await handler(plane, call))
    except Exception as error:  # a bug may have had an effect, too; the edge turns it into the same answer
        failure = error if isinstance(error, Error) else Internal(problem=type(error).__name__)
        if isinstance(failure, _UNKNOWN):
            await _store(plane, call.route, key, failure.status, render_envelope(failure))
        elif not call.bound_uid:
            await plane.store.forget_request(key)
        raise
    await _store(plane, call.route, key, response.status_code, bytes(response.body))
    return response


async def _store(plane: Plane, route: Route, key: RequestKey, status: int, body: bytes) -> None:
    if len(body) > MAX_KEPT:
        return
    text = body.decode()
    kept = plane.sealer.seal(text, row=_row(key)) if route.tells_secret else text
    await plane.store.finish_request(key, status, kept)


def _replayed(plane: Plane, route: Route, key: RequestKey, before: StoredRequest) -> Response:
    """The stored answer. Raises IdempotencyInProgress while there is none."""
    if not before.status:
        raise IdempotencyInProgress(key=key.key)
    text = plane.sealer.open(before.body, row=_row(key)) if route.tells_secret else before.body
    media_type = "application/json" if text else None
    return Response(text.encode() or None, before.status, {"idempotency-replayed": "true"}, media_type)


def _row(key: RequestKey) -> str:
    return f"request:{key.tenant}:{key.route}/{key.key}"


async def _collected(call: Call, response: Response) -> Response:
    """An answer with its whole body at hand, also if the client has gone."""
    if isinstance(getattr(response, "body", None), bytes):
        return response
    start: dict[str, Any] = {}
    body = bytearray()

    async def collect(message: Message) -> None:
        start.update(message if message["type"] == "http.response.start" else {})
        body.extend(message.get("body", b""))
        if len(body) > MAX_COLLECTED:
            raise Internal(problem="the answer is too long to be kept; ask without an Idempotency-Key")

    await response(call.connection.scope, _never, collect)
    whole = Response(bytes(body), start["status"])
    skipped = (b"content-length", b"transfer-encoding")
    whole.raw_headers += [(name, value) for name, value in start["headers"] if name not in skipped]
    return whole


async def _never() -> NoReturn:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("a future that nobody sets was set")
