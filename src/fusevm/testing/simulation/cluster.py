"""Puts a simulated cluster together, lets it live, lets it come to rest, and gives the verdict."""

import asyncio
import collections
import contextlib
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgspec
import structlog

from fusevm.control.host_api import HostApi
from fusevm.control.store import host_rows
from fusevm.control.store.sqlite import drive
from fusevm.core import reconcile
from fusevm.core.invariants import World
from fusevm.model.errors import Error
from fusevm.model.host import Host, HostHealth, Resources
from fusevm.testing.clock import START_MS
from fusevm.testing.simulation import loop as virtual
from fusevm.testing.simulation.checker import Checker, Violation
from fusevm.testing.simulation.database import SimDatabase
from fusevm.testing.simulation.faults import Faults
from fusevm.testing.simulation.host import SimHost
from fusevm.testing.simulation.network import Network, Way
from fusevm.testing.simulation.replica import Gone, Replica
from fusevm.testing.simulation.scale import ALL_ON, NO_FAULTS, SMALL, Luck, Safeguards, Scale, luck_of
from fusevm.testing.simulation.trace import Trace
from fusevm.testing.simulation.users import Crowd, User

#: Virtual seconds between looks at everything: of a small world, and for each environment of a larger one.
LOOK_S, LOOK_S_EACH = 2.0, 0.02
_DICE = ("hosts", "network", "replicas", "users", "faults", "store")


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a simulation."""

    seed: int
    violations: tuple[Violation, ...]
    #: SHA-256 of the trace: equal for equal seeds.
    digest: str
    virtual_s: float
    real_s: float
    #: Numbers by name, for people.
    counts: dict[str, int]
    #: All that is known of the object of the first violation.
    story: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """Did all rules hold?"""
        return not self.violations


def simulate(
    seed: int,
    scale: Scale = SMALL,
    *,
    safeguards: Safeguards = ALL_ON,
    luck: Luck | None = None,
) -> Verdict:
    """Run one simulation to its verdict; without `luck`, with that of its seed.

    Uses and restores the global random generator and the logging.
    """
    began = time.perf_counter()
    before, strikes = random.getstate(), reconcile.STRIKES_TO_ACT
    random.seed(seed)
    reconcile.STRIKES_TO_ACT = strikes if safeguards.strikes else 1
    try:
        with _heard_logs() as failures:
            return virtual.run(_simulate(seed, scale, safeguards, luck or luck_of(seed), failures, began))
    finally:
        random.setstate(before)
        reconcile.STRIKES_TO_ACT = strikes


async def _simulate(
    seed: int, scale: Scale, safeguards: Safeguards, luck: Luck, failures: list[str], began: float
) -> Verdict:
    cluster: Cluster | None = None
    async with asyncio.TaskGroup() as group:
        cluster = Cluster(group, seed, scale, safeguards)
        world = await cluster.live(luck)
        cluster.end()
    checker = cluster.checker
    for failure in failures:
        checker.broken("", f"a loop met an unexpected exception: {failure}")
    found = tuple(checker.violations)
    verdict = Verdict(
        seed=seed,
        violations=found,
        digest=cluster.trace.digest(),
        virtual_s=asyncio.get_running_loop().time(),
        real_s=time.perf_counter() - began,
        counts=cluster.counts(world),
        story=tuple(checker.story(found[0].subject)) if found else (),
    )
    cluster.database.inline.close()
    return verdict


class Cluster:
    """A whole world."""

    def __init__(self, group: asyncio.TaskGroup, seed: int, scale: Scale, safeguards: Safeguards) -> None:
        self._group = group
        self._scale = scale
        self._loop = asyncio.get_running_loop()
        #: Every part has luck of its own, so that a change in one does not change the others' at once.
        dice = self._dice = {name: Random(f"{seed} {name}") for name in _DICE}  # noqa: S311 - no secrets
        self._tasks: dict[asyncio.Task[None], None] = {}
        self.trace = Trace(self._loop.time)
        self.checker = Checker(self.trace, self._loop.time)
        self.network = Network(dice["network"], self._spawn, self.trace)
        self.database = SimDatabase(self._database_ms, dice["store"], self.checker, has_leases=safeguards.leases)
        self.hosts = [self._make_host(f"h{number:02}", safeguards) for number in range(scale.hosts)]
        self.replicas = [self._make_replica(f"r{number}") for number in range(scale.replicas)]
        self.checker.hosts = {host.id: host for host in self.hosts}
        self.checker.network = self.network
        self.checker.database = self.database.inline
        self.crowd = Crowd(self.replicas, self.checker, dice["users"])
        self.faults = Faults(
            hosts=self.hosts,
            replicas=self.replicas,
            network=self.network,
            database=self.database,
            chance=dice["faults"],
            trace=self.trace,
        )

    def _database_ms(self) -> int:
        return START_MS + round(self._loop.time() * 1000)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._group.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task

    def _make_host(self, id_: str, safeguards: Safeguards) -> SimHost:
        room = self._scale.room
        capacity = Resources(cpus=room, ram_mb=512 * room, storage_gb=4 * room, vm_count=room)
        host = SimHost(
            id_, capacity, chance=self._dice["hosts"], watch=self.checker, safeguards=safeguards, spawn=self._spawn
        )
        now_ms = self._database_ms()
        record = Host(
            id=id_,
            url="http://127.0.0.1:1",
            capacity=capacity,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            last_seen_ms=now_ms,
        )
        drive(self.database.inline.connection, host_rows.save(record))
        return host

    def _make_replica(self, name: str) -> Replica:
        return Replica(
            name,
            open_store=self.database.view,
            open_way=self._open_way,
            chance=self._dice["replicas"],
            spawn=self._spawn,
            trace=self.trace,
        )

    def _open_way(self, replica: str, host_id: str, is_alive: Callable[[], bool]) -> HostApi:
        return Way(self.network, replica, self.checker.hosts[host_id], is_alive)

    # -- a life ---------------------------------------------------------------------------------------------------

    async def live(self, luck: Luck) -> World:
        """Users come, things break; then all is well, and everything comes to rest."""
        for replica in self.replicas:
            replica.start()
        looking = self._spawn(self._keep_looking())
        self._be_bad(luck)
        active_s = self._scale.active_s
        async with asyncio.TaskGroup() as group:
            group.create_task(self.faults.happen(luck, active_s))
            for number in range(self._scale.environments):
                user = User(self.crowd, f"task-{number}")
                group.create_task(user.live(self._dice["users"].uniform(1.0, active_s * 0.9), active_s))
        self._be_good()
        world = await self._settle()
        looking.cancel()
        self.checker.finish(world)
        return world

    def _be_bad(self, luck: Luck) -> None:
        self.network.luck = luck
        for host in self.hosts:
            host.luck = luck

    def _be_good(self) -> None:
        self._be_bad(NO_FAULTS)
        self.trace.note("", "all is well from here on")
        self.database.fates.clear()
        for replica in self.replicas:
            replica.start()

    async def _settle(self) -> World:
        until_s = self._loop.time() + self._scale.settle_s
        self._spawn(self._remove_lost_hosts(until_s))
        while True:
            await asyncio.sleep(10.0)
            world = self.checker.look()
            if not self.checker.unrest(world) or self._loop.time() >= until_s:
                return world

    async def _remove_lost_hosts(self, until_s: float) -> None:
        """What an operator does about hosts that will not come back."""
        left = [host for host in self.hosts if host.is_gone]
        while left and self._loop.time() < until_s:
            await asyncio.sleep(5.0)
            host = left.pop(0)
            with contextlib.suppress(Gone):
                answer = await self.crowd.ask("DELETE", f"/v1/hosts/{host.id}", query={"force": "true"})
                if answer.status in (204, 404):
                    continue
            left.append(host)

    async def _keep_looking(self) -> None:
        pause_s = max(LOOK_S, LOOK_S_EACH * self._scale.environments)
        seen = 0
        while True:
            await asyncio.sleep(pause_s)
            if self.trace.length > seen:
                self.checker.look()
                seen = self.trace.length

    def end(self) -> None:
        """Switch everything off."""
        for replica in self.replicas:
            replica.kill()
        for task in list(self._tasks):
            task.cancel()

    def counts(self, world: World) -> dict[str, int]:
        """Numbers for people."""
        ends = collections.Counter(
            env.ending.reason if env.ending is not None else str(env.state) for env in world.environments.values()
        )
        lost = sum(host.health is HostHealth.LOST for host in world.hosts.values())
        return {
            "environments": len(world.environments),
            "events": sum(len(facts) for facts in world.facts.values()),
            "snapshots": len(world.snapshots),
            "hosts lost": lost,
            "trace lines": self.trace.length,
            **{f"ended: {reason}": count for reason, count in sorted(ends.items())},
            **{f"answers {status}": count for status, count in sorted(self.crowd.answers.items())},
            **{f"faults: {name}": count for name, count in sorted(self.faults.counts.items())},
        }


@contextlib.contextmanager
def _heard_logs() -> Iterator[list[str]]:
    """Silence, but for exceptions that loops of the product did not expect: they are collected."""
    failures: list[str] = []

    def listen(_logger: Any, _method: str, event: Any) -> Any:
        raised = event.get("exc_info")
        error = raised if isinstance(raised, BaseException) else sys.exc_info()[1]
        if raised and error is not None and not (isinstance(error, Error) and error.retryable):
            failures.append(_describe(str(event.get("event")), error))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[listen], wrapper_class=structlog.make_filtering_bound_logger(40))
    try:
        yield failures
    finally:
        structlog.configure(**before)


def _describe(event: str, error: BaseException) -> str:
    frames = reversed(traceback.extract_tb(error.__traceback__)[-4:])
    places = " < ".join(f"{frame.name} ({frame.filename.rpartition('/')[2]}:{frame.lineno})" for frame in frames)
    return f"{event}: {type(error).__name__}: {error} in {places}"
