"""An empty qcow2 overlay as bytes: no process has to be started to make one.

Version 3, 64 KiB clusters, a raw backing file. Layout (QEMU, docs/interop/qcow2.txt): cluster 0 header, 1 refcount
table, 2 first refcount block, from 3 the L1 table, all of it zeros: every read goes to the backing file.

| offset | size | header field (big-endian) |
|---|---|---|
| 0 | 4 | magic `QFI\\xfb` |
| 4 | 4 | version, 3 |
| 8 | 8 + 4 | offset and length of the backing file's name |
| 20 | 4 | log2 of the cluster size |
| 24 | 8 | size of the disk in bytes |
| 32 | 4 | encryption, 0 |
| 36 | 4 + 8 | entries and offset of the L1 table |
| 48 | 8 + 4 | offset and clusters of the refcount table |
| 60 | 4 + 8 | snapshots, 0 |
| 72 | 8 + 8 + 8 | incompatible, compatible and autoclear features, 0 |
| 96 | 4 + 4 | log2 of the refcount bits, 4; length of the header, 104 |
| 104 | 8 + n | extension: type 0xE2792ACA, length, `raw`; then an end marker |
"""

import struct
from typing import Final

CLUSTER: Final = 1 << 16
_CLUSTER_BITS: Final = 16
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_REFCOUNT_BITS_LOG2: Final = 4
_BACKING_FORMAT = struct.Struct(">II8s")
_FORMAT_EXTENSION: Final = 0xE2792ACA
_END_OF_EXTENSIONS: Final = bytes(8)
_MAX_NAME: Final = 1023
#: One L1 entry covers a table of 8192 clusters.
_L1_COVERS: Final = CLUSTER // 8 * CLUSTER
#: So that one refcount block covers all tables: 4096 L1 clusters would be 16 PiB.
MAX_BYTES: Final = 64 << 40


def render_overlay(size_bytes: int, backing: str) -> bytes:
    """Return a qcow2 file of a disk whose every byte is that of the raw file `backing` (an absolute path)."""
    name = backing.encode()
    if len(name) > _MAX_NAME:
        raise ValueError(f"a backing file's name has at most {_MAX_NAME} bytes, not {len(name)}")
    if not 0 < size_bytes <= MAX_BYTES or size_bytes % 512:
        raise ValueError(f"a disk has a multiple of 512 bytes up to {MAX_BYTES}, not {size_bytes}")
    l1_entries = -(-size_bytes // _L1_COVERS)
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    extensions = _BACKING_FORMAT.pack(_FORMAT_EXTENSION, 3, b"raw") + _END_OF_EXTENSIONS
    header = _HEADER.pack(
        b"QFI\xfb",
        3,
        _HEADER.size + len(extensions),
        len(name),
        _CLUSTER_BITS,
        size_bytes,
        0,
        l1_entries,
        3 * CLUSTER,
        CLUSTER,
        1,
        0,
        0,
        0,
        0,
        0,
        _REFCOUNT_BITS_LOG2,
        _HEADER.size,
    )
    refcounts = b"\x00\x01" * (3 + l1_clusters)
    clusters = (header + extensions + name, struct.pack(">Q", 2 * CLUSTER), refcounts, *[b""] * l1_clusters)
    return b"".join(cluster.ljust(CLUSTER, b"\0") for cluster in clusters)
