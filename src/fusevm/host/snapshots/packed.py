"""A raw disk read as if it were a packed qcow2 file: nothing is stored twice, and holes are neither hashed nor sent.

The head (`disk.qcow2.render_head`) follows from where the data is; behind it come the clusters that hold any.

Owns: an open file. Must not: write.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Final, Self

import msgspec

from fusevm.host.disk.copy import data_ranges
from fusevm.host.disk.qcow2 import CLUSTER, Run, render_head

_CHUNK: Final = 1 << 20


class PackedDisk:
    """An open packed disk. Blocking; `close` it."""

    def __init__(self, fd: int, disk_bytes: int, runs: list[Run]) -> None:
        self._fd = fd
        self.disk_bytes = disk_bytes
        self._runs = runs
        self._head = render_head(disk_bytes, runs)
        #: Clusters of data before each run.
        self._before = list(accumulate((run.length for run in runs), initial=0))
        #: Bytes of the packed file.
        self.size = len(self._head) + self._before[-1] * CLUSTER

    @classmethod
    def open(cls, disk: Path, layout: bytes) -> Self:
        """Open the raw disk that `find_runs` looked at. Raises OSError."""
        runs = msgspec.json.decode(layout, type=list[Run])
        fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return cls(fd, os.fstat(fd).st_size, runs)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on; fewer only at the end."""
        parts: list[bytes] = []
        while count > 0 and offset < self.size:
            part = self._read_some(offset, count)
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        """A range in pieces."""
        for offset in range(start, end, _CHUNK):
            yield self.read(offset, min(_CHUNK, end - offset))

    def _read_some(self, offset: int, count: int) -> bytes:
        if offset < len(self._head):
            return self._head[offset : offset + count]
        cluster, within = divmod(offset - len(self._head), CLUSTER)
        index = bisect_right(self._before, cluster) - 1
        run = self._runs[index]
        skipped = (cluster - self._before[index]) * CLUSTER + within
        count = min(count, run.length * CLUSTER - skipped)
        # The last cluster of a disk may be cut off.
        return os.pread(self._fd, count, run.first * CLUSTER + skipped).ljust(count, b"\0")


def find_runs(disk: Path) -> list[Run]:
    """Find the clusters of a raw disk that hold data, by its holes."""
    fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    runs: list[Run] = []
    try:
        for at, length in data_ranges(fd, 0, os.fstat(fd).st_size):
            first, end = at // CLUSTER, -(-(at + length) // CLUSTER)
            if runs and first <= runs[-1].first + runs[-1].length:
                runs[-1] = Run(runs[-1].first, max(end, runs[-1].first + runs[-1].length) - runs[-1].first)
            else:
                runs.append(Run(first, end - first))
    finally:
        os.close(fd)
    return runs
