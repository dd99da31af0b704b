"""Working folders of builds: made, locked, and gone whatever happens.

A workspace is a folder `.build-<random>` beside the results, so that a result can be renamed into place. Its maker
holds a lock (flock) on it. One whose lock is free belonged to a process that was killed, and is swept by whoever
makes the next one. Named locks let two builds of one thing wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from fusevm.host.run import run
from fusevm.host.tasks import outlast
from fusevm.model.errors import BadSetting, CommandFailed, NoSpace

T = TypeVar("T")

PREFIX = ".build-"
_LOCK = ".lock"
_LOCK_POLL_S = 0.1


@asynccontextmanager
async def workspace(root: Path, needed_bytes: int = 64 << 20) -> AsyncIterator[Path]:
    """Make an empty working folder below `root`, and remove it at the end, with all that is in it.

    Sweeps the folders of killed builds first. Raises NoSpace when there is less than `needed_bytes` left, or when the
    disk fills up meanwhile, for us or for a program.
    """
    folder, fd = await _finished(lambda: _make(root), _discard_made)
    try:
        await sweep(root)
        await asyncio.to_thread(ensure_free, folder, needed_bytes)
        yield folder
    except (OSError, CommandFailed) as e:
        if not _says_no_space(e):
            raise
        raise NoSpace(path=str(root), needed=needed_bytes, free=_free_bytes(root)) from e
    finally:
        os.close(fd)
        await _remove_tree(folder)


@asynccontextmanager
async def passing_folder(path: Path) -> AsyncIterator[Path]:
    """Use a folder of this user's as a root of workspaces: made when it is missing, gone with the last who uses it.

    Others may pass through it, not look into it. Raises BadSetting when the path is somebody else's.
    """
    fd = await _finished(lambda: _hold(path), lambda fd: _let_go(path, fd))
    try:
        yield path
    finally:
        await asyncio.to_thread(_let_go, path, fd)


@asynccontextmanager
async def exclusive(root: Path, name: str) -> AsyncIterator[None]:
    """Hold the lock `name` below `root` among processes and tasks, waiting for its holder; death frees it."""
    fd = await _finished(lambda: _open_lock(root / f".lock-{name}"), os.close)
    try:
        while not _try_lock(fd):  # noqa: ASYNC110 - another process holds it: there is no event to wait for
            await asyncio.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


async def _finished(make: Callable[[], T], undo: Callable[[T], None]) -> T:
    """Make something in a thread. The thread cannot be cancelled: what it makes for nobody is undone."""
    making = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        await outlast(making)
        if not making.cancelled() and making.exception() is None:
            undo(making.result())
        raise


@contextmanager
def brief_lock(root: Path) -> Iterator[None]:
    """Hold the folder's own lock for a change of milliseconds. Blocks: call it from a thread."""
    fd = _open_lock(root / _LOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def ensure_free(folder: Path, needed_bytes: int) -> None:
    """Raise NoSpace unless the file system of `folder` has `needed_bytes` left for us."""
    free = _free_bytes(folder)
    if free < needed_bytes:
        raise NoSpace(path=str(folder), needed=needed_bytes, free=free)


def _free_bytes(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def write_durably(path: Path, data: bytes, mode: int = 0o444, *, is_alone: bool = False) -> None:
    """Write a whole file so that after a crash there is either the old one or the new one.

    `is_alone`: nobody else writes it now, so that what killed writers have left beside it is removed.
    """
    for left in path.parent.glob(f".{path.name}.*.tmp") if is_alone else ():
        left.unlink(missing_ok=True)
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


def publish_folder(source: Path, target: Path, is_whole: Callable[[Path], bool]) -> None:
    """Rename a finished folder into its place, durably.

    One that is there already stays if `is_whole` says so (machines may be using it), and is replaced if not.
    """
    for path in source.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    sync_folder(source)
    with brief_lock(target.parent):
        if target.is_dir():
            if is_whole(target):
                return
            discard_folder(target)
        source.rename(target)
    sync_folder(target.parent)


def discard_folder(target: Path) -> None:
    """Remove a published folder: renamed first, so that nobody finds half of it. The caller holds the brief lock."""
    doomed = target.with_name(f"{PREFIX}removed-{secrets.token_hex(6)}")
    target.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _says_no_space(error: OSError | CommandFailed) -> bool:
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    return os.strerror(errno.ENOSPC) in error.stderr or os.strerror(errno.EDQUOT) in error.stderr


def _open_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _hold(path: Path) -> int:
    """Make the folder ours as long as the descriptor is open."""
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o711)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its last user has just removed it
        except OSError as e:
            raise BadSetting(setting=str(path), problem=f"it is no folder of yours ({e.strerror}); remove it") from e
        try:
            _check_owner(path, fd)
            fcntl.flock(fd, fcntl.LOCK_SH)
            if _is_at(path, fd):
                os.fchmod(fd, 0o711)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _check_owner(path: Path, fd: int) -> None:
    if os.fstat(fd).st_uid != os.geteuid():
        raise BadSetting(setting=str(path), problem="it belongs to another user; remove it")


def _let_go(path: Path, fd: int) -> None:
    """Remove the folder unless somebody else holds it, or a killed build has left something in it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if {entry.name for entry in path.iterdir()} <= {_LOCK}:
            (path / _LOCK).unlink(missing_ok=True)
            path.rmdir()
    except (BlockingIOError, FileNotFoundError):
        return  # somebody else's to remove, or removed by hand
    finally:
        os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _make(root: Path) -> tuple[Path, int]:
    with brief_lock(root):  # no sweeper sees the folder before its lock is held
        folder = root / f"{PREFIX}{secrets.token_hex(6)}"
        folder.mkdir(mode=0o755)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder, fd


def _discard_made(made: tuple[Path, int]) -> None:
    folder, fd = made
    folder.rmdir()
    os.close(fd)


async def sweep(root: Path) -> None:
    """Remove the working folders of killed builds below `root`."""
    for folder in await asyncio.to_thread(find_abandoned, root):
        await _remove_tree(folder)


def find_abandoned(root: Path) -> list[Path]:
    """The working folders below `root` that nobody works in any more."""
    found: list[Path] = []
    if not root.is_dir():
        return found
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
    if os.geteuid() == 0 or not await asyncio.to_thread(folder.exists):
        return
    # Without root, a Debian build leaves files of subordinate uids, which only its own user namespace can remove.
    await run(["mmdebstrap", "--unshare-helper", "rm", "-rf", folder], timeout_s=120, check=False)
    # That one, in turn, cannot remove the folders that are this user's own.
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
