"""Who wants to know when a record changes, within this process.

A signal only says "look again": what is shown comes from the store, so a missed or doubled signal costs time, never
correctness. Changes made by other replicas arrive with the next look.
"""

import asyncio
import contextlib
from collections.abc import Iterator

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
        self._by_uid: dict[str, set[Subscription]] = {}
        self._all: set[Subscription] = set()

    def publish(self, record: Environment) -> None:
        """A record was committed."""
        for subscription in (*self._by_uid.get(record.uid, ()), *self._all):
            subscription.notify(record)

    def wake_all(self) -> None:
        """Make every subscriber look again, as at shutdown."""
        for subscriptions in (*self._by_uid.values(), self._all):
            for subscription in subscriptions:
                subscription.wake()

    @contextlib.contextmanager
    def subscribe(self, uid: str = "") -> Iterator[Subscription]:
        """Changes of one environment, or of all."""
        subscription = Subscription()
        found = self._by_uid.setdefault(uid, set()) if uid else self._all
        found.add(subscription)
        try:
            yield subscription
        finally:
            found.discard(subscription)
            if uid and not found:
                self._by_uid.pop(uid, None)
