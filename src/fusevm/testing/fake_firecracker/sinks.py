"""Where a process writes: files and named pipes that nobody may be reading, and a serial port with a limit."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any


def open_sink(path: Path) -> int:
    """Open a log, made if absent; writing never blocks. A pipe is opened for both directions: nobody has to read."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)


class Serial:
    """The serial port's output, by a token bucket: what exceeds it is dropped."""

    def __init__(self, descriptor: int, limit: dict[str, Any] | None) -> None:
        self._descriptor = descriptor
        self._limit = limit or {}
        self._size = self._limit.get("size", 0)
        self._tokens = float(self._size)
        self._burst = self._limit.get("one_time_burst", 0)
        self._refilled = time.monotonic()

    def write(self, data: bytes) -> None:
        """Write what the bucket and the reader allow."""
        if self._size:
            now = time.monotonic()
            per_s = self._size / self._limit["refill_time"] * 1000
            self._tokens = min(self._size, self._tokens + (now - self._refilled) * per_s)
            self._refilled = now
            data = data[: int(self._tokens) + self._burst]
            self._burst -= min(self._burst, len(data))
            self._tokens = max(0.0, self._tokens - len(data))
        with contextlib.suppress(OSError):
            os.write(self._descriptor, data)
