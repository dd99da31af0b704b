"""Sessions of browsers: a sealed cookie that says who logged in and until when. It is not the token, and nothing of it
is stored: it opens with the server's encryption key on every replica, and after a restart.

A session ends at its time, with the key it was begun with, and all of them when the master token is changed.
"""

import base64
import binascii
import hashlib
import hmac

import msgspec

from fusevm.control.clock import Clock
from fusevm.control.secrets import Sealer
from fusevm.model.errors import BadSetting

COOKIE = "fuse_session"
LIFE_S = 7 * 86_400
_ROW = "session"


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """What the cookie holds."""

    #: Key by which it was begun; empty: the master token.
    key_id: str = ""
    prefix: str = ""
    expires_at_ms: int
    #: Digest of the master token at the login.
    bound_to: str


class Sessions:
    """Begins and opens sessions."""

    def __init__(self, sealer: Sealer, clock: Clock, master_token: str) -> None:
        self._sealer = sealer
        self._clock = clock
        self._bound_to = hashlib.sha256(b"fuse session\0" + master_token.encode()).hexdigest()

    def begin(self, key_id: str = "", prefix: str = "") -> str:
        """The value of the cookie. Raises NoEncryptionKey."""
        expires_at_ms = self._clock.now_ms() + LIFE_S * 1000
        session = Session(key_id=key_id, prefix=prefix, expires_at_ms=expires_at_ms, bound_to=self._bound_to)
        sealed = self._sealer.seal(msgspec.json.encode(session).decode(), row=_ROW)
        return base64.urlsafe_b64encode(base64.b64decode(sealed)).decode().rstrip("=")

    def open(self, value: str) -> Session | None:
        """The session; None when it is over, or none of ours."""
        try:
            sealed = base64.b64encode(base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_", validate=True))
            session = msgspec.json.decode(self._sealer.open(sealed.decode(), row=_ROW), type=Session)
        except (binascii.Error, ValueError, BadSetting, msgspec.MsgspecError):
            return None
        is_bound = hmac.compare_digest(session.bound_to, self._bound_to)
        return session if is_bound and self._clock.now_ms() < session.expires_at_ms else None


def render_cookie(value: str, *, is_secure: bool) -> str:
    """The header `Set-Cookie`; an empty value deletes the cookie."""
    life_s = LIFE_S if value else 0
    secure = "; Secure" if is_secure else ""
    return f"{COOKIE}={value}; Path=/; Max-Age={life_s}; HttpOnly; SameSite=Lax{secure}"
