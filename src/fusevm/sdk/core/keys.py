"""Calls about API keys."""

from fusevm.model.errors import NotFound
from fusevm.sdk.core.exchange import Call, Request, Retry, get, json_reader, make_target, post, read_nothing
from fusevm.wire.rest_keys import CreateKey, KeyList, NewKey


def create_key(wanted: CreateKey, *, key: str) -> Call[NewKey]:
    """Make a key; its text is in this answer and nowhere else. Safe to repeat by the Idempotency-Key `key`."""
    request = post(make_target("api-keys"), wanted, key=key)
    return Call(request=request, read=json_reader(NewKey), retry=Retry.ALWAYS)


def list_keys() -> Call[KeyList]:
    """All keys, without their texts."""
    return get(make_target("api-keys"), KeyList)


def revoke_key(key_id: str) -> Call[None]:
    """Refuse a key from now on. Safe to repeat."""
    request = Request(method="DELETE", target=make_target("api-keys", key_id))
    return Call(request=request, read=read_nothing, retry=Retry.ALWAYS, done_by=(NotFound,))
