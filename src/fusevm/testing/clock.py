"""A clock that stands still until a test moves it."""

import asyncio
import heapq
import itertools

#: 2026-01-01T00:00:00Z.
START_MS = 1_767_225_600_000


class FakeClock:
    """Implements `control.clock.Clock`. Sleepers wake when `advance` reaches them, in order of their times."""

    def __init__(self, now_ms: int = START_MS) -> None:
        self._now_ms = now_ms
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def now_ms(self) -> int:
        """The time as the test left it."""
        return self._now_ms

    def steady_ms(self) -> int:
        """The same: nobody sets this clock back."""
        return self._now_ms

    async def sleep_until(self, at_ms: int) -> None:
        """Return when `advance` has come that far."""
        if at_ms <= self._now_ms:
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (at_ms, next(self._numbers), woken))
        await woken

    def advance(self, milliseconds: int) -> None:
        """Move on and wake whoever waits for a time up to the new one."""
        self._now_ms += milliseconds
        while self._sleepers and self._sleepers[0][0] <= self._now_ms:
            _, _, woken = heapq.heappop(self._sleepers)
            if not woken.done():
                woken.set_result(None)
