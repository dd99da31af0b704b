"""What all open pages share: the environments and hosts as they are now, or why nothing can be learnt.

One event stream says when to look again; without events everything is read anew every few seconds. While no page is
open nothing is asked at all. Owns no state of its own: what it shows was read from the API.
"""

import asyncio
import contextlib
import random
from collections.abc import Iterator

import msgspec

from fusevm.model.errors import Error
from fusevm.sdk import AsyncFuse
from fusevm.wire.rest import EnvironmentBody, HostBody

#: Environments that are read at most; a page says so when there are more.
LIMIT = 1000
REFRESH_S = 5.0
#: Between two looks, however many events come.
PAUSE_S = 0.2
RETRY_S = 1.0


class Board(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the control plane."""

    #: Live ones, the oldest first, at most LIMIT.
    environments: tuple[EnvironmentBody, ...] = ()
    hosts: tuple[HostBody, ...] = ()
    #: There are more than LIMIT.
    is_cut: bool = False
    #: False until the first look that worked.
    is_known: bool = False
    #: Why the last look failed; what is shown is then the one before.
    problem: Error | None = None


class Feed:
    """Looks while somebody watches. `run` it in a task of its own."""

    def __init__(self, fuse: AsyncFuse) -> None:
        self._fuse = fuse
        self.board = Board()
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._watched = asyncio.Event()
        self._watchers = 0

    # -- for pages -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Keep looking within the block."""
        self._watchers += 1
        self._watched.set()
        self.refresh()
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._watched.clear()

    async def after(self, seen: Board | None) -> Board:
        """The present board, or the next one when that is the one seen."""
        while self.board is seen:
            await self._changed.wait()
        return self.board

    def refresh(self) -> None:
        """Look again soon."""
        self._wake.set()

    # -- the work ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look and listen until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_on())
            group.create_task(self._listen_on())

    async def _look_on(self) -> None:
        while True:
            await self._watched.wait()
            self._wake.clear()
            self._publish(await self._look())
            await asyncio.sleep(PAUSE_S)
            pause = RETRY_S if self.board.problem else REFRESH_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.8, 1.2)):  # noqa: S311 - spreads load, hides nothing
                    await self._wake.wait()

    async def _look(self) -> Board:
        try:
            hosts = [host async for host in self._fuse.hosts.list()]
            environments: list[EnvironmentBody] = []
            cursor = ""
            while len(environments) < LIMIT:
                page = await self._fuse.environments.page(limit=200, cursor=cursor)
                environments += page.environments
                cursor = page.next_cursor
                if not cursor:
                    break
        except Error as error:
            return msgspec.structs.replace(self.board, problem=error)
        return Board(environments=tuple(environments), hosts=tuple(hosts), is_cut=bool(cursor), is_known=True)

    def _publish(self, board: Board) -> None:
        self.board = board
        self._changed.set()
        self._changed = asyncio.Event()

    async def _listen_on(self) -> None:
        """Every event is a reason to look; so is the end of the stream."""
        while True:
            await self._watched.wait()
            with contextlib.suppress(Error):  # the look that follows says what is wrong
                async for _ in self._fuse.environments.events():
                    self.refresh()
            self.refresh()
            await asyncio.sleep(RETRY_S)
