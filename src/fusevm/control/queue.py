"""Gives places to environments that wait for one, in the order that `core.queue` finds fair.

Every replica does this; a place is booked by compare-and-swap, so that two of them only waste each other's plan.
"""

import asyncio
import random
from collections.abc import Sequence
from typing import Protocol

import structlog

from fusevm.control.clock import Clock
from fusevm.control.entry import Entry
from fusevm.control.metrics import Metrics
from fusevm.core.policy import Policy
from fusevm.core.queue import plan_placements
from fusevm.model.environment import Environment
from fusevm.model.errors import Error
from fusevm.model.host import Host, Resources
from fusevm.model.snapshot import Snapshot

log = structlog.get_logger()
#: Of the first in turn, and of the rest: how many are planned for at once.
LIMIT = 500


class QueueStore(Protocol):
    """What the queue needs of the store."""

    async def queued(self, limit: int) -> list[Environment]:
        """Environments that wait for a place: the oldest of every tenant, then the second oldest ..."""
        ...

    async def queued_after(self, uid: str, limit: int) -> list[Environment]:
        """Environments that wait for a place, by uid."""
        ...

    async def usage_by_tenant(self) -> dict[str, Resources]:
        """What is placed, per tenant."""
        ...

    async def hosts(self) -> list[Host]:
        """All hosts by id."""
        ...

    async def snapshot(self, id: str) -> Snapshot | None:  # noqa: A002 - the record's field
        """One snapshot."""
        ...


class Queue:
    """The waiting line, as one replica works on it."""

    def __init__(
        self, store: QueueStore, entry: Entry, policy: Policy, *, clock: Clock, metrics: Metrics, poll_s: float
    ) -> None:
        self._store = store
        self._entry = entry
        self._policy = policy
        self._clock = clock
        self._metrics = metrics
        self._poll_s = poll_s
        self._wake = asyncio.Event()
        #: Uid of the last of the rest that the last round planned for.
        self._looked_at = ""

    def notice(self, record: Environment) -> None:
        """A record was committed: one that waits, or one that has freed its place."""
        if record.is_queued or record.is_terminal:
            self._wake.set()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                await self.serve()
            except Exception:  # loop boundary: the next round may succeed
                self._metrics.loop_failures.labels("queue").inc()
                log.exception("queue_failed")
            try:
                async with asyncio.timeout(self._poll_s * random.uniform(0.75, 1.25)):  # noqa: S311 - spreads replicas
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def serve(self) -> None:
        """Place whoever can be placed now."""
        waiting = await self._line()
        self._entry.has_line = bool(waiting)
        if not waiting:
            self._entry.kept_free = ""
            return
        records = {env.uid: env for env in waiting}
        hosts, usage = await self._store.hosts(), await self._store.usage_by_tenant()
        seeds = await self._seeds(waiting)
        plan = plan_placements(waiting, hosts, usage, self._policy, now_ms=self._clock.now_ms(), seeds=seeds)
        self._entry.kept_free = plan.kept_free
        for uid, host_id in plan.placed:
            try:
                placed = await self._entry.place(records[uid], host_id)
            except Error as error:
                log.info("not_placed", uid=uid, host=host_id, reason=error.reason)
            else:
                if placed is not records[uid]:
                    self._metrics.placed(placed)

    async def _line(self) -> list[Environment]:
        """Those who come first in turn, and of a line that is longer each round another part: what fits nowhere does
        not hide what would."""
        first = await self._store.queued(LIMIT)
        rest = await self._store.queued_after(self._looked_at, LIMIT) if first else []
        self._looked_at = rest[-1].uid if rest else ""
        return list({env.uid: env for env in (*first, *rest)}.values())

    async def _seeds(self, waiting: Sequence[Environment]) -> dict[str, str]:
        """Id of every seed snapshot to the host where its bytes are."""
        ids = {env.spec.seed_snapshot_id for env in waiting} - {""}
        found = [await self._store.snapshot(id_) for id_ in sorted(ids)]
        return {snapshot.id: snapshot.host_id for snapshot in found if snapshot is not None}
