"""The wall clock, as a part that tests replace, and the database's. Durations of waits use the event loop's own."""

import asyncio
import time
from collections.abc import Awaitable, Callable
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


class DatabaseClock:
    """The database's time, by which all replicas decide: their own clocks differ and jump.

    A steady clock carries it on from one reading to the next. Before the first it is the machine's time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead_ms = clock.now_ms() - clock.steady_ms()

    def now_ms(self) -> int:
        return self._clock.steady_ms() + self._ahead_ms

    def steady_ms(self) -> int:
        return self._clock.steady_ms()

    async def sleep_until(self, at_ms: int) -> None:
        await self._clock.sleep_until(self._clock.now_ms() + at_ms - self.now_ms())

    async def follow(self, read: Callable[[], Awaitable[int]]) -> None:
        """Read the database's time. The answer was true at some moment between question and arrival, and what is
        within that span stays as it is. Afterwards this clock is not behind the answer."""
        asked_ms = self.steady_ms()
        read_ms = await read()
        steady_ms = self.steady_ms()
        now_ms = min(max(self.now_ms(), read_ms), read_ms + steady_ms - asked_ms)
        self._ahead_ms = now_ms - steady_ms
