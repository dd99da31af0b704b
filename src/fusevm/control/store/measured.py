"""An engine that tells a meter how long its transactions take and how they end."""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from fusevm.control.store.sql_store import Engine
from fusevm.control.store.statements import Begin, Statement

T = TypeVar("T")
READ, WRITE = "read", "write"


class Meter(Protocol):
    """Is told of everything that the database does."""

    def transaction(self, kind: str, seconds: float, failure: BaseException | None) -> None:
        """A transaction is over, the wait for its turn included. Not called for one whose caller was cancelled."""
        ...

    def batch(self, transactions: int) -> None:
        """So many shared one commit."""
        ...


class MeasuredEngine:
    """Implements `sql_store.Engine` by another one."""

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._engine = engine
        self._meter = meter

    @property
    def waker(self) -> Callable[[str], None]:
        """See `protocol.Store`."""
        return self._engine.waker

    @waker.setter
    def waker(self, waker: Callable[[str], None]) -> None:
        self._engine.waker = waker

    async def write(self, begin: Begin[T], after: Callable[[T], None] | None = None) -> T:
        return await self._timed(WRITE, self._engine.write(begin, after))

    async def apply(self, statement: Statement) -> Sequence[Sequence[Any]]:
        return await self._timed(WRITE, self._engine.apply(statement))

    async def read(self, begin: Begin[T], *, is_row: bool = False) -> T:
        return await self._timed(READ, self._engine.read(begin, is_row=is_row))

    async def read_moment(self, begin: Begin[T]) -> T:
        return await self._timed(READ, self._engine.read_moment(begin))

    async def close(self) -> None:
        await self._engine.close()

    async def _timed(self, kind: str, work: Awaitable[T]) -> T:
        began = time.perf_counter()
        try:
            result = await work
        except Exception as failure:
            self._meter.transaction(kind, time.perf_counter() - began, failure)
            raise
        self._meter.transaction(kind, time.perf_counter() - began, None)
        return result


def measured(engine: Engine, meter: Meter | None) -> Engine:
    """The engine, measured if there is a meter."""
    return engine if meter is None else MeasuredEngine(engine, meter)
