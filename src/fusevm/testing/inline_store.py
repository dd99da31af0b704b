"""A store without threads: everything happens at once, on the event loop, in one SQLite database in memory.

For the cluster simulation: several simulated replicas share one database, each through a view of its own, and the order
of everything is that of the loop. The transactions are the real ones.

    database = InlineDatabase(now_ms)
    store = database.view(policy)       # one per replica

What one view commits, it tells its own `listener`, and the `waker` of the other views with the loop's next turn: as in
PostgreSQL, where other replicas hear of it by NOTIFY.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fusevm.control.store.location import MEMORY
from fusevm.control.store.protocol import GLOBAL_ORDER, Committed
from fusevm.control.store.sql_store import SqlStore
from fusevm.control.store.sqlite import connect, drive, drive_moment, execute, migrate_now
from fusevm.control.store.statements import Begin, Statement
from fusevm.core.policy import Policy
from fusevm.model.errors import ShuttingDown

T = TypeVar("T")


class InlineDatabase:
    """The database itself. `now_ms` is its clock."""

    def __init__(self, now_ms: Callable[[], int], policy: Policy | None = None) -> None:
        self.connection = connect(MEMORY, now_ms)
        self.cluster, _ = migrate_now(self.connection, policy or Policy(), now_ms)
        self._engines: list[InlineEngine] = []

    def view(self, policy: Policy) -> SqlStore:
        """A store over this database, as one replica has it. To close it is the end of that replica's."""
        return SqlStore(self.attach(InlineEngine(self)), policy, self.cluster)

    def attach(self, engine: "InlineEngine") -> "InlineEngine":
        """Let an engine hear what the others commit, until it is closed."""
        self._engines.append(engine)
        return engine

    def forget(self, engine: "InlineEngine") -> None:
        """A view was closed."""
        if engine in self._engines:
            self._engines.remove(engine)

    def spread(self, uid: str, origin: "InlineEngine") -> None:
        """Wake the other views."""
        loop = asyncio.get_running_loop()
        for engine in self._engines:
            if engine is not origin:
                loop.call_soon(engine.wake, uid)

    def close(self) -> None:
        """Forget everything."""
        self.connection.close()


class InlineEngine:
    """Implements `sql_store.Engine`."""

    def __init__(self, database: InlineDatabase) -> None:
        self.waker: Callable[[str], None] = lambda _uid: None
        self._database = database
        self._is_closed = False

    async def write(self, begin: Begin[T], after: Callable[[T], None] | None = None) -> T:
        connection = self._open()
        connection.execute("begin immediate")
        try:
            result = drive(connection, begin())
        except BaseException:
            connection.execute("rollback")
            raise
        connection.execute("commit")
        if after is not None:
            after(result)
        if isinstance(result, Committed):
            self._database.spread(result.record.uid, self)
        return result

    async def apply(self, statement: Statement) -> Sequence[Sequence[Any]]:
        return execute(self._open(), statement)

    async def read(self, begin: Begin[T], *, is_row: bool = False) -> T:  # noqa: ARG002 - no thread anyway
        return drive(self._open(), begin())

    async def read_moment(self, begin: Begin[T]) -> T:
        return drive_moment(self._open(), begin())

    async def close(self) -> None:
        self._is_closed = True
        self._database.forget(self)

    def wake(self, uid: str) -> None:
        """Another view has committed a record."""
        if not self._is_closed:
            self.waker(uid)
            self.waker(GLOBAL_ORDER)

    def _open(self) -> sqlite3.Connection:
        if self._is_closed:
            raise ShuttingDown
        return self._database.connection
