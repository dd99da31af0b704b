"""Making the disk of a stopped machine larger: raw by its length, qcow2 by its header. The guest's agent then grows the
file system (docs/guest-protocol.md, section 5).

A qcow2 overlay whose disk is larger than its backing file reads zeros behind the backing file's end (QEMU,
docs/interop/qcow2.txt). Its L1 table has room for 4 TiB in the cluster that it has from the start.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from pathlib import Path
from typing import Final, Literal

from fusevm.host.disk.qcow2 import CLUSTER
from fusevm.model.errors import BadField, Internal, NoSpace

_MIB: Final = 1 << 20
#: Offsets in the qcow2 header, big-endian: size of the disk, entries of the L1 table.
_MAGIC: Final = b"QFI\xfb"
_SIZE_AT: Final = 24
_SIZE_AND_L1 = struct.Struct(">QII")
#: One L1 entry covers this much; one cluster has this many entries.
_L1_COVERS: Final = CLUSTER // 8 * CLUSTER
_L1_ENTRIES: Final = CLUSTER // 8
#: Largest disk of either format.
MAX_BYTES: Final = _L1_ENTRIES * _L1_COVERS


async def grow_overlay(path: Path, kind: Literal["raw", "qcow2"], size_bytes: int) -> None:
    """Make the disk at least this large, rounded up to whole MiB. Idempotent; nothing shrinks. Raises NoSpace."""
    await asyncio.to_thread(_grow, path, kind, -(-size_bytes // _MIB) * _MIB)


def check_size(size_bytes: int) -> None:
    """Raise BadField for a disk that no format can have."""
    if size_bytes > MAX_BYTES:
        raise BadField(field="storage_bytes", problem=f"must be at most {MAX_BYTES}")


def _grow(path: Path, kind: str, size: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if kind == "raw":
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
        else:
            _grow_qcow2(fd, path, size)
        os.fsync(fd)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            stats = os.statvfs(path.parent)
            raise NoSpace(path=str(path.parent), needed=size, free=stats.f_bavail * stats.f_frsize) from e
        raise
    finally:
        os.close(fd)


def _grow_qcow2(fd: int, path: Path, size: int) -> None:
    head = os.pread(fd, _SIZE_AT + _SIZE_AND_L1.size, 0)
    if head[:4] != _MAGIC:
        raise Internal(problem=f"{path} is no qcow2 file")
    before, encryption, entries = _SIZE_AND_L1.unpack_from(head, _SIZE_AT)
    if before >= size:
        return
    needed = max(entries, -(-size // _L1_COVERS))
    if needed > _L1_ENTRIES:
        raise Internal(problem=f"{path}: a disk of {size} bytes needs a larger L1 table than there is")
    # One write within a sector: a crash leaves the old header or the new one.
    os.pwrite(fd, _SIZE_AND_L1.pack(size, encryption, needed), _SIZE_AT)
