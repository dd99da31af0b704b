"""Opens the store that a setting names."""

from collections.abc import Callable

from fusevm.control.store.location import is_postgres, sqlite_path
from fusevm.control.store.measured import Meter
from fusevm.control.store.protocol import Store
from fusevm.control.store.sqlite import open_sqlite
from fusevm.core.policy import Policy

#: Connections of one replica to PostgreSQL, beside the one that listens.
POOL_SIZE = 10


async def open_store(
    database: str,
    policy: Policy,
    now_ms: Callable[[], int],
    *,
    pool_size: int = POOL_SIZE,
    meter: Meter | None = None,
) -> Store:
    """Open, and bring up to date, the database that the setting names.

    `now_ms` is the time of SQLite; PostgreSQL has its own. `meter` is told of every transaction. Raises BadSetting,
    DataRootInUse, StoreFull, StoreUnreachable.
    """
    if not is_postgres(database):
        return await open_sqlite(sqlite_path(database), policy, now_ms, meter)
    from fusevm.control.store.postgres import open_postgres  # noqa: PLC0415 - asyncpg is only for those who use it

    return await open_postgres(database, policy, now_ms, pool_size=pool_size, meter=meter)
