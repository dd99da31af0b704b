"""Two small shapes of concurrency: work that something may stop, and clean-up that does not give up half-way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, Generic, TypeVar

import structlog

T = TypeVar("T")
U = TypeVar("U")

log = structlog.get_logger()

#: Longest that one clean-up step may take; a process to kill, a folder to remove.
CLEAN_UP_TIMEOUT_S = 30.0


class Stopped(Exception, Generic[U]):
    """What was to stop the work came first; the work was cancelled and has ended."""

    def __init__(self, value: U) -> None:
        super().__init__("stopped")
        self.value = value


async def run_unless(stop: Coroutine[Any, Any, U], work: Coroutine[Any, Any, T]) -> T:
    """Run `work` and return its value, unless `stop` returns first: then raise Stopped with its value.

    Both have ended when this returns or raises, however it does. If they end together, the work counts.
    """
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop)
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Stopped(stopping.result())
    finally:
        await _end(working, stopping)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait for their end, also when cancelled again meanwhile."""
    for task in tasks:
        task.cancel()
    was_cancelled = False
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            was_cancelled = True
    for task in tasks:
        if not task.cancelled():
            task.exception()  # whoever is interested has read it
    if was_cancelled:
        raise asyncio.CancelledError


class CleanUp:
    """Undo steps, collected as resources appear and run newest first, unless `keep_all` is called.

    A step that fails is noted and does not keep the others from running.
    """

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        #: What could not be undone, as sentences.
        self.problems: list[str] = []

    def push(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """Add a step; `what` names it in notes."""
        self._stack.push_async_callback(self._run, what, step)

    def keep_all(self) -> None:
        """Nothing is to be undone any more."""
        self._stack.pop_all()

    async def run(self, blame: BaseException) -> None:
        """Undo everything; failures become notes of `blame`."""
        await self._stack.aclose()
        for problem in self.problems:
            blame.add_note(f"while cleaning up: {problem}")

    async def _run(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(CLEAN_UP_TIMEOUT_S):
                await step()
        except Exception as e:  # noqa: BLE001 - recorded as a note; the other steps must run
            problem = str(e) or type(e).__name__
            log.warning("clean_up_failed", what=what, problem=problem)
            self.problems.append(f"{what}: {problem}")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run work that others depend on to its end; a caller that is cancelled meanwhile is so only after it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await outlast(task)
        raise


async def outlast(work: asyncio.Future[Any]) -> None:
    """Wait for the end of what cannot be cancelled, whatever it brings, and however often the caller is."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({work})
    if not work.cancelled():
        work.exception()  # nobody else may ask for it


async def run_all(*work: Coroutine[Any, Any, Any]) -> None:
    """Run all at the same time; the first failure cancels the others and is raised, theirs are its notes."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as failures:
        first, *others = _leaves(failures)
        for other in others:
            first.add_note(f"also: {str(other) or type(other).__name__}")
        raise first from None


async def gather_all(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Run all at the same time and return their values in order; the first failure cancels the others and is raised."""
    tasks: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise _leaves(failures)[0] from None
    return [task.result() for task in tasks]


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]
