"""The mailbox of a machine's task: orders in the order of their arrival, but a delete comes first.

Owns: orders and their outcomes. Must not: carry them out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from fusevm.host.admission import Size
from fusevm.host.order import Order
from fusevm.host.port_rows import PortDraft
from fusevm.host.snapshots.record import HostSnapshot
from fusevm.host.visitors import Visit
from fusevm.host.vmm.driver import Vmm
from fusevm.model.machine import Fence
from fusevm.model.network import Network


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


class TakeSnapshot(Order):
    """Copy the disk at one moment. `taken` is the outcome, beside the machine's record."""

    def __init__(self, fence: Fence | None, snapshot_id: str) -> None:
        super().__init__()
        self.fence = fence
        self.snapshot_id = snapshot_id
        self.taken: HostSnapshot | None = None


class RestoreDisk(Order):
    """Put the disk of a snapshot in place of the machine's, and start it."""

    def __init__(self, fence: Fence | None, snapshot_id: str, timeout_ms: int) -> None:
        super().__init__()
        self.fence = fence
        self.snapshot_id = snapshot_id
        self.timeout_ms = timeout_ms


class Delete(Order):
    """The intent to delete is in the journal: remove everything. Overtakes and cancels what is under way."""


class Exited(Order):
    """The VMM has ended without an order."""

    def __init__(self, vmm: Vmm, reason: str) -> None:
        super().__init__()
        self.vmm = vmm
        self.reason = reason


class Recover(Order):
    """The daemon has started, or something could not be completed: finish or undo what is open, or adopt the VMM."""


class Resize(Order):
    """Stop it if it runs, and give it more memory or a larger disk."""

    def __init__(self, fence: Fence | None, size: Size) -> None:
        super().__init__()
        self.fence = fence
        self.size = size


class Tidy(Order):
    """A sweep has found what a machine at rest should not have: remove it."""


class SetNetwork(Order):
    """Hold the machine to another network policy."""

    def __init__(self, fence: Fence | None, network: Network) -> None:
        super().__init__()
        self.fence = fence
        self.network = network


class Publish(Order):
    """Let a port of the host lead to one of the machine."""

    def __init__(self, fence: Fence | None, draft: PortDraft) -> None:
        super().__init__()
        self.fence = fence
        self.draft = draft


class Unpublish(Order):
    """Take a published port back."""

    def __init__(self, fence: Fence | None, port_id: str) -> None:
        super().__init__()
        self.fence = fence
        self.port_id = port_id


Rewiring: TypeAlias = SetNetwork | Publish | Unpublish
DiskOrder: TypeAlias = TakeSnapshot | RestoreDisk
AnyOrder: TypeAlias = Create | Start | Stop | Resize | Visit | Delete | Exited | Recover | Tidy | Rewiring | DiskOrder


class Mailbox:
    """Orders that wait."""

    def __init__(self) -> None:
        self._orders: deque[AnyOrder] = deque()
        self._arrived = asyncio.Event()
        self._overtaking = asyncio.Event()
        self._refuse: Callable[[AnyOrder], None] | None = None

    def post(self, order: AnyOrder) -> None:
        """Add an order. Recovery comes before what was ordered meanwhile."""
        if self._refuse is not None:
            self._refuse(order)
            return
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

    async def wait_order(self) -> None:
        """Wait until an order waits, without taking it."""
        while not self._orders:
            self._arrived.clear()
            await self._arrived.wait()

    async def wait_overtaking(self) -> None:
        """Wait until a delete has come in."""
        await self._overtaking.wait()

    def close(self, refuse: Callable[[AnyOrder], None]) -> None:
        """Nobody will take an order any more: answer those that wait, and whatever still comes, by `refuse`."""
        self._refuse = refuse
        while self._orders:
            refuse(self._orders.popleft())
