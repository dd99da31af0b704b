"""Bring a database to this program's schema: numbered files, each in one transaction, recorded with its checksum."""

import sqlite3

from fusevm.control.store.sql import Migration, load_migrations
from fusevm.model.errors import BadSetting

_TABLE = """
create table if not exists schema_version (
    version integer primary key,
    name text not null,
    checksum text not null,
    applied_at_ms bigint not null
)
"""


def apply_migrations(connection: sqlite3.Connection, now_ms: int) -> None:
    """Apply what is missing. Raises BadSetting for a database of a newer or a foreign program, which is left alone."""
    migrations = load_migrations()
    connection.execute("begin immediate")
    try:
        connection.execute(_TABLE)
        applied = dict(connection.execute("select version, checksum from schema_version"))
        _refuse_foreign(applied, migrations)
        for migration in migrations:
            if migration.version not in applied:
                _apply(connection, migration, now_ms)
        connection.execute("commit")
    except BaseException:
        if connection.in_transaction:
            connection.execute("rollback")
        raise


def _refuse_foreign(applied: dict[int, str], migrations: list[Migration]) -> None:
    known = {migration.version: migration for migration in migrations}
    newest = max(applied, default=0)
    if newest > max(known):
        problem = f"the database has schema {newest}, this program knows {max(known)}; install a newer fuse"
        raise BadSetting(setting="database", problem=problem)
    for version, checksum in applied.items():
        if version not in known or known[version].checksum != checksum:
            problem = f"schema {version} of the database is not the one of this program; was it made by another build?"
            raise BadSetting(setting="database", problem=problem)


def _apply(connection: sqlite3.Connection, migration: Migration, now_ms: int) -> None:
    for statement in _statements(migration.text):
        connection.execute(statement)
    connection.execute(
        "insert into schema_version (version, name, checksum, applied_at_ms) values ($1, $2, $3, $4)",
        {"1": migration.version, "2": migration.name, "3": migration.checksum, "4": now_ms},
    )


def _statements(text: str) -> list[str]:
    """Split at semicolons: the files hold no text literals. executescript would commit by itself."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("--"))
    return [statement for part in "\n".join(lines).split(";") if (statement := part.strip())]
