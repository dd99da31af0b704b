"""SQLite: one file (or memory, for development), WAL, synchronous=FULL, one process per file."""

import asyncio
import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from fusevm.control.store.location import MEMORY
from fusevm.control.store.measured import Meter, measured
from fusevm.control.store.migrate import Opened, open_database
from fusevm.control.store.sql import Dialect, load_queries
from fusevm.control.store.sql_store import SqlStore
from fusevm.control.store.statements import Begin, Statement, Transaction
from fusevm.control.store.writer import Writer, translate
from fusevm.core.policy import Policy
from fusevm.model.errors import BadSetting, DataRootInUse, StoreFull

T = TypeVar("T")
READERS = 2
_BUSY_MS = 5_000
_SQL = load_queries(Dialect.SQLITE)


class FileLock:
    """An advisory lock that says who holds it. Ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        """Raises DataRootInUse."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise DataRootInUse(path=str(path), pid=holder or "unknown") from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have it."""
        os.close(self._fd)


def drive(connection: sqlite3.Connection, transaction: Transaction[T]) -> T:
    """Carry a transaction's statements out on a connection; beginning and ending it is the caller's part."""
    try:
        statement = next(transaction)
        while True:
            statement = transaction.send(execute(connection, statement))
    except StopIteration as done:
        result: T = done.value
        return result


def execute(connection: sqlite3.Connection, statement: Statement) -> list[Any]:
    """All rows of one statement."""
    text = _SQL[statement.name] + statement.tail if statement.name else statement.tail
    values = {str(number): value for number, value in enumerate(statement.values, 1)}
    return connection.execute(text, values).fetchall()


def connect(path: str, now_ms: Callable[[], int], *, is_uri: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode, on which the SQL function `now_ms` tells database time."""
    connection = sqlite3.connect(
        path, timeout=_BUSY_MS / 1000, isolation_level=None, cached_statements=256, check_same_thread=False, uri=is_uri
    )
    # Deterministic within one statement (sqlite.org/deterministic.html): it may stand in a search by index.
    connection.create_function("now_ms", 0, now_ms, deterministic=True)
    return connection


def connect_to_read(path: Path, now_ms: Callable[[], int]) -> sqlite3.Connection:
    """A connection that changes nothing, beside whoever holds the file's lock."""
    return connect(f"{path.absolute().as_uri()}?mode=ro", now_ms, is_uri=True)


def migrate_now(
    connection: sqlite3.Connection, policy: Policy | None, now_ms: Callable[[], int], *, is_alone: bool = True
) -> Opened:
    """Make a database ready in one transaction. Raises BadSetting, leaving it as it was."""
    connection.execute("begin immediate")
    try:
        opened = drive(
            connection,
            open_database(
                Dialect.SQLITE,
                policy,
                new_cluster="c-" + secrets.token_hex(16),
                now_ms=now_ms(),
                is_alone=is_alone,
            ),
        )
        connection.execute("commit")
    except BaseException:
        if connection.in_transaction:
            connection.execute("rollback")
        raise
    return opened


class SqliteEngine:
    """Implements `sql_store.Engine`. Database time is `now_ms`: the database lives in this process."""

    def __init__(self, path: str, policy: Policy | None, now_ms: Callable[[], int], meter: Meter | None = None) -> None:
        self.waker: Callable[[str], None] = lambda _uid: None
        self.cluster = ""
        #: Migrations that opening has applied.
        self.applied: tuple[str, ...] = ()
        self._path = path
        self._policy = policy
        self._now_ms = now_ms
        self._lock: FileLock | None = None
        self._writer = Writer(self._connect_writer, meter.batch if meter is not None else None)
        self._readers: ThreadPoolExecutor | None = None
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []

    @classmethod
    async def open(
        cls, path: str, policy: Policy | None, now_ms: Callable[[], int], meter: Meter | None = None
    ) -> Self:
        """Lock the file, update its schema, start the threads. Raises DataRootInUse, BadSetting, StoreFull."""
        engine = cls(path, policy, now_ms, meter)
        try:
            if path != MEMORY:
                engine._lock = FileLock(Path(path + ".lock"))
                _make_private(path)
            await engine._writer.open()
            if path != MEMORY:
                engine._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        except (sqlite3.Error, OSError) as error:
            await engine.close()
            full = translate(error) if isinstance(error, sqlite3.Error) else error
            raise (
                full if isinstance(full, StoreFull) else BadSetting(setting="database", problem=f"{path}: {error}")
            ) from error
        except BaseException:
            await engine.close()
            raise
        return engine

    async def write(self, begin: Begin[T], after: Callable[[T], None] | None = None) -> T:
        return await self._writer.run(lambda db: drive(db, begin()), after=after)

    async def apply(self, statement: Statement) -> Sequence[Sequence[Any]]:
        return await self._writer.run(lambda db: execute(db, statement))

    async def read(self, begin: Begin[T], *, is_row: bool = False) -> T:
        def job(db: sqlite3.Connection) -> T:
            return drive(db, begin())

        if is_row and self._readers is not None:
            return self._on_reader(job)  # 20 us; the hop to a thread and back takes ten times that
        return await self._read(job)

    async def read_moment(self, begin: Begin[T]) -> T:
        return await self._read(lambda db: drive_moment(db, begin()))

    async def close(self) -> None:
        await self._writer.close()
        if self._readers is not None:
            self._readers.shutdown()
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    async def _read(self, job: Callable[[sqlite3.Connection], T]) -> T:
        if self._readers is None:
            return await self._writer.read(job)
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._on_reader, job)

    def _on_reader(self, job: Callable[[sqlite3.Connection], T]) -> T:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        try:
            if connection is None:
                connection = connect(self._path, self._now_ms)
                connection.execute("pragma query_only = on")
                self._local.connection = connection
                self._connections.append(connection)
            return job(connection)
        except sqlite3.Error as error:
            raise translate(error) from error

    def _connect_writer(self) -> sqlite3.Connection:
        connection = connect(self._path, self._now_ms)
        try:
            connection.execute("pragma journal_mode = wal").fetchall()
            connection.execute("pragma synchronous = full")
            opened = migrate_now(connection, self._policy, self._now_ms)
        except BaseException:
            connection.close()
            raise
        self.cluster, self.applied = opened
        return connection


def drive_moment(connection: sqlite3.Connection, transaction: Transaction[T]) -> T:
    """Drive queries within one reading transaction; one of the caller's is joined."""
    is_ours = not connection.in_transaction
    if is_ours:
        connection.execute("begin")
    try:
        return drive(connection, transaction)
    finally:
        if is_ours:
            connection.execute("rollback")


async def open_sqlite(path: str, policy: Policy, now_ms: Callable[[], int], meter: Meter | None = None) -> SqlStore:
    """A store in a file, or in `:memory:`. Raises DataRootInUse, BadSetting, StoreFull."""
    engine = await SqliteEngine.open(path, policy, now_ms, meter)
    return SqlStore(measured(engine, meter), policy, engine.cluster)


def _make_private(path: str) -> None:
    """Make the file, if it is new, for its owner alone; SQLite gives its companions (-wal, -shm) the same mode."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
