"""Bodies of requests and answers at the host's API: read within their bounds, decoded, encoded."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from fusevm.model.errors import PayloadTooLarge
from fusevm.wire.decode import decode_body
from fusevm.wire.routes import Route

T = TypeVar("T")

#: Where a request keeps the names of its unknown fields, which become a warning of the answer.
UNKNOWN = "fuse.unknown"


async def read_body(request: Request, route: Route) -> bytes:
    """The whole body. Raises PayloadTooLarge beyond the route's limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > route.limit:
            raise PayloadTooLarge(limit=route.limit)
    return bytes(body)


def decode_noting(request: Request, body: bytes, kind: type[T]) -> T:
    """Decode a body, noting the fields that nobody knows. Raises BadJson."""
    value, unknown = decode_body(body, kind)
    request.scope[UNKNOWN] = unknown
    return value


def render_json(value: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")
