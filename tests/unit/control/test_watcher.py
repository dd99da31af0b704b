"""Heartbeats, reconciliation, lost hosts."""

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import structlog
from control_harness import Running, config, running, until
from msgspec.structs import replace

from fusevm.control import loop_lag, watcher
from fusevm.control.config import HostSetting
from fusevm.control.entry import Asked
from fusevm.control.main import open_plane
from fusevm.control.plane import Plane
from fusevm.control.secrets import Sealer
from fusevm.control.store.opening import open_store
from fusevm.control.store.protocol import Claim, Store
from fusevm.control.watcher import LIST_PAUSE_S, ORPHANS_AT_ONCE
from fusevm.core.policy import Policy
from fusevm.core.reconcile import STUCK_ATTEMPTS
from fusevm.core.spec import complete
from fusevm.model.environment import State
from fusevm.model.errors import Error, HostRejected, Internal, ShuttingDown, StoreUnreachable, WrongCluster
from fusevm.model.host import Resources
from fusevm.model.machine import MachineSpec, Phase
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import CREATED_AT, FakeHost
from fusevm.wire.host_api import HostFacts, MachineBody

#: A step of the clock in which heartbeats are close enough together to count.
STEP_MS = 15_000


@pytest.fixture
def warnings() -> Iterator[list[MutableMapping[str, Any]]]:
    before, capture = structlog.get_config(), structlog.testing.LogCapture()
    structlog.configure(processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    yield capture.entries
    structlog.configure(**before)


async def _ends(server: Running, uid: str, reason: str) -> bool:
    body = (await server.get(uid=uid)).json()
    return body["state"] == "failed" and body["reason"] == reason


async def _host(server: Running, id_: str = "h1") -> dict[str, object]:
    return dict((await server.http.get(f"/v1/hosts/{id_}")).json())


async def _health(server: Running, health: str, id_: str = "h1") -> bool:
    return (await _host(server, id_))["health"] == health


def _planted(cluster: str, **changes: object) -> MachineBody:
    values = {"id": "m-stray", "cluster": cluster, "uid": "gone", "incarnation": 1, "phase": Phase.RUNNING}
    return MachineBody(**{**values, "spec": MachineSpec(image="x"), "created_at": CREATED_AT, **changes})


async def test_a_crashed_machine_fails_its_environment_at_once() -> None:
    async with running(reconcile_s=60.0) as server:
        made = await server.create()
        machine_id = next(iter(server.host.table))
        await until(lambda: server.host.count("events") > 0)
        server.host.crash(machine_id, "killed by signal 9")
        await until(lambda: _ends(server, made["uid"], "machine_exited"))
        assert "killed by signal 9" in (await server.get(uid=made["uid"])).json()["error"]
        assert server.host.table == {}


async def test_a_machine_that_vanished_fails_its_environment_after_two_strikes() -> None:
    async with running() as server:
        made = await server.create()
        server.host.forget(next(iter(server.host.table)))
        await until(lambda: _ends(server, made["uid"], "machine_missing"))


async def test_an_orphan_is_destroyed_and_strangers_are_left_alone() -> None:
    async with running() as server:
        await server.create()
        cluster = server.plane.store.cluster
        server.host.plant(_planted(cluster))
        server.host.plant(_planted("other-cluster", id="m-foreign"))
        server.host.plant(_planted("", id="m-by-hand", uid=""))
        await until(lambda: "m-stray" not in server.host.table)
        assert {"m-foreign", "m-by-hand"} <= set(server.host.table)
        fence, machine_id = next(what for name, what in server.host.calls if name == "destroy")
        assert (machine_id, fence.uid, fence.incarnation) == ("m-stray", "gone", 1)
        assert server.plane.metrics.orphans_destroyed._value.get() == 1
        for stray in ("m-foreign", "m-by-hand"):
            server.host.forget(stray)


async def test_an_orphan_that_cannot_be_destroyed_is_tried_again() -> None:
    async with running() as server:
        server.host.plant(_planted(server.plane.store.cluster))
        server.host.script("destroy", Internal(problem="busy"))
        await until(lambda: "m-stray" not in server.host.table)
        assert server.host.count("destroy") == 2


async def test_orphans_do_not_wait_for_one_another() -> None:
    async with running() as server:
        host = server.host
        released = host.hold["destroy"] = asyncio.Event()
        for number in range(ORPHANS_AT_ONCE):
            host.plant(_planted(server.plane.store.cluster, id=f"m-stray-{number}", uid=f"gone-{number}"))
        await until(lambda: host.count("destroy") == ORPHANS_AT_ONCE)  # none of them has been answered
        released.set()
        await until(lambda: host.table == {})


async def test_an_orphan_that_stays_becomes_a_dead_letter_once_and_is_tried_again() -> None:
    async with running() as server:
        server.host.plant(_planted(server.plane.store.cluster))
        metrics = server.plane.metrics
        server.host.script("destroy", *[Internal(problem="busy")] * (STUCK_ATTEMPTS + 3))
        await until(lambda: "m-stray" not in server.host.table)
        assert metrics.orphans_failed._value.get() == STUCK_ATTEMPTS + 3
        assert metrics.orphans_dead_lettered._value.get() == 1


async def test_a_silent_host_becomes_unreachable_then_lost_and_comes_back() -> None:
    clock = FakeClock()
    async with running(clock=clock, policy=Policy(backoff_first_ms=10)) as server:
        made = await server.create()
        server.host.is_down = True
        await _pass(server.host, clock, 15_000)
        await until(lambda: _health(server, "unreachable"))
        assert "does not answer" in str((await _host(server))["problem"])
        assert (await server.get()).json()["state"] == "running"  # silence is not absence
        refused = (await server.http.post("/v1/environments", json={"task_id": "t2"})).json()
        assert "unreachable" in refused["error"]["message"]
        await _pass(server.host, clock, 110_000)
        await until(lambda: _health(server, "lost"))
        await until(lambda: _ends(server, made["uid"], "host_lost"))
        assert (await _host(server))["allocated"]["vm_count"] == 0  # type: ignore[index]
        assert len(server.host.table) == 1
        server.host.is_down = False
        await until(lambda: _health(server, "ok"))
        assert "problem" not in await _host(server)
        await until(lambda: not server.host.table)  # its machine was given up


async def test_a_deletion_on_a_lost_host_is_finished() -> None:
    clock = FakeClock()
    async with running(clock=clock, wait_s=0.05) as server:
        made = await server.create()
        server.host.is_down = True
        assert (await server.delete()).status_code == 202
        await _pass(server.host, clock, 130_000)

        async def is_over() -> bool:
            body = (await server.get(uid=made["uid"])).json()
            return body["state"] == "destroyed"

        await until(is_over)


async def _one_heartbeat(host: FakeHost) -> None:
    """Wait until one has begun and ended."""
    beats = host.count("info")
    await until(lambda: host.count("info") > beats + 1)


async def _pass(host: FakeHost, clock: FakeClock, ms: int) -> None:
    """Let time pass with heartbeats in it: without them, it does not count."""
    await _one_heartbeat(host)
    for _ in range(0, ms, STEP_MS):
        clock.advance(STEP_MS)
        await _one_heartbeat(host)


async def test_a_dead_host_does_not_stop_the_others() -> None:
    dead, alive = FakeHost("dead"), FakeHost("alive")
    async with running(dead, alive) as server:
        dead.hold["info"] = dead.hold["machines"] = asyncio.Event()
        made = await server.create(spec={"host_id": "alive"})
        alive.forget(next(iter(alive.table)))
        await until(lambda: _ends(server, made["uid"], "machine_missing"))
        dead.hold["info"].set()


async def test_what_a_host_says_of_itself_is_shown() -> None:
    async with running() as server:
        server.host.capacity = Resources(cpus=2, ram_mb=2048, storage_gb=20, vm_count=3)
        server.host.images = ["debian-12"]

        async def is_shown() -> bool:
            host = await _host(server)
            return host["capacity"]["cpus"] == 2 and host.get("images") == ["debian-12"]  # type: ignore[index]

        await until(is_shown)
        assert (await _host(server))["driver"] == "fake"


async def test_a_host_of_another_cluster_is_not_used() -> None:
    host, clock = FakeHost("h1"), FakeClock()
    host.cluster = "somebody-else"
    async with running(host, clock=clock) as server:
        refused = await server.http.post("/v1/environments", json={"task_id": "t"})
        assert refused.status_code == 503
        await _pass(host, clock, 15_000)
        await until(lambda: _health(server, "unreachable"))


REFUSALS = (
    HostRejected(id="h1"),
    WrongCluster(cluster="other", asked="ours"),
    Internal(problem="a bug of the daemon"),
    ShuttingDown(),
)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.reason)
async def test_a_host_that_refuses_is_unreachable_for_a_visible_cause_and_never_lost(
    refusal: Error, warnings: list[MutableMapping[str, Any]]
) -> None:
    clock = FakeClock()
    async with running(clock=clock, heartbeat_s=0.02) as server:
        made = await server.create(spec={"max_runtime_seconds": -1})
        server.host.script("info", *[refusal] * 10_000)
        await _pass(server.host, clock, 300_000)
        await until(lambda: _health(server, "unreachable"))
        assert (await _host(server))["problem"] == refusal.message
        warned = {line["reason"] for line in warnings if line["event"] == "host_refuses"}
        assert warned == {refusal.reason}
        assert (await server.get(uid=made["uid"])).json()["state"] == "running"
        assert len(server.host.table) == 1
        server.host._faults["info"].clear()
        await until(lambda: _health(server, "ok"))
        assert "problem" not in await _host(server)


async def test_silence_with_an_answer_in_between_is_counted_anew() -> None:
    clock = FakeClock()
    async with running(clock=clock) as server:
        made = await server.create(spec={"max_runtime_seconds": -1})
        server.host.is_down = True
        await _pass(server.host, clock, 100_000)
        server.host.is_down = False
        server.host.script("info", HostRejected(id="h1"))
        await _one_heartbeat(server.host)
        server.host.is_down = True
        await _pass(server.host, clock, 100_000)
        assert not await _health(server, "lost")
        assert (await server.get(uid=made["uid"])).json()["state"] == "running"


class LameStore:
    """A store of which some calls fail: the database is away."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.broken: set[str] = set()
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        if name in self.broken:
            self.failures += 1
            raise StoreUnreachable(problem="the connection was lost")
        return getattr(self._store, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("listener", "waker"):
            setattr(self._store, name, value)
        else:
            super().__setattr__(name, value)


class Watched:
    """A control plane that watches one host with a token, and what can be done to both."""

    def __init__(self, plane: Plane, store: LameStore, host: FakeHost, clock: FakeClock) -> None:
        self.plane = plane
        self.store = store
        self.host = host
        self.clock = clock

    async def health(self) -> str:
        host = await self.plane.store.host("h1")
        assert host is not None
        return str(host.health)

    async def is_running(self, uid: str) -> bool:
        env = await self.plane.store.get(uid)
        return env is not None and env.state is State.RUNNING

    async def is_over(self, uid: str) -> bool:
        env = await self.plane.store.get(uid)
        return env is not None and env.is_terminal

    async def create(self) -> str:
        asked = Asked(spec=replace(complete(self.plane.config.policy), max_runtime_seconds=-1))
        env = await self.plane.entry.begin(self.plane.entry.new_identity("t1"), asked, cause="test")
        await until(lambda: self.is_running(env.uid))
        return env.uid

    async def fail(self, *methods: str) -> None:
        """Let the store fail for five minutes, and a round of the watch with it, each fifteen seconds."""
        self.store.broken = set(methods)
        for _ in range(0, 300_000, STEP_MS):
            self.clock.advance(STEP_MS)
            failures = self.store.failures
            await until(lambda failures=failures: self.store.failures > failures + 1)
        self.store.broken = set()


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Watched]:
    host, clock = FakeHost("h1"), FakeClock()
    settings = config(
        {}, heartbeat_s=0.02, hosts=(HostSetting(id="h1", url="http://127.0.0.1:1", token="s"),), lease_s=1.0
    )
    store = LameStore(await open_store(":memory:", settings.policy, clock.now_ms))
    async with open_plane(settings, clock=clock, store=store, dial=lambda _: host) as plane:  # type: ignore[arg-type]
        yield Watched(plane, store, host, clock)


async def test_a_store_that_is_away_gives_no_host_up() -> None:
    """What is needed to ask cannot be read, and the rest of the store can: nobody was asked, so nobody was silent."""
    async with watched() as at:
        uid = await at.create()
        await at.fail("get_secret")
        await _one_heartbeat(at.host)
        assert await at.health() == "ok"
        assert await at.is_running(uid)


async def test_silence_is_counted_from_zero_after_the_store_was_away() -> None:
    async with watched() as at:
        uid = await at.create()
        at.host.is_down = True
        await _pass(at.host, at.clock, 100_000)
        await at.fail("host", "get_secret")
        await _pass(at.host, at.clock, 100_000)
        assert await at.health() == "unreachable"
        assert await at.is_running(uid)
        await _pass(at.host, at.clock, 30_000)
        await until(lambda: at.is_over(uid))
        assert await at.health() == "lost"


async def test_a_loop_that_stands_still_makes_no_host_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_lag, "TICK_S", 0.01)
    monkeypatch.setattr(watcher, "MAX_LAG_S", 0.02)
    async with watched() as at:
        uid = await at.create()
        info = at.host.info

        async def info_of_a_blocked_loop() -> HostFacts:
            time.sleep(0.05)  # what another task does
            return await info()

        at.host.is_down = True
        monkeypatch.setattr(at.host, "info", info_of_a_blocked_loop)
        await _pass(at.host, at.clock, 150_000)
        assert await at.health() == "ok"
        assert await at.is_running(uid)
        monkeypatch.undo()
        await _pass(at.host, at.clock, 150_000)
        await until(lambda: at.is_over(uid))
        assert await at.health() == "lost"


async def test_health_is_saved_before_anybody_is_told_of_it() -> None:
    async with watched() as at:
        uid = await at.create()
        at.host.is_down = True
        at.store.broken = {"on_host"}
        await _pass(at.host, at.clock, 30_000)
        assert await at.health() == "unreachable"

        async def told() -> list[str]:
            return [told.fact.reason for told in await at.plane.store.facts_of(uid, 0, 100) if told.fact.kind == "host"]

        async def is_told() -> bool:
            return await told() == ["unreachable"]

        assert await told() == []
        at.store.broken = set()
        await until(is_told)
        await _one_heartbeat(at.host)
        assert await is_told()


async def test_a_host_whose_token_only_other_replicas_can_read_is_left_to_them() -> None:
    """Keys were rotated in the wrong order: what this replica must open is sealed with a key that it does not have."""
    async with watched() as at:
        uid = await at.create()
        mine, at.plane.directory._sealer = at.plane.directory._sealer, Sealer(bytes(32))
        at.clock.advance(STEP_MS)
        await until(lambda: "h1" not in at.plane.metrics.views)
        assert await at.plane.store.acquire_host("h1", Claim("w-other", 60_000))
        at.clock.advance(30_000)
        assert await at.health() == "ok"
        assert await at.is_running(uid)
        await at.plane.store.release("w-other")
        at.plane.directory._sealer = mine
        await _one_heartbeat(at.host)
        assert await at.health() == "ok"


async def test_our_own_silence_is_not_the_hosts() -> None:
    """A control plane that was down for an hour does not give up its hosts when it starts."""
    clock, host = FakeClock(), FakeHost("h1")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "fuse.db")
        async with running(host, clock=clock, database=path) as server:
            made = await server.create(spec={"max_runtime_seconds": -1})
        clock.advance(3_600_000)
        host.is_down = True
        async with running(host, clock=clock, database=path) as server:
            beats = host.count("info")
            await until(lambda: host.count("info") > beats + 3)
            assert (await _host(server))["health"] == "ok"
            assert (await server.get(uid=made["uid"])).json()["state"] == "running"
            clock.advance(15_000)
            await until(lambda: _health(server, "unreachable"))


async def test_a_bug_in_one_round_does_not_end_the_watch() -> None:
    async with running() as server:
        server.host.script("machines", KeyError("bug"))
        server.host.script("info", KeyError("bug"))
        lists = server.host.count("machines")
        await until(lambda: server.host.count("machines") > lists + 3)
        assert await _health(server, "ok")


@pytest.mark.parametrize("phase", [Phase.STOPPED, Phase.FAILED])
async def test_a_machine_that_is_over_in_the_list_ends_its_environment(phase: Phase) -> None:
    async with running() as server:
        made = await server.create()
        machine_id = next(iter(server.host.table))
        server.host.table[machine_id] = replace(server.host.table[machine_id], phase=phase)
        await until(lambda: _ends(server, made["uid"], "machine_exited"))


@pytest.mark.parametrize("phase", [Phase.CREATING, Phase.PAUSED, Phase.DELETING])
async def test_a_machine_that_is_stuck_in_a_phase_ends_its_environment_and_goes(phase: Phase) -> None:
    async with running() as server:
        made = await server.create()
        machine_id = next(iter(server.host.table))
        server.host.table[machine_id] = replace(server.host.table[machine_id], phase=phase)
        await until(lambda: _ends(server, made["uid"], "machine_exited"))
        assert f"as {phase} again and again" in (await server.get(uid=made["uid"])).json()["error"]
        assert server.host.table == {}


async def test_only_ends_make_us_look_at_once_and_a_burst_of_them_is_looked_at_together() -> None:
    """A list costs as much as the host has machines: those that are made and destroyed by order need none."""
    async with running(reconcile_s=60.0) as server:
        await until(lambda: server.host.count("events") > 0 and server.host.count("machines") > 0)
        await asyncio.sleep(2 * LIST_PAUSE_S)  # what the first line of the stream led to
        lists = server.host.count("machines")
        made = [await server.create(f"t{number}") for number in range(31)]
        assert (await server.delete("t30")).status_code == 204
        await asyncio.sleep(2 * LIST_PAUSE_S)
        assert server.host.count("machines") == lists
        for machine_id in list(server.host.table):
            server.host.crash(machine_id, "killed")

        async def are_over() -> bool:
            return await server.plane.store.count_live() == {}

        began = asyncio.get_running_loop().time()
        await until(are_over)
        took_s = asyncio.get_running_loop().time() - began
        assert server.host.count("machines") - lists <= 2 + took_s / LIST_PAUSE_S
        ended = [await server.record(env["uid"]) for env in made[:30]]
        assert {env.ending.reason for env in ended if env.ending is not None} == {"machine_exited"}
