"""The host API's ways into a guest: commands, requests that are passed on, frames."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import msgspec
import pytest
from api_client import FENCE, Api
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fusevm.testing.fake_answer import FakeAnswer
from fusevm.testing.host_world import until
from fusevm.wire.frames import Frame, FrameType, decode_message, encode_frame
from fusevm.wire.guest import ExecRequest
from fusevm.wire.http1 import Connection
from fusevm.wire.streams import open_unix

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
