"""Did whoever used a disk last take leave of it in order? Read from ext4's superblock, in a raw file or in a qcow2.

A guest that shuts down makes its disks read-only first, and ext4 then takes the mark off that its journal must be
replayed. One whose VMM was killed leaves the mark. The guest writes the disk: what is read here is its word, good for
telling people, never for more.

| offset in the disk | size | field (little-endian; kernel, Documentation/filesystems/ext4/super.rst) |
|---|---|---|
| 1024 + 0x38 | 2 | magic 0xEF53 |
| 1024 + 0x3a | 2 | state, bit 0: cleanly unmounted |
| 1024 + 0x60 | 4 | incompatible features, bit 2: the journal needs recovery |

The first 2 KiB of a qcow2's disk are in its first cluster: entry 0 of the table that entry 0 of the L1 table names
(`disk.qcow2` has the header).
"""

import struct
from pathlib import Path
from typing import BinaryIO, Final, Literal

_SUPERBLOCK: Final = 1024
_MAGIC: Final = 0xEF53
_STATE = struct.Struct("<HH")
_STATE_AT, _INCOMPATIBLE_AT = 0x38, 0x60
_CLEAN, _NEEDS_RECOVERY = 1, 4
_QCOW2: Final = b"QFI\xfb"
_L1_OFFSET_AT: Final = 40
#: Bits 9 to 55 of a table's entry are an offset; bit 62 says that the cluster is compressed.
_OFFSET_MASK, _COMPRESSED = 0x00FF_FFFF_FFFF_FE00, 1 << 62


def is_cleanly_left(path: Path, kind: Literal["raw", "qcow2"]) -> bool | None:
    """Tell whether the disk's file system was left in order; None when that cannot be read. Blocking."""
    try:
        with path.open("rb") as file:
            start = 0 if kind == "raw" else _first_cluster(file)
            if start is None:
                return None
            file.seek(start + _SUPERBLOCK)
            block = file.read(_SUPERBLOCK)
            magic, state = _STATE.unpack_from(block, _STATE_AT)
            (features,) = struct.unpack_from("<I", block, _INCOMPATIBLE_AT)
    except (OSError, ValueError, struct.error):  # ValueError: an offset that is none of any file
        return None
    if magic != _MAGIC:
        return None
    return bool(state & _CLEAN) and not features & _NEEDS_RECOVERY


def _first_cluster(file: BinaryIO) -> int | None:
    """Where the first cluster of a qcow2's disk is; None when nobody has written it."""
    header = file.read(_L1_OFFSET_AT + 8)
    if header[:4] != _QCOW2:
        return None
    (l1_table,) = struct.unpack_from(">Q", header, _L1_OFFSET_AT)
    l2_table = _entry(file, l1_table)
    return _entry(file, l2_table) if l2_table else None


def _entry(file: BinaryIO, table: int) -> int | None:
    file.seek(table)
    (entry,) = struct.unpack(">Q", file.read(8))
    return None if entry & _COMPRESSED else (entry & _OFFSET_MASK) or None
