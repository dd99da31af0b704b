"""PostgreSQL: any number of replicas over one database, through a pool of connections of which each carries out one
transaction at a time.

Rows are locked (`for update`) for as short as can be; what PostgreSQL undoes because two transactions were in each
other's way is begun again. A transaction runs to its end even if its caller is cancelled. When the connection is lost
before the commit was asked for, it is begun again once, on another connection; when it is lost during the commit,
nobody knows whether it was carried out, and the caller is told so by StoreUnreachable.
"""

import asyncio
import contextlib
import random
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from fusevm.control.store.hearing import Hearing
from fusevm.control.store.measured import Meter, measured
from fusevm.control.store.migrate import Opened, open_database
from fusevm.control.store.protocol import Committed
from fusevm.control.store.sql import Dialect, load_queries
from fusevm.control.store.sql_store import SqlStore
from fusevm.control.store.statements import Begin, Statement, Transaction
from fusevm.core.policy import Policy
from fusevm.model.errors import BadSetting, Error, ShuttingDown, StoreFull, StoreUnreachable

T = TypeVar("T")
Connection = Any  # asyncpg's connections and the proxies of its pool have no common type
CONNECT_S = 10.0
#: For a free connection of the pool.
ACQUIRE_S = 10.0
#: The server gives up before the client does: a timeout is then the server's answer, and the connection stays usable.
SETTINGS = {
    "application_name": "fuse",
    "statement_timeout": "15s",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "15s",
    "timezone": "UTC",
}
COMMAND_S = 20.0
#: How often a transaction is begun when others are in its way.
ATTEMPTS = 8
FIRST_PAUSE_S = 0.005
_SQL = load_queries(Dialect.POSTGRES)

#: What talking to the server raises. InternalClientError: among others, where a server that ends the session says so
#: at the moment at which a statement is begun.
Failure = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
_CONFLICT = frozenset({"40001", "40P01"})
_FULL = frozenset({"53100", "58030"})
#: Shut down, crashed, starting; an idle transaction was ended; connection exceptions.
_LOST = frozenset({"57P01", "57P02", "57P03", "25P03", "08000", "08001", "08003", "08004", "08006"})
_LATE = {"57014": "a statement took too long", "55P03": "a lock was held too long"}
_AWAY = {"25006": "it is read-only", "53300": "it has too many connections", "53200": "it is out of memory"}


# -- statements ----------------------------------------------------------------------------------------------------


async def drive(connection: Connection, transaction: Transaction[T]) -> T:
    """Carry a transaction's statements out; beginning and ending it is the caller's part."""
    try:
        statement = next(transaction)
        while True:
            statement = transaction.send(await execute(connection, statement))
    except StopIteration as done:
        result: T = done.value
        return result


async def execute(connection: Connection, statement: Statement) -> Sequence[Sequence[Any]]:
    """All rows of one statement."""
    text = _SQL[statement.name] + statement.tail if statement.name else statement.tail
    found: Sequence[Sequence[Any]] = await connection.fetch(text, *map(_storable, statement.values))
    return found


def _storable(value: object) -> object:
    """Text columns cannot hold NUL (documents can: JSON escapes it); what is looked for with one is not there."""
    return value.replace("\0", "\ufffd") if isinstance(value, str) and "\0" in value else value


# -- failures ------------------------------------------------------------------------------------------------------


def translate(error: BaseException) -> BaseException:
    """What a failure means to the caller; a bug stays what it is."""
    state = getattr(error, "sqlstate", None)
    if state in _FULL:
        return StoreFull(problem=str(error))
    if state in _LATE or state in _AWAY:
        return StoreUnreachable(problem=_LATE.get(state) or _AWAY[state])
    if is_conflict(error):
        return StoreUnreachable(problem="others are in the way all the time")
    if is_lost(error):
        return StoreUnreachable(problem=f"the connection was lost: {_sentence(error)}")
    if isinstance(error, TimeoutError):
        return StoreUnreachable(problem="it did not answer in time")
    return error


def is_conflict(error: BaseException) -> bool:
    """Did others come in between, so that the same may work at once? A replica that changes the schema does, too."""
    return getattr(error, "sqlstate", None) in _CONFLICT or isinstance(error, asyncpg.InvalidCachedStatementError)


def is_lost(error: BaseException | None) -> bool:
    """Is it the connection that failed?"""
    if isinstance(error, asyncpg.PostgresError):
        return error.sqlstate in _LOST
    # asyncpg's own errors are also raised for wrong use, but never by these few calls.
    lost = (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
    return isinstance(error, lost) and not isinstance(error, TimeoutError)


def _sentence(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# -- the engine ----------------------------------------------------------------------------------------------------


class PostgresEngine:
    """Implements `sql_store.Engine`."""

    def __init__(self, url: str, pool: "asyncpg.Pool[Any]", hearing: Hearing) -> None:
        self._url = url
        self._pool = pool
        self._hearing = hearing
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    @property
    def waker(self) -> Callable[[str], None]:
        """See `protocol.Store`."""
        return self._hearing.waker

    @waker.setter
    def waker(self, waker: Callable[[str], None]) -> None:
        self._hearing.waker = waker

    async def write(self, begin: Begin[T], after: Callable[[T], None] | None = None) -> T:
        return await self._run(self._write(begin, after))

    async def apply(self, statement: Statement) -> Sequence[Sequence[Any]]:
        async def work(connection: Connection) -> Sequence[Sequence[Any]]:
            return await execute(connection, statement)

        return await self._run(self._repeat(work))

    async def read(self, begin: Begin[T], *, is_row: bool = False) -> T:  # noqa: ARG002 - it waits for the network anyway
        async def work(connection: Connection) -> T:
            return await drive(connection, begin())

        return await self._run(self._repeat(work))

    async def read_moment(self, begin: Begin[T]) -> T:
        async def work(connection: Connection) -> T:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                await connection.execute("set local statement_timeout = '10min'")
                return await drive(connection, begin())

        return await self._run(self._repeat(work))

    async def close(self) -> None:
        self._is_closed = True
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._hearing.close()
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Carry on when the caller is cancelled: a transaction in the middle is no place to stop."""
        if self._is_closed:
            work.close()
            raise ShuttingDown
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _write(self, begin: Begin[T], after: Callable[[T], None] | None) -> T:
        async def work(connection: Connection) -> T:
            transaction = connection.transaction()
            await transaction.start()
            try:
                result = await drive(connection, begin())
            except BaseException:
                await _undo(connection, transaction)
                raise
            try:
                await transaction.commit()
            except Failure as error:
                raise _CommitFailed from error
            return result

        result = await self._repeat(work)
        if isinstance(result, Committed):
            self._hearing.tell(result.record.uid)
        if after is not None:
            after(result)
        return result

    async def _repeat(self, work: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        """Do it, and do it again when that may help and cannot hurt."""
        losses = 0
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._on_connection(work)
            except _CommitFailed as failed:
                error = failed.__cause__ or failed
                if not is_conflict(error):
                    raise translate(error) from error
            except Failure as failure:
                error = failure
                losses += is_lost(error)
                if not is_conflict(error) and not (is_lost(error) and losses == 1):
                    raise translate(error) from error
            if attempt == ATTEMPTS:
                raise translate(error) from error
            await asyncio.sleep(random.uniform(0, FIRST_PAUSE_S * 2**attempt))  # noqa: S311 - no secret
        raise AssertionError("unreachable")

    async def _on_connection(self, work: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        connection = await self._pool.acquire(timeout=ACQUIRE_S)
        try:
            return await work(connection)
        except (*Failure, _CommitFailed) as error:
            if is_lost(error.__cause__ if isinstance(error, _CommitFailed) else error):
                _end(connection)  # asyncpg does not always see that by itself
            raise
        finally:
            # What happened to the work is decided; a connection that cannot be given back is replaced by the pool.
            with contextlib.suppress(*Failure):
                await self._pool.release(connection)


class _CommitFailed(Exception):
    """The commit was asked for; its cause says what happened."""


async def _undo(connection: Connection, transaction: Any) -> None:
    """Roll back; a connection on which that fails is not used again, and the server rolls back by itself."""
    try:
        await transaction.rollback()
    except Failure:
        _end(connection)


def _end(connection: Connection) -> None:
    """Close at once. The pool's proxy of a connection that is gone already says so by an error."""
    with contextlib.suppress(asyncpg.InterfaceError):
        connection.terminate()


# -- opening -------------------------------------------------------------------------------------------------------


async def open_postgres(
    url: str, policy: Policy, now_ms: Callable[[], int], *, pool_size: int, meter: Meter | None = None
) -> SqlStore:
    """A store in PostgreSQL, its schema up to date. Raises BadSetting, StoreUnreachable.

    `now_ms` only dates the migrations: everything else goes by the server's time.
    """
    opened = await bring_up(url, policy, now_ms)
    hearing = Hearing(lambda: connect(url))
    try:
        pool = await asyncpg.create_pool(
            url,
            # asyncpg would try to keep more than none up while the server is away, and log each failure.
            min_size=0,
            max_size=pool_size,
            timeout=CONNECT_S,
            command_timeout=COMMAND_S,
            server_settings=_session(url),
            statement_cache_size=512,
            reset=_leave,
        )
        await hearing.open()
    except (*Failure, Error) as error:
        await hearing.close()
        raise _opening_error(url, error) from error
    return SqlStore(measured(PostgresEngine(url, pool, hearing), meter), policy, opened.cluster)


async def bring_up(url: str, policy: Policy | None, now_ms: Callable[[], int]) -> Opened:
    """Make the database ready (see `open_database`), in one transaction. Raises BadSetting, leaving it as it was, and
    StoreUnreachable."""
    try:
        connection = await connect(url, is_patient=True)
        try:
            async with connection.transaction():
                return await drive(
                    connection,
                    open_database(
                        Dialect.POSTGRES,
                        policy,
                        new_cluster="c-" + secrets.token_hex(16),
                        now_ms=now_ms(),
                        is_alone=False,
                    ),
                )
        finally:
            await connection.close(timeout=CONNECT_S)
    except Failure as error:
        raise _opening_error(url, error) from error


async def connect(url: str, *, is_patient: bool = False) -> Connection:
    """One connection beside the pool. `is_patient`: for work that may take minutes."""
    return await asyncpg.connect(
        url, timeout=CONNECT_S, command_timeout=None if is_patient else COMMAND_S, server_settings=_session(url)
    )


def _session(url: str) -> dict[str, str]:
    """Settings of a session; the URL's own (`?lock_timeout=2s`) come first."""
    given = parse_qs(urlsplit(url).query)
    return {name: value for name, value in SETTINGS.items() if name not in given}


async def _leave(_connection: Connection) -> None:
    """Transactions leave nothing behind in a session; asyncpg's own clean-up would cost a round trip."""


def _opening_error(url: str, error: BaseException) -> BaseException:
    """Wrong credentials and the like are the setting's fault; a server that is away is not."""
    if isinstance(error, Error):
        return error
    known = translate(error)
    if isinstance(known, Error):
        return known
    return BadSetting(setting="database", problem=f"{render_place(url)}: {_sentence(error)}")


def without_password(url: str) -> tuple[str, str]:
    """A URL that may be shown or put on a command line, and the password that was in it."""
    parts = urlsplit(url)
    user, _, place = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    return parts._replace(netloc=f"{name}@{place}" if name else place).geturl(), unquote(password)


def render_place(url: str) -> str:
    """A database's URL without what must not be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
