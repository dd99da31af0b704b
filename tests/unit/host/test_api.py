"""The host API over real sockets: Unix and TLS, with a fake driver behind it."""

import asyncio
import base64
import json
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import websockets.asyncio.client as ws
from api_client import FENCE, Api
from websockets.exceptions import InvalidStatus

from fusevm.host.api import HANDLERS, make_router
from fusevm.host.boundary import Boundary
from fusevm.host.clock import read_moment
from fusevm.host.config import Listen
from fusevm.host.listeners import bind_tcp, bind_unix, serving
from fusevm.host.tls import ensure_identity, make_ssl_context
from fusevm.model.errors import Error
from fusevm.model.machine import Moment, Phase
from fusevm.testing.host_world import SPEC, World, fence, until
from fusevm.wire.errors import parse_error
from fusevm.wire.host_api import HostFacts, MachineAnswer, MachineEvent, MachineList, fence_headers
from fusevm.wire.host_routes import HOST_ROUTES
from fusevm.wire.http1 import Connection, Response
from fusevm.wire.pin import parse_host_token, spki_sha256
from fusevm.wire.streams import open_tcp

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
