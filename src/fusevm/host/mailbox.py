"""The mailbox of a machine's task: orders in the order of their arrival, but a delete comes first.

Owns: orders and their outcomes. Must not: carry them out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TypeAlias

from fusevm.host.rows import Operation
from fusevm.host.vmm.driver import Vmm
from fusevm.model.machine import Fence, Machine


class Order:
    """Something for the task to do. Any number of callers may wait for its outcome."""

    def __init__(self) -> None:
        self._outcome: asyncio.Future[Machine] = asyncio.get_running_loop().create_future()

    async def wait(self) -> Machine:
        """Return the machine's record when the order is carried out; raise what it raised. Cancel-safe."""
        return await asyncio.shield(self._outcome)

    def succeed(self, machine: Machine) -> None:
        """Tell those who wait."""
        if not self._outcome.done():
            self._outcome.set_result(machine)

    def fail(self, error: BaseException) -> None:
        """Tell those who wait; nobody has to."""
        if not self._outcome.done():
            self._outcome.set_exception(error)
            self._outcome.exception()


class Create(Order):
    """The intent to create is in the journal: make the machine."""

    def __init__(self, deadline_ms: int) -> None:
        super().__init__()
        self.deadline_ms = deadline_ms


class Start(Order):
    """Boot a stopped machine again, with its disk."""

    def __init__(self, fence: Fence | None, timeout_ms: int) -> None:
        super().__init__()
        self.fence = fence
        self.timeout_ms = timeout_ms


class Stop(Order):
    """End the VMM in order and keep the disk."""

    def __init__(self, fence: Fence | None) -> None:
        super().__init__()
        self.fence = fence


class Delete(Order):
    """The intent to delete is in the journal: remove everything. Overtakes and cancels what is under way."""


class Exited(Order):
    """The VMM has ended without an order."""

    def __init__(self, vmm: Vmm, reason: str) -> None:
        super().__init__()
        self.vmm = vmm
        self.reason = reason


class Recover(Order):
    """The daemon has started, or an operation could not be completed: finish or undo it, or adopt the VMM."""

    def __init__(self, operation: Operation | None) -> None:
        super().__init__()
        self.operation = operation


class Tidy(Order):
    """A sweep has found what a machine at rest should not have: remove it."""


AnyOrder: TypeAlias = Create | Start | Stop | Delete | Exited | Recover | Tidy


class Mailbox:
    """Orders that wait."""

    def __init__(self) -> None:
        self._orders: deque[AnyOrder] = deque()
        self._arrived = asyncio.Event()
        self._overtaking = asyncio.Event()

    def post(self, order: AnyOrder) -> None:
        """Add an order. Recovery comes before what was ordered meanwhile."""
        match order:
            case Delete():
                self._orders.appendleft(order)
                self._overtaking.set()
            case Recover():
                self._orders.appendleft(order)
            case _:
                self._orders.append(order)
        self._arrived.set()

    async def take(self) -> AnyOrder:
        """Remove and return the next order; wait for one."""
        while not self._orders:
            self._arrived.clear()
            await self._arrived.wait()
        order = self._orders.popleft()
        if not any(isinstance(waiting, Delete) for waiting in self._orders):
            self._overtaking.clear()
        return order

    @property
    def is_empty(self) -> bool:
        """True when nothing waits."""
        return not self._orders

    async def wait_overtaking(self) -> None:
        """Wait until a delete has come in."""
        await self._overtaking.wait()

    def drain(self) -> list[AnyOrder]:
        """Remove and return all that is left."""
        rest = list(self._orders)
        self._orders.clear()
        return rest
