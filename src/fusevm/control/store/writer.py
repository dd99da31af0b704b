"""One thread that owns the only writing connection. Transactions that arrive together share one commit.

Jobs are functions over the connection. Each runs in a savepoint of its own, so that one that raises takes nothing of
its neighbours with it; the answers are given out after the commit. fsync (synchronous=FULL) is thus paid per batch.
"""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from fusevm.model.errors import ShuttingDown, StoreFull

T = TypeVar("T")
Job = Callable[[sqlite3.Connection], Any]
#: Jobs per commit.
MAX_BATCH = 256
_FULL_CODES = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})


class _Item(NamedTuple):
    job: Job
    answer: "asyncio.Future[Any]"
    is_read: bool
    after: Callable[[Any], None] | None


class _Outcome(NamedTuple):
    item: _Item
    value: Any
    error: BaseException | None


class Writer:
    """Runs jobs one after another, in the order in which they were given."""

    def __init__(
        self, connect: Callable[[], sqlite3.Connection], on_batch: Callable[[int], None] | None = None
    ) -> None:
        """`connect` is called in the thread. Must be made on the event loop that awaits the answers, on which
        `on_batch` hears how many transactions shared a commit."""
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._connect = connect
        self._on_batch = on_batch
        self._is_closed = False
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, name="store-writer", daemon=True)

    async def open(self) -> None:
        """Start the thread and wait for its connection. Raises what `connect` raises."""
        self._thread.start()
        await self._opened

    async def run(self, job: Callable[[sqlite3.Connection], T], *, after: Callable[[T], None] | None = None) -> T:
        """Run a transaction; returns when it is durable. `after` is called with its value even if we are cancelled."""
        return await self._put(job, is_read=False, after=after)

    async def read(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run a query on the writing connection, between transactions."""
        return await self._put(job, is_read=True, after=None)

    async def close(self) -> None:
        """Finish what is queued, close the connection, end the thread. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._queue.put(None)
            if self._thread.ident is not None:
                await asyncio.to_thread(self._thread.join)

    async def _put(self, job: Callable[[sqlite3.Connection], T], *, is_read: bool, after: Any) -> T:
        if self._is_closed:
            raise ShuttingDown
        answer: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Item(job, answer, is_read, after))
        return await answer

    # -- in the thread --------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            connection = self._connect()
        except BaseException as error:  # noqa: BLE001 - handed to the opener, which raises it
            self._loop.call_soon_threadsafe(self._opened.set_exception, error)
            return
        self._loop.call_soon_threadsafe(self._opened.set_result, None)
        while batch := self._next_batch():
            outcomes = self._run_batch(connection, batch)
            self._loop.call_soon_threadsafe(self._finish, outcomes)
        connection.close()

    def _next_batch(self) -> list[_Item]:
        item = self._queue.get()
        batch: list[_Item] = []
        while item is not None:
            batch.append(item)
            if len(batch) >= MAX_BATCH or self._queue.empty():
                return batch
            item = self._queue.get()
        if batch:
            self._queue.put(None)
        return batch

    def _finish(self, outcomes: list[_Outcome]) -> None:
        """On the event loop: count, and give the answers out."""
        writes = sum(not outcome.item.is_read for outcome in outcomes)
        if writes and self._on_batch is not None:
            self._on_batch(writes)
        _deliver(outcomes)

    @staticmethod
    def _run_batch(connection: sqlite3.Connection, batch: list[_Item]) -> list[_Outcome]:
        writes = [item for item in batch if not item.is_read]
        outcomes = _transact(connection, writes) if writes else []
        return outcomes + [_attempt(connection, item) for item in batch if item.is_read]


def _transact(connection: sqlite3.Connection, items: list[_Item]) -> list[_Outcome]:
    """All in one commit; when that fails, all of them fail."""
    outcomes: list[_Outcome] = []
    try:
        connection.execute("begin immediate")
        outcomes.extend(_in_savepoint(connection, item) for item in items)
        connection.execute("commit")
    except (sqlite3.Error, StoreFull) as error:
        if connection.in_transaction:
            connection.execute("rollback")
        return [_Outcome(item, None, translate(error)) for item in items]
    return outcomes


def _in_savepoint(connection: sqlite3.Connection, item: _Item) -> _Outcome:
    connection.execute("savepoint job")
    outcome = _attempt(connection, item)
    if outcome.error is not None:
        if not connection.in_transaction:
            # SQLite has rolled everything back by itself (lang_transaction.html, section 3.1): the whole batch failed.
            lost = outcome.error
            raise lost if isinstance(lost, StoreFull) else StoreFull(problem=f"the transaction was undone: {lost}")
        connection.execute("rollback to job")
    connection.execute("release job")
    return outcome


def _attempt(connection: sqlite3.Connection, item: _Item) -> _Outcome:
    try:
        return _Outcome(item, item.job(connection), None)
    except sqlite3.Error as error:
        return _Outcome(item, None, translate(error))
    except Exception as error:  # noqa: BLE001 - the caller's own: it is raised where the job was given
        return _Outcome(item, None, error)


def _deliver(outcomes: list[_Outcome]) -> None:
    for item, value, error in outcomes:
        if error is None and item.after is not None:
            item.after(value)
        if item.answer.done():
            continue
        if error is not None:
            item.answer.set_exception(error)
        else:
            item.answer.set_result(value)


def translate(error: sqlite3.Error | StoreFull) -> Exception:
    """A database that cannot write is a clean 503; anything else stays what it is."""
    if isinstance(error, StoreFull):
        return StoreFull(problem=error.problem)
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return StoreFull(problem=str(error)) if code in _FULL_CODES else error
