"""Pages of lists: their size, and opaque cursors."""

import base64
import binascii
import json
from typing import Any

from fusevm.control.call import Call
from fusevm.model.errors import BadField
from fusevm.wire import rest


def page_limit(call: Call) -> int:
    """The page size; what cannot be read means the default, as in the contract."""
    asked = call.text("limit")
    number = int(asked) if asked.isdecimal() else 0
    return min(number, rest.PAGE_MAX) if number > 0 else rest.PAGE_DEFAULT


def render_cursor(after: str) -> str:
    """An opaque cursor."""
    return base64.urlsafe_b64encode(json.dumps({"after": after}).encode()).decode().rstrip("=")


def parse_cursor(text: str) -> str:
    """What a cursor stands for; empty for none. Raises BadField."""
    if not text:
        return ""
    try:
        value: Any = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
        after = value["after"]
    except (binascii.Error, ValueError, KeyError, TypeError) as error:
        raise BadField(field="cursor", problem="this is no cursor of ours; take next_cursor as it is") from error
    if not isinstance(after, str):
        raise BadField(field="cursor", problem="this is no cursor of ours; take next_cursor as it is")
    return after
