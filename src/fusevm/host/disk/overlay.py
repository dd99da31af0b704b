"""The private writable disk of a machine, on top of a blank file system of its size that all machines share.

A raw copy that shares the blank's blocks where the file system can (reflink); else a qcow2 file whose backing file is
the blank, for QEMU, or a sparse raw copy, for a VMM that knows only raw. Creating one writes next to nothing.
The blank is never written to and must outlive its qcow2 overlays.
"""

import asyncio
import errno
import fcntl
import os
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

import msgspec

from fusevm.host.disk.qcow2 import render_overlay
from fusevm.model.errors import NoSpace

#: ioctl_ficlone(2): share all blocks of another file.
_FICLONE: Final = 0x40049409
#: What a file system that cannot share blocks answers (another file system, no support, holes of odd sizes).
_NO_REFLINK: Final = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})
_BLOCK: Final = 512
_COPY_BYTES: Final = 1 << 22


class Method(StrEnum):
    """How an overlay is made."""

    REFLINK = "reflink"
    QCOW2 = "qcow2"
    SPARSE_COPY = "sparse-copy"


class Overlay(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's disk."""

    path: Path
    format: Literal["raw", "qcow2"]
    method: Method
    #: What the guest sees.
    size_bytes: int


async def create_overlay(
    blank: Path,
    path: Path,
    *,
    without_reflink: Literal[Method.QCOW2, Method.SPARSE_COPY] = Method.QCOW2,
    uid: int | None = None,
    gid: int | None = None,
) -> Overlay:
    """Make an overlay of a blank's size at `path`, which must not exist; its owner gets mode 0600.

    Reflink if the file system can, else the other method. Nothing is left on failure. Raises NoSpace, OSError.
    """
    return await asyncio.to_thread(_create, blank, path, without_reflink, uid, gid)


async def sync_overlay(path: Path) -> None:
    """Make all that a stopped machine has written survive a crash of the host, also what its guest has not synced."""
    await asyncio.to_thread(_sync, path)


def allocated_bytes(path: Path) -> int:
    """Return what a file really takes of its disk; 0 when it does not exist.

    Blocks shared by reflink count for every file that shares them.
    """
    try:
        return path.stat().st_blocks * _BLOCK
    except FileNotFoundError:
        return 0


def _create(
    blank: Path,
    path: Path,
    without_reflink: Literal[Method.QCOW2, Method.SPARSE_COPY],
    uid: int | None,
    gid: int | None,
) -> Overlay:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    source = os.open(blank, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(source).st_size
        target = os.open(path, flags, 0o600)
        try:
            method = _fill(source, target, blank, size, without_reflink)
            if uid is not None or gid is not None:
                os.fchown(target, -1 if uid is None else uid, -1 if gid is None else gid)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(target)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(path=str(path.parent), needed=allocated_bytes(blank), free=_free_bytes(path.parent)) from e
        raise
    finally:
        os.close(source)
    kind: Literal["raw", "qcow2"] = "qcow2" if method is Method.QCOW2 else "raw"
    return Overlay(path=path, format=kind, method=method, size_bytes=size)


def _fill(
    source: int, target: int, blank: Path, size: int, without_reflink: Literal[Method.QCOW2, Method.SPARSE_COPY]
) -> Method:
    if _reflink(source, target):
        return Method.REFLINK
    if without_reflink is Method.QCOW2:
        data = render_overlay(size, str(blank.absolute()))
        if os.write(target, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        _copy_sparsely(source, target, size)
    return without_reflink


def _reflink(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as e:
        if e.errno in _NO_REFLINK:
            return False
        raise
    return True


def _copy_sparsely(source: int, target: int, size: int) -> None:
    """Copy what is not a hole."""
    os.ftruncate(target, size)
    at = 0
    while True:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # holes up to the end
                return
            raise
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            at += _copy_range(source, target, at, min(end - at, _COPY_BYTES))


def _copy_range(source: int, target: int, at: int, count: int) -> int:
    done = os.pwrite(target, os.pread(source, count, at), at)
    if done == 0:
        raise OSError(errno.EIO, "the blank became shorter while it was copied")
    return done


def _free_bytes(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
