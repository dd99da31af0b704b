"""How errors look to people and programs: one line and a hint on stderr, an exit code that means something.

    0    all is well
    1    any other error
    2    wrong usage: bad flags, bad settings, a request that can never work
    3    not found
    4    conflict: exists already, wrong state, port or data directory in use
    5    unavailable: no server, no capacity, the machine did not start
    6    no or wrong token, not allowed
    7    timeout
    130  interrupted (Ctrl-C)
    141  whoever read our output has gone

`exec`, `run` and `shell` end with the command's own status.
"""

import json
import sys

from fusevm.model.errors import Error, Unauthorized
from fusevm.sdk.failures import ServerUnreachable
from fusevm.wire.exit_status import OTHER, UNAVAILABLE, USAGE, exit_status

__all__ = [
    "HINT_INDENT",
    "INTERRUPTED",
    "OTHER",
    "PIPE_CLOSED",
    "UNAVAILABLE",
    "USAGE",
    "CliError",
    "hint",
    "report",
    "report_error",
]

INTERRUPTED, PIPE_CLOSED = 130, 141
#: Before the second line of a report.
HINT_INDENT = " " * 6


class CliError(Exception):
    """A failure of the command itself: what happened, what to do, with which code to end."""

    def __init__(self, message: str, *, hint: str = "", code: int = OTHER) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code


def hint(error: Error) -> str:
    """What to do, where the message itself does not say it."""
    if isinstance(error, ServerUnreachable):
        return "start one with `fuse up`, or name another with --url or FUSE_BASE_URL"
    if isinstance(error, Unauthorized):
        return "`fuse up` prints the token; give it with --token or FUSE_TOKEN"
    if "record" in error.details:
        return "`fuse env events {id} --uid {uid}` tells what happened".format_map(error.details)
    return ""


def report(message: str, hint_text: str = "") -> None:
    """Tell the user on stderr."""
    print(f"fuse: {message}", file=sys.stderr)
    if hint_text:
        print(f"{HINT_INDENT}{hint_text}", file=sys.stderr)


def report_error(error: Error, *, is_json: bool) -> int:
    """Tell about an error, as text or as the API's JSON, and return the exit code."""
    code = exit_status(error)
    if is_json:
        body = {"code": error.code, "message": error.message, "details": error.details, "exit_code": code}
        print(json.dumps({"error": body}), file=sys.stderr)
        return code
    notes = getattr(error, "__notes__", [])
    report(error.message + (f" ({'; '.join(notes)})" if notes and error.code == "internal" else ""), hint(error))
    return code
