"""qcow2 as bytes, without a process: an empty overlay, a packed disk, and where the content of either is.

Version 3, 64 KiB clusters. Layout (QEMU, docs/interop/qcow2.txt) of an overlay: cluster 0 header, 1 refcount table, 2
first refcount block, from 3 the L1 table, all of it zeros: every read goes to the raw backing file. A packed disk has
no backing file; behind the same tables come the L2 tables and then the clusters that hold data, in their order.

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

| bits of an L1 or L2 entry | meaning |
|---|---|
| 9 to 55 | offset in the file; 0: not there |
| 0 (L2) | reads as zeros |
| 62 (L2) | compressed, which neither we nor QEMU by itself write |
| 63 | refcount is one |
"""

import os
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

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
_MAX_L1: Final = 1 << 22
_VERSION: Final = 3
_L2_ENTRIES: Final = CLUSTER // 8
#: Clusters that one block of 16-bit refcounts covers.
_REFCOUNTS: Final = CLUSTER // 2
_OFFSET: Final = (1 << 56) - (1 << 9)
_ZERO: Final = 1
_COMPRESSED: Final = 1 << 62
_COPIED: Final = 1 << 63
#: Behind every file there can be: Linux has offsets below 2**63, and more is no number for pread(2).
_BEYOND: Final = 1 << 62
#: Bytes by which the map of used clusters grows: 4 GiB of the file.
_TAKEN_STEP: Final = 1 << 13


class QcowDamaged(Exception):
    """A qcow2 file that cannot be read, or uses what neither we nor QEMU by itself write."""


class Run(NamedTuple):
    """Clusters in a row."""

    #: Number of the first one on the disk.
    first: int
    length: int


class Piece(NamedTuple):
    """Where a range of the disk is: in the file at `offset`, or nowhere (`offset` 0), which reads as zeros."""

    at: int
    length: int
    offset: int


def render_overlay(size_bytes: int, backing: str) -> bytes:
    """Return a qcow2 file of a disk whose every byte is that of the raw file `backing` (an absolute path)."""
    name = backing.encode()
    if len(name) > _MAX_NAME:
        raise ValueError(f"a backing file's name has at most {_MAX_NAME} bytes, not {len(name)}")
    _check_size(size_bytes)
    l1_entries = -(-size_bytes // _L1_COVERS)
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    extensions = _BACKING_FORMAT.pack(_FORMAT_EXTENSION, 3, b"raw") + _END_OF_EXTENSIONS
    header = _pack_header(size_bytes, l1_entries, 3 * CLUSTER, name=name, extensions=extensions)
    refcounts = b"\x00\x01" * (3 + l1_clusters)
    clusters = (header, struct.pack(">Q", 2 * CLUSTER), refcounts, *[b""] * l1_clusters)
    return b"".join(_fill(cluster, 1) for cluster in clusters)


def render_head(size_bytes: int, runs: Sequence[Run]) -> bytes:
    """Return everything of a packed disk but its data: what follows are the clusters of `runs`, one behind the other.

    `runs` ascend and do not touch. A last cluster beyond the disk's end is filled up with zeros.
    """
    _check_size(size_bytes)
    l1_entries = -(-size_bytes // _L1_COVERS)
    tables = sorted({table for run in runs for table in _tables_of(run)})
    data = sum(run.length for run in runs)
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    fixed = 2 + l1_clusters + len(tables) + data
    blocks = 1
    while -(-(fixed + blocks) // _REFCOUNTS) > blocks:
        blocks += 1
    l1_at, l2_at = 2 + blocks, 2 + blocks + l1_clusters
    extensions = _END_OF_EXTENSIONS
    header = _pack_header(size_bytes, l1_entries, l1_at * CLUSTER, name=b"", extensions=extensions)
    table = b"".join(struct.pack(">Q", (2 + block) * CLUSTER) for block in range(blocks))
    refcounts = b"\x00\x01" * (fixed + blocks)
    l1 = bytearray(l1_clusters * CLUSTER)
    for place, number in enumerate(tables):
        struct.pack_into(">Q", l1, number * 8, (l2_at + place) * CLUSTER | _COPIED)
    l2 = _render_l2(tables, runs, first_data=l2_at + len(tables))
    return _fill(header, 1) + _fill(table, 1) + _fill(refcounts, blocks) + bytes(l1) + l2


def read_size(fd: int) -> int:
    """Return the size of the disk in a qcow2 file. Raises QcowDamaged."""
    return _read_header(fd)[0]


def read_backing(fd: int) -> str:
    """Return what the file names as its backing file; empty when it has none. Raises QcowDamaged."""
    _read_header(fd)
    offset, length = struct.unpack(">QI", os.pread(fd, 12, 8))
    if not offset:
        return ""
    name = _pread(fd, min(length, _MAX_NAME), offset)
    if length > _MAX_NAME or len(name) < length:
        raise QcowDamaged("the name of its backing file is cut off")
    return name.decode(errors="replace")


def read_pieces(fd: int, size_bytes: int) -> Iterator[Piece]:
    """Yield every range that does not come from a backing file, ascending; the file is not trusted.

    No two ranges are at the same place of the file: together they hold no more data than it does. Of a disk that is
    being written to a cluster may be seen in its old and its new place, which is QcowDamaged as well. The backing file
    that the header names is nobody's business: who opens the file knows it. Raises QcowDamaged, also when the disk has
    another size.
    """
    size, l1_offset, l1_entries = _read_header(fd)
    if size != size_bytes:
        raise QcowDamaged(f"it is a disk of {size} bytes instead of {size_bytes}")
    l1 = _read_table(fd, l1_offset, l1_entries)
    taken = _Taken()
    for at in range(l1_offset, l1_offset + l1_entries * 8, CLUSTER):
        taken.add(at)
    for number, entry in enumerate(l1):
        offset = entry & _OFFSET
        if offset:
            yield from _read_l2(fd, offset, number * _L1_COVERS, size_bytes, taken)


class _Taken:
    """Clusters of the file that belong to something, a bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, offset: int) -> None:
        """Raises QcowDamaged for one that belongs to something else."""
        if offset >= MAX_BYTES:
            raise QcowDamaged(f"it has a cluster at {offset}")
        byte, bit = divmod(offset // CLUSTER, 8)
        if byte >= len(self._bits):
            self._bits += bytes(byte + _TAKEN_STEP - len(self._bits))
        if self._bits[byte] >> bit & 1:
            raise QcowDamaged(f"the cluster at {offset} is used twice")
        self._bits[byte] |= 1 << bit


def _read_l2(fd: int, offset: int, start: int, size_bytes: int, taken: _Taken) -> Iterator[Piece]:
    covered = -(-(min(size_bytes, start + _L1_COVERS) - start) // CLUSTER)
    table = _read_table(fd, offset, covered)
    taken.add(offset)
    end = os.fstat(fd).st_size  # after the table: the file may grow
    pending: Piece | None = None
    for index, entry in enumerate(table):
        if entry & _COMPRESSED:
            raise QcowDamaged("it has compressed clusters")
        at = start + index * CLUSTER
        place = 0 if entry & _ZERO else entry & _OFFSET
        if not place and not entry & _ZERO:
            continue
        if place % CLUSTER:
            raise QcowDamaged(f"cluster {at // CLUSTER} is at {place}")
        if place >= end:
            place = 0  # nothing is there, which reads as zeros
        elif place:
            taken.add(place)
        if pending is not None and pending.at + pending.length == at and _goes_on(pending, place):
            pending = pending._replace(length=pending.length + CLUSTER)
            continue
        if pending is not None:
            yield pending
        pending = Piece(at, CLUSTER, place)
    if pending is not None:
        yield pending._replace(length=min(pending.length, size_bytes - pending.at))


def _goes_on(piece: Piece, place: int) -> bool:
    """Does the cluster at `place` follow the piece in the file, too?"""
    return place == (piece.offset + piece.length if piece.offset else 0)


def _read_header(fd: int) -> tuple[int, int, int]:
    """Size of the disk; offset and length of the L1 table."""
    head = os.pread(fd, _HEADER.size, 0)
    if len(head) < _HEADER.size:
        raise QcowDamaged("it is too short")
    magic, version, _, _, bits, size, crypt, l1_entries, l1_offset, *_, incompatible, _, _, _, _ = _HEADER.unpack(head)
    if magic != b"QFI\xfb" or version != _VERSION or bits != _CLUSTER_BITS or crypt:
        raise QcowDamaged("it is no qcow2 file of version 3 with clusters of 64 KiB")
    # A dirty file has lazy refcounts, which nobody turns on; of the others we read none.
    if incompatible:
        raise QcowDamaged(f"it needs the features {incompatible:#x}")
    if not 0 < size <= MAX_BYTES or l1_entries < -(-size // _L1_COVERS) or l1_entries > _MAX_L1 or l1_offset % CLUSTER:
        raise QcowDamaged("its header contradicts itself")
    return size, l1_offset, -(-size // _L1_COVERS)


def _read_table(fd: int, offset: int, entries: int) -> tuple[int, ...]:
    if offset % CLUSTER:
        raise QcowDamaged(f"a table is at {offset}")
    table = _pread(fd, entries * 8, offset)
    if len(table) < entries * 8:
        raise QcowDamaged("a table is cut off")
    return struct.unpack(f">{entries}Q", table)


def _pread(fd: int, length: int, offset: int) -> bytes:
    """As pread(2), for an offset that the file itself has told: nothing is there beyond its end."""
    return os.pread(fd, length, offset) if offset < _BEYOND else b""


def _tables_of(run: Run) -> range:
    return range(run.first // _L2_ENTRIES, (run.first + run.length - 1) // _L2_ENTRIES + 1)


def _render_l2(tables: Sequence[int], runs: Sequence[Run], first_data: int) -> bytes:
    place = {number: index * CLUSTER for index, number in enumerate(tables)}
    out, data = bytearray(len(tables) * CLUSTER), first_data
    for run in runs:
        for cluster in range(run.first, run.first + run.length):
            at = place[cluster // _L2_ENTRIES] + cluster % _L2_ENTRIES * 8
            struct.pack_into(">Q", out, at, data * CLUSTER | _COPIED)
            data += 1
    return bytes(out)


def _pack_header(size_bytes: int, l1_entries: int, l1_offset: int, *, name: bytes, extensions: bytes) -> bytes:
    header = _HEADER.pack(
        b"QFI\xfb",
        _VERSION,
        _HEADER.size + len(extensions) if name else 0,
        len(name),
        _CLUSTER_BITS,
        size_bytes,
        0,
        l1_entries,
        l1_offset,
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
    return header + extensions + name


def _check_size(size_bytes: int) -> None:
    if not 0 < size_bytes <= MAX_BYTES or size_bytes % 512:
        raise ValueError(f"a disk has a multiple of 512 bytes up to {MAX_BYTES}, not {size_bytes}")


def _fill(content: bytes, clusters: int) -> bytes:
    return content.ljust(clusters * CLUSTER, b"\0")
