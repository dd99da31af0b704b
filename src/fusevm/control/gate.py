"""Who may come in: from which address, with which credential, for what.

A credential is a bearer token (the master token or an API key) or, where there is no such header at all, the session
cookie. Without a master token only programs on this machine can connect, but a web page in a browser on this machine is
one of them: it reaches us under its own host name (DNS rebinding) or with its own Origin. Both are refused.
"""

import hashlib
import hmac
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import structlog
from msgspec.structs import replace
from starlette.requests import HTTPConnection

from fusevm.control.addresses import Address, Networks, client_address, group_of
from fusevm.control.attempts import Attempts
from fusevm.control.caller import ANYONE, MASTER, Caller
from fusevm.control.config import accepted_hosts
from fusevm.control.cors import Cors
from fusevm.control.keys import START, KeyRing
from fusevm.control.plane import Plane
from fusevm.control.session import COOKIE, Session, Sessions
from fusevm.model.errors import Error, Forbidden, RateLimited, Unauthorized
from fusevm.wire.routes import Route, Scope

log = structlog.get_logger()
#: Answered to every address, and without a token: what monitors ask.
OPEN_TO_ALL = frozenset({"/health", "/ready", "/metrics", "/v1/version"})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Gate:
    """Checks requests before anything is read of them."""

    def __init__(self, plane: Plane, cors: Cors) -> None:
        config = plane.config
        self._plane = plane
        self._cors = cors
        self._master = _digest(config.auth_token) if config.auth_token else b""
        self._hosts = accepted_hosts(config)
        self._allowed = Networks(config.allowed_cidrs)
        self._trusted = Networks(config.trusted_proxies)
        self._keys = KeyRing(plane.store, plane.clock)
        self._attempts = Attempts(time.monotonic)
        self.sessions = Sessions(plane.sealer, plane.clock, config.auth_token)

    # -- addresses ------------------------------------------------------------------------------------------------

    def admit(self, connection: HTTPConnection) -> None:
        """Is this address served? Raises Forbidden, BadField."""
        if not self._allowed or connection.scope["path"] in OPEN_TO_ALL:
            return
        address = self._address(connection)
        if address is None or address not in self._allowed:
            self._count("address")
            log.info("address_refused", address=str(address))
            raise Forbidden(problem=f"The address {address or 'of this client'} is not within the allowed networks")

    def _address(self, connection: HTTPConnection) -> Address | None:
        peer = connection.client.host if connection.client is not None else ""
        headers = connection.headers
        return client_address(
            peer,
            forwarded=headers.getlist("forwarded"),
            forwarded_for=headers.getlist("x-forwarded-for"),
            trusted=self._trusted,
        )

    # -- credentials ----------------------------------------------------------------------------------------------

    async def check(self, connection: HTTPConnection, route: Route) -> Caller:
        """Who calls, and may they? Raises Unauthorized, Forbidden, ScopeMissing, RateLimited."""
        if not self._master:
            self._check_names(connection.headers)
        scope = self._scope_of(route)
        if scope is Scope.OPEN:
            return ANYONE
        caller = await self._caller(connection)
        try:
            caller.require(scope)
        except Error:
            self._count("scope")
            raise
        if caller.key_id:
            self._plane.metrics.key_used(caller.key_id)
        return caller

    def _scope_of(self, route: Route) -> Scope:
        return Scope.ADMIN if route.name == "metrics" and self._plane.config.metrics_auth else route.scope

    async def _caller(self, connection: HTTPConnection) -> Caller:
        header = connection.headers.get("authorization")
        if header is None:
            return await self._by_cookie(connection)
        kind, _, token = header.partition(" ")
        if kind == "Bearer" and token:
            return await self.by_token(connection, token)
        if not self._master:
            return MASTER
        raise Unauthorized(problem="The Authorization header is not a bearer token")

    async def by_token(self, connection: HTTPConnection, token: str) -> Caller:
        """Whose token this is. Raises Unauthorized, and RateLimited after too many wrong ones from one address."""
        if not self._master and not token.startswith(START):
            return MASTER
        address, digest = group_of(self._address(connection)), _digest(token)
        try:
            self._attempts.check(address, digest)
        except RateLimited:
            self._count("rate_limited")
            raise
        is_master = hmac.compare_digest(digest, self._master or bytes(len(digest)))
        caller = MASTER if is_master and self._master else await self._keys.by_text(token)
        if caller is None:
            self._attempts.failed(address)
            self._count("token")
            log.warning("token_refused", address=address)
            raise Unauthorized(problem="The token is not valid, has expired or was revoked")
        self._attempts.succeeded(address, digest)
        return caller

    async def _by_cookie(self, connection: HTTPConnection) -> Caller:
        value = connection.cookies.get(COOKIE, "")
        if not self._master:
            return MASTER
        if not value:
            raise Unauthorized(problem="This server asks for a token")
        session = self.sessions.open(value)
        caller = await self._of_session(session) if session is not None else None
        if session is None or caller is None:
            self._count("session")
            raise Unauthorized(problem="The session has ended; log in again")
        if connection.scope["type"] != "http" or connection.scope["method"] not in _SAFE:
            self.check_page(connection)
        return replace(caller, ends_at_ms=session.expires_at_ms)

    async def _of_session(self, session: Session) -> Caller | None:
        return await self._keys.by_id(session.prefix, session.key_id) if session.key_id else MASTER

    @property
    def asks_for_tokens(self) -> bool:
        """Is there a master token?"""
        return bool(self._master)

    # -- pages ----------------------------------------------------------------------------------------------------

    def check_page(self, connection: HTTPConnection, *, may_be_no_page: bool = False) -> None:
        """A browser sends the cookie along with what any page makes it send; only our own pages and listed ones may
        change things, or open a WebSocket, which no browser keeps from other pages. Raises Forbidden."""
        origin = connection.headers.get("origin", "")
        site = connection.headers.get("sec-fetch-site", "")
        is_ours = bool(origin) and _authority(origin) == connection.headers.get("host", "").lower() != ""
        is_same = site == "same-origin" if not origin else is_ours and site in ("", "same-origin")
        if is_same or self._cors.is_listed(origin) or (may_be_no_page and not origin and not site):
            return
        self._count("page")
        raise Forbidden(problem="With a session, only this server's own pages may do this; other programs send a token")

    def _check_names(self, headers: Mapping[str, str]) -> None:
        host = _name(headers.get("host", ""))
        if host not in self._hosts:
            raise Forbidden(
                problem=f"The Host header names {host!r}; a server without a token answers only local names"
            )
        origin = headers.get("origin", "")
        is_known = _name(_authority(origin)) in self._hosts or self._cors.is_listed(origin)
        if origin and not is_known:
            raise Forbidden(problem=f"Pages of {origin[:200]!r} may not use a server without a token")

    def _count(self, kind: str) -> None:
        self._plane.metrics.refused.labels(kind).inc()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _authority(origin: str) -> str:
    """Host and port of an origin; empty when it has none, or is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name(host: str) -> str:
    """The host name in a Host header."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
