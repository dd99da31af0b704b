"""How long this process's event loop stands still, over the length of a `with` block."""

import asyncio
from types import TracebackType
from typing import Self

#: Seconds between two moments at which the loop should run.
TICK_S = 0.5


class LoopLag:
    """Counts the seconds by which the loop comes too late: blocked by a computation, stopped, short of a processor.

    What others sent meanwhile was not read, and deadlines ran out all the same.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._late_s = 0.0
        self._timer = self._plan()

    @property
    def seconds(self) -> float:
        """The sum until now, or until the end of the block."""
        if self._timer.cancelled():
            return self._late_s
        return self._late_s + max(0.0, self._loop.time() - self._timer.when())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._late_s = self.seconds
        self._timer.cancel()

    def _plan(self) -> asyncio.TimerHandle:
        return self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._late_s = self.seconds
        self._timer = self._plan()
