"""Who may come in, checked before NiceGUI sees anything: requests and sockets, the same rules for both.

1. The Host header names this machine's loopback: a page that reaches us under its own name (DNS rebinding) does not.
2. An Origin header is our own origin: no other page, not even one on another port of this machine, drives us.
   (NiceGUI's own socket takes every origin.)
3. The key: the address that we print carries it once, then a cookie does. Other users of this machine can connect to a
   loopback port, too, and behind this one is the token of whoever started us.

Answers allow only what comes from ourselves, so pages work without the Internet, and nobody may frame them.
"""

import hmac
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from fusevm.console.config import is_loopback

KEY_PARAMETER = "key"
#: Scripts inline and compiled at run time are how NiceGUI and Vue work; what matters is that all come from ourselves.
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval'; img-src 'self' data:; "
    "font-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
#: What NiceGUI would take from a reverse proxy; there is none.
_DROPPED = frozenset({b"x-forwarded-prefix"})


class Gate:
    """The outermost application."""

    def __init__(self, app: ASGIApp, key: str, port: int) -> None:
        self.app = app
        self._key = key
        # Cookies do not keep ports apart; two consoles on one machine must not forget each other's.
        self._cookie = f"fuse-console-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = foreign(headers)
        if problem:
            await _refuse(scope, receive, send, problem)
        elif scope["type"] == "http" and (welcome := self._welcome(scope)) is not None:
            await welcome(scope, receive, _hardened(send))
        elif not self._is_known(headers):
            problem = "This console asks for its key: open the address that `fuse console` printed when it started."
            await _refuse(scope, receive, send, problem)
        else:
            kept = [pair for pair in scope["headers"] if pair[0] not in _DROPPED]
            await self.app({**scope, "headers": kept}, receive, _hardened(send))

    def _welcome(self, scope: Scope) -> Response | None:
        """Exchange the key in the address for a cookie; None when there is no right key."""
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["method"] != "GET" or not self._is_key(query.pop(KEY_PARAMETER, [""])[0]):
            return None
        rest = urlencode(query, doseq=True)
        # One leading slash only: `//name` would be another host.
        path = "/" + scope.get("raw_path", b"/").decode("latin-1").lstrip("/\\")
        answer = RedirectResponse(path + (f"?{rest}" if rest else ""), status_code=303)
        answer.set_cookie(self._cookie, self._key, httponly=True, samesite="lax", path="/")
        return answer

    def _is_known(self, headers: Headers) -> bool:
        return self._is_key(cookie_parser(headers.get("cookie", "")).get(self._cookie, ""))

    def _is_key(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self._key.encode())


def foreign(headers: Headers) -> str:
    """Why a request is not from a page of ours; empty when nothing speaks against it."""
    host = headers.get("host", "")
    if not is_loopback(_name(host)):
        return f"The Host header names {host[:200]!r}; the console answers only local names."
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"http://{host.lower()}":
        return f"Pages of {origin[:200]!r} may not use the console."
    return ""


def _name(authority: str) -> str:
    """The host of `host:port`, brackets removed; empty when it cannot be read."""
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


async def _refuse(scope: Scope, receive: Receive, send: Send, problem: str) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose(code=1008, reason="refused")(scope, receive, send)
        return
    await PlainTextResponse(problem + "\n", status_code=403)(scope, receive, _hardened(send))


def _hardened(send: Send) -> Send:
    """Add the security headers to an answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _SECURITY_HEADERS.items():
                headers[name] = value
        await send(message)

    return sending
