"""The one door through which environments change: read, `step`, commit, again if another writer was faster.

Whoever commits a new pending action claims it for the worker of this process; nobody else starts actions.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Protocol

from fusevm.control.clock import Clock
from fusevm.control.signals import Signals, Subscription
from fusevm.control.store.protocol import Claim, Records, RequestKey, Reservation, ReservationLost
from fusevm.core import lifecycle
from fusevm.core.lifecycle import Identity, Step
from fusevm.core.placement import can_reserve, place
from fusevm.core.policy import Policy
from fusevm.core.spec import resources_of
from fusevm.model import ids
from fusevm.model.environment import Environment, Event, Spec
from fusevm.model.errors import EnvironmentNotFound, NoCapacity, RevisionConflict
from fusevm.model.host import Host

#: How often a create plans anew when hosts fill up under it.
MAX_PLANS = 20
#: Longest time without looking at the store while waiting for a record: other replicas send no signals.
LOOK_AGAIN_S = 1.0


class Environments(Records, Protocol):
    """What the entry needs of the store."""

    async def hosts(self) -> list[Host]:
        """All hosts by id."""
        ...


class Entry:
    """Creates environments and feeds them events."""

    def __init__(
        self, store: Environments, signals: Signals, policy: Policy, clock: Clock, claim: Claim | None
    ) -> None:
        self._store = store
        self._signals = signals
        self._policy = policy
        self._clock = clock
        self._claim = claim

    def new_identity(self, task_id: str) -> Identity:
        """Fresh ids for an environment of a task. Subscribe to the uid before `begin`, and no change is missed."""
        entropy = secrets.token_bytes(26)
        return Identity(
            uid=ids.make_uid(self._clock.now_ms(), entropy[:10]),
            task_id=task_id,
            machine_id=ids.make_machine_id(entropy[10:]),
        )

    async def begin(self, identity: Identity, spec: Spec, *, cause: str, key: RequestKey | None = None) -> Environment:
        """Place and create an environment; its boot is claimed.

        Raises TaskExists, NoHosts, NoCapacity, HostNotFound, ImageNotFound, StoreFull.
        """
        began = time.perf_counter()
        for _ in range(MAX_PLANS):
            host_id = place(await self._store.hosts(), spec, self._policy)
            step = self._first_step(identity, spec, host_id, cause, began)
            reservation = Reservation(host_id, resources_of(spec), lambda host: can_reserve(host, spec, self._policy))
            try:
                return await self._store.create(step, reservation, self._claim, key)
            except ReservationLost:
                continue
        raise NoCapacity(rejections=f"hosts filled up {MAX_PLANS} times while this environment was being placed")

    def _first_step(self, identity: Identity, spec: Spec, host_id: str, cause: str, began: float) -> Step:
        now_ms = self._clock.now_ms()
        step = lifecycle.begin(identity, spec, host_id, cause=cause, now_ms=now_ms, policy=self._policy)
        record = lifecycle.with_schedule_time(step.record, (time.perf_counter() - began) * 1000)
        return Step(record, step.actions, step.facts)

    async def feed(
        self, uid: str, event: Event, *, known: Environment | None = None, commit_always: bool = False
    ) -> Environment:
        """Decide what an event means and save it; the answer is the record as it is now.

        `known` is the caller's reading, tried first. `commit_always` saves an unchanged record too, which moves its
        stored deadline. Raises WrongState, EnvironmentNotFound, StoreFull. Cancel: it may have been saved.
        """
        record = known
        while True:
            record = record or await self._store.get(uid)
            if record is None:
                raise EnvironmentNotFound(id=uid)
            step = lifecycle.step(record, event, self._clock.now_ms(), self._policy)
            if step.record is record and not step.facts and not commit_always:
                return record
            try:
                return await self._store.commit(uid, record.revision, step, self._claim)
            except RevisionConflict:
                record = None

    async def wait_for(
        self,
        record: Environment,
        is_done: Callable[[Environment], bool],
        timeout_s: float,
        *,
        news: Subscription,
        closing: asyncio.Event,
    ) -> Environment:
        """Wait until the record is as wished, the time is over or the server closes; returns the newest reading.

        `news` was subscribed to before `record` was read or saved.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        record = _newer(record, news.record)
        while not is_done(record) and loop.time() < until and not closing.is_set():
            changed = await news.changed(min(until - loop.time(), LOOK_AGAIN_S))
            record = _newer(record, news.record if changed else await self._store.get(record.uid))
        return record


def _newer(record: Environment, seen: Environment | None) -> Environment:
    return seen if seen is not None and seen.revision > record.revision else record
