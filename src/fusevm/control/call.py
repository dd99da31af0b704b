"""One request on its way through a handler: what was matched, what was sent, what to remark upon."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, NoReturn, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response

from fusevm.control.caller import Caller
from fusevm.control.etag import etag_of, names_revision
from fusevm.control.race import first_of
from fusevm.control.store.protocol import RequestKey
from fusevm.model.errors import BadField, PayloadTooLarge, PreconditionFailed, Timeout
from fusevm.wire.decode import decode_body, describe_unknown
from fusevm.wire.routes import Route

T = TypeVar("T")
#: Seconds within which a body that is read whole must have arrived.
BODY_TIMEOUT_S = 15
#: Longer numbers are not even read: Python refuses those of some thousand digits.
MAX_DIGITS = 18
_encode = msgspec.json.Encoder().encode
_TRUE, _FALSE = frozenset({"true", "1", "yes"}), frozenset({"", "false", "0", "no"})


class Call:
    """A matched request."""

    def __init__(
        self, connection: HTTPConnection, route: Route, params: dict[str, str], request_id: str, caller: Caller
    ) -> None:
        self.connection = connection
        self.route = route
        self.params = params
        self.request_id = request_id
        self.caller = caller
        #: Sentences for the `Warning` header.
        self.warnings: list[str] = []
        #: Of the record that the answer shows; empty: it shows none, or many.
        self.etag = ""
        #: The Idempotency-Key, if one was sent: the request then goes on without its client, and its answer is kept.
        self.request_key: RequestKey | None = None
        #: The environment that the request has made or changed: from then on its failure is its answer, too. When a
        #: create is called, set by an earlier request with this key: wait for that one instead of making another.
        self.acted_on = ""
        self._body: bytes | None = None

    @property
    def request(self) -> Request:
        """The HTTP request; not for WebSockets."""
        if not isinstance(self.connection, Request):
            raise TypeError("a WebSocket has no HTTP request")
        return self.connection

    def header(self, name: str) -> str:
        """A header's value, or empty."""
        return self.connection.headers.get(name, "")

    def text(self, name: str) -> str:
        """A query parameter's value, or empty."""
        return self.connection.query_params.get(name, "")

    def flag(self, name: str) -> bool:
        """A query parameter as a yes or no. Raises BadField."""
        asked = self.text(name).lower()
        if asked not in _TRUE | _FALSE:
            raise BadField(field=name, problem=f"{asked[:80]!r} is neither true nor false")
        return asked in _TRUE

    def integer(self, name: str, default: int, *, least: int, most: int) -> int:
        """A query parameter as a number. Raises BadField."""
        asked = self.text(name)
        if not asked:
            return default
        try:
            value = int(asked)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise BadField(field=name, problem=f"{asked[:80]!r} is not a whole number of {least} to {most}")
        return value

    def prefers_async(self) -> bool:
        """Was `Prefer: respond-async` sent (RFC 7240)?"""
        wishes = self.header("prefer").lower().split(",")
        return any(wish.split(";")[0].strip() == "respond-async" for wish in wishes)

    async def body(self) -> bytes:
        """The whole body, within the route's limit. Raises PayloadTooLarge, Timeout."""
        if self._body is None:
            self._body = await self._read_body(self.route.limit)
        return self._body

    async def _read_body(self, limit: int) -> bytes:
        declared = self.header("content-length")
        if declared.isdecimal() and (len(declared) > MAX_DIGITS or int(declared) > limit):
            raise PayloadTooLarge(limit=limit)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in self.request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise PayloadTooLarge(limit=limit)
        except TimeoutError as error:
            raise Timeout(what="receiving the request body", limit_s=BODY_TIMEOUT_S) from error
        return bytes(body)

    async def json(self, kind: type[T]) -> tuple[T, bytes]:
        """The body as a record, and its bytes; unknown fields become a warning. Raises BadJson."""
        body = await self.body()
        value, unknown = decode_body(body, kind)
        if unknown:
            self.warnings.append(describe_unknown(unknown))
        return value, body

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work`, but cancel it when the client goes away; then raises ClientDisconnect. The body must be read.
        With an Idempotency-Key the work is done in any case: its answer is kept."""
        if self.request_key is not None:
            return await work
        return await first_of(work, self._gone())

    async def _gone(self) -> NoReturn:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect

    def mark(self, key: str, revision: int, body: bytes = b"") -> None:
        """The answer shows this revision of a record: it gets an ETag, and a GET that knows it a 304.

        `body`: what a GET shows, where a revision has more than one rendering.
        """
        self.etag = etag_of(key, revision, body)

    def expected(self, id: str, key: str, revision: int) -> int | None:  # noqa: A002 - as in the path
        """The revision that `If-Match` allows to be changed; None: any. Raises PreconditionFailed for another one."""
        header = self.header("if-match")
        if not header:
            return None
        if not names_revision(header, key, revision):
            raise PreconditionFailed(id=id, etag=etag_of(key, revision))
        return revision if header.strip() != "*" else None

    def stream(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ClientDisconnect when it is cut off."""
        return self.request.stream()


def reply(body: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(_encode(body), status, media_type="application/json")


def empty(status: int = 204) -> Response:
    """An answer without a body."""
    return Response(None, status)


__all__ = ["Call", "ClientDisconnect", "empty", "reply"]
