"""The one door through which environments change: read, `step`, commit, again if another writer was faster.

Whoever commits a new pending action claims it for the worker of this process; nobody else starts actions.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
from msgspec.structs import replace

from fusevm.control.clock import Clock
from fusevm.control.etag import etag_of
from fusevm.control.signals import Signals, Subscription
from fusevm.control.store.protocol import (
    Claim,
    Records,
    RequestKey,
    Reservation,
    ReservationLost,
    SealedRow,
)
from fusevm.core import lifecycle
from fusevm.core.backoff import backoff_ms
from fusevm.core.lifecycle import Identity, Step
from fusevm.core.placement import can_reserve, place
from fusevm.core.policy import Policy
from fusevm.core.spec import resources_of
from fusevm.core.use import waits_for_list
from fusevm.model import ids
from fusevm.model.environment import Environment, Spec
from fusevm.model.errors import EnvironmentNotFound, NoCapacity, NoHosts, PreconditionFailed, RevisionConflict
from fusevm.model.event import Event, Placed, Tick
from fusevm.model.host import Host
from fusevm.model.setup import Duties

#: How often a create plans anew when hosts fill up under it.
MAX_PLANS = 20
#: First and longest pause before an event is decided again because another writer was faster.
CONFLICT_PAUSE_MS, MAX_CONFLICT_PAUSE_MS = 1, 250
#: Longest time without looking at the store while waiting for a record: other replicas send no signals.
LOOK_AGAIN_S = 1.0


class Environments(Records, Protocol):
    """What the entry needs of the store."""

    async def hosts(self) -> list[Host]:
        """All hosts by id."""
        ...


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a create asks for, complete and checked."""

    spec: Spec
    duties: Duties = Duties()
    sealed: SealedRow | None = None
    #: Where the bytes of the seed snapshot are.
    pinned_to: str = ""


class Entry:
    """Creates environments and feeds them events."""

    def __init__(
        self,
        store: Environments,
        signals: Signals,
        policy: Policy,
        clock: Clock,
        claim: Claim | None,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._store = store
        self._signals = signals
        self._policy = policy
        self._clock = clock
        self._claim = claim
        self._entropy = entropy
        #: Does anybody wait for a place, as far as the queue of this process knows?
        self.has_line = False
        #: Id of the host that is kept free for somebody who waits, as that queue planned it last; empty: none.
        self.kept_free = ""

    def new_identity(self, task_id: str, tenant: str = "") -> Identity:
        """Fresh ids for an environment of a task. Subscribe to the uid before `begin`, and no change is missed."""
        entropy = self._entropy(26)
        return Identity(
            uid=ids.make_uid(self._clock.now_ms(), entropy[:10]),
            task_id=task_id,
            tenant=tenant,
            machine_id=ids.make_machine_id(entropy[10:]),
        )

    def new_id(self) -> str:
        """A fresh time-ordered id, for what belongs to an environment."""
        return ids.make_uid(self._clock.now_ms(), self._entropy(10))

    async def begin(
        self, identity: Identity, asked: Asked, *, cause: str, key: RequestKey | None = None
    ) -> Environment:
        """Place and create an environment; its boot is claimed. Where nothing fits, it waits if it may.

        Raises TaskExists, NoHosts, NoCapacity, HostNotFound, ImageNotFound, BadField, SnapshotNotReady, StoreFull.
        """
        began = time.perf_counter()
        spec, sealed = asked.spec, asked.sealed
        for _ in range(MAX_PLANS):
            host_id = await self._place(asked)
            step = self._first_step(identity, asked, host_id, cause, began)
            reservation = self._reservation(spec, host_id) if host_id else None
            try:
                return await self._store.create(step, reservation, self._claim, key, sealed)
            except ReservationLost:
                continue
        raise NoCapacity(rejections=f"hosts filled up {MAX_PLANS} times while this environment was being placed")

    async def _place(self, asked: Asked) -> str:
        """A host, or nothing for an environment that is to wait. What can never be placed is refused in any case."""
        hosts, may_wait = await self._store.hosts(), bool(asked.spec.queue_seconds)
        try:
            host_id = place(hosts, asked.spec, self._policy, pinned_to=asked.pinned_to, kept_free=self.kept_free)
        except (NoCapacity, NoHosts):
            if not may_wait:
                raise
            return ""
        return "" if may_wait and self.has_line else host_id

    def _reservation(self, spec: Spec, host_id: str) -> Reservation:
        return Reservation(host_id, resources_of(spec), lambda host: can_reserve(host, spec, self._policy))

    def _first_step(self, identity: Identity, asked: Asked, host_id: str, cause: str, began: float) -> Step:
        now_ms = self._clock.now_ms()
        step = lifecycle.begin(
            identity, asked.spec, host_id, duties=asked.duties, cause=cause, now_ms=now_ms, policy=self._policy
        )
        record = lifecycle.with_schedule_time(step.record, (time.perf_counter() - began) * 1000)
        return replace(step, record=record)

    async def place(self, env: Environment, host_id: str) -> Environment:
        """Give a waiting environment its place. Without effect when it has changed or the host filled up meanwhile."""
        step = lifecycle.step(env, Placed(cause="queue", host_id=host_id), self._clock.now_ms(), self._policy)
        if step.record is env:
            return env
        try:
            return await self._store.commit(
                env.uid, env.revision, step, self._claim, reservation=self._reservation(env.spec, host_id)
            )
        except (ReservationLost, RevisionConflict):
            return env

    async def feed(
        self,
        uid: str,
        event: Event,
        *,
        known: Environment | None = None,
        commit_always: bool = False,
        only: int | None = None,
        sealed: SealedRow | None = None,
    ) -> Environment:
        """Decide what an event means and save it; the answer is the record as it is now.

        `known` is the caller's reading, tried first. `commit_always` saves an unchanged live record too, which
        moves its stored deadline. `only` allows this revision and no other. `sealed` is saved with it.
        Raises WrongState, ActionUnderWay, SnapshotNotReady, EnvironmentNotFound, PreconditionFailed, StoreFull, and
        RevisionConflict when a snapshot that the event brings has changed: who read it reads it again. A change of the
        environment leads to another attempt; each is another writer's success, and the pauses keep the load small.
        Cancel: it may have been saved.
        """
        record, conflicts = known, 0
        while True:
            record = record or await self._store.get(uid)
            if record is None:
                raise EnvironmentNotFound(id=uid)
            if only not in (None, record.revision):
                raise PreconditionFailed(id=record.id, etag=etag_of(uid, record.revision))
            step = lifecycle.step(record, event, self._clock.now_ms(), self._policy)
            if step.record is record and not step.facts and (record.is_terminal or not commit_always):
                return record
            try:
                return await self._store.commit(uid, record.revision, step, self._claim, sealed=sealed)
            except RevisionConflict as conflict:
                if conflict.uid != uid:
                    raise
                record = None
            conflicts += 1
            pause_ms = backoff_ms(conflicts, first_ms=CONFLICT_PAUSE_MS, max_ms=MAX_CONFLICT_PAUSE_MS, key=event.cause)
            await asyncio.sleep(pause_ms / 1000)

    async def tick(self, uid: str) -> bool:
        """Let happen what is due. False: that is for the watch of its host to say, after a list (`core.use`)."""
        record = await self._store.get(uid)
        if record is not None and waits_for_list(record, self._clock.now_ms(), self._policy):
            return False
        await self.feed(uid, Tick(cause="deadline"), known=record, commit_always=True)
        return True

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
            await news.changed(min(until - loop.time(), LOOK_AGAIN_S))
            # Woken without a newer record: another replica committed it.
            newer = _newer(record, news.record)
            record = newer if newer is not record else _newer(record, await self._store.get(record.uid))
        return record


def _newer(record: Environment, seen: Environment | None) -> Environment:
    return seen if seen is not None and seen.revision > record.revision else record
