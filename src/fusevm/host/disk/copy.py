"""Making one raw file equal to a disk, writing only what differs, so that it can be done twice.

The first time while the machine runs and writes: that moves nearly all bytes, though of no single moment. The second
time while its file system is frozen: then only what has changed meanwhile is written. Where the file system can share
blocks and the disk is a raw file, both are one ioctl. Holes and zeros take no room in the copy.

Owns: the target's content. Must not: know machines.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Final, Literal, NamedTuple, ParamSpec, TypeVar

import msgspec

from fusevm.host.disk.qcow2 import CLUSTER, Piece, read_pieces
from fusevm.host.tasks import outlast

P = ParamSpec("P")
T = TypeVar("T")

#: ioctl_ficlone(2): share all blocks of another file.
_FICLONE: Final = 0x40049409
#: What a file system that cannot share blocks answers (another file system, no support, holes of odd sizes).
_NO_REFLINK: Final = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})
_CHUNK: Final = 1 << 20
_ZEROS: Final = bytes(_CHUNK)
#: fallocate(2): FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE.
_PUNCH: Final = 0x03


class DiskImage(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's disk as it lies there."""

    path: Path
    format: Literal["raw", "qcow2"]
    #: What the guest sees.
    size_bytes: int
    #: Raw file that a qcow2 disk's other bytes come from; as we know it, not as the disk says. None: zeros.
    backing: Path | None = None


class CopyStopped(Exception):
    """The copy was not finished: it was cancelled, or its time was over."""


class Stop:
    """Whether a copy that runs in a thread shall go on."""

    def __init__(self, limit_s: float | None = None) -> None:
        self._deadline = None if limit_s is None else time.monotonic() + limit_s
        self._asked = Event()

    def ask(self) -> None:
        """Let the copy end at its next chunk."""
        self._asked.set()

    def check(self) -> None:
        """Raise CopyStopped when it is time."""
        if self._asked.is_set() or (self._deadline is not None and time.monotonic() > self._deadline):
            raise CopyStopped


class _Extent(NamedTuple):
    """A range that may hold data: `length` bytes of the disk from `at` on are in the file `fd` from `source` on."""

    at: int
    length: int
    fd: int
    source: int


async def copy_disk(disk: DiskImage, target: Path, stop: Stop) -> bool:
    """Make `target` a raw copy of the disk, sparse; True when it shares the disk's blocks instead.

    Can be repeated. Cancelled: the thread has ended when this raises. Raises CopyStopped, QcowDamaged, OSError.
    """
    return await run_in_thread(stop, _copy, disk, target, stop)


async def run_in_thread(stop: Stop, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work that looks at `stop`; cancelled, it is asked to end, and has ended when this raises."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.ask()
        await outlast(work)
        raise


def share_blocks(source: int, target: int) -> bool:
    """Let one open file have the blocks of another; False where the file system cannot. Raises OSError."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as e:
        if e.errno in _NO_REFLINK:
            return False
        raise
    return True


def data_ranges(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what is not a hole, within bounds."""
    at = start
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # holes up to the end
                return
            raise
        if at >= end:
            return
        hole = min(os.lseek(fd, at, os.SEEK_HOLE), end)
        yield at, hole - at
        at = hole


def copy_into(disk: DiskImage, source: int, target: int, stop: Stop) -> bool:
    """Do what `copy_disk` does, with open files, in the caller's thread."""
    stop.check()
    if disk.format == "raw" and share_blocks(source, target):
        return True
    os.ftruncate(target, disk.size_bytes)
    with ExitStack() as stack:
        if disk.format == "raw":
            extents = _of_raw(source, 0, disk.size_bytes)
        else:
            backing = _open(stack, disk.backing, os.O_RDONLY) if disk.backing is not None else None
            extents = _of_qcow2(source, backing, disk.size_bytes)
        _make_equal(extents, target, disk.size_bytes, stop)
    return False


def _copy(disk: DiskImage, target: Path, stop: Stop) -> bool:
    with ExitStack() as stack:
        source = _open(stack, disk.path, os.O_RDONLY)
        return copy_into(disk, source, _open(stack, target, os.O_RDWR | os.O_CREAT), stop)


def _open(stack: ExitStack, path: Path, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    stack.callback(os.close, fd)
    return fd


def _of_raw(fd: int, start: int, end: int) -> Iterator[_Extent]:
    for at, count in data_ranges(fd, start, end):
        yield _Extent(at, count, fd, at)


def _of_qcow2(fd: int, backing: int | None, size: int) -> Iterator[_Extent]:
    """What the overlay has is its own, the rest is the backing file's as far as that goes."""
    behind = 0 if backing is None else os.fstat(backing).st_size
    done = 0
    for piece in chain(read_pieces(fd, size), [Piece(size, 0, 0)]):
        if backing is not None:
            yield from _of_raw(backing, done, min(piece.at, behind))
        if piece.offset:
            yield _Extent(piece.at, piece.length, fd, piece.offset)
        done = piece.at + piece.length


def _make_equal(extents: Iterator[_Extent], out: int, size: int, stop: Stop) -> None:
    done = 0
    for extent in extents:
        _clear(out, done, extent.at, stop)
        _copy_extent(extent, out, stop)
        done = extent.at + extent.length
    _clear(out, done, size, stop)


def _copy_extent(extent: _Extent, out: int, stop: Stop) -> None:
    for start in range(0, extent.length, _CHUNK):
        stop.check()
        count = min(_CHUNK, extent.length - start)
        # A cluster at the end of a qcow2 file may be cut off: what is not there are zeros.
        wanted = os.pread(extent.fd, count, extent.source + start).ljust(count, b"\0")
        if wanted != os.pread(out, count, extent.at + start):
            _write(out, extent.at + start, wanted)


def _write(out: int, at: int, wanted: bytes) -> None:
    """Write a chunk; whole clusters of zeros become holes."""
    start = 0
    while start < len(wanted):
        end = min(len(wanted), start + CLUSTER - (at + start) % CLUSTER)
        piece = wanted[start:end]
        if piece == _ZEROS[: len(piece)]:
            _punch(out, at + start, len(piece))
        else:
            _write_all(out, at + start, piece)
        start = end


def _write_all(out: int, at: int, data: bytes) -> None:
    while data:
        done = os.pwrite(out, data, at)
        data, at = data[done:], at + done


def _clear(out: int, start: int, end: int, stop: Stop) -> None:
    """Make a range of the target read as zeros; nothing is written where it does."""
    for at, count in list(data_ranges(out, start, end)):
        stop.check()
        _punch(out, at, count)


def _punch(out: int, at: int, count: int) -> None:
    if _fallocate(out, _PUNCH, at, count) == 0:
        return
    problem = ctypes.get_errno()
    if problem != errno.EOPNOTSUPP:
        raise OSError(problem, os.strerror(problem))
    for start in range(0, count, _CHUNK):
        _write_all(out, at + start, _ZEROS[: min(_CHUNK, count - start)])


def _fallocate(fd: int, mode: int, at: int, count: int) -> int:
    return int(_LIBC.fallocate(fd, mode, ctypes.c_int64(at), ctypes.c_int64(count)))


_LIBC: Final = ctypes.CDLL(None, use_errno=True)
