"""What happens inside of a machine: commands, terminals, processes, files, logs, through the control plane."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator

import msgspec
import pytest
import websockets
from control_harness import Running, leave, running, until

from fusevm.control import activity
from fusevm.control.host_api import ReplyLost
from fusevm.control.idempotency import fingerprint_of
from fusevm.control.store.protocol import RequestKey
from fusevm.core.policy import Policy
from fusevm.model.errors import AgentFailure, CommandNotFound, GuestUnreachable
from fusevm.model.machine import Fence
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import FakeHost, FakeTerminal, result
from fusevm.wire.frames import Frame, FrameType, decode_message, encode_frame
from fusevm.wire.guest import ExecRequest, ExecResult

TRUE = {"cmd": ["true"]}


async def test_exec_answers_in_the_contracts_words_and_ours() -> None:
    async with running() as server:
        await server.create()
        answer = (await server.act("t1", "exec", {"cmd": ["echo", "a b"]})).json()
        assert (answer["exit_code"], answer["stdout"], answer["stderr"]) == (0, "echo a b\n", "")
        assert "stdout_b64" not in answer
        assert answer["truncated"] == {"stdout": False, "stderr": False}
        assert answer["total"] == {"stdout": 9, "stderr": 0}


async def test_exec_passes_everything_on() -> None:
    asked: list[ExecRequest] = []

    def note(order: ExecRequest) -> ExecResult:
        asked.append(order)
        return result()

    async with running() as server:
        server.host.on_exec = note
        await server.create()
        body = {"shell": "env", "env": {"A": "b"}, "cwd": "/tmp", "user": "1000", "stdin_b64": "aGk=", "timeout_ms": 5}
        assert (await server.act("t1", "exec", body)).status_code == 200
    order = asked[0]
    assert (order.shell, order.env, order.cwd, order.user) == ("env", {"A": "b"}, "/tmp", "1000")
    assert (order.stdin_b64, order.timeout_ms, order.max_output_bytes) == ("aGk=", 5, 16 << 20)


async def test_a_failing_command_is_a_success_of_the_call() -> None:
    async with running() as server:
        server.host.on_exec = lambda _order: result(b"", b"no such file\n", exit_code=2)
        await server.create()
        answer = await server.act("t1", "exec", TRUE)
        assert (answer.status_code, answer.json()["exit_code"], answer.json()["stderr"]) == (200, 2, "no such file\n")


async def test_no_byte_of_the_output_is_lost() -> None:
    async with running() as server:
        server.host.on_exec = lambda _order: result(b"\xff\x00ok", b"fine")
        await server.create()
        answer = (await server.act("t1", "exec", TRUE)).json()
        assert base64.b64decode(answer["stdout_b64"]) == b"\xff\x00ok"
        assert answer["stdout"] == "\ufffd\x00ok"
        assert "stderr_b64" not in answer
        both = (await server.act("t1", "exec", {**TRUE, "encoding": "base64"})).json()
        assert base64.b64decode(both["stderr_b64"]) == b"fine"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "cmd"),
        ({"cmd": ["a"], "shell": "b"}, "cmd"),
        ({"cmd": ["a"], "timeout_ms": 600_001}, "timeout_ms"),
        ({"cmd": ["a"], "timeout_ms": -1}, "timeout_ms"),
        ({"cmd": ["a"], "stdin_b64": "!"}, "stdin_b64"),
        ({"cmd": ["a"], "stdin_b64": "\u00e9"}, "stdin_b64"),
    ],
)
async def test_a_command_that_cannot_be_meant_is_refused(body: dict[str, object], field: str) -> None:
    async with running() as server:
        await server.create()
        answer = await server.act("t1", "exec", body)
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, field)
        assert server.host.count("relay") == 0


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (CommandNotFound(command="nope"), 400, "command_not_found"),
        (GuestUnreachable(id="m", problem="silent"), 503, "guest_unreachable"),
        (AgentFailure(problem="EIO"), 500, "agent_failure"),
        (ReplyLost(id="h1", problem="reset"), 503, "host_unreachable"),
    ],
)
async def test_errors_of_the_guest_keep_their_class(error: Exception, status: int, reason: str) -> None:
    async with running() as server:
        await server.create()
        server.host.script("relay", error)
        answer = await server.act("t1", "exec", TRUE)
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (status, reason)


async def test_exec_needs_a_running_environment() -> None:
    async with running(wait_s=0.05) as server:
        assert (await server.act("t1", "exec", TRUE)).status_code == 404
        server.host.hold["create"] = asyncio.Event()
        await server.create()
        answer = await server.act("t1", "exec", TRUE)
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (409, "wrong_state")
        server.host.hold["create"].set()


async def test_a_client_that_leaves_ends_its_command() -> None:
    async with running() as server:
        await server.create()
        server.host.hold["relay"] = asyncio.Event()
        await leave(server.act("t1", "exec", TRUE), lambda: server.host.count("relay") == 1)
        in_flight = server.plane.metrics.in_flight
        await until(lambda: in_flight._value.get() == 0)
        server.host.hold["relay"].set()


# -- idempotency ---------------------------------------------------------------------------------------------------


async def test_the_same_key_runs_a_command_once() -> None:
    async with running() as server:
        await server.create()
        first = await server.act("t1", "exec", TRUE, **{"Idempotency-Key": "k"})
        again = await server.act("t1", "exec", TRUE, **{"Idempotency-Key": "k"})
        assert (first.status_code, first.content) == (again.status_code, again.content)
        assert again.headers["idempotency-replayed"] == "true"
        assert server.host.count("relay") == 1
        other = await server.act("t1", "exec", {"cmd": ["false"]}, **{"Idempotency-Key": "k"})
        assert (other.status_code, other.json()["error"]["details"]["reason"]) == (409, "idempotency_key_reused")


async def test_a_command_that_may_have_run_is_not_run_again() -> None:
    async with running() as server:
        await server.create()
        server.host.script("relay", ReplyLost(id="h1", problem="reset"))
        first = await server.act("t1", "exec", TRUE, **{"Idempotency-Key": "k"})
        again = await server.act("t1", "exec", TRUE, **{"Idempotency-Key": "k"})
        assert [first.status_code, again.status_code] == [503, 503]
        assert server.host.count("relay") == 1


async def test_a_command_that_did_not_run_may_be_tried_again() -> None:
    async with running() as server:
        await server.create()
        server.host.script("relay", CommandNotFound(command="x"))
        assert (await server.act("t1", "exec", TRUE, **{"Idempotency-Key": "k"})).status_code == 400
        assert (await server.act("t1", "exec", TRUE, **{"Idempotency-Key": "k"})).status_code == 200


async def test_a_repetition_while_the_command_runs_is_refused() -> None:
    async with running() as server:
        await server.create()
        server.host.hold["relay"] = asyncio.Event()
        first = asyncio.ensure_future(server.act("t1", "exec", TRUE, **{"Idempotency-Key": "k"}))
        await until(lambda: server.host.count("relay") == 1)
        again = await server.act("t1", "exec", TRUE, **{"Idempotency-Key": "k"})
        assert (again.status_code, again.json()["error"]["details"]["reason"]) == (409, "idempotency_in_progress")
        server.host.hold["relay"].set()
        assert (await first).status_code == 200


async def test_a_client_that_leaves_finds_its_answer_under_the_key() -> None:
    async with running() as server:
        await server.create()
        server.host.hold["relay"] = asyncio.Event()
        headers = {"Idempotency-Key": "k"}
        await leave(server.act("t1", "exec", TRUE, **headers), lambda: server.host.count("relay") == 1)
        server.host.hold["relay"].set()

        async def answered() -> bool:
            return (await server.act("t1", "exec", TRUE, **headers)).status_code == 200

        await until(answered)
        assert server.host.count("relay") == 1


async def test_the_same_key_creates_once() -> None:
    async with running() as server:
        body, headers = {"task_id": "t"}, {"Idempotency-Key": "k"}
        answers = await asyncio.gather(
            *(server.http.post("/v1/environments", json=body, headers=headers) for _ in range(5))
        )
        uids = {answer.json()["uid"] for answer in answers if answer.status_code == 201}
        assert len(uids) == 1
        assert {answer.status_code for answer in answers} <= {201, 409}
        again = await server.http.post("/v1/environments", json=body, headers=headers)
        assert (again.status_code, again.json()["uid"]) == (201, uids.pop())
        await server.delete("t")
        after = await server.http.post("/v1/environments", json=body, headers=headers)
        assert (after.status_code, after.headers["idempotency-replayed"]) == (201, "true")
        assert server.host.count("create") == 1


async def test_a_refused_create_frees_its_key() -> None:
    async with running() as server:
        headers = {"Idempotency-Key": "k"}
        body = {"task_id": "t", "spec": {"ram_mb": 1 << 23}}
        assert (await server.http.post("/v1/environments", json=body, headers=headers)).status_code == 503
        server.host.capacity = msgspec.structs.replace(server.host.capacity, ram_mb=1 << 24)
        await until(lambda: _ram(server, 1 << 24))
        assert (await server.http.post("/v1/environments", json=body, headers=headers)).status_code == 201


async def _ram(server: Running, ram_mb: int) -> bool:
    return bool((await server.http.get("/v1/hosts/h1")).json()["capacity"]["ram_mb"] == ram_mb)


async def test_a_key_has_limits() -> None:
    async with running() as server:
        headers = {"Idempotency-Key": "k" * 256}
        answer = await server.http.post("/v1/environments", json={"task_id": "t"}, headers=headers)
        assert answer.status_code == 400


# -- files, processes, logs ----------------------------------------------------------------------------------------


async def test_a_file_travels_both_ways_whole_and_in_parts() -> None:
    url, content = "/v1/environments/fuse-t1/files", bytes(range(256)) * 5000

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 100_000):
            yield content[start : start + 100_000]

    async with running() as server:
        await server.create()
        path = {"path": "/data/a file+ü.bin"}
        written = await server.http.put(url, params=path, content=parts())
        assert (written.status_code, written.json()["size_bytes"]) == (200, len(content))
        assert server.host.files == {"/data/a file+ü.bin": content}
        assert (await server.http.get(url, params=path)).content == content
        part = await server.http.get(url, params=path, headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, content[10:20])
        assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"
        head = await server.http.head(url, params=path)
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(content)))
        assert head.headers["x-fuse-mode"] == "0644"
        beyond = await server.http.get(url, params=path, headers={"Range": f"bytes={len(content)}-"})
        assert (beyond.status_code, beyond.json()["error"]["details"]["reason"]) == (400, "bad_range")
        assert (await server.http.delete(url, params=path)).status_code == 204
        missing = await server.http.get(url, params=path)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        assert (await server.http.head(url, params=path)).status_code == 404


async def test_a_cut_off_upload_reaches_the_host_as_one() -> None:
    async def half() -> AsyncIterator[bytes]:
        yield b"half"
        raise RuntimeError("the client breaks")

    async with running() as server:
        await server.create()
        with pytest.raises(RuntimeError):
            await server.http.put("/v1/environments/fuse-t1/files?path=/x", content=half())
        await until(lambda: server.plane.metrics.in_flight._value.get() == 0)
        assert server.host.files == {}


async def test_files_can_be_read_but_not_written_while_draining() -> None:
    url = "/v1/environments/fuse-t1/files?path=/x"
    async with running() as server:
        await server.create()
        await server.http.put(url, content=b"1")
        await server.act("t1", "drain")
        assert (await server.http.get(url)).content == b"1"
        assert (await server.http.put(url, content=b"2")).status_code == 409


@pytest.mark.parametrize(
    ("method", "path", "body", "told"),
    [
        ("POST", "processes", {"cmd": ["sleep", "9"]}, ("POST", "guest/processes")),
        ("GET", "processes", None, ("GET", "guest/processes")),
        ("POST", "files?op=stat", {"path": "/a"}, ("POST", "guest/files?op=stat")),
        ("POST", "files?op=move", {"path": "/a", "to": "/b"}, ("POST", "guest/files?op=move")),
        ("GET", "archive?path=/a%20b", None, ("GET", "guest/archive?path=%2Fa%20b")),
    ],
)
async def test_requests_are_passed_on(method: str, path: str, body: object, told: tuple[str, str]) -> None:
    async with running() as server:
        await server.create()
        answer = await server.http.request(method, f"/v1/environments/fuse-t1/{path}", json=body)
        assert answer.status_code == 200
        assert (answer.json()["method"], answer.json()["target"]) == told
        if body is not None:
            assert json.loads(answer.json()["body"]) == body


async def test_processes_have_their_own_errors() -> None:
    async with running() as server:
        await server.create()
        base = "/v1/environments/fuse-t1/processes/77"
        for answer in (
            await server.http.get(base),
            await server.http.get(base + "/output?follow=true"),
            await server.http.post(base + "?action=signal", json={"signal": "TERM"}),
            await server.http.post(base + "?action=stdin&eof=true", content=b"x"),
        ):
            assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (404, "process_not_found")
        assert (await server.http.post(base + "?action=kill")).json()["error"]["details"]["reason"] == "unknown_action"
        targets = [request.target for name, request in server.host.calls if name == "relay"]
        assert targets == [
            "guest/processes/77",
            "guest/processes/77/output?follow=true",
            "guest/processes/77/signal",
            "guest/processes/77/stdin?eof=true",
        ]


async def test_logs_come_from_the_host() -> None:
    async with running() as server:
        await server.create()
        answer = await server.http.get("/v1/environments/fuse-t1/logs?source=console")
        assert (answer.status_code, answer.text) == (200, "booted\n")
        asked = server.host.count("relay")
        unknown = await server.http.get("/v1/environments/fuse-t1/logs?source=mail")
        assert (unknown.status_code, unknown.json()["error"]["details"]["field"]) == (400, "source")
        assert server.host.count("relay") == asked
        await server.act("t1", "drain")
        assert (await server.http.get("/v1/environments/fuse-t1/logs")).status_code == 200


async def test_unknown_fields_of_guest_bodies_are_named() -> None:
    async with running() as server:
        await server.create()
        answer = await server.http.post("/v1/environments/fuse-t1/files?op=stat", json={"path": "/a", "follow": True})
        assert "follow" in answer.headers["warning"]


# -- terminals -----------------------------------------------------------------------------------------------------


def _ws(server: Running, path: str) -> str:
    return server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t1/" + path


def _frame(kind: FrameType, payload: bytes = b"") -> bytes:
    return encode_frame(Frame(kind, payload))


async def test_frames_travel_both_ways() -> None:
    async with running() as server:
        await server.create()
        async with websockets.connect(_ws(server, "exec"), max_size=None) as socket:
            await socket.send(_frame(FrameType.START, msgspec.json.encode(ExecRequest(cmd=["cat"]))))
            assert decode_message(await socket.recv()).type is FrameType.STARTED
            payload = b"x" * (1 << 20)
            await socket.send(_frame(FrameType.STDIN, payload))
            assert decode_message(await socket.recv()) == Frame(FrameType.STDOUT, payload)
            await socket.send(_frame(FrameType.STDIN_EOF))
            assert decode_message(await socket.recv()).type is FrameType.EXIT
            with pytest.raises(websockets.ConnectionClosedOK):
                await socket.recv()


async def test_a_shell_starts_itself() -> None:
    async with running() as server:
        await server.create()
        async with websockets.connect(_ws(server, "shell?rows=40&cols=100&cmd=ls&cmd=-l")) as socket:
            assert socket.response is not None
            assert socket.response.headers["x-request-id"].startswith("req_")
            assert decode_message(await socket.recv()).type is FrameType.STARTED
            await socket.send(_frame(FrameType.START, b"{}"))  # not the client's to send; dropped
            await socket.send(_frame(FrameType.STDIN, b"a"))
            assert decode_message(await socket.recv()) == Frame(FrameType.STDOUT, b"a")


@pytest.mark.parametrize("message", [b"", b"\x63\0\0\0\0\0\0\0", "text"])
async def test_what_is_no_frame_ends_the_session(message: str | bytes) -> None:
    async with running() as server:
        await server.create()
        async with websockets.connect(_ws(server, "exec")) as socket:
            await socket.send(message)
            with pytest.raises(websockets.ConnectionClosedError) as caught:
                await socket.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1002


async def test_a_terminal_that_cannot_be_opened_is_an_ordinary_error() -> None:
    async with running() as server:
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(_ws(server, "shell"))
        assert caught.value.response.status_code == 404
        assert json.loads(caught.value.response.body)["error"]["details"]["reason"] == "environment_not_found"
        await server.create()
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(_ws(server, "shell?rows=many"))
        assert caught.value.response.status_code == 400
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(_ws(server, "nothing"))
        assert caught.value.response.status_code == 404
        server.host.script("open_frames", GuestUnreachable(id="m", problem="silent"))
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(_ws(server, "shell"))
        assert caught.value.response.status_code == 503


async def test_a_plain_request_to_a_terminal_says_what_to_do() -> None:
    async with running() as server:
        await server.create()
        answer = await server.http.get("/v1/environments/fuse-t1/shell")
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "Upgrade")


async def test_terminals_close_when_the_server_does() -> None:
    async with running() as server:
        await server.create()
        socket = await websockets.connect(_ws(server, "shell"))
        await socket.recv()
        server.plane.closing.set()
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
        await socket.close()


async def test_use_keeps_an_environment_awake() -> None:
    policy = Policy(activity_grain_ms=0)
    async with running(FakeHost("h1"), policy=policy) as server:
        made = await server.create(spec={"idle_timeout_seconds": 60})
        before = (await server.record(made["uid"])).last_activity_ms
        await until(lambda: server.plane.clock.now_ms() > before)
        await server.act("t1", "exec", TRUE)
        assert (await server.record(made["uid"])).last_activity_ms > before


async def test_a_repetition_while_the_create_waits_joins_it() -> None:
    async with running() as server:
        server.host.hold["create"] = asyncio.Event()
        body, headers = {"task_id": "t"}, {"Idempotency-Key": "k"}
        first = asyncio.ensure_future(server.http.post("/v1/environments", json=body, headers=headers))
        await until(lambda: server.host.count("create") == 1)
        second = asyncio.ensure_future(server.http.post("/v1/environments", json=body, headers=headers))
        requests = server.plane.metrics.in_flight
        await until(lambda: requests._value.get() == 2)
        server.host.hold["create"].set()
        answers = [await first, await second]
        assert [answer.status_code for answer in answers] == [201, 201]
        assert len({answer.json()["uid"] for answer in answers}) == 1
        assert server.host.count("create") == 1


async def test_a_create_that_died_before_it_had_an_effect_may_be_repeated() -> None:
    clock = FakeClock()
    async with running(clock=clock) as server:
        body = json.dumps({"task_id": "t"}).encode()
        key = RequestKey("", "create_environment", "k", fingerprint_of({}, [], body), "dead")
        assert await server.plane.store.claim_request(key, 60_000) is None  # as a process that died right after it
        headers = {"Idempotency-Key": "k"}
        early = await server.http.post("/v1/environments", content=body, headers=headers)
        assert (early.status_code, early.json()["error"]["details"]["reason"]) == (409, "idempotency_in_progress")
        clock.advance(30_001)
        assert (await server.http.post("/v1/environments", content=body, headers=headers)).status_code == 201


async def test_a_terminal_whose_host_is_lost_says_so() -> None:
    class Losing(FakeTerminal):
        async def receive(self) -> bytes | None:
            raise ReplyLost(id="h1", problem="reset")

    class LosingHost(FakeHost):
        async def open_frames(self, fence: Fence, machine_id: str) -> FakeTerminal:
            return Losing()

    async with running(LosingHost("h1")) as server:
        await server.create()
        async with websockets.connect(_ws(server, "shell")) as socket:
            frame = decode_message(await socket.recv())
            assert (frame.type, b"host_unreachable" in frame.payload) == (FrameType.ERROR, True)
            with pytest.raises(websockets.ConnectionClosedError) as caught:
                await socket.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1011


async def test_a_long_session_keeps_an_environment_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "NOTES_PER_TIMEOUT", 6000)
    async with running(policy=Policy(activity_grain_ms=0)) as server:
        made = await server.create(spec={"idle_timeout_seconds": 60})
        async with websockets.connect(_ws(server, "shell")) as socket:
            await socket.recv()
            first = (await server.record(made["uid"])).last_activity_ms

            async def is_noted() -> bool:
                return (await server.record(made["uid"])).last_activity_ms > first + 20

            await until(is_noted)


async def test_an_environment_that_ends_during_a_session_is_no_error() -> None:
    async with running() as server:
        await server.create(spec={"idle_timeout_seconds": 60})
        server.host.hold["relay"] = asyncio.Event()
        running_command = asyncio.ensure_future(server.act("t1", "exec", TRUE))
        await until(lambda: server.host.count("relay") == 1)
        assert (await server.delete()).status_code == 204
        server.host.hold["relay"].set()
        answer = await running_command
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (404, "machine_not_found")
