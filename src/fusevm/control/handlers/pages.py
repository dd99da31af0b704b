"""Pages of lists: their size, and opaque cursors."""

import base64
import binascii

import msgspec

from fusevm.control.call import MAX_DIGITS, Call
from fusevm.model.errors import BadField
from fusevm.wire import rest

_encode = msgspec.json.Encoder().encode


class _Cursor(msgspec.Struct, forbid_unknown_fields=True):
    """Nothing within it nests, so no text, however deep, is read far."""

    after: str


def page_limit(call: Call) -> int:
    """The page size; what cannot be read means the default, as in the contract."""
    asked = call.text("limit")
    number = int(asked) if asked.isdecimal() and len(asked) <= MAX_DIGITS else 0
    return min(number, rest.PAGE_MAX) if number > 0 else rest.PAGE_DEFAULT


def render_cursor(after: str) -> str:
    """An opaque cursor."""
    return base64.urlsafe_b64encode(_encode(_Cursor(after))).decode().rstrip("=")


def parse_cursor(text: str) -> str:
    """What a cursor stands for; empty for none. Raises BadField."""
    if not text:
        return ""
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(content, type=_Cursor).after
    except (binascii.Error, ValueError) as error:
        raise BadField(field="cursor", problem="this is no cursor of ours; take next_cursor as it is") from error
