"""What the replicas tell each other, by NOTIFY and LISTEN on a connection of its own, which is made again when it is
lost.

Two things are told to the waker: the uid of a record that another replica committed, and that the global order of facts
shows more. The second is not the same moment: facts are shown only when no older transaction is under way, so after
every commit, ours included, the oldest running transaction is watched until it has passed.

Our own commits are told after the fact and several at once: a NOTIFY within the transactions would make all of the
server's commits wait for each other (it takes a lock until the commit is durable). A replica that dies in between has
told nothing; the others' next look finds it.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import structlog

from fusevm.control.store.protocol import EVERYTHING, GLOBAL_ORDER
from fusevm.control.store.sql import Dialect, load_queries

log = structlog.get_logger()
CHANNEL = "fuse_commits"
#: A silent connection is asked for a sign of life that often.
KEEPALIVE_S = 15.0
#: Looks at the oldest running transaction: first and longest pause. Commits that come closer together share a message
#: and a look.
FIRST_LOOK_S, LONGEST_LOOK_S = 0.01, 0.5
#: For the last message, when we close.
CLOSE_S = 1.0
#: Pauses between attempts to connect.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
_BOUNDS = load_queries(Dialect.POSTGRES)["transaction_bounds"]
_TELL = load_queries(Dialect.POSTGRES)["tell_commits"]
_FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
Connection = Any


class Hearing:
    """Listens until it is closed."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        self.waker: Callable[[str], None] = lambda _uid: None
        self._connect = connect
        self._pid = 0
        #: What the others do not know yet, in order.
        self._untold: dict[str, None] = {}
        self._is_closing = False
        self._heard = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Listen from now on. Raises what connecting raises."""
        connection = await self._begin()
        self._task = asyncio.get_running_loop().create_task(self._main(connection), name="store-hearing")

    async def close(self) -> None:
        """Tell what is untold, and stop. Idempotent."""
        self._is_closing = True
        self._heard.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CLOSE_S)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def tell(self, uid: str) -> None:
        """We have committed a record."""
        self._untold[uid] = None
        self._heard.set()

    async def _main(self, connection: Connection) -> None:
        while True:
            try:
                await self._follow(connection)
            except _FAILURES as error:
                log.warning("store_listener_lost", problem=str(error))
            finally:
                connection.terminate()
            if self._is_closing:
                return
            connection = await self._begin_again()
            self.waker(EVERYTHING)

    async def _begin_again(self) -> Connection:
        pause_s = FIRST_PAUSE_S
        while True:
            await asyncio.sleep(random.uniform(pause_s / 2, pause_s))  # noqa: S311 - no secret
            try:
                connection = await self._begin()
            except _FAILURES as error:
                log.warning("store_listener_not_connected", problem=str(error))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                log.info("store_listener_connected")
                return connection

    async def _begin(self) -> Connection:
        connection = await self._connect()
        try:
            connection.add_termination_listener(lambda _connection: self._heard.set())
            await connection.add_listener(CHANNEL, self._on_commit)
            self._pid = connection.get_server_pid()
        except BaseException:
            connection.terminate()
            raise
        return connection

    def _on_commit(self, _connection: Connection, pid: int, _channel: str, uid: str) -> None:
        if pid != self._pid:
            self._heard.set()
            self.waker(uid)

    async def _follow(self, connection: Connection) -> None:
        """Tell what we did, and when the global order shows more; ends with the connection, or when we close."""
        shown_below = wanted = 0
        pause_s = FIRST_LOOK_S
        while not connection.is_closed():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s if wanted else KEEPALIVE_S):
                    await self._heard.wait()
            has_news = self._heard.is_set()
            self._heard.clear()
            await self._tell_all(connection)
            if self._is_closing:
                return
            oldest, following = await connection.fetchrow(_BOUNDS)
            if has_news:
                wanted, pause_s = following, FIRST_LOOK_S
            if wanted and oldest > shown_below:
                shown_below = oldest
                self.waker(GLOBAL_ORDER)
            wanted = wanted if oldest < wanted else 0
            pause_s = min(2 * pause_s, LONGEST_LOOK_S)
            if has_news:
                await asyncio.sleep(FIRST_LOOK_S)

    async def _tell_all(self, connection: Connection) -> None:
        """What cannot be told now is told on the next connection."""
        untold, self._untold = self._untold, {}
        if untold:
            try:
                await connection.execute(_TELL, list(untold))
            except _FAILURES:
                self._untold = untold | self._untold
                raise
