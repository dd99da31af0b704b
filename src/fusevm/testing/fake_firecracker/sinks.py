"""Where a process writes: files and named pipes that nobody may be reading, and a serial port with a limit."""

import contextlib
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

#: Levels of the logger, loudest last.
LEVELS: Final = ("Off", "Error", "Warning", "Info", "Debug", "Trace")
_SHORT: Final = {"Error": "ERROR", "Warning": "WARN", "Info": "INFO", "Debug": "DEBUG", "Trace": "TRACE"}


def open_sink(path: Path) -> int:
    """Open a log, made if absent; writing never blocks. A pipe is opened for both directions: nobody has to read."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)


class Log:
    """The logger: nothing before it is configured."""

    def __init__(self, instance_id: str) -> None:
        self._id = instance_id
        self._descriptor = -1
        self._level = "Info"

    def open(self, path: Path, level: str) -> None:
        """Write there from now on, what is at least of this level."""
        self._descriptor = open_sink(path)
        self._level = level

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def write(self, level: str, text: str) -> None:
        """Write a line; a full pipe loses it."""
        if self._descriptor >= 0 and LEVELS.index(level) <= LEVELS.index(self._level):
            moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
            with contextlib.suppress(OSError):
                os.write(self._descriptor, f"{moment}.000000000 [{self._id}:main:{_SHORT[level]}] {text}\n".encode())


class Counts:
    """The metrics: each line has what has been counted since the one before."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._since: Counter[tuple[str, str]] = Counter()
        #: Every field that was ever counted appears in every line.
        self._known = {("logger", "missed_metrics_count"), ("seccomp", "num_faults"), ("vsock", "conns_added")}

    def open(self, path: Path) -> None:
        """Write there from now on."""
        self._descriptor = open_sink(path)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def add(self, section: str, field: str, amount: int = 1) -> None:
        """Count something."""
        self._known.add((section, field))
        self._since[section, field] += amount

    def flush(self) -> None:
        """Write a line and begin anew; one for which there is no room is lost, and counted."""
        if self._descriptor < 0:
            return
        line: dict[str, Any] = {"utc_timestamp_ms": time.time_ns() // 1_000_000}
        for section, field in sorted(self._known):
            line.setdefault(section, {})[field] = self._since[section, field]
        self._since.clear()
        try:
            os.write(self._descriptor, json.dumps(line).encode() + b"\n")
        except OSError:
            self.add("logger", "missed_metrics_count")


class Serial:
    """The serial port's output, by a token bucket: what exceeds it is dropped."""

    def __init__(self, descriptor: int, limit: dict[str, Any] | None, counts: Counts) -> None:
        self._descriptor = descriptor
        self._limit = limit or {}
        self._counts = counts
        self._size = self._limit.get("size", 0)
        self._tokens = float(self._size)
        self._burst = self._limit.get("one_time_burst", 0)
        self._refilled = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def write(self, data: bytes) -> None:
        """Write what the bucket and the reader allow."""
        if self._size:
            now = time.monotonic()
            per_s = self._size / self._limit["refill_time"] * 1000
            self._tokens = min(self._size, self._tokens + (now - self._refilled) * per_s)
            self._refilled = now
            allowed = int(self._tokens) + self._burst
            if len(data) > allowed:
                self._counts.add("uart", "rate_limiter_dropped_bytes", len(data) - allowed)
            data = data[:allowed]
            by_burst = min(self._burst, len(data))
            self._burst -= by_burst
            self._tokens -= len(data) - by_burst
        with contextlib.suppress(OSError):
            os.write(self._descriptor, data)
