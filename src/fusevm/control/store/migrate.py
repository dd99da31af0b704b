"""Bring a database to this program's schema: numbered files, all that are missing in one transaction, each recorded
with its checksum. Two programs that do it at once wait for each other: SQLite by the write lock, PostgreSQL by an
advisory lock."""

from typing import NamedTuple

from fusevm.control.store import transactions as tx
from fusevm.control.store.sql import Dialect, Migration, load_migrations
from fusevm.control.store.statements import Statement, Transaction, one, rows
from fusevm.core.policy import Policy
from fusevm.model.errors import BadSetting

#: Any number that no other program is likely to lock: "fuse" in ASCII.
LOCK = 0x66757365
_TABLE = """
create table if not exists schema_version (
    version integer primary key,
    name text not null,
    checksum text not null,
    applied_at_ms bigint not null
)
"""


class Opened(NamedTuple):
    """What opening a database led to."""

    cluster: str
    #: Names of the migrations that were applied now.
    applied: tuple[str, ...]


def open_database(
    dialect: Dialect, policy: Policy | None, *, new_cluster: str, now_ms: int, is_alone: bool
) -> Transaction[Opened]:
    """Bring the schema up to date and make the data ready for use.

    `policy` None: deadlines are left as they are. `is_alone`: nobody else works on this database. Raises BadSetting for
    one of a newer or foreign program, which is left as it is.
    """
    if dialect is Dialect.POSTGRES:
        # Others may be migrating for as long as that takes.
        yield Statement("", (), "set local lock_timeout = '10min'")
        yield Statement("", (), "set local statement_timeout = '10min'")
        yield Statement("", (LOCK,), "select pg_advisory_xact_lock($1)")
    applied = yield from migrate(dialect, now_ms)
    yield from rows("put_meta", "cluster", new_cluster)
    if is_alone:
        # Whoever held a lease is dead, and its work need not wait until that runs out.
        for name in ("end_action_leases", "end_host_leases", "end_snapshot_leases"):
            yield from rows(name)
    if dialect is Dialect.POSTGRES and (yield from rows("restored_events")):
        yield from rows("rebase_events")
    if policy is not None:
        yield from tx.refresh_deadlines(policy)
    ((cluster,),) = yield from rows("get_meta", "cluster")
    return Opened(str(cluster), applied)


def migrate(dialect: Dialect, now_ms: int) -> Transaction[tuple[str, ...]]:
    """Apply what is missing; the names of it."""
    migrations = load_migrations(dialect)
    yield Statement("", (), _TABLE)
    found = yield Statement("", (), "select version, checksum from schema_version")
    applied = {int(version): str(checksum) for version, checksum in found}
    problem = schema_problem(applied, migrations)
    if problem:
        raise BadSetting(setting="database", problem=problem)
    missing = [migration for migration in migrations if migration.version not in applied]
    for migration in missing:
        for text in migration.statements:
            yield Statement("", (), text)
        yield Statement(
            "",
            (migration.version, migration.name, migration.checksum, now_ms),
            "insert into schema_version (version, name, checksum, applied_at_ms) values ($1, $2, $3, $4)",
        )
    return tuple(migration.name for migration in missing)


def schema_problem(applied: dict[int, str], migrations: list[Migration]) -> str:
    """Why this program must not touch the database; empty: it may."""
    known = {migration.version: migration.checksum for migration in migrations}
    newest = max(applied, default=0)
    if newest > max(known):
        return f"the database has schema {newest}, this program knows {max(known)}; install a newer fuse"
    for version, checksum in sorted(applied.items()):
        if known.get(version) != checksum:
            return f"schema {version} of the database is not the one of this program; was it made by another build?"
    return ""


def stored_versions() -> Transaction[dict[int, str] | None]:
    """Version to checksum as the database says; None: it has no schema at all. Changes nothing."""
    if (yield from one("find_schema")) is None:
        return None
    found = yield Statement("", (), "select version, checksum from schema_version")
    return {int(version): str(checksum) for version, checksum in found}
