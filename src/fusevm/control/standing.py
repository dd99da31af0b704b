"""Answers that last: whoever was let in may be let in no longer. A key is revoked or expires, a session ends.

Requests are checked by the gate, once. Streams, terminals, uploads and whatever is followed look again
here, every `keepalive_s` seconds, and end.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import NoReturn

import structlog

from fusevm.control.caller import Caller
from fusevm.control.keys import is_good
from fusevm.control.plane import Plane
from fusevm.model.errors import Error, Unauthorized

log = structlog.get_logger()


async def check_standing(plane: Plane, caller: Caller) -> None:
    """May a caller that was let in go on? A store that does not answer ends nothing. Raises Unauthorized."""
    now_ms = plane.clock.now_ms()
    if caller.ends_at_ms is not None and now_ms >= caller.ends_at_ms:
        raise Unauthorized(problem="The session has ended")
    if not caller.key_id:
        return
    try:
        key = await plane.store.find_key(caller.key_prefix)
    except Error as error:
        log.warning("standing_unknown", key=caller.key_id, problem=error.message)
        return
    if key is None or key.id != caller.key_id or not is_good(key, now_ms):
        raise Unauthorized(problem="The key was revoked or has expired")


async def keep_checking(plane: Plane, caller: Caller) -> NoReturn:
    """Look again and again. Raises Unauthorized."""
    while True:
        await asyncio.sleep(plane.config.keepalive_s)
        await check_standing(plane, caller)


async def while_standing(plane: Plane, caller: Caller, messages: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """Pass messages on, of which one comes every `keepalive_s` seconds at least; end when the caller may not go on."""
    loop = asyncio.get_running_loop()
    checked_s = loop.time()
    async with aclosing(messages):
        async for message in messages:
            if loop.time() - checked_s >= plane.config.keepalive_s:
                try:
                    await check_standing(plane, caller)
                except Unauthorized as ended:
                    log.info("stream_ended", key=caller.key_id, problem=ended.message)
                    return
                checked_s = loop.time()
            yield message
