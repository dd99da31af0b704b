"""The host client against a FakeHost behind a real HTTP server: plain, over TLS with a pin, and on a Unix socket."""

import asyncio
import contextlib
import datetime as dt
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvicorn
from control_harness import running, until
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from msgspec.structs import replace

from fusevm.control import dial, host_client
from fusevm.control.config import HostSetting
from fusevm.control.dial import Endpoint
from fusevm.control.host_api import GuestRequest, Reading, ReplyLost
from fusevm.control.host_client import HttpHost
from fusevm.control.main import HttpServer
from fusevm.model.errors import (
    BadSetting,
    BootFailed,
    HostRejected,
    HostUnproven,
    HostUnreachable,
    Internal,
    MachineNotFound,
    OrderExpired,
    StaleIncarnation,
    Timeout,
)
from fusevm.model.machine import Fence, MachineSpec
from fusevm.testing.fake_host import FakeHost, fake_host_app
from fusevm.wire.frames import Frame, FrameType, decode_message, encode_frame
from fusevm.wire.host_api import CreateMachine
from fusevm.wire.host_snapshots import TakeSnapshot
from fusevm.wire.pin import spki_sha256

FENCE = Fence(cluster="c", uid="u1", incarnation=1, action_seq=1)
ORDER = CreateMachine(machine_id="m-1", spec=MachineSpec(image="debian-12"), boot_timeout_ms=5000)


@contextlib.asynccontextmanager
async def serving(app: object, listener: socket.socket, **options: object) -> AsyncIterator[None]:
    settings = uvicorn.Config(app, log_config=None, lifespan="off", ws="websockets-sansio", **options)  # type: ignore[arg-type]
    server = HttpServer(settings)
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve([listener]))
        await server.up.wait()
        try:
            yield
        finally:
            server.should_exit = True


@contextlib.asynccontextmanager
async def connected(host: FakeHost, secret: str = "s", **options: object) -> AsyncIterator[HttpHost]:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with serving(fake_host_app(host, "s"), listener, **options):
        client = HttpHost(Endpoint("h1", url, secret))
        try:
            yield client
        finally:
            await client.close()


def certificate(folder: Path) -> tuple[Path, Path, str]:
    """(certificate file, key file, pin)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fuse-host")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=30))
        .not_valid_after(now - dt.timedelta(days=1))  # expiry means nothing to a pin
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "c.pem", folder / "k.pem"
    cert_file.write_bytes(made.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return cert_file, key_file, spki_sha256(made.public_bytes(Encoding.DER))


async def test_the_life_of_a_machine() -> None:
    host = FakeHost("h1")
    async with connected(host) as client:
        assert (await client.info()).driver == "fake"
        made = await client.create(FENCE, ORDER)
        assert (made.id, made.uid, made.incarnation) == ("m-1", "u1", 1)
        assert (await client.create(FENCE, ORDER)).id == "m-1"
        assert [machine.id for machine in (await client.machines()).machines] == ["m-1"]
        await client.destroy(FENCE, "m-1")
        assert (await client.machines()).machines == []
        with pytest.raises(StaleIncarnation) as caught:
            await client.create(FENCE, ORDER)
        assert caught.value.seen == 1
        assert host.calls[1][1][0] == FENCE


def limited(reading: Reading, seconds: float) -> Fence:
    """The fence of an order that is valid for so long."""
    return replace(FENCE, valid_until=reading.at(asyncio.get_running_loop().time() + seconds))


async def test_a_late_order_is_refused_and_the_hosts_clock_is_read_anew() -> None:
    host = FakeHost("h1")
    async with connected(host) as client:
        reading = await client.read_clock()
        assert await client.read_clock() is reading
        assert host.count("info") == 1
        shown = reading.at(asyncio.get_running_loop().time())
        assert shown.clock == host.clock
        assert shown.ms <= host.now().ms
        with pytest.raises(OrderExpired):
            await client.create(limited(reading, -0.5), ORDER)
        assert host.table == {}
        assert await client.read_clock() is not reading
        host.clock, host.ahead_s = "after a restart", 0.0
        with pytest.raises(OrderExpired):
            await client.create(limited(reading, 60), ORDER)
        await client.create(limited(await client.read_clock(), 60), ORDER)
        assert list(host.table) == ["m-1"]


async def test_an_old_reading_of_a_hosts_clock_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    host = FakeHost("h1")
    async with connected(host) as client:
        reading = await client.read_clock()
        monkeypatch.setattr(host_client, "READING_S", 0.0)
        assert (await client.read_clock()).heard_s > reading.heard_s
        assert host.count("info") == 2


async def test_every_order_of_an_action_has_its_limit() -> None:
    host = FakeHost("h1")
    async with connected(host) as client:
        await client.create(FENCE, ORDER)
        late = limited(await client.read_clock(), -1)
        guest = GuestRequest(fence=late, machine_id="m-1", method="POST", target="guest/agent/drain", body=b"{}")
        orders: list[Callable[[], Awaitable[object]]] = [
            lambda: client.take_snapshot(late, "m-1", TakeSnapshot(snapshot_id="s-1")),
            lambda: client.restore_snapshot(late, "m-1", "s-1"),
            lambda: client.relay(guest),
            lambda: client.destroy(late, "m-1"),
        ]
        for order in orders:
            with pytest.raises(OrderExpired):
                await order()
        assert (list(host.table), host.snapshots) == (["m-1"], {})


async def test_errors_arrive_as_the_class_that_was_raised() -> None:
    host = FakeHost("h1")
    async with connected(host) as client:
        host.script("create", BootFailed(id="m-1", problem="panic"))
        with pytest.raises(BootFailed, match="panic"):
            await client.create(FENCE, ORDER)
    async with connected(host, secret="wrong") as client:
        with pytest.raises(HostRejected):
            await client.info()
        with pytest.raises(HostRejected):
            await client.open_frames(FENCE, "m-1")


async def test_connections_are_used_again() -> None:
    host = FakeHost("h1")
    async with connected(host) as client:
        for _ in range(5):
            await client.info()
        assert len(client._pool._idle) == 1
        await asyncio.gather(*(client.info() for _ in range(5)))
        assert 1 < len(client._pool._idle) <= 5


async def test_a_connection_that_the_host_closed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "IDLE_S", 60.0)
    async with connected(FakeHost("h1"), timeout_keep_alive=0) as client:
        await client.info()
        lane = client._pool._idle[0][1]
        await until(lane.reader.at_eof)
        assert (await client.info()).driver == "fake"


async def test_an_idle_connection_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "IDLE_S", 0.0)
    async with connected(FakeHost("h1")) as client:
        await client.info()
        await client.info()
        assert len(client._pool._idle) <= 1


async def test_nobody_there_is_told_apart_from_no_answer() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    client = HttpHost(Endpoint("h1", f"http://127.0.0.1:{port}", ""))
    with pytest.raises(HostUnreachable) as caught:
        await client.info()
    assert not isinstance(caught.value, ReplyLost)


@contextlib.asynccontextmanager
async def talking(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[HttpHost]:
    """A host that does what the test says with the raw connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        client = HttpHost(Endpoint("h1", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", ""))
        yield client
        await client.close()


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", b"what?\r\n\r\n"]
)
async def test_an_answer_that_is_cut_off_is_a_lost_reply(said: bytes) -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)

    async with talking(answer) as client:
        with pytest.raises(ReplyLost):
            await client.create(FENCE, ORDER)


@pytest.mark.parametrize("body", [b"nonsense", b'{"machine": 5}'])
async def test_an_answer_that_makes_no_sense_is_internal(body: bytes) -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async with talking(answer) as client:
        with pytest.raises(Internal):
            await client.create(FENCE, ORDER)


async def test_an_error_that_is_not_ours_keeps_its_status() -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 3\r\n\r\nwho")

    async with talking(answer) as client:
        with pytest.raises(Internal, match="502"):
            await client.info()


async def test_silence_ends_in_a_timeout() -> None:
    forever = asyncio.Event()

    async def answer(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await forever.wait()

    async with talking(answer) as client:
        with pytest.raises(Timeout):
            await client._call("GET", "/info", timeout_s=0.05)
        request = GuestRequest(fence=FENCE, machine_id="m-1", method="GET", target="logs", timeout_s=0.05)
        with pytest.raises(Timeout):
            await client.relay(request)
        forever.set()


async def test_events_arrive_line_by_line() -> None:
    host = FakeHost("h1")
    async with connected(host) as client:
        events = client.events()
        assert (await anext(events)).kind == "hello"
        await client.create(FENCE, ORDER)
        event = await anext(events)
        assert (event.kind, event.machine_id, event.phase) == ("phase", "m-1", "running")
        await events.aclose()  # type: ignore[attr-defined]


async def test_bodies_stream_both_ways() -> None:
    host = FakeHost("h1")
    content = bytes(range(256)) * 4096

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 65_536):
            yield content[start : start + 65_536]

    async with connected(host) as client:
        await client.create(FENCE, ORDER)

        def request(method: str, **more: object) -> GuestRequest:
            values = {"fence": FENCE, "machine_id": "m-1", "method": method, "target": "guest/files?path=%2Fa%2Fb"}
            return GuestRequest(**{**values, **more})  # type: ignore[arg-type]

        upstream = await client.relay(request("PUT", body=parts()))
        assert b"sha256" in b"".join([chunk async for chunk in upstream.chunks()])
        await upstream.close()
        assert host.files == {"/a/b": content}
        upstream = await client.relay(request("GET", headers={"range": "bytes=5-9"}))
        assert (upstream.status, upstream.headers["content-range"]) == (206, f"bytes 5-9/{len(content)}")
        assert b"".join([chunk async for chunk in upstream.chunks()]) == content[5:10]
        await upstream.close()
        half_read = await client.relay(request("GET"))
        assert len(await anext(half_read.chunks())) > 0
        await half_read.close()
        head = await client.relay(request("HEAD"))
        assert head.headers["content-length"] == str(len(content))
        await head.close()
        with pytest.raises(MachineNotFound):
            await client.relay(request("GET", machine_id="m-2"))


async def test_a_terminal_over_a_websocket() -> None:
    host = FakeHost("h1")
    async with connected(host) as client:
        with pytest.raises(MachineNotFound):
            await client.open_frames(FENCE, "m-1")
        await client.create(FENCE, ORDER)
        terminal = await client.open_frames(FENCE, "m-1")
        await terminal.send(encode_frame(Frame(FrameType.START, b'{"cmd":["cat"]}')))
        message = await terminal.receive()
        assert message is not None
        assert decode_message(message).type is FrameType.STARTED
        payload = bytes(range(256)) * 4096
        await terminal.send(encode_frame(Frame(FrameType.STDIN, payload)))
        message = await terminal.receive()
        assert message is not None
        assert decode_message(message).payload == payload
        await terminal.send(encode_frame(Frame(FrameType.STDIN_EOF)))
        message = await terminal.receive()
        assert message is not None
        assert decode_message(message).type is FrameType.EXIT
        assert await terminal.receive() is None
        with pytest.raises(ReplyLost):
            await terminal.send(b"x")
        await terminal.close()


async def test_a_terminal_that_is_cut_off_is_a_lost_reply() -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with talking(answer) as client:
        with pytest.raises(ReplyLost):
            await client.open_frames(FENCE, "m-1")


async def test_a_pinned_host_is_spoken_to_and_another_is_not(tmp_path: Path) -> None:
    cert_file, key_file, pin = certificate(tmp_path)
    host = FakeHost("h1")
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"https://127.0.0.1:{listener.getsockname()[1]}"
    async with serving(fake_host_app(host, "s"), listener, ssl_certfile=cert_file, ssl_keyfile=key_file):
        client = HttpHost(Endpoint("h1", url, f"s.{pin}"))
        assert (await client.info()).driver == "fake"
        await client.create(FENCE, ORDER)
        terminal = await client.open_frames(FENCE, "m-1")
        await terminal.close()
        await client.close()
        calls = len(host.calls)
        other = HttpHost(Endpoint("h1", url, f"s.{'0' * 64}"))
        with pytest.raises(HostUnproven):
            await other.info()
        assert len(host.calls) == calls  # the secret was not sent


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "h.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    async with serving(fake_host_app(FakeHost("h1"), "s"), listener):
        client = HttpHost(Endpoint("h1", f"unix://{path}", "s"))
        assert (await client.info()).driver == "fake"
        await client.close()


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("http://10.0.0.1:8090", "s"),
        ("ftp://x", "s"),
        ("https://x", "no-pin"),
        ("https://user@x", "s." + "0" * 64),
        ("x", ""),
    ],
)
async def test_a_host_that_cannot_be_trusted_is_refused_at_once(url: str, token: str) -> None:
    with pytest.raises(BadSetting):
        Endpoint("h1", url, token)


async def test_a_whole_control_plane_over_http() -> None:
    """Create, exec, file, terminal frames and delete through server, client and fake host."""
    host = FakeHost("default")
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    setting = HostSetting(id="default", url=url, token="s")
    async with serving(fake_host_app(host, "s"), listener):
        async with running(host, hosts=(setting,)) as server:
            server.plane.directory._fixed.clear()  # over HTTP, not by the shortcut
            made = await server.create()
            assert made["state"] == "running"
            answer = await server.act("t1", "exec", {"cmd": ["hi"]})
            assert answer.json()["stdout"] == "hi\n"
            files = "/v1/environments/fuse-t1/files?path=/x"
            assert (await server.http.put(files, content=b"abc")).json()["size_bytes"] == 3
            assert (await server.http.get(files)).content == b"abc"
            assert (await server.http.head(files)).headers["content-length"] == "3"
            assert (await server.http.delete(files)).status_code == 204
            assert (await server.delete()).status_code == 204
        assert host.table == {}
