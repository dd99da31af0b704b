"""The control plane in front of the real host daemon (journal, fences, relay) with a fake driver, over pinned TLS."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import websockets
from control_harness import Running, running, until

from fusevm.control.config import HostSetting
from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.config import Listen
from fusevm.host.daemon import Daemon
from fusevm.host.listeners import bind_tcp, serving
from fusevm.host.tls import ensure_identity, make_ssl_context
from fusevm.model.machine import Fence
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import FakeHost
from fusevm.testing.host_world import FakeMeter, World, order
from fusevm.wire.frames import Frame, FrameType, decode_message, encode_frame
from fusevm.wire.guest import ExecRequest


@contextlib.asynccontextmanager
async def together(folder: Path, world: World, **changes: object) -> AsyncIterator[tuple[Running, Daemon]]:
    """A daemon on a TLS port, and a control plane that knows it as `default`."""
    async with (
        served(folder, world) as (setting, daemon),
        running(FakeHost("unused"), hosts=(setting,), **changes) as server,
    ):
        yield server, daemon
        daemon.events.close()


@contextlib.asynccontextmanager
async def served(folder: Path, world: World, port: int = 0) -> AsyncIterator[tuple[HostSetting, Daemon]]:
    """A daemon on a TLS port, and how a control plane finds it."""
    async with world.daemon() as daemon:
        identity = ensure_identity(folder)
        listener = bind_tcp(Listen(host="127.0.0.1", port=port))
        app = Boundary(make_router(daemon), daemon.metrics, secret=identity.secret)
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        async with serving(listener, app, make_ssl_context(identity)):
            yield HostSetting(id="default", url=url, token=identity.token), daemon


async def test_a_life_through_both(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with together(tmp_path, world) as (server, daemon):
        made = await server.create("A_b.1")
        assert (made["state"], made["host_id"]) == ("running", "default")
        host = (await server.http.get("/v1/hosts/default")).json()
        assert (host["driver"], host["health"]) == ("fake", "ok")
        (machine,) = daemon.machines.records()
        assert (machine.fence.uid, machine.fence.incarnation) == (made["uid"], 1)
        assert machine.spec.hostname == "a-b-1"
        answer = (await server.act("A_b.1", "exec", {"cmd": ["echo", "hello"]})).json()
        assert (answer["exit_code"], answer["stdout"]) == (0, "hello\n")
        missing = await server.act("A_b.1", "exec", {"cmd": ["no-such-program"]})
        assert (missing.status_code, missing.json()["error"]["details"]["reason"]) == (400, "command_not_found")
        url = "/v1/environments/fuse-A_b.1/files?path=/tmp/a%20b"
        assert (await server.http.put(url, content=b"x" * 300_000)).json()["size_bytes"] == 300_000
        assert (await server.http.get(url, headers={"Range": "bytes=1-4"})).content == b"xxxx"
        assert (await server.http.head(url)).headers["content-length"] == "300000"
        assert (await server.http.get("/v1/environments/fuse-A_b.1/logs")).status_code == 200
        assert (await server.delete("A_b.1")).status_code == 204
        assert daemon.machines.records() == []
        shown = (await server.get("A_b.1", uid=made["uid"])).json()
        assert shown["state"] == "destroyed"


async def test_network_and_ports_through_both(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with together(tmp_path, world) as (server, daemon):
        rules = [{"domain": "pypi.org", "ports": [443]}]
        made = await server.create("net", expose=[{"port": 80, "as": "web"}], network={"rules": rules})
        (machine,) = daemon.machines.records()
        assert (machine.spec.network.internet, machine.spec.network.rules[0].domain) == (False, "pypi.org")
        (port,) = machine.ports
        wanted = {"as": "web", "url": f"127.0.0.1:{port.host_port}", "port": 80, "protocol": "tcp"}
        assert made["endpoints"] == [wanted]
        answer = await server.http.put("/v1/environments/fuse-net/network", json={"internet": True, "egress_kbit": 512})
        assert (answer.status_code, answer.json()["network"]) == (200, {"internet": True, "egress_kbit": 512})
        assert world.quarters.rewired[machine.id].spec.network.egress_kbit == 512
        # The order has a number of its own: what was given before is refused from then on.
        assert daemon.machines.records()[0].fence.action_seq > machine.fence.action_seq


async def two_lists(meter: FakeMeter) -> None:
    """One of them was begun and judged after this was called."""
    asked = meter.asked
    await until(lambda: meter.asked > asked + 2)


async def test_a_service_that_is_used_only_by_its_port_lives_as_long_as_clients_come(tmp_path: Path) -> None:
    world, clock = World(tmp_path), FakeClock()
    world.meter = meter = FakeMeter()
    async with together(tmp_path, world, clock=clock) as (server, daemon):
        made = await server.create("web", expose=[{"port": 80}], spec={"idle_timeout_seconds": 60})
        (machine,) = daemon.machines.records()
        for _ in range(4):
            clock.advance(50_000)
            meter.used = {machine.slot: 3}

            async def is_noted() -> bool:
                return (await server.record(made["uid"])).last_activity_ms == clock.now_ms() - 3_000

            await until(is_noted)
        meter.used = {}
        await two_lists(meter)
        revision = (await server.record(made["uid"])).revision
        clock.advance(61_000)
        await two_lists(meter)
        assert (await server.record(made["uid"])).revision == revision, "where nothing is new, nothing is written"
        clock.advance(10_000)

        async def is_over() -> bool:
            return (await server.get("web", uid=made["uid"])).json()["state"] == "destroyed"

        await until(is_over)
        assert (await server.get("web", uid=made["uid"])).json()["reason"] == "idle"


async def test_a_terminal_through_both(tmp_path: Path) -> None:
    async with together(tmp_path, World(tmp_path)) as (server, _):
        await server.create()
        url = server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t1/exec"
        async with websockets.connect(url) as socket:
            start = msgspec.json.encode(ExecRequest(cmd=["cat"]))
            await socket.send(encode_frame(Frame(FrameType.START, start)))
            assert decode_message(await socket.recv()).type is FrameType.STARTED
            await socket.send(encode_frame(Frame(FrameType.STDIN, b"hi")))
            assert decode_message(await socket.recv()) == Frame(FrameType.STDOUT, b"hi")
            await socket.send(encode_frame(Frame(FrameType.STDIN_EOF)))
            assert decode_message(await socket.recv()).type is FrameType.EXIT


async def test_a_boot_that_is_deleted_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with together(tmp_path, world, wait_s=0.05) as (server, _):
        boot = world.driver.holds.hold("boot")
        await server.create()
        await world.driver.holds.reached("boot").wait()
        assert (await server.delete()).status_code in (202, 204)
        boot.set()

        async def is_gone() -> bool:
            return (await server.get()).status_code == 404

        await until(is_gone)
        assert world.driver.processes == {}


async def test_a_vmm_that_dies_fails_its_environment(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with together(tmp_path, world, reconcile_s=30.0) as (server, daemon):
        made = await server.create()
        await until(lambda: daemon.events.subscribers > 0)
        next(iter(world.driver.processes.values())).end("killed by signal 9")

        async def is_failed() -> bool:
            body = (await server.get(uid=made["uid"])).json()
            return body["state"] == "failed" and body["reason"] == "machine_exited"

        await until(is_failed)
        assert daemon.machines.records() == []


async def test_a_reboot_of_the_host_ends_what_ran_there_and_says_so(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with contextlib.AsyncExitStack() as life:
        setting, daemon = await life.enter_async_context(served(tmp_path, world))
        async with running(FakeHost("unused"), hosts=(setting,), reconcile_s=0.2) as server:
            made = await server.create()
            daemon.events.close()
            await life.aclose()
            for process in list(world.driver.processes.values()):
                process.end("the power went")
            world.boot_id = "another boot"
            port = int(setting.url.rpartition(":")[2])
            async with served(tmp_path, world, port) as (_, daemon):

                async def is_over() -> bool:
                    body = (await server.get(uid=made["uid"])).json()
                    return body["state"] == "failed" and daemon.machines.records() == []

                await until(is_over)
                ending = (await server.record(made["uid"])).ending
                assert ending is not None
                assert (ending.reason, "host rebooted" in ending.message) == ("machine_exited", True)
                # The name is free, and the host serves.
                assert (await server.create())["state"] == "running"
                daemon.events.close()
    assert len(world.leftovers[0]) == 1


async def test_orphans_go_and_later_orders_are_still_accepted(tmp_path: Path) -> None:
    """An orphan of a uid that lives on in a newer incarnation must not fence the newer one out."""
    async with together(tmp_path, World(tmp_path)) as (server, daemon):
        made = await server.create()
        stray = Fence(cluster=server.plane.store.cluster, uid="somebody", incarnation=1, action_seq=3)
        await daemon.machines.create(order("m-stray"), stray)
        await until(
            lambda: [machine.id for machine in daemon.machines.records()] != [] and len(daemon.machines.records()) == 1
        )
        assert daemon.machines.records()[0].fence.uid == made["uid"]
        assert (await server.act("t1", "exec", {"cmd": ["echo", "x"]})).status_code == 200
        assert (await server.delete()).status_code == 204


async def test_machines_of_users_of_the_contract_are_left_alone(tmp_path: Path) -> None:
    async with together(tmp_path, World(tmp_path)) as (server, daemon):
        await daemon.machines.create(order("m-local"), None)
        await server.create()
        rounds = server.plane.metrics.reconcile_cycles.labels("done")
        before = rounds._value.get()
        await until(lambda: rounds._value.get() > before + 3)
        assert "m-local" in {machine.id for machine in daemon.machines.records()}


async def test_head_of_a_missing_file_is_a_404(tmp_path: Path) -> None:
    async with together(tmp_path, World(tmp_path)) as (server, _):
        await server.create()
        url = "/v1/environments/fuse-t1/files?path=/missing"
        assert (await server.http.get(url)).status_code == 404
        assert (await server.http.head(url)).status_code == 404


async def test_the_life_of_a_snapshot_through_both(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with together(tmp_path, world) as (server, daemon):
        made = await server.create("t1", secrets={"A": "b"})
        (machine,) = daemon.machines.records()
        world.disks.write(machine.id, b"before")
        taken = await server.http.post("/v1/environments/fuse-t1/snapshots", json={"comment": "first"})
        assert taken.status_code == 201, taken.text
        snapshot = taken.json()
        assert (snapshot["state"], snapshot["kind"]) == ("ready", "disk")
        assert snapshot["size_bytes"] > 0
        world.disks.write(machine.id, b"after")
        assert [one["id"] for one in (await server.http.get("/v1/snapshots")).json()["snapshots"]] == [snapshot["id"]]

        url = f"/v1/snapshots/{snapshot['id']}"
        assert (await server.http.post(url + "?action=restore")).status_code == 204
        assert world.disks.read(machine.id) == b"before"
        (restored,) = daemon.machines.records()
        assert (restored.id, restored.generation) == (machine.id, 2)
        assert "PUT /setup" in world.driver.processes[machine.id].agent.requests, "secrets are delivered again"
        assert (await server.get("t1", uid=made["uid"])).json()["state"] == "running"

        seeded = await server.create("t2", seed_snapshot_id=snapshot["id"])
        assert (seeded["state"], seeded["host_id"]) == ("running", "default")
        (other,) = (record for record in daemon.machines.records() if record.id != machine.id)
        assert world.disks.read(other.id) == b"before"

        assert (await server.http.delete(url)).status_code == 204
        assert (await server.http.get(url)).status_code == 404
        assert await daemon.snapshots.load_all() == []
        assert list((tmp_path / "data" / "snapshots").iterdir()) == []
        assert (await server.act("t2", "exec", {"cmd": ["echo", "x"]})).status_code == 200


async def test_what_expires_is_freed_on_the_host(tmp_path: Path) -> None:
    async with together(tmp_path, World(tmp_path)) as (server, daemon):
        await server.create()
        url = "/v1/environments/fuse-t1/snapshots"
        old = (await server.http.post(url, json={"retention_seconds": 1})).json()
        new = (await server.http.post(url, json={})).json()

        async def is_freed() -> bool:
            return [snapshot.id for snapshot in await daemon.snapshots.load_all()] == [new["id"]]

        await until(is_freed)
        assert not (tmp_path / "data" / "snapshots" / old["id"]).exists()
