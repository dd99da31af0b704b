"""One holder at a time for a name: flock(2) on a file in a folder where only our user makes files.

Not an abstract socket (unix(7)), which any user of the machine could bind first and keep.

Owns: the file; it goes with its holder, and a lock goes with the process, however that ends.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def name_lock(path: Path) -> Iterator[bool]:
    """Hold the lock while this is entered; False: another process does. Raises OSError."""
    with ExitStack() as stack:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if _is_still(path, fd):
                break
            # Its holder removed the file between our two calls: what we hold has no name any more.
            stack.close()
        stack.callback(path.unlink, missing_ok=True)  # before it is let go of
        yield True


def _is_still(path: Path, fd: int) -> bool:
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(fd))
