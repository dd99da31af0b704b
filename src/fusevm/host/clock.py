"""The real clock and the real chance."""

from __future__ import annotations

import os
import time

from fusevm.host.process import boot_id
from fusevm.model.machine import Moment


def read_moment() -> Moment:
    """Now, by the clock that goes on while the host sleeps and begins anew when it boots (clock_gettime(2))."""
    return Moment(clock=boot_id(), ms=time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000)


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

    def moment(self) -> Moment:
        """For limits of orders."""
        return read_moment()

    def entropy(self, size: int) -> bytes:
        """Fresh random bytes from the kernel."""
        return os.urandom(size)
