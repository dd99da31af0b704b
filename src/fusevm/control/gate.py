"""Who may come in: the bearer token, and without one, the names in Host and Origin.

Without a token only programs on this machine can connect, but a web page in a browser on this machine is one of them: a
page reaches us under its own host name (DNS rebinding) or with its own Origin. Both are refused.
"""

import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from fusevm.control.config import ControlConfig, accepted_hosts
from fusevm.model.errors import Forbidden, Unauthorized
from fusevm.wire.routes import Scope


class Gate:
    """Checks requests before anything is read of them."""

    def __init__(self, config: ControlConfig) -> None:
        self._digest = hashlib.sha256(config.auth_token.encode()).digest() if config.auth_token else b""
        self._hosts = accepted_hosts(config)

    def check(self, headers: Mapping[str, str], scope: Scope) -> None:
        """Raises Unauthorized, Forbidden."""
        if not self._digest:
            self._check_names(headers)
        elif scope is not Scope.OPEN:
            self._check_token(headers.get("authorization", ""))

    def _check_token(self, header: str) -> None:
        if not header:
            raise Unauthorized(problem="This server asks for a token")
        kind, _, token = header.partition(" ")
        if kind != "Bearer" or not token:
            raise Unauthorized(problem="The Authorization header is not a bearer token")
        if not hmac.compare_digest(hashlib.sha256(token.encode("utf-8", "replace")).digest(), self._digest):
            raise Unauthorized(problem="The token is not valid")

    def _check_names(self, headers: Mapping[str, str]) -> None:
        host = _name(headers.get("host", ""))
        if host not in self._hosts:
            raise Forbidden(
                problem=f"The Host header names {host!r}; a server without a token answers only local names"
            )
        origin = headers.get("origin", "")
        if origin and (urlsplit(origin).hostname or "").lower() not in self._hosts:
            raise Forbidden(problem=f"Pages of {origin[:200]!r} may not use a server without a token")


def _name(host: str) -> str:
    """The host name in a Host header."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
