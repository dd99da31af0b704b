"""Idempotency-Key: the same key and request within a day get the answer of the first, and act once. For every POST.

A row that binds its key (create) ties it to what it makes in the same transaction: whether it acted is known whatever
was lost on the way, and a repetition waits for what the first has made. Others have no such tie: a key whose request
got no answer stays refused, since the request may have had its effect. Answers are kept sealed wherever they can be.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NoReturn

import structlog
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
    BadSetting,
    Error,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    Internal,
    NoEncryptionKey,
    ShuttingDown,
    StoreFull,
    StoreUnreachable,
    Timeout,
)
from fusevm.wire.errors import render_envelope

log = structlog.get_logger()
HEADER = "idempotency-key"
MAX_KEY = 255
#: Larger answers are not kept; a repetition is then refused as one whose answer is unknown.
MAX_KEPT = 4 << 20
#: An answer that is collected to be kept may be this long.
MAX_COLLECTED = 64 << 20
#: A request that binds what it makes, and has bound nothing for this long, is dead and had no effect.
STALE_MS = 30_000
#: After these the request may have had its effect: they are its answer, as is every error after its first change.
#: After every other one it had none, and may be sent again.
_UNKNOWN = (ReplyLost, Timeout, Internal, AgentFailure)
#: These say nothing about the request, neither what became of it nor that it had no effect.
_NO_ANSWER = (StoreUnreachable, ShuttingDown)
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
    before = await _claim(plane, call, key)
    if before is not None and before.fingerprint != key.fingerprint:
        raise IdempotencyKeyReused(key=key.key)
    call.request_key = key
    if before is not None:
        if before.status:
            return _replayed(plane, key, before)
        if not before.uid:
            raise IdempotencyInProgress(key=key.key)
        call.acted_on = before.uid
    return await _kept(plane, call, key, handler)


async def _claim(plane: Plane, call: Call, key: RequestKey) -> StoredRequest | None:
    keep_ms = round(plane.config.idempotency_s * 1000)
    dead_after_ms = STALE_MS if call.route.binds_key else None
    try:
        return await plane.store.claim_request(key, keep_ms, dead_after_ms)
    except StoreUnreachable:
        # It may be claimed all the same, and nobody else would ever free it. A claim of one's own is found.
        return await plane.store.claim_request(key, keep_ms, dead_after_ms)


def request_key(call: Call, body: bytes) -> RequestKey:
    """The key of a request, in the scope of its caller. Raises BadField."""
    key = call.header(HEADER)
    if len(key) > MAX_KEY or not key.isprintable():
        raise BadField(field="Idempotency-Key", problem=f"use 1 to {MAX_KEY} printable characters")
    seen = fingerprint_of(call.params, call.connection.query_params.multi_items(), body)
    return RequestKey(scope_of(call.caller), call.route.name, key, seen, secrets.token_hex(8))


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
        if call.acted_on or isinstance(failure, _UNKNOWN):
            if not isinstance(failure, (*_NO_ANSWER, StoreFull)):
                await _keep(plane, call, key, failure.status, render_envelope(failure))
            raise
        call.acted_on = await _freed(plane, call, key, failure)
        if not call.acted_on:
            raise
        call.warnings.clear()
        return await _kept(plane, call, key, handler)
    await _keep(plane, call, key, response.status_code, bytes(response.body))
    return response


async def _freed(plane: Plane, call: Call, key: RequestKey, failure: Error) -> str:
    """Free the key of a request that had no effect. Not empty: what it, or an equal one, has made after all."""
    if isinstance(failure, _NO_ANSWER) and not call.route.binds_key:
        return ""
    try:
        return await plane.store.forget_request(key)
    except Error as error:
        log.warning("key_not_freed", problem=error.message)
        return ""


async def _keep(plane: Plane, call: Call, key: RequestKey, status: int, body: bytes) -> None:
    """Keep an answer. It is given also where it cannot be kept; a repetition is then refused."""
    if len(body) > MAX_KEPT:
        return
    text, is_sealed = body.decode(), plane.sealer.has_key
    kept = plane.sealer.seal(text, row=key.row) if is_sealed else text
    try:
        await plane.store.finish_request(key, status, kept, is_sealed=is_sealed, uid=call.acted_on)
    except Error as error:
        log.warning("answer_not_kept", problem=error.message)


def _replayed(plane: Plane, key: RequestKey, before: StoredRequest) -> Response:
    """The stored answer. Raises IdempotencyInProgress where its key has been dropped: nobody knows it any more."""
    text = before.body
    if before.is_sealed:
        try:
            text = plane.sealer.open(text, row=key.row)
        except BadSetting as error:
            raise IdempotencyInProgress(key=key.key) from error
    media_type = "application/json" if text else None
    return Response(text.encode() or None, before.status, {"idempotency-replayed": "true"}, media_type)


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
