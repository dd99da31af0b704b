"""Who wants to know when a record changes, within this process.

A signal only says "look again": what is shown comes from the store, so a missed or doubled signal costs time, never
correctness. Of changes made by other replicas the store's waker tells.
"""

import asyncio
import contextlib
from collections.abc import Iterator

from fusevm.control.store.protocol import EVERYTHING, GLOBAL_ORDER
from fusevm.model.environment import Environment


class Subscription:
    """Remembers that something changed, and the newest record seen."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.record: Environment | None = None

    def notify(self, record: Environment) -> None:
        """Wake the subscriber."""
        if self.record is None or record.uid != self.record.uid or record.revision > self.record.revision:
            self.record = record
        self._changed.set()

    def wake(self) -> None:
        """Wake the subscriber without news."""
        self._changed.set()

    async def changed(self, timeout_s: float) -> bool:
        """Wait for the next change, at most that long; False: none came."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True


class Signals:
    """Spreads committed records to subscribers. Belongs to one event loop."""

    def __init__(self) -> None:
        #: In the order in which they came, which is that in which they are told.
        self._by_uid: dict[str, dict[Subscription, None]] = {}
        self._all: dict[Subscription, None] = {}

    def publish(self, record: Environment) -> None:
        """A record was committed."""
        for subscription in (*self._by_uid.get(record.uid, ()), *self._all):
            subscription.notify(record)

    def wake(self, uid: str) -> None:
        """What a store's waker hears: a record changed elsewhere, the order of all facts grew, or anything may have."""
        if uid == EVERYTHING:
            self.wake_all()
            return
        for subscription in self._all if uid == GLOBAL_ORDER else self._by_uid.get(uid, ()):
            subscription.wake()

    def wake_all(self) -> None:
        """Make every subscriber look again, as at shutdown."""
        for subscriptions in (*self._by_uid.values(), self._all):
            for subscription in subscriptions:
                subscription.wake()

    @contextlib.contextmanager
    def subscribe(self, uid: str = "") -> Iterator[Subscription]:
        """Changes of one environment, or of all."""
        subscription = Subscription()
        found = self._by_uid.setdefault(uid, {}) if uid else self._all
        found[subscription] = None
        try:
            yield subscription
        finally:
            del found[subscription]
            if uid and not found:
                self._by_uid.pop(uid, None)
