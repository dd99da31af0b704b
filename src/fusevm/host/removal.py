"""Removing directories that belong to somebody else: a machine's user may have made anything below them."""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import shutil
import stat
import time
from pathlib import Path

from fusevm.host.mounts import detach_below

_ATTEMPTS, _PAUSE_S = 50, 0.02


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, however deep. Idempotent; follows no links, enters no mount."""
    detach_below(path)
    for attempt in range(_ATTEMPTS):
        if not os.path.lexists(path):
            return
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            continue  # somebody else is removing it, too
        except NotADirectoryError:
            path.unlink(missing_ok=True)
        except RecursionError:
            _flatten(path)
        except OSError as e:
            # The thread of a task that was cancelled may still be writing its last file.
            if e.errno != errno.ENOTEMPTY or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_PAUSE_S)


def _flatten(path: Path) -> None:
    """Remove a directory by moving what is deep up to its top, so that neither paths nor recursion grow."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fresh = (f"{secrets.token_hex(8)}-{number}" for number in itertools.count())
    top = os.open(path, flags)
    try:
        while names := os.listdir(top):  # noqa: PTH208 - by descriptor
            for name in names:
                if not _is_directory(name, top):
                    os.unlink(name, dir_fd=top)
                    continue
                inner = os.open(name, flags, dir_fd=top)
                try:
                    for deeper in os.listdir(inner):  # noqa: PTH208
                        if _is_directory(deeper, inner):
                            os.rename(deeper, next(fresh), src_dir_fd=inner, dst_dir_fd=top)
                        else:
                            os.unlink(deeper, dir_fd=inner)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    path.rmdir()


def _is_directory(name: str, parent: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
