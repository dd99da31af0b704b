"""Blank overlay disks: one empty ext4 file per size, made once, then copied sparsely or by reflink for each machine.

`<data>/blanks/<size in MiB>m.ext4`, read-only. Sparse: a blank of many GiB takes a few MiB.
"""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from fusevm.host.images.ext4 import EPOCH_S
from fusevm.host.images.workspace import ensure_free, exclusive, sync_folder
from fusevm.host.run import run
from fusevm.model.errors import BadField

_MIB = 1 << 20
#: Smallest overlay with room for ext4's own tables.
MIN_BYTES = 16 * _MIB
_MAKE_TIMEOUT_S = 120
_NEEDED_BYTES = 256 * _MIB


async def ensure_blank(data: Path, size_bytes: int) -> Path:
    """Return the blank overlay of a size (rounded up to whole MiB), made when it is not there.

    Never write to it: copy it. The journal is small, inode tables are initialised on first use, every copy has the
    same UUID.
    """
    if size_bytes < MIN_BYTES:
        raise BadField(field="disk_bytes", problem=f"{size_bytes} is less than {MIN_BYTES}")
    size_mib = -(-size_bytes // _MIB)
    root = data / "blanks"
    path = root / f"{size_mib}m.ext4"
    if await asyncio.to_thread(path.is_file):
        return path
    async with exclusive(root, path.stem):
        if not await asyncio.to_thread(path.is_file):
            await _make(path, size_mib)
    return path


async def _make(path: Path, size_mib: int) -> None:
    await asyncio.to_thread(_sweep, path)
    await asyncio.to_thread(ensure_free, path.parent, _NEEDED_BYTES)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    words = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "fuse-overlay"]
    words += ["-J", "size=4", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"]
    words += [str(temporary), f"{size_mib}M"]
    try:
        await run(words, timeout_s=_MAKE_TIMEOUT_S, env={"E2FSPROGS_FAKE_TIME": str(EPOCH_S)})
        await asyncio.to_thread(_publish, temporary, path)
    finally:
        await asyncio.to_thread(temporary.unlink, missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what a killed maker of this size left; its lock is ours now."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    temporary.chmod(0o444)
    temporary.replace(path)
    sync_folder(path.parent)
