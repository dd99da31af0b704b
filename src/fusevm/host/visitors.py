"""Who visits the disk of a machine at rest: the order to open it, shared by all who come while it is open.

Owns: who is inside, and how long. Must not: start or end VMMs (`host.visit` does).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fusevm.host.channel import AgentClient
from fusevm.host.order import Order
from fusevm.host.tasks import Stopped, run_unless

#: How long it goes on after the last has left: the next operation mostly comes at once.
LINGER_S = 5.0
#: The longest visit: whoever is still inside then is cut off.
LONGEST_S = 600.0


class Visit(Order):
    """The order to bring a stopped machine's agent up, and those who want it."""

    def __init__(self) -> None:
        super().__init__()
        self._agent: asyncio.Future[AgentClient] = asyncio.get_running_loop().create_future()
        self._inside = 0
        self._has_changed = asyncio.Event()
        #: May somebody else still come in?
        self.is_open = True

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[AgentClient]:
        """The agent, for as long as this is held. Raises why there is none."""
        self._inside += 1
        try:
            yield await asyncio.shield(self._agent)
        finally:
            self._inside -= 1
            self._has_changed.set()

    def fail(self, error: BaseException) -> None:
        """There will be no agent, or no longer."""
        self.is_open = False
        super().fail(error)
        if not self._agent.done():
            self._agent.set_exception(error)
            self._agent.exception()

    async def receive(self, agent: AgentClient, wait_other: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Let people in until nobody comes any more, or `wait_other` returns (another order waits)."""
        self._agent.set_result(agent)
        try:
            async with asyncio.timeout(LONGEST_S) as limit:
                try:
                    await run_unless(wait_other(), self._wait_deserted())
                except Stopped:
                    self.is_open = False
                    await self._wait_empty()
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            self.is_open = False

    async def _wait_deserted(self) -> None:
        """Nobody has been inside for a while; closes in the same moment."""
        while True:
            await self._wait_empty()
            try:
                async with asyncio.timeout(LINGER_S):
                    await self._wait_change()
            except TimeoutError:
                if self._inside == 0:
                    self.is_open = False
                    return

    async def _wait_empty(self) -> None:
        while self._inside > 0:
            await self._wait_change()

    async def _wait_change(self) -> None:
        self._has_changed.clear()
        await self._has_changed.wait()
