"""The API client against a server that behaves in every possible way."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from fusevm.host.vmm.firecracker.calls import Call
from fusevm.host.vmm.firecracker.client import ApiClient, Fault
from fusevm.host.vmm.firecracker.records import Action
from fusevm.host.vmm.firecracker.sockets import SocketRefused, connect_guest
from fusevm.testing.fake_firecracker.rules import Answer
from fusevm.testing.fake_firecracker.server import MAX_CONNECTIONS, ApiServer

START = Call("PUT", "/actions", Action(action_type="InstanceStart"))
GET = Call("GET", "/")


@contextlib.asynccontextmanager
async def served(path: Path, decide: Callable[[str, str, bytes], Awaitable[Answer]]) -> AsyncIterator[ApiClient]:
    server = await ApiServer(decide).start(str(path))
    client = ApiClient(path, None)
    try:
        yield client
    finally:
        await client.close()
        server.close()


async def test_a_refusal_has_firecrackers_words(tmp_path):
    async def decide(method: str, path: str, content: bytes) -> Answer:
        return Answer(400, {"fault_message": "The requested operation is not supported after starting the microVM."})

    async with served(tmp_path / "s", decide) as client:
        with pytest.raises(Fault, match="PUT /actions: The requested operation is not supported after") as caught:
            await client.send(START)
    assert caught.value.status == 400


async def test_a_refusal_in_another_shape_is_one_all_the_same(tmp_path):
    async def decide(method: str, path: str, content: bytes) -> Answer:
        return Answer(500, {"else": 1})

    async with served(tmp_path / "s", decide) as client:
        with pytest.raises(Fault, match="else"):
            await client.send(START)


async def test_one_connection_is_kept_and_a_get_has_no_body(tmp_path):
    """More than ten at once would be turned away, and a GET with a body is refused."""
    seen = []

    async def decide(method: str, path: str, content: bytes) -> Answer:
        seen.append((method, content))
        await asyncio.sleep(0)
        return Answer(200, {"id": "m-1", "state": "Running", "vmm_version": "1.16.1"})

    async with served(tmp_path / "s", decide) as client:
        infos = await asyncio.gather(*(client.info() for _ in range(3 * MAX_CONNECTIONS)))
    assert {info.state for info in infos} == {"Running"}
    assert seen == [("GET", b"")] * 3 * MAX_CONNECTIONS


async def test_silence_ends_in_a_timeout_and_the_next_call_has_a_connection_of_its_own(tmp_path):
    answers = [asyncio.Event(), asyncio.Event()]
    answers[1].set()

    async def decide(method: str, path: str, content: bytes) -> Answer:
        await answers.pop(0).wait()
        return Answer(204)

    silent = answers[0]
    async with served(tmp_path / "s", decide) as client:
        with pytest.raises(TimeoutError):
            await client.send(START, limit_s=0.05)
        silent.set()  # its answer comes too late, and must not be taken for the next call's
        async with asyncio.timeout(30):
            assert await client.send(START) == b""


async def test_a_server_that_goes_is_a_connection_error_and_a_new_one_is_found(tmp_path):
    async def decide(method: str, path: str, content: bytes) -> Answer:
        return Answer(204)

    path = tmp_path / "s"
    async with served(path, decide) as client:
        await client.send(START)
    path.unlink()
    with pytest.raises(OSError):
        await client.send(START)
    server = await ApiServer(decide).start(str(path))
    try:
        assert await client.send(START) == b""
    finally:
        await client.close()
        server.close()


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\ncontent-length: 4000000\r\n\r\n" + bytes(4_000_000), b"\x00" * 99]
)
async def test_a_vmm_that_lies_about_its_api_is_a_connection_error(tmp_path, answer):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        with contextlib.suppress(ConnectionError):
            writer.write(answer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, str(tmp_path / "s"))
    client = ApiClient(tmp_path / "s", None)
    with pytest.raises(ConnectionError):
        await client.send(GET)
    await client.close()
    server.close()


# -- what a broken-into VMM may put in its directory -------------------------------------------------------------------


async def test_a_link_to_another_socket_of_the_host_is_not_followed(tmp_path):
    async def decide(method: str, path: str, content: bytes) -> Answer:
        return Answer(204)

    async with served(tmp_path / "real", decide):
        (tmp_path / "s").symlink_to(tmp_path / "real")
        with pytest.raises(OSError):
            await ApiClient(tmp_path / "s", None).send(START)


async def test_a_socket_of_somebody_else_is_refused(tmp_path):
    async def decide(method: str, path: str, content: bytes) -> Answer:
        return Answer(204)

    async with served(tmp_path / "s", decide):
        with pytest.raises(SocketRefused):
            await ApiClient(tmp_path / "s", os.getuid() + 1).send(START)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SocketRefused):
        await ApiClient(tmp_path / "file", None).send(START)


# -- the guest's sockets -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def vsock(path: Path, answer: bytes) -> AsyncIterator[list[bytes]]:
    """The machine's socket, answering a connection with some bytes."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(100))
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, str(path))
    try:
        yield seen
    finally:
        server.close()


async def test_the_handshake_is_one_write_and_what_follows_it_is_the_guests(tmp_path):
    async with vsock(tmp_path / "v", b"OK 1073741824\nhello") as seen:
        stream = await connect_guest(tmp_path / "v", None, 1024)
        assert await stream.read(100) == b"hello"
        await stream.close()
    assert seen == [b"CONNECT 1024\n"]


async def test_nobody_listens_is_a_refusal(tmp_path):
    async with vsock(tmp_path / "v", b""):
        with pytest.raises(ConnectionRefusedError):
            await connect_guest(tmp_path / "v", None, 1024)


@pytest.mark.parametrize("answer", [b"NO 1\n", b"OK x\n", b"OK", b"OK 1" * 100, b"\n"])
async def test_another_answer_is_an_error(tmp_path, answer):
    async with vsock(tmp_path / "v", answer):
        with pytest.raises(ConnectionError):
            await connect_guest(tmp_path / "v", None, 1024)
