"""Use keeps an environment awake: noted at the beginning, during and at the end of every command and session.

Only environments with an idle timeout are noted; nothing is written for the others.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from fusevm.control.plane import Plane
from fusevm.core.use import NOTES_PER_TIMEOUT
from fusevm.model.environment import Environment
from fusevm.model.errors import Error
from fusevm.model.event import ActivitySeen

log = structlog.get_logger()


@contextlib.asynccontextmanager
async def in_use(plane: Plane, env: Environment, cause: str) -> AsyncIterator[None]:
    """Keep `env` awake for the length of the block."""
    if not env.spec.idle_timeout_seconds:
        yield
        return
    # Not a TaskGroup: what the block raises must leave it as it is.
    noting = asyncio.ensure_future(_keep_noting(plane, env, cause))
    try:
        yield
    finally:
        noting.cancel()
        await asyncio.gather(noting, return_exceptions=True)
    await _note(plane, env, cause)


async def _keep_noting(plane: Plane, env: Environment, cause: str) -> None:
    while True:
        await _note(plane, env, cause)
        await asyncio.sleep(env.spec.idle_timeout_seconds / NOTES_PER_TIMEOUT)


async def _note(plane: Plane, env: Environment, cause: str) -> None:
    try:
        await plane.entry.feed(env.uid, ActivitySeen(cause=cause))
    except Error as error:
        log.warning("activity_not_noted", uid=env.uid, problem=error.message)
