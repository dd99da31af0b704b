"""What a row of a route table says. The host daemon's table (`wire.host_routes`) has rows of the same kind."""

from enum import StrEnum
from typing import Any, Literal

import msgspec

from fusevm.model import errors as e

KIB, MIB = 1 << 10, 1 << 20
#: Largest JSON body unless a row says otherwise.
JSON_LIMIT = 64 * KIB
NO_LIMIT = 0


class Scope(StrEnum):
    """What a key must be allowed to do. `OPEN` needs no key."""

    OPEN = ""
    READ = "environments:read"
    WRITE = "environments:write"
    EXEC = "environments:exec"
    SNAPSHOTS = "snapshots"
    HOSTS = "hosts"
    ADMIN = "admin"


class Payload(StrEnum):
    """What a body is."""

    NONE = ""
    JSON = "application/json"
    BYTES = "application/octet-stream"
    TAR = "application/x-tar"
    EVENTS = "text/event-stream"
    #: One JSON object a line (the host daemon's events).
    LINES = "application/x-ndjson"
    TEXT = "text/plain"
    #: A WebSocket; one binary message is one exec frame (`wire.frames`).
    FRAMES = "websocket"


_KEPT = frozenset({Payload.NONE, Payload.JSON})


class Param(msgspec.Struct, frozen=True, kw_only=True):
    """A query parameter or a header."""

    name: str
    summary: str
    kind: Literal["string", "integer", "boolean"] = "string"
    place: Literal["query", "header"] = "query"
    is_required: bool = False
    is_repeated: bool = False


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One operation."""

    method: str
    #: Segments in braces match one percent-decoded segment.
    path: str
    name: str
    summary: str
    scope: Scope = Scope.READ
    #: `action` or `op`, and the value that selects this row.
    selector: str = ""
    value: str = ""
    takes: Payload = Payload.NONE
    request: Any = None
    gives: Payload = Payload.JSON
    answer: Any = None
    #: Every status of success.
    statuses: tuple[int, ...] = (200,)
    #: Largest body in bytes; 0: unlimited, streamed.
    limit: int = JSON_LIMIT
    params: tuple[Param, ...] = ()
    errors: tuple[type[e.Error], ...] = ()
    #: Answers with one record carry its ETag; changes take If-Match, GET takes If-None-Match.
    is_versioned: bool = False
    #: What it makes is tied to the Idempotency-Key in the same transaction: a repetition after a crash finds it.
    binds_key: bool = False
    #: Path of what a success has made, whose last id is in the answer: the document links to every operation on it.
    makes: str = ""
    #: The answer holds a secret: under an Idempotency-Key it is stored sealed.
    tells_secret: bool = False
    #: Why it answers 501; empty: it is there.
    unimplemented: str = ""

    @property
    def is_websocket(self) -> bool:
        return self.gives is Payload.FRAMES

    @property
    def takes_key(self) -> bool:
        """Does it take an Idempotency-Key? Streams, either way, cannot be kept and answered again."""
        return self.method == "POST" and self.takes in (Payload.NONE, Payload.JSON) and self.gives in _KEPT


#: What every route may answer: the gate, the store, the process.
COMMON_ERRORS: tuple[type[e.Error], ...] = (
    e.Unauthorized,
    e.Forbidden,
    e.BadField,
    e.StoreFull,
    e.StoreUnreachable,
    e.ShuttingDown,
    e.Internal,
)
BODY_ERRORS: tuple[type[e.Error], ...] = (e.BadJson, e.PayloadTooLarge, e.Timeout)


def errors_of(route: Route) -> tuple[type[e.Error], ...]:
    """Every error class that the route may answer with."""
    found = [*route.errors, *COMMON_ERRORS]
    if route.takes is not Payload.NONE:
        found += BODY_ERRORS
    if route.selector:
        found.append(e.UnknownAction)
    if route.unimplemented:
        found.append(e.Unimplemented)
    return tuple(dict.fromkeys(found))
