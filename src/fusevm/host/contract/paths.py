"""Paths of files/ops: relative to the workspace, or absolute within it. Pure.

Within is meant by name: what links of the guest lead to is the guest's, as in a shell.
"""

from __future__ import annotations

import posixpath

from fusevm.model.errors import BadField
from fusevm.wire.contract import WORKSPACE

_LONGEST = 4096
_FORBIDDEN = ("\0", "\r", "\n")


def resolve(path: str, field: str = "path") -> str:
    """The absolute path in the guest; empty and `.` mean the workspace. Raises BadField."""
    if any(character in path for character in _FORBIDDEN) or len(path.encode("utf-8", "surrogatepass")) > _LONGEST:
        raise BadField(field=field, problem=f"must be at most {_LONGEST} bytes, without NUL, CR and LF")
    if any("\ud800" <= character <= "\udfff" for character in path):
        raise BadField(field=field, problem="is no Unicode text: it has half a surrogate pair")
    absolute = posixpath.normpath(posixpath.join(WORKSPACE, path)).replace("//", "/")
    if absolute != WORKSPACE and not absolute.startswith(WORKSPACE + "/"):
        raise BadField(field=field, problem=f"{path[:200]!r} leads out of the workspace {WORKSPACE}")
    return absolute


def resolve_below(path: str, field: str = "path") -> str:
    """As `resolve`, but not the workspace itself, which is neither written, moved nor removed."""
    absolute = resolve(path, field)
    if absolute == WORKSPACE:
        raise BadField(field=field, problem="must name something in the workspace, not the workspace itself")
    return absolute


def relative(path: str) -> str:
    """A path of the guest as answers show it; the workspace is `.`. Whatever the guest says becomes some path."""
    return posixpath.relpath(posixpath.join(WORKSPACE, path), WORKSPACE)
