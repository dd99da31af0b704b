"""Mounts below our directories. There are none in ordinary life; one that a crash or somebody else has left there must
be gone before a directory is removed: what is mounted is not ours.

Owns: finding and detaching. Must not: mount.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

_MOUNTINFO = Path("/proc/self/mountinfo")
#: linux/fs.h: gone from the tree at once, from the kernel when nobody uses it any more; never through a link.
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_OCTAL = re.compile(r"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


def find_mounts(root: Path) -> list[Path]:
    """Mount points at and below a directory, the deepest first."""
    points = [_point(line) for line in _MOUNTINFO.read_text().splitlines()]
    return sorted((point for point in points if point.is_relative_to(root)), key=lambda point: -len(point.parts))


def detach(point: Path) -> None:
    """Take one mount off its place, in use or not. Raises OSError."""
    if _libc.umount2(os.fsencode(point), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(point))


def detach_below(root: Path) -> int:
    """Detach everything at and below a directory; return how many there were. Raises OSError."""
    points = find_mounts(root)
    for point in points:
        detach(point)
    return len(points)


def _point(line: str) -> Path:
    """The fifth field of a line (proc(5)); blanks and the like are written in octal."""
    return Path(_OCTAL.sub(lambda found: chr(int(found.group(1), 8)), line.split()[4]))
