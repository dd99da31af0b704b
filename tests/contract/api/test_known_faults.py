"""Faults of the systems that Fuse replaces, which no other test would notice here. `tests/faults.toml` has them all."""

import asyncio
import os
from collections import deque
from pathlib import Path

import pytest
from control_harness import Running, leave, running, until
from msgspec.structs import replace

from fusevm.control import tracker
from fusevm.control.config import HostSetting
from fusevm.control.store.protocol import START
from fusevm.core.policy import Policy
from fusevm.model.errors import BootFailed, HostUnreachable, Internal, MachineNotFound, NoSpace, Timeout
from fusevm.model.host import Resources
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import FakeHost, result
from fusevm.wire.guest import ExecRequest, ExecResult
from fusevm.wire.host_api import MachineList

URL = "/v1/environments"


class SlowLister(FakeHost):
    """Its next lists were made before anything existed, and arrive when their gates open."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: deque[asyncio.Event] = deque()
        self.is_listing = False

    def slow_list(self) -> asyncio.Event:
        """The gate of one list more."""
        self.gates.append(asyncio.Event())
        return self.gates[-1]

    async def machines(self) -> MachineList:
        if not self.gates:
            return await super().machines()
        gate = self.gates[0]
        self.is_listing = True
        await gate.wait()
        self.is_listing = False
        self.gates.popleft()
        return MachineList(machines=[])


async def _state(server: Running, uid: str) -> str:
    return (await server.record(uid)).state.value


async def _is(server: Running, uid: str, state: str) -> bool:
    return await _state(server, uid) == state


async def _lists(server: Running, more: int = 3) -> None:
    """Let some lists pass."""
    before = server.host.count("machines")
    await until(lambda: server.host.count("machines") >= before + more)


# -- reconciliation ------------------------------------------------------------------------------------------------


async def test_lists_that_are_older_than_what_they_judge_end_nothing() -> None:
    host, clock = SlowLister(), FakeClock()
    async with running(host, clock=clock) as server:
        first = host.slow_list()
        await until(lambda: host.is_listing)
        clock.advance(1_000)
        made = await server.create()
        clock.advance(1_000)
        second = host.slow_list()
        first.set()
        await until(lambda: len(host.gates) == 1 and host.is_listing)
        clock.advance(1_000)
        await server.act("t1", "drain")
        clock.advance(1_000)
        second.set()
        await _lists(server)
        assert await _state(server, made["uid"]) == "draining"


async def test_creates_and_deletes_on_one_host_do_not_wait_for_a_boot() -> None:
    async with running() as server:
        host = server.host
        await server.create("early")
        released = host.hold["create"] = asyncio.Event()
        booting = [asyncio.ensure_future(server.create(f"t{number}")) for number in range(8)]
        await until(lambda: host.count("create") == 1 + len(booting))  # none of them has been answered
        async with asyncio.timeout(60):
            assert (await server.delete("early")).status_code == 204
        released.set()
        assert {env["state"] for env in await asyncio.gather(*booting)} == {"running"}


async def test_a_guest_that_hangs_holds_up_neither_reconciliation_nor_its_own_end() -> None:
    async with running() as server:
        await server.create("t1")
        other = await server.create("t2")
        released = server.host.hold["relay"] = asyncio.Event()
        hanging = asyncio.ensure_future(server.act("t1", "exec", {"cmd": ["hang"]}))
        await until(lambda: server.host.count("relay") == 1)
        server.host.crash(next(m.id for m in server.host.table.values() if m.uid == other["uid"]))
        await until(lambda: _is(server, other["uid"], "failed"))
        async with asyncio.timeout(60):
            assert (await server.delete("t1")).status_code == 204
        released.set()
        assert (await hanging).status_code >= 400


async def test_tracked_guests_that_hang_do_not_delay_what_is_found_out_about_their_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracker, "LOOK_TIMEOUT_S", 3_600)
    async with running() as server:
        host = server.host
        for number in range(tracker.AT_ONCE + 1):
            await server.create(f"sick-{number}", healthcheck={"exec": ["true"]})
        other = await server.create("other")
        released = host.hold["relay"] = asyncio.Event()
        asked = host.count("relay")
        await until(lambda: host.count("relay") >= asked + tracker.AT_ONCE)  # nobody of them will answer
        host.crash(next(m.id for m in host.table.values() if m.uid == other["uid"]))
        await until(lambda: _is(server, other["uid"], "failed"))
        host.plant(replace(next(iter(host.table.values())), id="m-stray", uid="gone"))
        await until(lambda: "m-stray" not in host.table)
        released.set()


async def test_gauges_say_what_is_known_while_a_host_is_silent() -> None:
    """What is ours stays; what only the host could say is not told, neither as it was nor as zero."""
    async with running() as server:
        await server.create()
        await _lists(server)
        server.host.is_down = True
        silent = server.plane.metrics.reconcile_cycles.labels("no_list")
        before = silent._value.get()
        await until(lambda: silent._value.get() >= before + 2)
        view = server.plane.metrics.views["h1"]
        await until(lambda: view.is_up is False)
        text = (await server.http.get("/metrics")).text
        server.host.is_down = False
    for line in (
        'orchestrator_fleet_tracked_vms{state="running"} 1.0',
        'orchestrator_host_allocated{host="h1",resource="vm_count"} 1.0',
        'orchestrator_host_up{host="h1"} 0.0',
    ):
        assert line in text
    assert "orchestrator_fleet_provider_vms{" not in text


async def test_another_host_in_the_settings_costs_the_earlier_one_nothing(tmp_path: Path) -> None:
    first, second, path = FakeHost("h1"), FakeHost("h2"), str(tmp_path / "fuse.db")
    async with running(first, database=path) as server:
        made = await server.create()
    only_second = (HostSetting(id="h2", url="http://127.0.0.1:1"),)
    async with running(first, second, database=path, hosts=only_second) as server:
        await _lists(server)
        assert await _state(server, made["uid"]) == "running"
        assert len(first.table) == 1
        # It is still watched.
        first.forget(next(iter(first.table)))
        await until(lambda: _is(server, made["uid"], "failed"))


# -- names and ends ------------------------------------------------------------------------------------------------


async def test_a_task_id_is_free_only_when_its_failed_boot_is_cleaned_up() -> None:
    async with running() as server:
        released = server.host.hold["destroy"] = asyncio.Event()
        server.host.script("create", BootFailed(id="m", problem="kernel panic"))
        first = await server.create_ends()
        await until(lambda: server.host.count("destroy") == 1)
        assert (await server.http.post(URL, json={"task_id": "t1"})).status_code == 409
        released.set()
        await until(lambda: _is(server, first["uid"], "failed"))
        second = await server.create()
        # The same clean-up once more, as a network may deliver it, is about the first machine only.
        fence, machine_id = next(what for name, what in server.host.calls if name == "destroy")
        await server.host.destroy(fence, machine_id)
        await _lists(server)
        assert await _state(server, second["uid"]) == "running"
        assert [machine.uid for machine in server.host.table.values()] == [second["uid"]]


async def test_a_create_without_room_leaves_neither_record_nor_name() -> None:
    small = FakeHost("small", capacity=Resources(cpus=1, ram_mb=600, storage_gb=10, vm_count=5))
    async with running(small) as server:
        refused = await server.http.post(URL, json={"task_id": "t1", "spec": {"ram_mb": 4096}})
        assert (refused.status_code, refused.json()["error"]["details"]["reason"]) == (503, "no_capacity")
        for params in ({}, {"ended": "true"}):
            assert (await server.http.get(URL, params=params)).json()["environments"] == []
        assert (await server.get()).json()["error"]["details"]["reason"] == "environment_not_found"
        assert (await server.http.get("/v1/hosts/small")).json()["allocated"]["vm_count"] == 0
        assert await server.plane.store.facts_after(START, 10) == []
        assert (await server.create("t1"))["state"] == "running"


async def test_a_destroy_that_fails_is_repeated_until_the_host_confirms() -> None:
    async with running(policy=Policy(backoff_first_ms=1)) as server:
        await server.create()
        failures = (
            Internal(problem="busy"),
            HostUnreachable(id="h1", problem="connection refused"),
            Timeout(what="DELETE", limit_s=60),
            NoSpace(path="/", needed=1, free=0),
        )
        server.host.script("destroy", *failures)
        assert (await server.delete()).status_code == 204
        assert server.host.count("destroy") == len(failures) + 1
        assert server.host.table == {}


async def test_a_machine_that_its_host_has_lost_can_be_deleted() -> None:
    async with running(reconcile_s=60.0) as server:
        await server.create()
        server.host.forget(next(iter(server.host.table)))
        server.host.script("destroy", MachineNotFound(id="m"))
        assert (await server.delete()).status_code == 204
        assert (await server.get()).json()["error"]["details"]["reason"] == "ended"
        assert server.host.count("destroy") == 1


# -- what is kept --------------------------------------------------------------------------------------------------


async def test_everything_about_an_environment_survives_a_restart(tmp_path: Path) -> None:
    host, path = FakeHost("h1"), str(tmp_path / "fuse.db")
    settings = (HostSetting(id="h1", url="http://127.0.0.1:1", labels={"team": "a"}),)
    spec = {"labels": {"team": "a"}, "idle_timeout_seconds": 600, "max_runtime_seconds": 4000, "cpus": 2}
    async with running(host, database=path, hosts=settings, policy=Policy(activity_grain_ms=0)) as server:
        used, drained = await server.create("used", spec=spec), await server.create("drained", spec=spec)
        since = (await server.record(used["uid"])).last_activity_ms
        await until(lambda: server.plane.clock.now_ms() > since)
        await server.act("used", "exec", {"cmd": ["true"]})
        await server.act("drained", "drain")
        await server.plane.commands.tell(used["uid"])
        before = [await server.record(made["uid"]) for made in (used, drained)]
        shown = (await server.http.get("/v1/hosts/h1")).json()["allocated"]
    assert before[0].last_activity_ms > since
    async with running(host, database=path, hosts=settings) as server:
        await _lists(server)
        assert [await server.record(made["uid"]) for made in (used, drained)] == before
        assert (await server.http.get("/v1/hosts/h1")).json()["allocated"] == shown
        assert (await server.get("used")).json()["spec"]["labels"] == {"team": "a"}


async def test_the_database_is_for_its_owner_alone(tmp_path: Path) -> None:
    """It holds the output of commands (answers kept for Idempotency-Keys); the umask of the server does not matter."""
    before = os.umask(0o022)
    try:
        async with running(database=str(tmp_path / "fuse.db")) as server:
            await server.create()
            modes = {path.name: path.stat().st_mode & 0o077 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert {"fuse.db", "fuse.db-wal"} <= set(modes)
    assert set(modes.values()) == {0}


# -- commands ------------------------------------------------------------------------------------------------------


async def test_arguments_and_variables_reach_the_guest_as_they_were_sent() -> None:
    asked: list[ExecRequest] = []

    def note(order: ExecRequest) -> ExecResult:
        asked.append(order)
        return result()

    command = ["printf", "%s", "a b; $HOME `id` && rm -rf /", "", "--", "'\"\\\n"]
    variables = {"A": "$HOME ${B} $$ `id`", "B": ""}
    async with running() as server:
        server.host.on_exec = note
        await server.create()
        assert (await server.act("t1", "exec", {"cmd": command, "env": variables})).status_code == 200
    assert (asked[0].cmd, asked[0].env, asked[0].shell) == (command, variables, "")


async def test_a_command_has_all_of_its_time() -> None:
    """No other limit ends it: neither of this server nor of its way to the host."""
    async with running() as server:
        await server.create()
        await server.act("t1", "exec", {"cmd": ["true"], "timeout_ms": 600_000})
        (request,) = (what for name, what in server.host.calls if name == "relay")
    assert request.timeout_s > 600


async def test_a_client_that_leaves_breaks_the_way_to_its_command() -> None:
    """The host sees the hang-up, and the agent ends the command."""
    cancelled = asyncio.Event()

    class Noticing(FakeHost):
        async def relay(self, request):
            try:
                return await super().relay(request)
            except asyncio.CancelledError:
                cancelled.set()
                raise

    host = Noticing()
    async with running(host) as server:
        await server.create()
        host.hold["relay"] = asyncio.Event()
        await leave(server.act("t1", "exec", {"cmd": ["sleep", "600"]}), lambda: host.count("relay") == 1)
        await until(cancelled.is_set)
