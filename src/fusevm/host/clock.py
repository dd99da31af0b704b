"""The real clock and the real chance."""

from __future__ import annotations

import os
import time


class SystemClock:
    """Implements `surroundings.Clock`."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def now_ns(self) -> int:
        """Nanoseconds since the epoch."""
        return time.time_ns()

    def monotonic_ms(self) -> float:
        """For durations."""
        return time.monotonic_ns() / 1_000_000

    def entropy(self, size: int) -> bytes:
        """Fresh random bytes from the kernel."""
        return os.urandom(size)
