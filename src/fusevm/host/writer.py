"""One thread writes to a SQLite file; whoever waits in the meantime shares the next commit.

A transaction is a function of the connection, and has no other effect: it may run twice. When it returns, its writes
are on disk (`synchronous=FULL`). Functions of one batch are separated by savepoints: one that raises takes back only
its own writes.

Owns: the connection and its thread. Must not: know what is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from fusevm.host.faults import Fault
from fusevm.host.tasks import outlast

T = TypeVar("T")

#: Transactions per commit at most: bounds how long the first one waits for the others to run.
_BATCH = 64
_CLOSE_TIMEOUT_S = 10.0

#: SQLite's codes for a file system without room (sqlite.org/rescode.html). Writes of a WAL may fail with the second.
_FULL_CODES = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_SHMSIZE}
)


class DiskFull(Exception):
    """The commit had no room; nothing of the transaction was kept."""


class Superseded(Exception):
    """The intent that a write belongs to has been replaced (by a delete). Nothing was written."""


class _Job(Generic[T]):
    """One transaction on its way."""

    def __init__(self, transact: Callable[[sqlite3.Connection], T], point: str, on_commit: Callable[[T], None]) -> None:
        self.transact = transact
        self.point = point
        self.on_commit = on_commit
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[T] = self.loop.create_future()
        #: The thread takes a job only when it holds this; a cancelled waiter keeps it for ever.
        self.claim = threading.Lock()

    def succeed(self, value: T) -> None:
        """Hand over the outcome, from the thread."""
        self._later(lambda: self._succeed(value))

    def fail(self, error: BaseException) -> None:
        self._later(lambda: self.done.set_exception(error))

    def _succeed(self, value: T) -> None:
        try:
            self.on_commit(value)
        finally:
            self.done.set_result(value)

    def _later(self, call: Callable[[], None]) -> None:
        # A loop that was closed without waiting for its writes wants no answers.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(call)


class Writer:
    """The writing end of a database file."""

    def __init__(self, connection: sqlite3.Connection, fault: Fault) -> None:
        self._connection = connection
        self._fault = fault
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal-writer", daemon=True)
        self._thread.start()

    async def write(
        self,
        transact: Callable[[sqlite3.Connection], T],
        *,
        point: str = "",
        on_commit: Callable[[T], None] = lambda _value: None,
    ) -> T:
        """Run a transaction and return its value when it is on disk.

        `on_commit` is called in the event loop as soon as that is so, also when the waiter was cancelled meanwhile. A
        cancelled call either writes nothing, or has written and called `on_commit` before CancelledError is raised.
        Raises whatever `transact` raises, or DiskFull; then nothing was written.
        """
        job = _Job(transact, point, on_commit)
        self._jobs.put(job)
        try:
            return await asyncio.shield(job.done)
        except asyncio.CancelledError:
            if not job.claim.acquire(blocking=False):
                await outlast(job.done)  # milliseconds
            raise

    async def close(self) -> None:
        """Finish what is queued and close the connection."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, _CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, is_last = self._collect(job)
            if batch:
                self._commit(batch)
            if is_last:
                break
        self._connection.close()

    def _collect(self, first: _Job[Any]) -> tuple[list[_Job[Any]], bool]:
        batch = [first] if first.claim.acquire(blocking=False) else []
        while len(batch) < _BATCH:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return batch, True
            if job.claim.acquire(blocking=False):
                batch.append(job)
        return batch, False

    def _commit(self, batch: list[_Job[Any]]) -> None:
        try:
            outcomes = self._transact(batch)
        except sqlite3.Error as error:
            self._roll_back()
            if len(batch) > 1:
                # Whose fault it was is unknown: everyone gets a commit of their own.
                for job in batch:
                    self._commit([job])
                return
            batch[0].fail(_translate(error))
            return
        for job, outcome in outcomes:
            if isinstance(outcome, _Raised):
                job.fail(outcome.error)
            else:
                self._fault.reached(job.point)
                job.succeed(outcome)

    def _transact(self, batch: list[_Job[Any]]) -> list[tuple[_Job[Any], Any]]:
        outcomes: list[tuple[_Job[Any], Any]] = []
        self._connection.execute("BEGIN IMMEDIATE")
        for job in batch:
            self._connection.execute("SAVEPOINT job")
            try:
                outcome = job.transact(self._connection)
                self._fault.reached(job.point + ".writing")
            except sqlite3.OperationalError:
                raise
            except Exception as error:  # noqa: BLE001 - handed to whoever asked for the write
                self._connection.execute("ROLLBACK TO job")
                outcome = _Raised(error)
            self._connection.execute("RELEASE job")
            outcomes.append((job, outcome))
        self._connection.execute("COMMIT")
        return outcomes

    def _roll_back(self) -> None:
        # A full disk may have rolled back already.
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


class _Raised:
    """An exception as an outcome."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _translate(error: sqlite3.Error) -> Exception:
    if getattr(error, "sqlite_errorcode", 0) in _FULL_CODES:
        full = DiskFull(str(error))
        full.__cause__ = error
        return full
    return error
