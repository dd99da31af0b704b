"""What is done to a database from outside of the control plane, and beside a running one: check it, copy it, bring its
schema up to date."""

import os
import sqlite3
import time
from pathlib import Path

from fusevm.control.store.check import Finding, Opener, examine
from fusevm.control.store.location import MEMORY, is_postgres, sqlite_path
from fusevm.control.store.sql import Dialect
from fusevm.control.store.sqlite import SqliteEngine, connect_to_read, drive_moment
from fusevm.model.errors import BadSetting


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def file_of(database: str) -> Path:
    """The SQLite file of a setting. Raises BadSetting for memory, which only its process can see."""
    path = sqlite_path(database)
    if path == MEMORY:
        problem = "the database is in memory; name one with DATABASE_URL or --database-url"
        raise BadSetting(setting="database", problem=problem)
    return Path(path)


# -- check ---------------------------------------------------------------------------------------------------------


async def check(database: str, sealer: Opener | None) -> list[Finding]:
    """Everything that is wrong with a database. Raises BadSetting for one that cannot be named."""
    if is_postgres(database):
        return await _check_postgres(database, sealer)
    path = file_of(database)
    if not path.exists():
        return [Finding("file", f"there is no file {path}", "run `fuse db migrate`, or name another", is_fatal=True)]
    try:
        connection = connect_to_read(path, _now_ms)
        try:
            return drive_moment(connection, examine(Dialect.SQLITE, sealer))
        finally:
            connection.close()
    except sqlite3.Error as error:
        return [Finding("file", f"{path} cannot be read: {error}", "restore a backup", is_fatal=True)]


async def _check_postgres(database: str, sealer: Opener | None) -> list[Finding]:
    from fusevm.control.store import postgres  # noqa: PLC0415 - asyncpg is only for those who use it

    try:
        connection = await postgres.connect(database, is_patient=True)
    except postgres.Failure as error:
        problem = f"{postgres.render_place(database)} cannot be reached: {error}"
        return [Finding("server", problem, "start the server, or correct DATABASE_URL", is_fatal=True)]
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute("set local statement_timeout = '10min'")
            return await postgres.drive(connection, examine(Dialect.POSTGRES, sealer))
    except postgres.Failure as error:
        return [Finding("server", f"the server failed: {error}", "see its log", is_fatal=True)]
    finally:
        await connection.close(timeout=postgres.CONNECT_S)


# -- migrate -------------------------------------------------------------------------------------------------------


async def migrate(database: str) -> tuple[str, ...]:
    """Bring the schema up to date; the names of what was applied. Raises what opening the store raises.

    Deadlines stay as they are: they follow the settings of the control plane, which refreshes them when it starts.
    """
    if is_postgres(database):
        from fusevm.control.store.postgres import bring_up  # noqa: PLC0415 - as above

        return (await bring_up(database, None, _now_ms)).applied
    engine = await SqliteEngine.open(str(file_of(database)), None, _now_ms)
    await engine.close()
    return engine.applied


# -- backup --------------------------------------------------------------------------------------------------------


def backup_sqlite(source: Path, target: Path) -> int:
    """Copy a database as it is at one moment, for its owner alone; the size in bytes.

    A control plane may go on writing meanwhile. The target appears when it is complete, or not at all. Raises
    BadSetting.
    """
    if not source.exists():
        raise BadSetting(setting="database", problem=f"there is no file {source}")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            _copy(source, partial)
            partial.replace(target)
            _sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)
        return target.stat().st_size
    except (OSError, sqlite3.Error) as error:
        raise BadSetting(setting="backup", problem=f"cannot copy {source} to {target}: {error}") from error


def _copy(source: Path, partial: Path) -> None:
    reading = connect_to_read(source, _now_ms)
    writing = sqlite3.connect(partial, isolation_level=None)
    try:
        # All pages in one step: one reading transaction, which in WAL mode stops no writer.
        reading.backup(writing, pages=-1)
        # One file, without companions.
        writing.execute("pragma journal_mode = delete").fetchall()
        if writing.execute("pragma quick_check").fetchall() != [("ok",)]:
            raise sqlite3.DatabaseError("the copy is damaged, as the database probably is; see `fuse db check`")
    finally:
        reading.close()
        writing.close()
    _sync(partial)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
