"""How builders tell what they are doing: one event per step or per amount done, for progress bars and logs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec


class ProgressEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a build, and how far it is."""

    #: What happens, for people: "Downloading the kernel". The same text until the next step begins.
    step: str
    #: Bytes done and to do; None: unknown.
    done_bytes: int | None = None
    total_bytes: int | None = None
    #: Result of a step, or what the tool says at the moment; empty: nothing to add.
    detail: str = ""


Progress = Callable[[ProgressEvent], None]


def ignore_progress(event: ProgressEvent) -> None:
    """Take an event and do nothing."""
    del event


@asynccontextmanager
async def watched_bytes(
    progress: Progress, step: str, measure: Callable[[], int], total_bytes: int | None, interval_s: float = 0.25
) -> AsyncIterator[None]:
    """Report `measure()` (run in a thread) while the block runs, and once at its end."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(interval_s)
            progress(ProgressEvent(step=step, done_bytes=await asyncio.to_thread(measure), total_bytes=total_bytes))

    progress(ProgressEvent(step=step, done_bytes=0, total_bytes=total_bytes))
    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])
    done = await asyncio.to_thread(measure)
    progress(ProgressEvent(step=step, done_bytes=done, total_bytes=total_bytes))
