"""Performs the pending actions of environments, and turns every outcome into an event.

An action is performed by whoever holds its lease. The replica that commits a new action holds it from the start
(`notice`); everything else is found by looking: actions never taken, leases run out, deadlines passed. A record whose
pending action is another one cancels what was under way for it: at once in this process, with the next renewal in
others. Nothing is lost when this process dies: the lease runs out and another performs the action again. What is due is
judged by the database's time. A record that cannot be worked on is left alone for a while, and holds up no other.
"""

import asyncio
import random
import time
from collections.abc import Awaitable

import structlog

from fusevm.control.clock import DatabaseClock
from fusevm.control.collector import Collector
from fusevm.control.entry import Entry
from fusevm.control.metrics import Metrics
from fusevm.control.outcome import error_outcome
from fusevm.control.performer import Performer, operation_name
from fusevm.control.store.protocol import Claim, Leases
from fusevm.model.environment import Action, Environment
from fusevm.model.errors import EnvironmentNotFound, Error, ShuttingDown, StoreFull, StoreUnreachable
from fusevm.model.event import Event, OutcomeUnknown

log = structlog.get_logger()

#: Most actions taken up per look.
LOOK_LIMIT = 256
#: How long a record that cannot be worked on is left alone.
TROUBLE_PAUSE_MS = 30_000
#: The same, where a list of its host is waited for.
LIST_PAUSE_MS = 5_000
#: Pause before an outcome is reported again to a store that could not take it.
REPORT_PAUSE_S = 0.5


class _Job:
    """One action under way."""

    def __init__(self, action: Action) -> None:
        self.action = action
        self.task: asyncio.Task[None] | None = None
        #: The action is over and its outcome is on its way into the store: not to be cancelled.
        self.is_reporting = False

    def cancel(self) -> None:
        if self.task is not None and not self.is_reporting:
            self.task.cancel()


class Worker:
    """The worker of one process. The owner of `claim` must be unique among all that share the store."""

    def __init__(
        self,
        store: Leases,
        entry: Entry,
        performer: Performer,
        collector: Collector,
        *,
        claim: Claim,
        clock: DatabaseClock,
        metrics: Metrics,
        poll_s: float,
    ) -> None:
        self._store = store
        self._entry = entry
        self._performer = performer
        self._collector = collector
        self._claim = claim
        self._clock = clock
        self._metrics = metrics
        self._poll_s = poll_s
        self._jobs: dict[str, _Job] = {}
        #: Environments and snapshots that cannot be worked on now, and the steady time until which they are left alone.
        self._troubled: dict[str, int] = {}
        self._stopping = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Work until `stop`. Leases are given back at the end, so that others go on at once."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                loops = [group.create_task(self._look_loop()), group.create_task(self._renew_loop())]
                await self._stopping.wait()
                self._group = None
                for task in loops:
                    task.cancel()
                for job in self._jobs.values():
                    job.cancel()
        finally:
            self._group = None
            await self._give_back()

    async def _give_back(self) -> None:
        try:
            await self._store.release(self._claim.owner)
        except Exception:  # loop boundary: they run out by themselves
            self._metrics.loop_failures.labels("release").inc()
            log.exception("leases_not_given_back")

    def stop(self) -> None:
        """End `run`. Actions under way are cancelled; whoever holds the lease next performs them again."""
        self._stopping.set()

    # -- what to work on ------------------------------------------------------------------------------------------

    def notice(self, record: Environment, leased_to: str | None) -> None:
        """A record was committed: cancel what it supersedes; perform the new action if it was leased to us."""
        job = self._jobs.get(record.uid)
        if job is not None and job.action != record.pending:
            del self._jobs[record.uid]
            job.cancel()
        if leased_to == self._claim.owner and record.pending is not None:
            self._start(record, record.pending)

    def _start(self, record: Environment, action: Action) -> None:
        if self._group is None or record.uid in self._jobs:
            return
        job = self._jobs[record.uid] = _Job(action)
        job.task = self._group.create_task(self._work(record, job))

    async def _look_loop(self) -> None:
        while True:
            is_more = False
            try:
                is_more = await self._look()
            except Exception:  # loop boundary: the next look may succeed
                self._metrics.loop_failures.labels("worker").inc()
                log.exception("worker_look_failed")
            if not is_more:
                await asyncio.sleep(self._poll_s * random.uniform(0.75, 1.25))  # noqa: S311 - only spreads replicas

    async def _look(self) -> bool:
        """Take up what waits. True: there may be more."""
        steady_ms = self._clock.steady_ms()
        self._troubled = {uid: until_ms for uid, until_ms in self._troubled.items() if until_ms > steady_ms}
        # Those that are left alone come first again: they must not fill the whole look.
        due = await self._store.due(LOOK_LIMIT + len(self._troubled))
        # After the question: what is due by the database is then due by our clock, too.
        await self._clock.follow(self._store.now_ms)
        actions = [(uid, seq) for uid, seq in due.actions if uid not in self._troubled]
        for uid, seq in actions:
            await self._isolated(uid, self._take_up(uid, seq))
        deadlines = [uid for uid in due.deadlines if uid not in self._troubled]
        for uid in deadlines:
            await self._isolated(uid, self._tick(uid))
        for snapshot_id in due.snapshots:
            if self._group is not None and snapshot_id not in self._troubled:
                self._group.create_task(self._collect(snapshot_id))
        return max(len(actions), len(deadlines)) >= LOOK_LIMIT

    async def _tick(self, uid: str) -> None:
        if not await self._entry.tick(uid):
            self._leave_alone(uid, LIST_PAUSE_MS)

    async def _isolated(self, uid: str, work: Awaitable[object]) -> None:
        """Loop boundary: a failure concerns this record only, unless it is the store's."""
        try:
            await work
        except (StoreFull, StoreUnreachable, ShuttingDown):
            raise
        except Exception:
            self._leave_alone(uid)
            self._metrics.loop_failures.labels("record").inc()
            log.exception("record_left_alone", uid=uid, pause_ms=TROUBLE_PAUSE_MS)

    def _leave_alone(self, id: str, pause_ms: int = TROUBLE_PAUSE_MS) -> None:  # noqa: A002 - the record's field
        self._troubled[id] = self._clock.steady_ms() + pause_ms

    async def _collect(self, snapshot_id: str) -> None:
        if not await self._collector.collect(snapshot_id):
            self._leave_alone(snapshot_id)

    async def _take_up(self, uid: str, seq: int) -> None:
        record = await self._store.acquire(uid, seq, self._claim)
        if record is not None and record.pending is not None:
            self._forget_stale(record)
            self._start(record, record.pending)

    def _forget_stale(self, record: Environment) -> None:
        job = self._jobs.pop(record.uid, None)
        if job is not None:
            job.cancel()

    async def _renew_loop(self) -> None:
        """Prolong what we hold; what is no longer ours is cancelled."""
        while True:
            await asyncio.sleep(self._claim.lease_ms / 3000)
            jobs = dict(self._jobs)
            try:
                held = [(uid, job.action.seq) for uid, job in jobs.items()]
                kept = await self._store.renew(held, self._claim) if held else set()
            except Exception:  # loop boundary: a lease survives a missed renewal
                self._metrics.loop_failures.labels("renewal").inc()
                log.exception("lease_renewal_failed")
                continue
            for uid, job in jobs.items():
                if (uid, job.action.seq) not in kept and self._jobs.get(uid) is job:
                    self._metrics.leases_lost.labels("action").inc()
                    del self._jobs[uid]
                    job.cancel()

    # -- the work -------------------------------------------------------------------------------------------------

    async def _work(self, record: Environment, job: _Job) -> None:
        """Perform one action and report its outcome."""
        try:
            await self._clock.sleep_until(job.action.not_before_ms)
            event = await self._outcome(record, job.action)
            job.is_reporting = True
            await self._report(record, event)
        finally:
            if self._jobs.get(record.uid) is job:
                del self._jobs[record.uid]

    async def _outcome(self, record: Environment, action: Action) -> Event:
        began = time.perf_counter()
        try:
            event = await self._performer.perform(record, action)
        except Error as error:
            log.info("action_failed", uid=record.uid, action=action.seq, reason=error.reason, problem=error.message)
            event = error_outcome(action, error)
        except Exception:  # loop boundary: one broken environment must not stop the others
            self._metrics.loop_failures.labels("action").inc()
            log.exception("action_broke", uid=record.uid, action=action.seq)
            event = OutcomeUnknown(
                cause=f"action {action.seq}", seq=action.seq, message="internal error; the server's log has the details"
            )
        self._metrics.performed(record, action, operation_name(action), event, time.perf_counter() - began)
        return event

    async def _report(self, record: Environment, event: Event) -> None:
        """Feed the outcome until the store has taken it."""
        known: Environment | None = record
        while True:
            try:
                after = await self._entry.feed(record.uid, event, known=known)
            except EnvironmentNotFound:
                return  # ended and purged meanwhile
            except Exception:  # loop boundary: the outcome must not be lost to a full disk
                self._metrics.loop_failures.labels("report").inc()
                log.exception("outcome_not_saved", uid=record.uid)
                if self._stopping.is_set():
                    return
                known = None
                await asyncio.sleep(REPORT_PAUSE_S)
            else:
                self._metrics.reported(after, event)
                return
