"""An API key: who may do what, and until when. The secret itself is never stored, only its digest."""

import msgspec


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """The durable record of one key. The text of a key is `fuse_sk_<prefix>_<secret>`."""

    #: `ak_` and 16 hex digits.
    id: str
    #: Public part of the key's text, by which it is found.
    prefix: str
    #: SHA-256 of the whole text, hex.
    digest: str
    label: str = ""
    #: Whose environments it sees; empty: everybody's.
    tenant: str = ""
    #: As in the route table (`environments:read` ...); `admin` implies all.
    scopes: tuple[str, ...] = ()
    created_at_ms: int
    expires_at_ms: int | None = None
    revoked_at_ms: int | None = None
    #: Coarse: written at most once a minute.
    last_used_at_ms: int | None = None
