"""Errors as exit statuses of programs: the same for `fuse`, `python -m fusevm.control` and `python -m fusevm.host`.

docs/cli.md has the table for people.
"""

from fusevm.model.errors import Error

OTHER, USAGE, NOT_FOUND, CONFLICT, UNAVAILABLE, AUTH, TIMEOUT = 1, 2, 3, 4, 5, 6, 7

_BY_CODE = {
    "invalid_argument": USAGE,
    "payload_too_large": USAGE,
    "not_found": NOT_FOUND,
    "route_not_found": NOT_FOUND,
    "conflict": CONFLICT,
    "unavailable": UNAVAILABLE,
    "rate_limited": UNAVAILABLE,
    "unauthorized": AUTH,
    "forbidden": AUTH,
    "timeout": TIMEOUT,
}


def exit_status(error: Error) -> int:
    """The exit status of an error."""
    return _BY_CODE.get(error.code, OTHER)
