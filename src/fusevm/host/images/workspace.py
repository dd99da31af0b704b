"""Working folders of builds: made, locked, and gone whatever happens.

A workspace is a folder `.build-<random>` beside the results, so that a result can be renamed into place. Its maker
holds a lock (flock) on it. One whose lock is free belonged to a process that was killed, and is swept by whoever
makes the next one. Named locks let two builds of one thing wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from fusevm.host.run import run
from fusevm.model.errors import NoSpace

PREFIX = ".build-"
_LOCK_POLL_S = 0.1


@asynccontextmanager
async def workspace(root: Path) -> AsyncIterator[Path]:
    """Make an empty working folder below `root`, and remove it at the end, with all that is in it.

    Sweeps the folders of killed builds first.
    """
    folder, fd = await asyncio.to_thread(_make, root)
    try:
        await _sweep(root)
        yield folder
    finally:
        os.close(fd)
        await _remove_tree(folder)


@asynccontextmanager
async def exclusive(root: Path, name: str) -> AsyncIterator[None]:
    """Hold the lock `name` below `root`, among processes and tasks; waits for its holder. Freed by the kernel on death."""
    fd = await asyncio.to_thread(_open_lock, root / f".lock-{name}")
    try:
        while not _try_lock(fd):
            await asyncio.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


@contextmanager
def brief_lock(root: Path) -> Iterator[None]:
    """Hold the folder's own lock for a change of milliseconds. Blocks: call it from a thread."""
    fd = _open_lock(root / ".lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def ensure_free(folder: Path, needed_bytes: int) -> None:
    """Raise NoSpace unless the file system of `folder` has `needed_bytes` left for us."""
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if free < needed_bytes:
        raise NoSpace(path=str(folder), needed=needed_bytes, free=free)


def write_durably(path: Path, data: bytes, mode: int = 0o444) -> None:
    """Write a whole file so that after a crash there is either the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish_folder(source: Path, target: Path) -> None:
    """Rename a finished folder into its place, durably. An equal one that is there already wins."""
    for path in source.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    sync_folder(source)
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make(root: Path) -> tuple[Path, int]:
    with brief_lock(root):  # no sweeper sees the folder before its lock is held
        folder = root / f"{PREFIX}{secrets.token_hex(6)}"
        folder.mkdir(mode=0o755)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder, fd


async def _sweep(root: Path) -> None:
    for folder in await asyncio.to_thread(_abandoned, root):
        await _remove_tree(folder)


def _abandoned(root: Path) -> list[Path]:
    found = []
    with brief_lock(root):
        for folder in root.glob(f"{PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                if _try_lock(fd):
                    found.append(folder)
                os.close(fd)
    return found


async def _remove_tree(folder: Path) -> None:
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    if not folder.exists() or os.geteuid() == 0:
        return
    # Without root, a Debian build leaves files of subordinate uids, which only its own user namespace can remove.
    await run(["mmdebstrap", "--unshare-helper", "rm", "-rf", folder], timeout_s=120, check=False)
