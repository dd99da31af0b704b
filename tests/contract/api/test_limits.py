"""How large and how slow a request may be."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from control_harness import Running, running

from fusevm.wire import http_protocol
from fusevm.wire.routes import KIB, MIB, NO_LIMIT, ROUTES, Payload, Route

TIMEOUT_S = 10.0


@contextlib.asynccontextmanager
async def _connected(server: Running) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> str:
    async with asyncio.timeout(TIMEOUT_S):
        return (await reader.read()).decode()


GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"


@pytest.mark.parametrize(
    "head",
    [
        GET + b"x: " + b"a" * (64 * KIB) + b"\r\n\r\n",
        GET + b"".join(b"x-%d: %s\r\n" % (number, b"a" * 1000) for number in range(70)) + b"\r\n",
        b"GET /" + b"a" * (64 * KIB) + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        # Never ends: what is kept of it is bounded.
        GET + b"x: " + b"a" * (1 * MIB),
    ],
    ids=["one", "many", "path", "endless"],
)
async def test_headers_over_their_limit_are_refused(head: bytes) -> None:
    async with running() as server, _connected(server) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(head)
        answer = await _answer(reader)
        assert answer.startswith("HTTP/1.1 431 ")
        assert '"code":"payload_too_large"' in answer
        assert (await server.http.get("/health")).status_code == 200


@pytest.mark.parametrize("trailer", [b"a" * MIB, b"a\r\nx: " * (MIB // 6)], ids=["one", "many"])
async def test_trailers_over_their_limit_are_refused(trailer: bytes) -> None:
    head = b"POST /v1/environments HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    async with running() as server, _connected(server) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(head + b"2\r\n{}\r\n0\r\nx: " + trailer)
        with contextlib.suppress(ConnectionError):
            await _answer(reader)  # it ends
        assert (await server.http.get("/health")).status_code == 200


async def test_headers_within_their_limit_are_read() -> None:
    async with running() as server:
        headers = {f"x-{number}": "a" * 1000 for number in range(60)}
        assert (await server.http.get("/health", headers=headers)).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health", GET])
async def test_a_head_that_does_not_arrive_is_given_up(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    async with running() as server, _connected(server) as (reader, writer):
        writer.write(sent)
        answer = await _answer(reader)
        assert answer.startswith("HTTP/1.1 408 ")
        assert '"code":"timeout"' in answer


async def test_the_next_head_of_a_connection_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as server, _connected(server) as (reader, writer):
        for _ in range(2):
            writer.write(GET + b"\r\n")
            async with asyncio.timeout(TIMEOUT_S):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                await reader.readexactly(len(b'{"status":"ok"}'))
        monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
        writer.write(b"GET /he")
        assert (await _answer(reader)).startswith("HTTP/1.1 408 ")


async def test_a_slow_head_does_not_cut_an_answer_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request of a pipeline comes too slowly, while the first one streams."""
    async with running() as server, _connected(server) as (reader, writer):
        writer.write(b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        async with asyncio.timeout(TIMEOUT_S):
            await reader.readuntil(b"keepalive")
            monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.05)
            writer.write(b"GET /he")
            for _ in range(3):  # each is longer after the one before than the head may take
                assert b"408" not in await reader.readuntil(b"keepalive")
            await server.create()
            assert b"408" not in await reader.readuntil(b"fuse-t1")


async def test_what_is_no_http_is_an_enveloped_400() -> None:
    async with running() as server, _connected(server) as (reader, writer):
        writer.write(b"hello\r\n\r\n")
        answer = await _answer(reader)
        assert answer.startswith("HTTP/1.1 400 ")
        assert '"reason":"bad_request"' in answer


def _filled(route: Route) -> str:
    path = route.path.replace("{id}", "fuse-t1").replace("{pid}", "1")
    return path + (f"?{route.selector}={route.value}" if route.selector else "")


LIMITED = [route for route in ROUTES if route.takes is Payload.JSON and not route.unimplemented]


@pytest.mark.parametrize("route", LIMITED, ids=lambda route: route.name)
async def test_every_body_has_a_ceiling(route: Route) -> None:
    assert route.limit != NO_LIMIT
    async with running() as server:
        await server.create()
        answer = await server.http.request(route.method, _filled(route), content=b" " * (route.limit + 1))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
        assert str(route.limit) in answer.json()["error"]["message"]


def test_the_ceilings_are_the_contracts_where_those_are_large_enough() -> None:
    limits = {route.name: route.limit for route in LIMITED}
    assert limits.pop("login") == 4 * KIB
    assert limits.pop("create_environment") == 4 * MIB
    assert limits.pop("exec_command") == limits.pop("start_process") == MIB
    assert set(limits.values()) == {64 * KIB}


async def test_the_largest_create_that_the_contract_allows_fits() -> None:
    """1 MiB of secrets, whatever their characters, and 512 KiB of files."""
    secrets = {f"{'k' * 252}-{number:03}": "\n" * 65_000 for number in range(16)}
    body = {"task_id": "t", "secrets": secrets, "files": {"/opt/file": "QUFB" * (512 * KIB // 3)}}
    async with running() as server:
        answer = await server.http.post("/v1/environments", json=body)
        assert answer.status_code != 413
        assert answer.status_code == 201, answer.text
