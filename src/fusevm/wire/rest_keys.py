"""Bodies of the API keys' and sessions' routes."""

import msgspec


class CreateKey(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/api-keys`; everything may be left out."""

    label: str = ""
    #: Whose environments the key sees and makes; empty: everybody's.
    tenant: str = ""
    #: `environments:read`, `environments:write`, `environments:exec`, `snapshots`, `hosts`, `admin` (implies all).
    #: Empty: all but `admin`; with a tenant all but `hosts` and `admin`, which no tenant can have.
    scopes: list[str] = []
    #: Life of the key; 0: without end.
    expires_in_seconds: int = 0


class KeyBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A key without its text."""

    id: str
    #: Always there, as clients of the contract expect.
    label: str = msgspec.field()
    tenant: str = ""
    scopes: list[str] = msgspec.field()
    created_at: str
    expires_at: str = ""
    last_used_at: str = ""
    revoked_at: str = ""


class NewKey(KeyBody, frozen=True, kw_only=True, omit_defaults=True):
    """A key with its text, which is shown once."""

    key: str


class KeyList(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/api-keys`."""

    api_keys: list[KeyBody]


class Login(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /login`: the master token or an API key."""

    token: str
