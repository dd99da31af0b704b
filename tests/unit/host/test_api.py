"""The host API over real sockets: Unix and TLS, with a fake driver behind it."""

import asyncio
import base64
import contextlib
import json
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import websockets.asyncio.client as ws
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fusevm.host.api import HANDLERS, make_router
from fusevm.host.boundary import Boundary
from fusevm.host.clock import read_moment
from fusevm.host.config import Listen
from fusevm.host.daemon import Daemon
from fusevm.host.listeners import bind_tcp, bind_unix, serving
from fusevm.host.tls import ensure_identity, make_ssl_context
from fusevm.model.errors import Error
from fusevm.model.machine import Moment, Phase
from fusevm.testing.fake_answer import FakeAnswer
from fusevm.testing.host_world import SPEC, World, fence, until
from fusevm.wire.errors import parse_error
from fusevm.wire.frames import Frame, FrameType, decode_message, encode_frame
from fusevm.wire.guest import ExecRequest
from fusevm.wire.host_api import HostFacts, MachineAnswer, MachineEvent, MachineList, fence_headers
from fusevm.wire.host_routes import HOST_ROUTES
from fusevm.wire.http1 import Body, Connection, Response
from fusevm.wire.pin import parse_host_token, spki_sha256
from fusevm.wire.streams import open_tcp, open_unix


class Api:
    """A daemon that serves, and a client."""

    def __init__(self, world: World, daemon: Daemon, path: Path) -> None:
        self.world = world
        self.daemon = daemon
        self.path = path

    @asynccontextmanager
    async def exchange(self, method: str, target: str, headers=None, body: Body = None) -> AsyncIterator[Response]:
        """One request on a connection of its own."""
        connection = Connection(await open_unix(str(self.path)))
        try:
            yield await connection.request(method, target, headers=headers or {}, body=body)
        finally:
            await connection.close()

    async def call(self, method: str, target: str, headers=None, body: Body = None) -> tuple[int, bytes]:
        """Status and whole body."""
        async with self.exchange(method, target, headers, body) as response:
            return response.status, await response.read()

    async def fails(self, method: str, target: str, headers=None, body: Body = None) -> Error:
        """The error of a request that is refused."""
        status, content = await self.call(method, target, headers, body)
        assert status >= 400, content
        flat = json.loads(content)
        assert set(flat) == {"error", "code", "details"}
        assert flat["details"]["reason"]
        error = parse_error(status, content)
        assert error.status == status
        return error

    async def create(self, machine_id: str = "m-1", uid: str = "u1") -> MachineAnswer:
        """A running machine."""
        body = {"machine_id": machine_id, "spec": msgspec.to_builtins(SPEC)}
        status, content = await self.call("POST", "/machines", fence_headers(fence(uid)), json.dumps(body).encode())
        assert status == 201, content
        return msgspec.json.decode(content, type=MachineAnswer)

    def frames(self, machine_id: str = "m-1", uid: str = "u1") -> ws.unix_connect:
        """The exec WebSocket."""
        uri = f"ws://fuse/machines/{machine_id}/guest/exec"
        headers = fence_headers(fence(uid))
        return ws.unix_connect(str(self.path), uri, additional_headers=headers, compression=None, ping_interval=None)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    world = World(tmp_path)
    async with world.daemon() as daemon:
        path = tmp_path / "api.sock"
        app = Boundary(make_router(daemon), daemon.metrics, secret=None)
        async with serving(bind_unix(path), app):
            yield Api(world, daemon, path)
            daemon.events.close()


FENCE = fence_headers(fence())


# -- the table and the errors ----------------------------------------------------------------------------------------


def test_every_route_has_a_handler_and_every_handler_a_route():
    names = {route.name for route in HOST_ROUTES}
    assert {name for name in names if not name.startswith("relay_")} - {"exec_frames"} == set(HANDLERS)


async def test_the_document_that_is_served_is_the_one_in_docs(api: Api):
    status, content = await api.call("GET", "/openapi.json")
    committed = json.loads((Path(__file__).parents[3] / "docs/host-openapi.json").read_text())
    assert (status, json.loads(content)) == (200, committed)


async def test_unknown_routes_and_methods_are_flat_errors(api: Api):
    assert (await api.fails("GET", "/nowhere")).reason == "route_not_found"
    assert (await api.fails("GET", "/machines/")).reason == "route_not_found"
    async with api.exchange("PATCH", "/machines") as response:
        assert (response.status, response.headers["allow"]) == (405, "GET, POST")
        assert parse_error(405, await response.read()).reason == "method_not_allowed"
    async with api.exchange("POST", "/machines/m-1") as response:
        assert response.headers["allow"] == "DELETE, GET"


async def test_bodies_are_decoded_and_bounded(api: Api):
    assert (await api.fails("POST", "/machines", FENCE, b"{")).reason == "bad_json"
    assert (await api.fails("POST", "/machines", FENCE, b'{"machine_id": 5}')).reason == "bad_json"
    assert (await api.fails("POST", "/machines", FENCE, b" " * (2 << 20))).reason == "payload_too_large"


async def test_unknown_fields_are_named_and_environment_values_hidden(api: Api):
    spec = {**msgspec.to_builtins(SPEC), "env": {"TOKEN": "s3cret"}, "memory_mb": 1}
    body = json.dumps({"machine_id": "m-1", "spec": spec, "wrong": 1}).encode()
    async with api.exchange("POST", "/machines", FENCE, body) as response:
        assert response.status == 201
        assert response.headers["warning"] == '299 - "unknown fields ignored: spec.memory_mb, wrong"'
        assert json.loads(await response.read())["machine"]["spec"]["env"] == {"TOKEN": "(hidden)"}
    for target in ("/machines", "/machines/m-1", "/state"):
        _, content = await api.call("GET", target)
        assert b"s3cret" not in content


async def test_half_a_fence_is_refused(api: Api):
    body = json.dumps({"machine_id": "m-1", "spec": msgspec.to_builtins(SPEC)}).encode()
    assert (await api.fails("POST", "/machines", {"fuse-cluster": "c1"}, body)).reason == "bad_field"
    local = {**FENCE, "fuse-cluster": "local"}
    assert (await api.fails("POST", "/machines", local, body)).reason == "bad_field"


async def test_every_answer_carries_a_request_id(api: Api):
    async with api.exchange("GET", "/health", {"x-request-id": "mine-1"}) as response:
        assert response.headers["x-request-id"] == "mine-1"
    async with api.exchange("GET", "/nowhere", {"x-request-id": "a b"}) as response:
        assert len(response.headers["x-request-id"]) == 16


async def test_a_bug_is_an_internal_error_and_nothing_more_is_told(api: Api, monkeypatch):
    async def broken():
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(api.daemon, "facts", broken)
    error = await api.fails("GET", "/info")
    assert (error.reason, "secret" in error.message) == ("internal", False)


# -- the host --------------------------------------------------------------------------------------------------------


async def test_health_info_and_state(api: Api):
    assert await api.call("GET", "/health") == (200, b'{"ok":true}')
    await api.create()
    _, content = await api.call("GET", "/info")
    facts = msgspec.json.decode(content, type=HostFacts)
    assert (facts.epoch, facts.cluster, facts.driver) == ("epoch", "c1", "fake")
    assert (facts.reserved.vm_count, facts.reserved.ram_mb) == (1, 356)
    assert facts.capacity.cpus == 16
    _, content = await api.call("GET", "/state")
    state = json.loads(content)
    assert state["journal"]["entries"][0]["machine"]["id"] == "m-1"
    assert state["observed"]["phases"] == {"m-1": "running"}
    assert b"nonce" not in content


async def test_images_storage_and_metrics(api: Api):
    await api.create()
    assert await api.call("GET", "/images") == (200, b'{"images":[]}')
    _, content = await api.call("GET", "/storage/report")
    report = json.loads(content)["report"]
    assert [pool["pool"] for pool in report["pools"]] == [
        "artifacts",
        "machine-disks",
        "published-ports",
        "snapshots",
        "state",
    ]
    assert report["total_bytes"] == sum(pool["bytes"] for pool in report["pools"]) > 0
    _, content = await api.call("GET", "/metrics")
    assert b'fuse_host_machines{phase="running"} 1.0' in content
    assert b'fuse_host_requests_total{method="POST",route="create_machine",status="201"} 1.0' in content
    assert b"fuse_host_boot_seconds_bucket" in content


async def test_events_begin_with_hello_and_tell_every_change(api: Api):
    async with api.exchange("GET", "/events") as response:
        lines = _lines(response)
        hello = await anext(lines)
        assert (hello.kind, hello.epoch) == ("hello", "epoch")
        await api.create()
        await api.call("DELETE", "/machines/m-1", FENCE)
        seen = [await anext(lines) for _ in range(4)]
    assert [event.phase for event in seen] == ["creating", "running", "deleting", "deleting"]
    assert [event.kind for event in seen] == ["phase", "phase", "phase", "gone"]
    assert {(event.machine_id, event.uid, event.incarnation) for event in seen} == {("m-1", "u1", 1)}
    await until(lambda: api.daemon.events.subscribers == 1)  # the world's own


async def test_an_event_stream_says_that_it_is_alive(api: Api, monkeypatch):
    monkeypatch.setattr("fusevm.host.api._KEEPALIVE_S", 0.01)
    async with api.exchange("GET", "/events") as response:
        lines = _lines(response)
        assert [(await anext(lines)).kind for _ in range(3)] == ["hello", "keepalive", "keepalive"]


async def test_a_subscriber_that_does_not_read_is_cut_off(api: Api):
    with api.daemon.events.subscribe() as subscription:
        machine = (await api.create()).machine
        record = api.daemon.machines.record(machine.id)
        for _ in range(2000):
            api.daemon.events.publish(record)
        assert await subscription.next() is None


async def _lines(response: Response) -> AsyncIterator[MachineEvent]:
    rest = b""
    async for chunk in response.chunks():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line, type=MachineEvent)


# -- machines --------------------------------------------------------------------------------------------------------


async def test_the_life_of_a_machine(api: Api):
    made = (await api.create()).machine
    assert (made.phase, made.uid, made.cluster, made.incarnation) == (Phase.RUNNING, "u1", "c1", 1)
    assert made.timings.host_ms > 0
    assert made.created_at.endswith("Z")
    _, content = await api.call("GET", "/machines")
    listed = msgspec.json.decode(content, type=MachineList)
    assert (listed.machines, listed.tombstones) == ([made], 0)
    _, content = await api.call("GET", "/machines/m-1")
    assert msgspec.json.decode(content, type=MachineAnswer).machine == made
    assert await api.call("POST", "/machines/m-1/stop", FENCE) == (204, b"")
    status, content = await api.call("POST", "/machines/m-1/start", FENCE)
    assert (status, msgspec.json.decode(content, type=MachineAnswer).machine.generation) == (200, 2)
    assert await api.call("DELETE", "/machines/m-1", FENCE) == (204, b"")
    assert await api.call("DELETE", "/machines/m-1", FENCE) == (204, b"")
    assert (await api.fails("GET", "/machines/m-1")).reason == "machine_not_found"
    _, content = await api.call("GET", "/machines")
    assert msgspec.json.decode(content, type=MachineList) == MachineList(machines=[], tombstones=1)


async def test_every_route_of_a_machine_refuses_bad_and_unknown_ids(api: Api):
    for route in HOST_ROUTES:
        if "{id}" not in route.path or route.is_websocket or route.method == "HEAD":
            continue
        body = b'{"command":["true"],"operation":"list","snapshot_id":"s"}' if route.takes else None
        for machine_id, status in (("m_1", 400), ("..%2f..", 404), ("nobody", 404)):
            target = route.path.replace("{id}", machine_id).replace("{path:path}", "files")
            if route.name == "delete_machine" and machine_id == "nobody":
                continue  # idempotent
            error = await api.fails(route.method, target, None, body)
            assert error.status == status, (route.name, machine_id, error.message)


async def test_orders_without_a_fence_touch_no_machine_of_a_cluster(api: Api):
    await api.create()
    for method, target, body in (
        ("DELETE", "/machines/m-1", None),
        ("POST", "/machines/m-1/stop", None),
        ("POST", "/machines/m-1/exec", b'{"command":["echo"]}'),
        ("GET", "/machines/m-1/guest/files?path=/x", None),
        ("GET", "/machines/m-1/logs", None),
    ):
        assert (await api.fails(method, target, None, body)).reason == "wrong_cluster", target
    for target in ("/machines/m-1/guest/health", "/machines/m-1/logs"):
        stale = fence_headers(fence(incarnation=0))
        assert (await api.fails("GET", target, stale)).reason == "stale_incarnation"
        foreign = fence_headers(fence(uid="u2"))
        assert (await api.fails("GET", target, foreign)).reason == "machine_exists"
        other = fence_headers(fence(cluster="c2"))
        assert (await api.fails("GET", target, other)).reason == "wrong_cluster"
        local = {**FENCE, "fuse-cluster": "local"}
        assert (await api.fails("GET", target, local)).reason == "bad_field"


def _order(ms: int, action_seq: int = 1, clock: str = "") -> dict[str, str]:
    """Headers of an order of the control plane that is valid for so long."""
    now = read_moment()
    until = Moment(clock=clock or now.clock, ms=now.ms + ms)
    return fence_headers(msgspec.structs.replace(fence(action_seq=action_seq), valid_until=until))


async def test_info_tells_the_clock_that_limits_go_by(api: Api):
    _, content = await api.call("GET", "/info")
    told, now = msgspec.json.decode(content, type=HostFacts).clock, read_moment()
    assert told.clock == now.clock
    assert 0 <= now.ms - told.ms < 60_000


async def test_an_order_to_the_guest_is_judged_like_one_about_the_machine(api: Api):
    await api.create()
    target = "/machines/m-1/guest/health"
    assert (await api.fails("GET", target, _order(-1))).reason == "order_expired"
    assert (await api.fails("GET", target, _order(60_000, clock="another boot"))).reason == "order_expired"
    assert (await api.call("GET", target, _order(60_000, action_seq=4)))[0] == 200
    assert (await api.call("GET", target, _order(60_000, action_seq=4)))[0] == 200
    assert (await api.fails("GET", target, _order(60_000, action_seq=3))).reason == "stale_action"
    assert (await api.fails("POST", "/machines/m-1/stop", _order(60_000, action_seq=3))).reason == "stale_action"
    assert (await api.call("GET", target, FENCE))[0] == 200  # what users send is no order


async def test_an_order_whose_body_stalls_beyond_its_limit_does_not_reach_the_guest(api: Api):
    await api.create()
    heard = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield b"half"
        await heard.wait()
        yield b" and the rest"

    headers, target = _order(1_000), "/machines/m-1/guest/files?path=/late"
    asyncio.get_running_loop().call_later(1.1, heard.set)
    assert (await api.fails("PUT", target, headers, stalled())).reason == "order_expired"
    assert (await api.fails("GET", target, FENCE)).reason == "file_not_found"


async def test_a_create_whose_body_stalls_beyond_its_limit_makes_nothing(api: Api):
    body = json.dumps({"machine_id": "m-1", "spec": msgspec.to_builtins(SPEC)}).encode()
    heard = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield body[:10]
        await heard.wait()
        yield body[10:]

    asyncio.get_running_loop().call_later(0.3, heard.set)
    assert (await api.fails("POST", "/machines", _order(200), stalled())).reason == "order_expired"
    assert api.daemon.machines.records() == []


async def test_a_user_of_the_contract_needs_no_fence(api: Api):
    body = json.dumps({"machine_id": "box", "spec": {"image": "debian-12"}}).encode()
    status, content = await api.call("POST", "/machines", None, body)
    assert status == 201
    assert json.loads(content)["machine"]["cluster"] == "local"
    status, content = await api.call("POST", "/machines/box/exec", None, b'{"command":["echo","hi"]}')
    assert (status, json.loads(content)["stdout"]) == (200, "hi\n")
    assert await api.call("DELETE", "/machines/box") == (204, b"")


# -- exec ------------------------------------------------------------------------------------------------------------


async def _exec(api: Api, *command: str, **more) -> dict:
    body = json.dumps({"command": command, **more}).encode()
    status, content = await api.call("POST", "/machines/m-1/exec", FENCE, body)
    assert status == 200, content
    return json.loads(content)


async def test_exec_answers_as_the_contract_does(api: Api):
    await api.create()
    assert await _exec(api, "echo", "a", "b") == {"exit_code": 0, "stdout": "a b\n", "stderr": "", "duration_ms": 0}
    assert (await _exec(api, "exit", "3"))["exit_code"] == 3
    assert (await _exec(api, "stderr", "no"))["stderr"] == "no\n"
    assert (await _exec(api, "garbage"))["stdout"] == "\ufffd\ufffd"
    assert len((await _exec(api, "bytes", str(10 << 20)))["stdout"]) == 10 << 20


async def test_errors_of_the_agent_pass_through(api: Api):
    await api.create()
    body = b'{"command":["no-such-program"]}'
    assert (await api.fails("POST", "/machines/m-1/exec", FENCE, body)).reason == "command_not_found"
    assert (await api.fails("GET", "/machines/m-1/guest/nowhere", FENCE)).reason == "route_not_found"
    assert (await api.fails("GET", "/machines/m-1/guest/files?path=/no", FENCE)).reason == "file_not_found"
    assert (await api.fails("POST", "/machines/m-1/exec", FENCE, b'{"command":[]}')).reason == "bad_field"


async def test_a_stopped_machine_runs_nothing(api: Api):
    await api.create()
    await api.call("POST", "/machines/m-1/stop", FENCE)
    assert (await api.fails("POST", "/machines/m-1/exec", FENCE, b'{"command":["x"]}')).reason == "wrong_state"
    assert (await api.fails("GET", "/machines/m-1/guest/health", FENCE)).reason == "wrong_state"


async def test_a_client_that_goes_away_ends_its_command(api: Api):
    await api.create()
    agent = api.world.driver.processes["m-1"].agent
    connection = Connection(await open_unix(str(api.path)))
    asking = asyncio.create_task(
        connection.request("POST", "/machines/m-1/exec", headers=FENCE, body=b'{"command":["hang"]}')
    )
    await until(lambda: "POST /exec" in agent.requests)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await connection.close()
    async with asyncio.timeout(60):
        await agent.abandoned_changed.wait()
    assert agent.abandoned == ["hang"]


# -- the relay -------------------------------------------------------------------------------------------------------


async def _chunks(count: int, size: int = 1 << 16) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number % 251]) * size


async def test_files_are_streamed_both_ways(api: Api):
    await api.create()
    target = "/machines/m-1/guest/files?path=/a%20b/%C3%A4"
    status, content = await api.call("PUT", target, FENCE, _chunks(400))
    assert (status, json.loads(content)["size_bytes"]) == (200, 400 << 16)
    async with api.exchange("GET", target, FENCE) as response:
        assert response.headers["content-length"] == str(400 << 16)
        assert response.headers["x-fuse-mode"] == "0644"
        assert await response.read() == b"".join([chunk async for chunk in _chunks(400)])
    agent = api.world.driver.processes["m-1"].agent
    assert agent.requests[-1] == "GET /files?path=/a%20b/%C3%A4"
    assert set(agent.files) == {"/a b/ä"}


async def test_requests_one_after_another_share_a_stream_to_the_agent(api: Api):
    await api.create()
    serving = api.world.driver.processes["m-1"].serving
    target = "/machines/m-1/guest/files?path=/shared"
    assert (await api.call("PUT", target, FENCE, _chunks(3)))[0] == 200
    await until(lambda: len(serving) == 1)
    streams = set(serving)
    assert len((await api.call("GET", target, FENCE))[1]) == 3 << 16
    assert (await api.fails("GET", "/machines/m-1/guest/files?path=/no", FENCE)).reason == "file_not_found"
    assert (await api.call("DELETE", target, FENCE))[0] == 204
    assert serving == streams


async def test_a_stream_whose_request_was_given_up_is_not_used_again(api: Api):
    await api.create()
    process = api.world.driver.processes["m-1"]
    async with api.exchange("GET", "/machines/m-1/guest/endless", FENCE) as response:
        await anext(response.chunks())
        await until(lambda: len(process.serving) == 1)
        given_up = set(process.serving)
        assert (await api.call("GET", "/machines/m-1/guest/health", FENCE))[0] == 200
    await until(lambda: not given_up & process.serving)
    assert (await api.call("GET", "/machines/m-1/guest/health", FENCE))[0] == 200
    assert len(process.serving) == 1


async def test_no_more_streams_are_kept_than_a_few(api: Api):
    await api.create()
    serving = api.world.driver.processes["m-1"].serving
    async with contextlib.AsyncExitStack() as readers:
        for _ in range(12):
            reading = api.exchange("GET", "/machines/m-1/guest/health", FENCE)
            answer = await readers.enter_async_context(reading)
            await answer.read()
        assert len(serving) <= 2
    await asyncio.gather(*(api.call("GET", "/machines/m-1/guest/health", FENCE) for _ in range(30)))
    await until(lambda: len(serving) <= 8)


@pytest.mark.parametrize("body", [b"", b"x"])
async def test_small_and_empty_files(api: Api, body: bytes):
    await api.create()
    assert (await api.call("PUT", "/machines/m-1/guest/files?path=/e", FENCE, body))[0] == 200
    assert await api.call("GET", "/machines/m-1/guest/files?path=/e", FENCE) == (200, body)


async def test_ranges_and_heads_pass_through(api: Api):
    await api.create()
    target = "/machines/m-1/guest/files?path=/f"
    await api.call("PUT", target, FENCE, b"0123456789")
    async with api.exchange("GET", target, {**FENCE, "range": "bytes=2-4"}) as response:
        assert (response.status, await response.read()) == (206, b"234")
        assert response.headers["content-range"] == "bytes 2-4/10"
    async with api.exchange("HEAD", target, FENCE) as response:
        assert (response.status, response.headers["content-length"]) == (200, "10")
    error = await api.fails("GET", target, {**FENCE, "range": "bytes=99-"})
    assert (error.reason, error.status) == ("bad_range", 400)
    assert await api.call("HEAD", "/machines/m-1/guest/files?path=/no", FENCE) == (404, b"")
    assert await api.call("DELETE", target, FENCE) == (204, b"")


@pytest.mark.parametrize("status", [400, 403, 404, 409, 500, 503])
async def test_an_error_without_a_body_keeps_its_status_for_head(api: Api, monkeypatch, status: int):
    """Nobody can tell what it was but by its status; an answer that may have a body and has none is a fault."""
    await api.create()

    monkeypatch.setattr("fusevm.testing.fake_files.FakeFiles.answer", lambda *_: FakeAnswer(status))
    target = "/machines/m-1/guest/files?path=/x"
    assert await api.call("HEAD", target, FENCE) == (status, b"")
    error = await api.fails("GET", target, FENCE)
    assert (error.reason, str(status) in error.message) == ("internal", True)


async def test_the_guest_hears_neither_token_nor_fence(api: Api, monkeypatch):
    await api.create()
    heard: list[dict[str, str]] = []
    original = Connection.request

    async def spy(self, method, target, *, headers=None, body=None):
        if target == "/health" and self._authority == "fuse":
            heard.append(dict(headers or {}))
        return await original(self, method, target, headers=headers, body=body)

    monkeypatch.setattr(Connection, "request", spy)
    more = {**FENCE, "authorization": "Bearer x", "cookie": "y", "accept": "z"}
    assert (await api.call("GET", "/machines/m-1/guest/health", more))[0] == 200
    assert heard[-1] == {"accept": "z"}


async def test_a_reader_that_does_not_read_stops_the_guest(api: Api):
    await api.create()
    async with api.exchange("GET", "/machines/m-1/guest/endless", FENCE) as response:
        chunks = response.chunks()
        await anext(chunks)
        process = api.world.driver.processes["m-1"]
        await asyncio.sleep(0.2)
        assert len(process.serving) == 1
    await until(lambda: not process.serving)


async def test_an_answer_that_breaks_off_is_cut_off(api: Api):
    await api.create()
    async with api.exchange("GET", "/machines/m-1/guest/endless", FENCE) as response:
        chunks = response.chunks()
        await anext(chunks)
        api.world.driver.processes["m-1"].end("killed")
        with pytest.raises(ConnectionError):
            async for _chunk in chunks:
                pass


async def test_a_vmm_that_dies_within_a_request_is_an_unreachable_guest(api: Api):
    await api.create()
    process = api.world.driver.processes["m-1"]
    asking = asyncio.create_task(api.fails("POST", "/machines/m-1/exec", FENCE, b'{"command":["hang"]}'))
    await until(lambda: "POST /exec" in process.agent.requests)
    process.end("killed")
    assert (await asking).reason == "guest_unreachable"


# -- frames ----------------------------------------------------------------------------------------------------------


def _start(*command: str) -> bytes:
    return encode_frame(Frame(FrameType.START, msgspec.json.encode(ExecRequest(cmd=list(command)))))


async def test_frames_go_both_ways_until_the_exit(api: Api):
    await api.create()
    async with api.frames() as socket:
        await socket.send(_start("cat"))
        assert decode_message(await socket.recv()).type is FrameType.STARTED
        await socket.send(encode_frame(Frame(FrameType.STDIN, b"x" * 100_000)))
        assert decode_message(await socket.recv()) == Frame(FrameType.STDOUT, b"x" * 100_000)
        await socket.send(encode_frame(Frame(FrameType.STDIN_EOF)))
        assert decode_message(await socket.recv()).type is FrameType.EXIT
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd.code == 1000


async def test_a_client_that_hangs_up_ends_its_command(api: Api):
    await api.create()
    agent = api.world.driver.processes["m-1"].agent
    async with api.frames() as socket:
        await socket.send(_start("cat"))
        await socket.recv()
    async with asyncio.timeout(60):
        await agent.abandoned_changed.wait()
    assert agent.abandoned == ["interactive"]


async def test_a_flood_waits_for_its_reader(api: Api):
    await api.create()
    agent = api.world.driver.processes["m-1"].agent
    async with api.frames() as socket:
        await socket.send(_start("flood"))
        assert decode_message(await socket.recv()).type is FrameType.STARTED
        for _ in range(50):
            assert decode_message(await socket.recv()).type is FrameType.STDOUT
    async with asyncio.timeout(60):
        await agent.abandoned_changed.wait()


@pytest.mark.parametrize("message", [b"", b"\x63\0\0\0\0\0\0\0", b"\0\0\0\0\0\0\0\x05x", "text"])
async def test_what_is_no_frame_closes_the_connection(api: Api, message):
    await api.create()
    async with api.frames() as socket:
        await socket.send(_start("cat"))
        await socket.recv()
        await socket.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd.code == 1002


async def test_a_command_that_cannot_start_is_an_error_frame(api: Api):
    await api.create()
    async with api.frames() as socket:
        await socket.send(_start("missing"))
        frame = decode_message(await socket.recv())
    assert (frame.type, json.loads(frame.payload)["details"]["reason"]) == (FrameType.ERROR, "command_not_found")


async def test_a_vmm_that_dies_is_an_error_frame(api: Api):
    await api.create()
    async with api.frames() as socket:
        await socket.send(_start("cat"))
        await socket.recv()
        api.world.driver.processes["m-1"].end("killed")
        frame = decode_message(await socket.recv())
        assert (frame.type, json.loads(frame.payload)["details"]["reason"]) == (FrameType.ERROR, "guest_unreachable")
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd.code == 1011


async def test_a_refused_socket_is_answered_with_the_flat_error(api: Api):
    for machine_id, reason in (("nobody", "machine_not_found"), ("m_1", "bad_field")):
        with pytest.raises(InvalidStatus) as refused:
            await api.frames(machine_id)
        body = refused.value.response.body
        assert json.loads(body)["details"]["reason"] == reason


# -- logs ------------------------------------------------------------------------------------------------------------


async def test_the_end_of_the_console_and_what_follows(api: Api):
    await api.create()
    _, log = api.daemon.console_log("m-1", fence())
    log.parent.mkdir(parents=True)
    log.with_name("console.log.1").write_bytes(b"old\n")
    log.write_bytes(b"one\ntwo\n")
    assert await api.call("GET", "/machines/m-1/logs?tail_bytes=4", FENCE) == (200, b"two\n")
    assert await api.call("GET", "/machines/m-1/logs?tail_bytes=10", FENCE) == (200, b"d\none\ntwo\n"[-10:])
    assert await api.call("GET", "/machines/m-1/logs", FENCE) == (200, b"old\none\ntwo\n")
    for tail, lost in ((4, "8"), (10, "2"), (12, "0")):
        async with api.exchange("GET", f"/machines/m-1/logs?tail_bytes={tail}", FENCE) as response:
            assert response.headers["x-fuse-lost"] == lost, "who masks secrets must know that the beginning is cut"
            await response.read()
    async with api.exchange("GET", "/machines/m-1/logs?follow=true&tail_bytes=4", FENCE) as response:
        chunks = response.chunks()
        assert await anext(chunks) == b"two\n"
        with log.open("ab") as file:
            file.write(b"three\n")
        log.rename(log.with_name("console.log.1"))
        log.write_bytes(b"four\n")
        assert await anext(chunks) == b"three\n"
        assert await anext(chunks) == b"four\n"
        api.world.driver.processes["m-1"].end("the guest shut down")
        assert [chunk async for chunk in chunks] == []


async def test_who_follows_a_console_does_not_hear_the_next_machine_of_that_name(api: Api):
    await api.create()
    machine, _ = api.daemon.console_log("m-1", fence())
    assert api.daemon.is_live(machine)
    await api.call("DELETE", "/machines/m-1", FENCE)
    assert not api.daemon.is_live(machine)
    await api.create(uid="u2")
    assert not api.daemon.is_live(machine)


async def test_logs_know_their_parameters(api: Api):
    await api.create()
    for query in ("source=agent", "follow=maybe", "tail_bytes=-1", "tail_bytes=99999999999"):
        assert (await api.fails("GET", f"/machines/m-1/logs?{query}", FENCE)).reason == "bad_field"
    assert await api.call("GET", "/machines/m-1/logs", FENCE) == (200, b"")


# -- sockets, TLS, token ---------------------------------------------------------------------------------------------


async def test_the_unix_socket_is_for_its_owner_alone(api: Api):
    assert stat.S_IMODE(api.path.stat().st_mode) & 0o077 == 0
    assert stat.S_ISSOCK(api.path.stat().st_mode)


async def test_a_socket_that_a_dead_daemon_left_is_replaced(tmp_path: Path):
    for _ in range(2):
        with bind_unix(tmp_path / "api.sock"):
            pass
    assert (tmp_path / "api.sock").exists()


@pytest.fixture
async def tls(tmp_path: Path) -> AsyncIterator[tuple[str, int]]:
    """A daemon on TLS; its token and port."""
    identity = ensure_identity(tmp_path)
    async with World(tmp_path).daemon() as daemon:
        sock = bind_tcp(Listen(host="127.0.0.1", port=0))
        port = sock.getsockname()[1]
        app = Boundary(make_router(daemon), daemon.metrics, secret=identity.secret)
        async with serving(sock, app, make_ssl_context(identity)):
            yield identity.token, port


async def _call_tls(port: int, target: str, headers: dict[str, str]) -> tuple[int, bytes, bytes]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    stream = await open_tcp("127.0.0.1", port, context)
    connection = Connection(stream)
    try:
        response = await connection.request("GET", target, headers=headers)
        return response.status, await response.read(), stream.peer_certificate or b""
    finally:
        await connection.close()


async def test_tcp_wants_the_token_and_proves_its_key(tls: tuple[str, int]):
    token, port = tls
    secret, pin = parse_host_token(token)
    status, _, certificate = await _call_tls(port, "/info", {"authorization": f"Bearer {secret}"})
    assert (status, spki_sha256(certificate)) == (200, pin)
    assert (await _call_tls(port, "/info", {"authorization": f"Bearer {token}"}))[0] == 200
    assert (await _call_tls(port, "/health", {}))[0] == 200
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {secret}"}, {"authorization": ""}):
        for target in ("/info", "/machines", "/metrics", "/nowhere"):
            status, content, _ = await _call_tls(port, target, headers)
            assert (status, parse_error(status, content).reason) == (401, "unauthorized")


async def test_the_websocket_wants_the_token_too(tls: tuple[str, int]):
    _, port = tls
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with pytest.raises(InvalidStatus) as refused:
        await ws.connect(f"wss://127.0.0.1:{port}/machines/m-1/guest/exec", ssl=context)
    assert refused.value.response.status_code == 401


async def test_a_port_in_use_is_a_clear_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Error, match=str(port)):
            bind_tcp(Listen(host="127.0.0.1", port=port))


def test_the_identity_is_kept_private_and_repaired(tmp_path: Path):
    identity = ensure_identity(tmp_path)
    assert ensure_identity(tmp_path) == identity
    for name in ("tls.pem", "token"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert (tmp_path / "token").read_text().strip() == identity.token
    (tmp_path / "token").chmod(0o644)
    (tmp_path / "token").write_text("nonsense")
    renewed = ensure_identity(tmp_path)
    assert (renewed.pin, renewed.secret != identity.secret) == (identity.pin, True)
    (tmp_path / "tls.pem").unlink()
    assert ensure_identity(tmp_path).pin != identity.pin
    (tmp_path / "tls.pem").write_bytes(base64.b64encode(b"broken"))
    with pytest.raises(Error, match=r"tls\.pem"):
        ensure_identity(tmp_path)
