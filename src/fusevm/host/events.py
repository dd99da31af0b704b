"""Who hears of machines: every change of a phase goes to all subscribers, in order.

A subscriber that does not keep up is cut off rather than waited for: it connects again and lists the machines, as it
does after every connect. Nothing is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from fusevm.model.machine import Machine
from fusevm.wire.host_api import MachineEvent

log = structlog.get_logger(__name__)

#: Events that may wait for one subscriber.
_BACKLOG = 1024


class Subscription:
    """One reader of the stream."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[MachineEvent | None] = asyncio.Queue(_BACKLOG)

    async def next(self) -> MachineEvent | None:
        """The next event; None when the daemon stops or this reader has fallen behind. Cancel-safe."""
        return await self._queue.get()

    def offer(self, event: MachineEvent) -> bool:
        """Add an event; False when there is no room."""
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            return False
        return True

    def end(self) -> None:
        """Let the reader finish at once; what it has not read is lost."""
        with contextlib.suppress(asyncio.QueueEmpty):
            while True:
                self._queue.get_nowait()
        self._queue.put_nowait(None)


class EventHub:
    """The stream of one run of the daemon, which its `epoch` names."""

    def __init__(self, epoch: str, clock: Callable[[], int]) -> None:
        self.epoch = epoch
        self._clock = clock
        self._subscriptions: set[Subscription] = set()
        self._is_closed = False

    @property
    def hello(self) -> MachineEvent:
        """First line of every stream."""
        return MachineEvent(kind="hello", epoch=self.epoch, at_ms=self._clock())

    @property
    def keepalive(self) -> MachineEvent:
        """Says that the stream is alive."""
        return MachineEvent(kind="keepalive", at_ms=self._clock())

    def publish(self, machine: Machine, *, kind: str = "phase") -> None:
        """Tell everyone that a machine has changed its phase (or is `gone`), the log included."""
        log.info(
            f"machine_{kind}",
            machine=machine.id,
            uid=machine.fence.uid,
            incarnation=machine.fence.incarnation,
            phase=machine.phase.value,
            why=machine.error,
            pid=machine.vmm.pid if machine.vmm is not None else None,
        )
        event = MachineEvent(
            kind=kind,
            machine_id=machine.id,
            uid=machine.fence.uid,
            incarnation=machine.fence.incarnation,
            phase=machine.phase.value,
            error=machine.error,
            at_ms=self._clock(),
        )
        for subscription in list(self._subscriptions):
            if not subscription.offer(event):
                self._subscriptions.discard(subscription)
                subscription.end()

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Hear everything from here on."""
        subscription = Subscription()
        if self._is_closed:
            subscription.end()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    @property
    def subscribers(self) -> int:
        """How many listen."""
        return len(self._subscriptions)

    def close(self) -> None:
        """End all streams."""
        self._is_closed = True
        for subscription in self._subscriptions:
            subscription.end()
        self._subscriptions.clear()
