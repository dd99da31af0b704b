"""Heartbeats, reconciliation, lost hosts."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from control_harness import Running, running, until
from msgspec.structs import replace

from fusevm.control.watcher import LIST_PAUSE_S
from fusevm.core.policy import Policy
from fusevm.model.errors import HostRejected, Internal
from fusevm.model.host import Resources
from fusevm.model.machine import MachineSpec, Phase
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import CREATED_AT, FakeHost
from fusevm.wire.host_api import MachineBody


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


async def test_a_silent_host_becomes_unreachable_then_lost_and_comes_back() -> None:
    clock = FakeClock()
    async with running(clock=clock, policy=Policy(backoff_first_ms=10)) as server:
        made = await server.create()
        server.host.is_down = True
        await _one_heartbeat(server.host)
        clock.advance(15_000)
        await until(lambda: _health(server, "unreachable"))
        assert (await server.get()).json()["state"] == "running"  # silence is not absence
        refused = (await server.http.post("/v1/environments", json={"task_id": "t2"})).json()
        assert "unreachable" in refused["error"]["message"]
        clock.advance(110_000)
        await until(lambda: _health(server, "lost"))
        await until(lambda: _ends(server, made["uid"], "host_lost"))
        assert (await _host(server))["allocated"]["vm_count"] == 0  # type: ignore[index]
        assert len(server.host.table) == 1
        server.host.is_down = False
        await until(lambda: _health(server, "ok"))
        await until(lambda: not server.host.table)  # its machine was given up


async def test_a_deletion_on_a_lost_host_is_finished() -> None:
    clock = FakeClock()
    async with running(clock=clock, wait_s=0.05) as server:
        made = await server.create()
        server.host.is_down = True
        assert (await server.delete()).status_code == 202
        clock.advance(130_000)

        async def is_over() -> bool:
            body = (await server.get(uid=made["uid"])).json()
            return body["state"] == "destroyed"

        await until(is_over)


async def _one_heartbeat(host: FakeHost) -> None:
    """Silence counts from the first heartbeat that gets no answer: wait until one has begun and ended."""
    beats = host.count("info")
    await until(lambda: host.count("info") > beats + 1)


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
        clock.advance(15_000)
        await until(lambda: _health(server, "unreachable"))


async def test_a_rejected_token_makes_a_host_unreachable() -> None:
    clock = FakeClock()
    async with running(clock=clock) as server:
        server.host.script("info", *[HostRejected(id="h1")] * 10_000)
        await _one_heartbeat(server.host)
        clock.advance(15_000)
        await until(lambda: _health(server, "unreachable"))


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


async def test_changes_that_come_in_a_burst_are_looked_at_together() -> None:
    async with running(reconcile_s=60.0) as server:
        await until(lambda: server.host.count("events") > 0)
        began, lists = asyncio.get_running_loop().time(), server.host.count("machines")
        made = [await server.create(f"t{number}") for number in range(30)]
        took_s = asyncio.get_running_loop().time() - began
        assert server.host.count("machines") - lists <= 2 + took_s / LIST_PAUSE_S
        for machine_id in list(server.host.table):
            server.host.crash(machine_id, "killed")  # the end of a burst is seen, too

        async def are_over() -> bool:
            return await server.plane.store.count_live() == {}

        await until(are_over)
        ended = [await server.record(env["uid"]) for env in made]
        assert {env.ending.reason for env in ended if env.ending is not None} == {"machine_exited"}
