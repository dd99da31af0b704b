"""The wall clock, as a part that tests replace. Durations of waits use the event loop's own clock."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time, and waits for it."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch. Called from any thread."""
        ...

    def steady_ms(self) -> int:
        """Milliseconds of a clock that nobody sets. Only differences mean something, and only within one process."""
        ...

    async def sleep_until(self, at_ms: int) -> None:
        """Return when the clock shows about that time, or later."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def steady_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    async def sleep_until(self, at_ms: int) -> None:
        left_ms = at_ms - self.now_ms()
        if left_ms > 0:
            await asyncio.sleep(left_ms / 1000)
