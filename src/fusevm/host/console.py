"""Reading a machine's console log: its end, and what comes next.

The driver writes `console.log` and now and then renames it to `console.log.1` (`vmm.console`). A follower reads what
is left of the renamed file before it opens the new one.

Owns: nothing. Must not: write.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

_CHUNK = 64 << 10
#: How often a follower looks for more.
_POLL_S = 0.2


async def read_console(
    path: Path, *, tail_bytes: int, follow: bool, is_live: Callable[[], bool]
) -> AsyncIterator[bytes]:
    """Yield the last `tail_bytes`, then with `follow` whatever is written until `is_live()` is false."""
    log = _Log(path)
    try:
        for chunk in await asyncio.to_thread(log.tail, tail_bytes):
            yield chunk
        while follow:
            was_live = is_live()
            chunk = await asyncio.to_thread(log.more)
            if chunk:
                yield chunk
            elif was_live:
                await asyncio.sleep(_POLL_S)
            else:
                return
    finally:
        log.close()


def left_out(path: Path, tail_bytes: int) -> int:
    """How many bytes there are before the last `tail_bytes`."""
    return max(0, sum(map(_size, (path.with_name(path.name + ".1"), path))) - tail_bytes)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class _Log:
    """An open log and where we are in it. Blocking."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO | None = None

    def tail(self, limit: int) -> list[bytes]:
        """The last bytes of predecessor and log; what comes next is for `more`."""
        older = _last(self._path.with_name(self._path.name + ".1"), limit)
        self._open()
        newest = b""
        if self._file is not None:
            size = os.fstat(self._file.fileno()).st_size
            self._file.seek(max(0, size - limit))
            newest = self._file.read(limit) or b""
        older = older[len(older) - max(0, limit - len(newest)) :] if len(newest) < limit else b""
        whole = older + newest
        return [whole[start : start + _CHUNK] for start in range(0, len(whole), _CHUNK)]

    def more(self) -> bytes:
        """What was written since; empty when there is nothing."""
        if self._file is None:
            self._open()
        if self._file is None:
            return b""
        chunk = self._file.read(_CHUNK) or b""
        if not chunk and self._is_replaced():
            self.close()
            self._open()
            chunk = (self._file.read(_CHUNK) or b"") if self._file is not None else b""
        return chunk

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        try:
            self._file = self._path.open("rb", buffering=0)
        except FileNotFoundError:
            self._file = None

    def _is_replaced(self) -> bool:
        if self._file is None:
            return False
        try:
            return self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False


def _last(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
            return file.read(limit)
    except FileNotFoundError:
        return b""
