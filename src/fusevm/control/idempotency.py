"""Idempotency-Key: the same key and request within a day get the answer of the first, and act once.

A create binds the environment's uid to the key in the transaction that makes it: a repetition after a crash finds it. A
command has no such tie: a key whose request got no answer stays refused, since the command may have run.
"""

import hashlib

from starlette.responses import Response

from fusevm.control.call import Call
from fusevm.control.plane import Plane
from fusevm.control.store.protocol import RequestKey, StoredRequest
from fusevm.model.errors import BadField, IdempotencyInProgress, IdempotencyKeyReused

HEADER = "idempotency-key"
MAX_KEY = 255
#: Larger answers are not kept; a repetition is then refused as one whose answer is unknown.
MAX_KEPT = 4 << 20
#: A create that bound no environment for this long is dead, and had no effect.
STALE_MS = 30_000


def request_key(call: Call, body: bytes) -> RequestKey | None:
    """The key of a request, or None. Raises BadField."""
    key = call.header(HEADER)
    if not key:
        return None
    if len(key) > MAX_KEY or not key.isprintable():
        raise BadField(field="Idempotency-Key", problem=f"use 1 to {MAX_KEY} printable characters")
    seen = hashlib.sha256("\0".join(call.params.values()).encode() + b"\0" + body)
    return RequestKey("", call.route.name, key, seen.hexdigest())


async def claim(plane: Plane, key: RequestKey) -> StoredRequest | None:
    """None: go ahead. Else what is known of the first request. Raises IdempotencyKeyReused for a different one."""
    before = await plane.store.claim_request(key, round(plane.config.idempotency_s * 1000))
    if before is not None and before.fingerprint != key.fingerprint:
        raise IdempotencyKeyReused(key=key.key)
    return before


def replayed(key: RequestKey, before: StoredRequest) -> Response:
    """The stored answer. Raises IdempotencyInProgress while there is none."""
    if not before.status:
        raise IdempotencyInProgress(key=key.key)
    headers = {"idempotency-replayed": "true"}
    return Response(before.body.encode(), before.status, headers=headers, media_type="application/json")


async def keep(plane: Plane, key: RequestKey, response: Response) -> None:
    """Store an answer for repetitions."""
    body = bytes(response.body)
    if len(body) <= MAX_KEPT:
        await plane.store.finish_request(key, response.status_code, body.decode())


def is_dead(plane: Plane, before: StoredRequest) -> bool:
    """Did the first request die before it had an effect? Only for requests that bind what they make."""
    return not before.uid and not before.status and plane.clock.now_ms() - before.claimed_at_ms > STALE_MS
