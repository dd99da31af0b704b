"""An event loop whose time is virtual: when nothing is ready, the clock jumps to the next timer.

No thread, no socket, no real waiting. Everything in it happens in one order, which depends on nothing but what the
tasks do: timers of one moment run in the order in which they were set, and sets of tasks (asyncio keeps some) are
walked in the order in which the tasks were made.
"""

import asyncio
import itertools
from asyncio import base_events
from collections.abc import Coroutine, Generator
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")
#: Timers closer together than this are of one moment.
_RESOLUTION_S = 1e-6


class Deadlock(Exception):
    """Every task waits, and no timer is set."""


class _NumberedTask(asyncio.Task[Any]):
    """Its hash is its number, so that no order depends on where objects lie in memory."""

    def __init__(self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], number: int, **options: Any) -> None:
        self._number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(base_events.BaseEventLoop):
    """Implements the part of an event loop that programs without sockets, pipes and processes use."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._clock_resolution = _RESOLUTION_S
        self._selector = self
        self._numbers = itertools.count(1)
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def select(self, timeout: float | None) -> list[Any]:
        """Called by the loop where others wait for sockets. Raises Deadlock."""
        if timeout is None:
            raise Deadlock
        self._now_s += max(0.0, timeout)
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody has to be woken."""

    def _make_task(
        self,
        _loop: asyncio.AbstractEventLoop,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        context: Context | None = None,
    ) -> _NumberedTask:
        return _NumberedTask(coro, next(self._numbers), loop=self, context=context)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end on a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
