"""API keys: their text, and who presents one. `fuse_sk_<prefix>_<secret>`; the store knows the prefix and a digest.

Every request reads the key from the store, so that a revocation holds on every replica from the next request on.
"""

import base64
import hashlib
import hmac
import secrets

import structlog

from fusevm.control.caller import Caller
from fusevm.control.clock import Clock
from fusevm.control.store.protocol import Keys
from fusevm.model.api_key import ApiKey
from fusevm.model.errors import Error

log = structlog.get_logger()
START = "fuse_sk_"
#: The time of the last use is written at most this often.
TOUCH_MS = 60_000
#: Longer texts are not even looked up.
MAX_TEXT = 256
_NOBODY = hashlib.sha256(b"").hexdigest()


def make_text() -> tuple[str, str]:
    """A fresh key's public prefix, and its whole text."""
    prefix = secrets.token_hex(8)
    secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    return prefix, f"{START}{prefix}_{secret}"


def digest_of(text: str) -> str:
    """What the store keeps of a key."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def prefix_of(text: str) -> str:
    """The public part of a key's text; empty: this is no key."""
    prefix, found, secret = text.removeprefix(START).partition("_")
    return prefix if text.startswith(START) and found and secret and len(text) <= MAX_TEXT else ""


class KeyRing:
    """Finds callers by their keys."""

    def __init__(self, store: Keys, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        #: Key to when its use was last written by this process.
        self._touched: dict[str, int] = {}

    async def by_text(self, text: str) -> Caller | None:
        """Who presents this key; None when it is none of ours, expired or revoked."""
        prefix = prefix_of(text)
        if not prefix:
            return None
        key = await self._store.find_key(prefix)
        is_right = hmac.compare_digest(digest_of(text), key.digest if key is not None else _NOBODY)
        return await self._caller(key) if is_right else None

    async def by_id(self, prefix: str, id: str) -> Caller | None:  # noqa: A002 - the record's field
        """Who began a session with this key; None when it is gone, expired or revoked."""
        key = await self._store.find_key(prefix)
        return await self._caller(key) if key is not None and key.id == id else None

    async def _caller(self, key: ApiKey | None) -> Caller | None:
        now_ms = self._clock.now_ms()
        if key is None or not is_good(key, now_ms):
            return None
        await self._touch(key, now_ms)
        return Caller(tenant=key.tenant, scopes=key.scopes, key_id=key.id, key_prefix=key.prefix)

    async def _touch(self, key: ApiKey, now_ms: int) -> None:
        """Note the use; a store that cannot write does not keep anybody out."""
        last_ms = max(key.last_used_at_ms or 0, self._touched.get(key.id, 0))
        if now_ms - last_ms < TOUCH_MS:
            return
        self._touched = {id_: at_ms for id_, at_ms in self._touched.items() if now_ms - at_ms < TOUCH_MS}
        self._touched[key.id] = now_ms
        try:
            await self._store.touch_key(key.id, now_ms)
        except Error as error:
            log.warning("key_use_not_noted", key=key.id, problem=error.message)


def is_good(key: ApiKey, now_ms: int) -> bool:
    """Neither revoked nor expired?"""
    return key.revoked_at_ms is None and (key.expires_at_ms is None or now_ms < key.expires_at_ms)
