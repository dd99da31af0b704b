"""Transactions about API keys."""

import msgspec
from msgspec.structs import replace

from fusevm.control.store.statements import Row, Transaction, one, rows
from fusevm.model.api_key import ApiKey
from fusevm.model.errors import RevisionConflict

_key = msgspec.json.Decoder(ApiKey)
_encode = msgspec.json.Encoder().encode


def add(key: ApiKey) -> Transaction[None]:
    """Save a new key. Raises RevisionConflict when its id or public part is taken: make another."""
    values = (key.id, key.prefix, key.created_at_ms, key.revoked_at_ms, key.last_used_at_ms, _encode(key).decode())
    if (yield from one("insert_key", *values)) is None:
        raise RevisionConflict(uid=key.id, revision=0)


def find(prefix: str) -> Transaction[ApiKey | None]:
    row = yield from one("find_key", prefix)
    return _decode(row) if row is not None else None


def list_all() -> Transaction[list[ApiKey]]:
    return [_decode(row) for row in (yield from rows("list_keys"))]


def _decode(row: Row) -> ApiKey:
    return replace(_key.decode(row[0]), revoked_at_ms=row[1], last_used_at_ms=row[2])
