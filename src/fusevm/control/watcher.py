"""Watches hosts: heartbeat, machine list, event stream; feeds what they mean to the lifecycle.

Each host is watched by the one replica that holds the host's lease, in a task of its own: a dead host never stops
another's. Silence makes a host unreachable, then lost; a refusal makes it unreachable and never lost; only a good
answer makes it well again. A failure on our side, of the store, of the key that its token is sealed with or of an event
loop that stood still, says nothing about a host: silence is then counted from zero. What heartbeats and lists mean is
decided by `core.reconcile` and `core.use`; this module only carries it out.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import structlog
from msgspec.structs import replace

from fusevm.control.clock import Clock
from fusevm.control.draining import drain_environments
from fusevm.control.entry import Entry
from fusevm.control.host_api import HostApi
from fusevm.control.loop_lag import LoopLag
from fusevm.control.metrics import Metrics
from fusevm.control.race import first_of
from fusevm.control.store.protocol import Claim, Hosts
from fusevm.control.tracker import Tracker, is_tracked
from fusevm.control.vault import Vault
from fusevm.core.policy import Policy
from fusevm.core.reconcile import (
    Heartbeat,
    ObservedMachine,
    Plan,
    Silence,
    Strikes,
    expectations,
    heard,
    observe_host,
    plan,
)
from fusevm.core.use import uses, waits_for_list
from fusevm.model.environment import Environment
from fusevm.model.errors import (
    BadSetting,
    Error,
    HostNotFound,
    HostUnreachable,
    MachineNotFound,
    RevisionConflict,
    StaleIncarnation,
    Timeout,
    WrongCluster,
)
from fusevm.model.event import Event, HostLost, MachineMissing, Reported, Tick
from fusevm.model.fact import Kind
from fusevm.model.host import Host, HostHealth, HostState, effective
from fusevm.model.machine import Fence, Phase
from fusevm.wire.host_api import HostFacts, MachineBody

log = structlog.get_logger()

#: Seconds one heartbeat or list may take.
CALL_TIMEOUT_S = 10.0
#: A heartbeat during which our own event loop stood still for so many seconds finds no silence.
MAX_LAG_S = CALL_TIMEOUT_S / 5
#: Shortest pause between two lists of a host: changes that come in a burst are looked at together.
LIST_PAUSE_S = 0.2
#: The pause is at least so many times as long as the list before it took: a host with thousands of machines, or one of
#: which something ends all the time, must not keep us from our users.
LIST_REST = 10
#: What a host tells of a machine when nobody may have ordered it; what else has gone wrong is found by the next list.
_ENDS = frozenset({Phase.STOPPED.value, Phase.FAILED.value})
#: Orphans destroyed at the same time per host.
ORPHANS_AT_ONCE = 8
#: Seconds that they may take of one round; who is left is an orphan in the next one, too.
ORPHANS_TIMEOUT_S = 30.0
#: Orders about machines that no record stands for come from no action.
NO_ACTION = 0


class _Answer(NamedTuple):
    """What came of one heartbeat."""

    beat: Heartbeat
    facts: HostFacts | None = None
    problem: str = ""


class Pace(Protocol):
    """How often things happen; `config.ControlConfig` fits."""

    @property
    def heartbeat_s(self) -> float:
        """Pause between heartbeats."""
        ...

    @property
    def reconcile_s(self) -> float:
        """Longest pause between machine lists."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What every watch works with."""

    store: Hosts
    entry: Entry
    cluster: str
    policy: Policy
    claim: Claim
    clock: Clock
    metrics: Metrics
    pace: Pace
    vault: Vault


class Watch:
    """The watching of one host by this replica."""

    def __init__(
        self, host_id: str, client: HostApi, client_of: Callable[[str], Awaitable[HostApi]], around: Around
    ) -> None:
        self._id = host_id
        self._client = client
        self._client_of = client_of
        #: Set when the host is spoken to in another way than before: it was registered again.
        self._turned = asyncio.Event()
        self._store = around.store
        self._entry = around.entry
        self._cluster = around.cluster
        self._policy = around.policy
        self._claim = around.claim
        self._clock = around.clock
        self._metrics = around.metrics
        self._pace = around.pace
        self._view = around.metrics.watching(host_id)
        self._silence = Silence()
        self._gap_ms = round(2000 * (CALL_TIMEOUT_S + self._pace.heartbeat_s))
        #: The host as the last heartbeat left it; what follows from that is yet to be carried out.
        self._noted: Host | None = None
        self._is_noted = asyncio.Event()
        #: Changes of health that those on the host were not told of yet.
        self._changes: deque[Host] = deque()
        self._tracker = Tracker(self._entry, self._cluster, around.vault)
        self._strikes = Strikes()
        #: What was expected of the host when the last list was judged.
        self._known: dict[str, int] = {}
        self._look = asyncio.Event()
        #: The guests that the last list found to have something to track, and whether there is a list yet.
        self._tracked: Sequence[Environment] = ()
        self._is_listed = asyncio.Event()
        #: Nothing is left to do here: the host is no longer registered, or we cannot read how it is spoken to.
        self._over = asyncio.Event()
        #: Set after the first heartbeat, whatever came of it.
        self.first = asyncio.Event()

    async def run(self) -> None:
        """Watch until the lease is lost, the host is removed, or we are cancelled."""
        async with asyncio.TaskGroup() as group:
            loops = (
                self._pulse_loop(),
                self._effect_loop(),
                self._reconcile_loop(),
                self._track_loop(),
                self._event_loop(),
            )
            tasks = [group.create_task(loop) for loop in loops]
            try:
                await self._hold()
            finally:
                self.first.set()
                self._view.close()
                for task in tasks:
                    task.cancel()

    async def _hold(self) -> None:
        """Keep the lease. Not between two heartbeats: one may take longer than the lease, and whoever took over then
        would begin to count the host's silence anew, and so the next."""
        pause_s = self._claim.lease_ms / 3000
        while await self._guarded("lease", self._prolong):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._over.wait()

    async def _prolong(self) -> bool:
        if self._over.is_set() or await self._store.acquire_host(self._id, self._claim):
            return not self._over.is_set()
        if await self._store.host(self._id) is not None:
            self._metrics.leases_lost.labels("host").inc()
            log.info("host_lease_lost", host=self._id)
        return False

    async def _pulse_loop(self) -> None:
        while await self._guarded("pulse", self._pulse):
            self.first.set()
            await asyncio.sleep(_jittered(self._pace.heartbeat_s))
        self._over.set()

    async def _guarded(self, what: str, work: Callable[[], Awaitable[bool]]) -> bool:
        """Loop boundary: a failure concerns this host and this round only."""
        try:
            return await work()
        except Error as error:
            log.warning("host_trouble", host=self._id, during=what, reason=error.reason, problem=error.message)
        except Exception:  # loop boundary
            self._metrics.loop_failures.labels(what).inc()
            log.exception("watch_failed", host=self._id, during=what)
        return True

    # -- heartbeat ------------------------------------------------------------------------------------------------

    async def _pulse(self) -> bool:
        """Ask the host who it is and note its health. False: there is nothing to watch here any more."""
        # Where this round is not carried through, what was counted is forgotten: the trouble is ours.
        silence, self._silence = self._silence, Silence()
        if not await self._find_client():
            return False
        asked_ms = self._clock.steady_ms()
        with LoopLag() as lag:
            answer = await self._ask()
        if answer.beat is Heartbeat.SILENT and lag.seconds >= MAX_LAG_S:
            log.warning("host_not_heard", host=self._id, problem=f"our event loop stood still for {lag.seconds:.1f} s")
            return True
        silence = heard(silence, answer.beat, asked_ms, self._gap_ms)
        self._view.is_up = answer.facts is not None
        host = await self._store.host(self._id)
        if host is None:
            return False
        saved = await self._save(host, answer, silence)
        self._silence = silence
        if saved.health is not host.health:
            log.info("host_health", host=self._id, before=host.health, now=saved.health, problem=saved.problem)
            self._changes.append(saved)
        self._noted = saved
        self._is_noted.set()
        return True

    async def _find_client(self) -> bool:
        """Speak to the host as its record says now. False: it has none, or a token that only others can read."""
        try:
            client = await self._client_of(self._id)
        except HostNotFound:
            return False
        except BadSetting as error:
            # The watch ends, and with it the lease: a replica that has the key can take it.
            log.warning("host_token_unreadable", host=self._id, problem=error.message)
            return False
        if client is not self._client:
            self._client = client
            self._turned.set()
        return True

    async def _ask(self) -> _Answer:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                facts = await self._client.info()
            if facts.cluster not in ("", self._cluster):
                raise WrongCluster(cluster=facts.cluster, asked=self._cluster)
        except (TimeoutError, Timeout, HostUnreachable) as error:
            problem = error.message if isinstance(error, Error) else f"no answer within {CALL_TIMEOUT_S:.0f} s"
            log.warning("host_silent", host=self._id, problem=problem)
            return _Answer(Heartbeat.SILENT, problem=problem)
        except Error as error:
            log.warning("host_refuses", host=self._id, reason=error.reason, problem=error.message)
            return _Answer(Heartbeat.REFUSED, problem=error.message)
        return _Answer(Heartbeat.ANSWERED, facts)

    async def _save(self, host: Host, answer: _Answer, silence: Silence) -> Host:
        now_ms = self._clock.now_ms()
        if answer.facts is not None:
            await self._store.touch_host(self._id, now_ms)
            new = _well(host, answer.facts, now_ms)
        else:
            new = observe_host(host, silence, answer.problem, self._policy)
        if new == replace(host, last_seen_ms=new.last_seen_ms):
            return host
        try:
            return await self._store.save_host(replace(new, updated_at_ms=now_ms))
        except RevisionConflict:
            return host  # somebody else changed it; the next heartbeat sees that

    async def _effect_loop(self) -> None:
        """Apart from the heartbeats: the next one must not wait until all that are on the host were told."""
        while True:
            await self._is_noted.wait()
            self._is_noted.clear()
            await self._guarded("effects", self._carry_on)

    async def _carry_on(self) -> bool:
        """What a host's health and state mean for those that are on it. Repeated with every heartbeat."""
        while self._changes:
            await self._tell(self._changes[0])
            self._changes.popleft()
        host = self._noted
        if host is not None and host.health is HostHealth.LOST:
            for env in (await self._store.on_host(self._id)).records:
                await self._feed(env.uid, HostLost(cause=f"host {self._id}", host_id=self._id))
        elif host is not None and host.state is HostState.DRAINING:
            await drain_environments(self._store, self._entry, self._id, f"drain of host {self._id}")
        return True

    async def _tell(self, host: Host) -> None:
        """Tell those that are on the host of its health. It is saved already: if we die first, they are not told."""
        event = Reported(
            cause=f"host {self._id}",
            kind=Kind.HOST,
            reason=host.health,
            message=host.problem,
            data={"host_id": self._id},
        )
        for env in (await self._store.on_host(self._id)).records:
            await self._feed(env.uid, event, known=env)

    # -- machines -------------------------------------------------------------------------------------------------

    async def _reconcile_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self._guarded("reconcile", self._reconcile)
            pause_s = _jittered(self._pace.reconcile_s)
            rest_s = min(max(LIST_PAUSE_S, LIST_REST * (loop.time() - began)), pause_s)
            await asyncio.sleep(rest_s)
            try:
                async with asyncio.timeout(pause_s - rest_s):
                    await self._look.wait()
            except TimeoutError:
                pass
            self._look.clear()

    async def _reconcile(self) -> bool:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                listed = await self._client.machines()
        except (TimeoutError, Error) as error:
            # Unknown is not absent: no list, no conclusion, and no strike either.
            self._metrics.reconcile_cycles.labels("no_list").inc()
            self._view.silent()
            if isinstance(error, Error):
                raise
            raise HostUnreachable(id=self._id, problem=f"no list within {CALL_TIMEOUT_S:.0f} s") from error
        heard_ms = self._clock.now_ms()
        reading = await self._store.on_host(self._id)
        expected, observed = reading.records, [_observed(machine) for machine in listed.machines]
        cause = f"reconcile {self._id}"
        decided = plan(
            self._id,
            self._cluster,
            expected,
            observed,
            self._strikes,
            known=self._known,
            unreadable=reading.unreadable,
            cause=cause,
        )
        self._strikes, self._known = decided.strikes, expectations(expected)
        if decided.is_unsure:
            self._look.set()
        self._tracked = [env for env in expected if is_tracked(env)]
        self._is_listed.set()
        await self._carry_out(decided)
        for uid, event in uses(expected, observed, cause=cause, heard_ms=heard_ms, policy=self._policy):
            await self._feed(uid, event)
        # Now that use is noted, what is still idle is so.
        for env in expected:
            if waits_for_list(env, heard_ms, self._policy):
                await self._feed(env.uid, Tick(cause=cause))
        self._view.listed(len(listed.machines), expected)
        self._metrics.reconcile_cycles.labels("done").inc()
        self._metrics.reconcile_seconds.observe(time.perf_counter() - began)
        return True

    async def _carry_out(self, decided: Plan) -> None:
        for uid, event in decided.events:
            log.info("machine_over", host=self._id, uid=uid, observation=type(event).__name__)
            is_missing = isinstance(event, MachineMissing)
            (self._metrics.machines_missing if is_missing else self._metrics.machines_exited).inc()
            await self._feed(uid, event)
        for machine in decided.stuck:
            self._metrics.dead_letters.inc()
            self._metrics.orphans_dead_lettered.inc()
            log.error("orphan_needs_a_person", host=self._id, machine=machine.id, uid=machine.uid)
        slots = asyncio.Semaphore(ORPHANS_AT_ONCE)
        try:
            async with asyncio.timeout(ORPHANS_TIMEOUT_S), asyncio.TaskGroup() as group:
                for machine in decided.destroy:
                    group.create_task(self._destroy_orphan(machine, slots))
        except TimeoutError:
            log.warning("orphans_left", host=self._id, problem=f"not destroyed within {ORPHANS_TIMEOUT_S:.0f} s")

    async def _destroy_orphan(self, machine: ObservedMachine, slots: asyncio.Semaphore) -> None:
        fence = Fence(cluster=self._cluster, uid=machine.uid, incarnation=machine.incarnation, action_seq=NO_ACTION)
        async with slots:
            try:
                await self._client.destroy(fence, machine.id)
            except (MachineNotFound, StaleIncarnation):
                return
            except Error as error:
                self._metrics.orphans_failed.inc()
                log.warning("orphan_stays", host=self._id, machine=machine.id, problem=error.message)
                return
        self._metrics.orphans_destroyed.inc()
        log.info("orphan_destroyed", host=self._id, machine=machine.id, uid=machine.uid)

    async def _feed(self, uid: str, event: Event, *, known: Environment | None = None) -> None:
        try:
            await self._entry.feed(uid, event, known=known)
        except Error as error:
            log.warning("event_refused", host=self._id, uid=uid, problem=error.message)

    # -- guests ---------------------------------------------------------------------------------------------------

    async def _track_loop(self) -> None:
        """Apart from the lists: guests that hang must not delay what is found out about their host."""
        while True:
            await self._is_listed.wait()
            self._is_listed.clear()
            await self._guarded("track", self._track)
            await asyncio.sleep(_jittered(self._pace.reconcile_s))

    async def _track(self) -> bool:
        await self._tracker.look(self._client, self._tracked)
        return True

    # -- events ---------------------------------------------------------------------------------------------------

    async def _event_loop(self) -> None:
        """A machine that ends makes us look at once; the list then says what to make of it."""
        while True:
            self._turned.clear()
            await first_of(self._guarded("events", self._follow), self._turned.wait())
            await asyncio.sleep(_jittered(self._pace.heartbeat_s))

    async def _follow(self) -> bool:
        async for event in self._client.events():
            # The first line, too: something may have happened while nobody listened.
            if event.kind == "hello" or event.phase in _ENDS:
                self._look.set()
        return True


class Watchers:
    """Watches every host whose lease this replica can get."""

    def __init__(self, client_of: Callable[[str], Awaitable[HostApi]], around: Around) -> None:
        self._client_of = client_of
        self._around = around
        self._store = around.store
        self._claim = around.claim
        self._metrics = around.metrics
        self._pace = around.pace
        self._watches: dict[str, asyncio.Task[None]] = {}
        #: Set when every host that was there at the start has been asked once.
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._announce(await self._begin(group)))
            while True:
                await asyncio.sleep(_jittered(self._pace.heartbeat_s))
                await self._begin(group)

    async def _begin(self, group: asyncio.TaskGroup) -> list[Watch]:
        """Start watching what nobody watches."""
        found = [await self._take(group, host_id) for host_id in await self._unwatched()]
        return [watch for watch in found if watch is not None]

    async def _unwatched(self) -> list[str]:
        try:
            return [host.id for host in await self._store.hosts() if host.id not in self._watches]
        except Exception:  # loop boundary: the next round may succeed
            self._metrics.loop_failures.labels("watchers").inc()
            log.exception("watchers_failed")
            return []

    async def _take(self, group: asyncio.TaskGroup, host_id: str) -> Watch | None:
        try:
            client = await self._client_of(host_id)
            if not await self._store.acquire_host(host_id, self._claim):
                return None
        except HostNotFound:
            return None  # removed since the hosts were read
        except Error as error:
            log.warning("host_cannot_be_watched", host=host_id, reason=error.reason, problem=error.message)
            return None
        except Exception:  # loop boundary: one host must not stop the others
            self._metrics.loop_failures.labels("watchers").inc()
            log.exception("host_cannot_be_watched", host=host_id)
            return None
        watch = Watch(host_id, client, self._client_of, self._around)
        self._watches[host_id] = group.create_task(self._watch(host_id, watch))
        return watch

    async def _watch(self, host_id: str, watch: Watch) -> None:
        try:
            await watch.run()
        except Exception:  # loop boundary: one host must not stop the others
            self._metrics.loop_failures.labels("watch").inc()
            log.exception("watch_ended", host=host_id)
        finally:
            self._watches.pop(host_id, None)

    async def _announce(self, begun: list[Watch]) -> None:
        for watch in begun:
            await watch.first.wait()
        self.ready.set()


def _well(host: Host, facts: HostFacts, now_ms: int) -> Host:
    """The record after a good answer."""
    return replace(
        host,
        health=HostHealth.OK,
        problem="",
        is_refusing=False,
        last_seen_ms=now_ms,
        capacity=effective(host.declared, facts.capacity),
        arch=facts.arch,
        driver=facts.driver,
        version=facts.version,
        vmm_version=facts.vmm_version,
        agent_version=facts.agent_version,
        kernel=facts.kernel,
        images=tuple(facts.images),
    )


def _observed(machine: MachineBody) -> ObservedMachine:
    return ObservedMachine(
        id=machine.id,
        cluster=machine.cluster,
        uid=machine.uid,
        incarnation=machine.incarnation,
        phase=machine.phase,
        error=machine.error,
        ports_used_s_ago=machine.ports_used_s_ago,
    )


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - only spreads replicas
