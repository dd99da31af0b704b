"""The private writable disk of a machine, on top of a raw base: a blank file system that all machines of its size
share, or the disk of a snapshot.

A raw copy that shares the base's blocks where the file system can (reflink); else a qcow2 file whose backing file is
the base, for QEMU, or a sparse raw copy, for a VMM that knows only raw. Creating one writes next to nothing, but for
the last. The base is never written to and must outlive its qcow2 overlays.
"""

import asyncio
import errno
import os
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

import msgspec

from fusevm.host.disk.copy import DiskImage, Stop, copy_into, run_in_thread, share_blocks
from fusevm.host.disk.qcow2 import render_overlay
from fusevm.model.errors import NoSpace

_BLOCK: Final = 512


class Method(StrEnum):
    """How an overlay is made."""

    REFLINK = "reflink"
    QCOW2 = "qcow2"
    SPARSE_COPY = "sparse-copy"


#: For a file system that cannot share blocks: what QEMU reads, or what every VMM does.
WithoutReflink = Literal[Method.QCOW2, Method.SPARSE_COPY]


class Overlay(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's disk."""

    path: Path
    format: Literal["raw", "qcow2"]
    method: Method
    #: What the guest sees.
    size_bytes: int


async def create_overlay(
    base: Path,
    path: Path,
    *,
    size_bytes: int | None = None,
    without_reflink: WithoutReflink = Method.QCOW2,
    uid: int | None = None,
    gid: int | None = None,
) -> Overlay:
    """Make an overlay of a base's size, or a larger one, at `path`, which must not exist; its owner gets mode 0600.

    Reflink if the file system can, else the other method. Nothing is left on failure. Raises NoSpace, OSError.
    """
    stop = Stop()
    return await run_in_thread(stop, _create, base, path, size_bytes, without_reflink, uid, gid, stop)


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
    base: Path,
    path: Path,
    size_bytes: int | None,
    without_reflink: WithoutReflink,
    uid: int | None,
    gid: int | None,
    stop: Stop,
) -> Overlay:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    source = os.open(base, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = max(os.fstat(source).st_size, size_bytes or 0)
        target = os.open(path, flags, 0o600)
        try:
            method = _fill(source, target, base, size, without_reflink, stop)
            if uid is not None or gid is not None:
                os.fchown(target, -1 if uid is None else uid, -1 if gid is None else gid)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(target)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(path=str(path.parent), needed=allocated_bytes(base), free=_free_bytes(path.parent)) from e
        raise
    finally:
        os.close(source)
    kind: Literal["raw", "qcow2"] = "qcow2" if method is Method.QCOW2 else "raw"
    return Overlay(path=path, format=kind, method=method, size_bytes=size)


def _fill(
    source: int,
    target: int,
    base: Path,
    size: int,
    without_reflink: WithoutReflink,
    stop: Stop,
) -> Method:
    if share_blocks(source, target):
        os.ftruncate(target, size)
        return Method.REFLINK
    if without_reflink is Method.QCOW2:
        data = render_overlay(size, str(base.absolute()))
        if os.write(target, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        copy_into(DiskImage(path=base, format="raw", size_bytes=size), source, target, stop)
    return without_reflink


def _free_bytes(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
