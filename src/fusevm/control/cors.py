"""Which pages of other origins may read answers (the Fetch standard's CORS protocol). Pure.

Listed origins may send the session cookie; with `*`, every page may read, but never with a cookie.
"""

from collections.abc import Mapping, Sequence

Headers = list[tuple[bytes, bytes]]
_REQUEST_HEADERS = (
    b"Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, Last-Event-ID, Prefer, Range, X-Request-ID"
)
_ANSWER_HEADERS = (
    b"Content-Range, ETag, Idempotency-Replayed, Last-Modified, Retry-After, Warning, X-Fuse-Lost, X-Fuse-Offset, "
    b"X-Fuse-Sha256, X-Request-ID"
)
#: Seconds for which a browser may remember a preflight.
_MAX_AGE = b"600"


class Cors:
    """The rules for a list of origins."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._is_open = "*" in origins
        self._origins = frozenset(origins) - {"*"}

    def is_listed(self, origin: str) -> bool:
        """May pages of this origin act with the session cookie?"""
        return origin in self._origins

    def answer_headers(self, origin: str) -> Headers:
        """What every answer to a page of this origin carries."""
        if not origin or not (self._is_open or self._origins):
            return []
        if self._is_open:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _ANSWER_HEADERS)]
        if not self.is_listed(origin):
            return [(b"vary", b"Origin")]
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-credentials", b"true"),
            (b"access-control-expose-headers", _ANSWER_HEADERS),
            (b"vary", b"Origin"),
        ]

    def preflight_headers(self, headers: Mapping[str, str], methods: Sequence[str]) -> Headers:
        """What the answer to a preflight says besides; empty when this is none, or its origin is not listed."""
        origin = headers.get("origin", "")
        if "access-control-request-method" not in headers or not (self._is_open or self.is_listed(origin)):
            return []
        return [
            (b"access-control-allow-methods", ", ".join(methods).encode()),
            (b"access-control-allow-headers", _REQUEST_HEADERS),
            (b"access-control-max-age", _MAX_AGE),
        ]
