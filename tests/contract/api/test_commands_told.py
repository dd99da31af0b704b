"""Commands are told as events of kind `exec`: that they ended and how, never what they were or wrote."""

import asyncio
from typing import Any

import msgspec
import pytest
import websockets
from control_harness import Running, leave, running, until

from fusevm.control import command_log
from fusevm.control.host_api import GuestRequest, ReplyLost
from fusevm.control.store.sqlite import open_sqlite
from fusevm.core.policy import Policy
from fusevm.model.errors import Internal, StoreUnreachable
from fusevm.model.fact import Fact, Kind
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import FakeAnswer, FakeHost
from fusevm.wire.frames import Frame, FrameType, decode_message, encode_frame
from fusevm.wire.guest import ExecRequest, ExecResult, Process

ENV = "/v1/environments/fuse-t1"
TRUE = {"cmd": ["program-name", "an-argument"]}


async def told(server: Running, uid: str, count: int = 1) -> list[Fact]:
    """The facts of commands, once there are so many."""

    async def found() -> list[Fact]:
        facts = [stored.fact for stored in await server.plane.store.facts_of(uid, 0, 10_000)]
        commands = [fact for fact in facts if fact.kind is Kind.EXEC]
        return commands if len(commands) >= count else []

    facts = await until(found)
    assert "argument" not in str(facts)
    return list(facts)


@pytest.mark.parametrize(
    ("result", "data", "message"),
    [
        (ExecResult(exit_code=0, duration_ms=12), {"exit_code": "0"}, "a command ended with exit status 0"),
        (
            ExecResult(exit_code=137, signal="KILL", duration_ms=12),
            {"exit_code": "137", "signal": "KILL"},
            "a command was ended by the signal KILL",
        ),
        (
            ExecResult(exit_code=124, timed_out=True, duration_ms=12),
            {"exit_code": "124", "timed_out": "true"},
            "a command was ended at its time limit",
        ),
    ],
)
async def test_the_end_of_a_command_is_told(result: ExecResult, data: dict[str, str], message: str) -> None:
    async with running() as server:
        env = await server.create()
        server.host.on_exec = lambda _order: result
        answer = await server.act("t1", "exec", TRUE)
        (fact,) = await told(server, env["uid"])
        assert fact.data == {"how": "exec", "duration_ms": "12", **data}
        assert (fact.message, fact.cause) == (message, f"request {answer.headers['x-request-id']}")


async def test_a_command_that_was_lost_sight_of_is_told_as_that() -> None:
    async with running() as server:
        env = await server.create()
        server.host.script("relay", ReplyLost(id="h1", problem="reset"))
        assert (await server.act("t1", "exec", TRUE)).status_code == 503
        server.host.hold["relay"] = asyncio.Event()
        await leave(server.act("t1", "exec", TRUE), lambda: server.host.count("relay") == 2)
        facts = await told(server, env["uid"], 2)
        assert [(fact.reason, fact.data) for fact in facts] == [("cut_off", {"how": "exec"})] * 2
        server.host.hold.pop("relay").set()


async def test_a_command_that_was_refused_is_not_told() -> None:
    async with running() as server:
        env = await server.create()
        assert (await server.act("t1", "exec", {})).status_code == 400
        await server.act("t1", "exec", TRUE)
        assert len(await told(server, env["uid"])) == 1


@pytest.mark.parametrize(("path", "how"), [("exec", "stream"), ("shell", "shell")])
@pytest.mark.parametrize("is_ended", [True, False])
async def test_sessions_are_told(path: str, how: str, is_ended: bool) -> None:
    async with running() as server:
        env = await server.create()
        async with websockets.connect(f"{server.url.replace('http', 'ws')}{ENV}/{path}") as socket:
            if how == "stream":
                start = msgspec.json.encode(ExecRequest(cmd=["an-argument"]))
                await socket.send(encode_frame(Frame(FrameType.START, start)))
            assert decode_message(bytes(await socket.recv())).type is FrameType.STARTED
            if is_ended:
                await socket.send(encode_frame(Frame(FrameType.STDIN_EOF)))
                assert decode_message(bytes(await socket.recv())).type is FrameType.EXIT
        (fact,) = await told(server, env["uid"])
        assert (fact.reason, fact.data["how"]) == ("" if is_ended else "cut_off", how)
        assert fact.data.get("exit_code") == ("0" if is_ended else None)


class WithProcesses(FakeHost):
    """Its guests start processes; a key that is known starts nothing."""

    async def relay(self, request: GuestRequest) -> FakeAnswer:
        if request.target == "guest/processes" and isinstance(request.body, bytes):
            status = 200 if b"known" in request.body else 201
            body = msgspec.json.encode(Process(pid=7, cmd=["an-argument"]))
            return FakeAnswer(status, {"content-length": str(len(body)), "content-type": "application/json"}, body)
        return await super().relay(request)


async def test_the_start_of_a_background_process_is_told_once() -> None:
    async with running(WithProcesses("h1")) as server:
        env = await server.create()
        assert (await server.http.post(f"{ENV}/processes", json={"cmd": ["a"], "key": "known"})).status_code == 200
        assert (await server.http.post(f"{ENV}/processes", json={"cmd": ["a"]})).status_code == 201
        (fact,) = await told(server, env["uid"])
        assert (fact.data, fact.message) == ({"how": "process", "pid": "7"}, "a background process was started")


async def test_what_ended_is_told_before_the_end_of_its_environment() -> None:
    async with running() as server:
        env = await server.create()
        await server.act("t1", "exec", TRUE)
        await server.delete()
        facts = [stored.fact for stored in await server.plane.store.facts_of(env["uid"], 0, 9)]
        kinds = [(fact.kind, fact.state) for fact in facts]
        assert kinds[2] == (Kind.EXEC, "running")
        assert kinds[-1] == (Kind.STATE, "destroyed")


async def test_many_commands_are_one_transaction_and_none_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_log, "EVERY_S", 3600.0)
    async with running() as server:
        env = await server.create()
        before = await server.record(env["uid"])
        for _ in range(20):
            assert (await server.act("t1", "exec", TRUE)).status_code == 200
        end = ExecResult(exit_code=0)
        for number in range(980):
            server.plane.commands.ended(before, "exec", f"request {number}", end)
        assert (await server.record(env["uid"])).revision == before.revision
        await server.plane.commands.tell(env["uid"])
        assert (await server.record(env["uid"])).revision == before.revision + 1
        facts = await told(server, env["uid"], command_log.MOST + 1)
        assert len(facts) == command_log.MOST + 1
        assert (facts[-1].reason, facts[-1].data) == ("omitted", {"count": str(1000 - command_log.MOST)})


async def test_what_the_store_did_not_take_is_told_later() -> None:
    async with running() as server:
        env = await server.create()
        record, commands = await server.record(env["uid"]), server.plane.commands
        commands.ended(record, "exec", "request a", ExecResult(exit_code=0))
        commit = server.plane.store.commit

        async def unreachable(*_args: Any, **_more: Any) -> Any:
            raise StoreUnreachable(problem="away")

        server.plane.store.commit = unreachable  # type: ignore[method-assign]
        await commands.tell(env["uid"])
        server.plane.store.commit = commit  # type: ignore[method-assign]
        commands.ended(record, "exec", "request b", ExecResult(exit_code=0))
        assert [fact.cause for fact in await told(server, env["uid"], 2)] == ["request a", "request b"]


async def test_what_the_store_never_takes_is_dropped() -> None:
    async with running() as server:
        env = await server.create()
        record, commands = await server.record(env["uid"]), server.plane.commands
        commands.ended(record, "exec", "request a", ExecResult(exit_code=0))
        commit = server.plane.store.commit

        async def hopeless(*_args: Any, **_more: Any) -> Any:
            raise Internal(problem="unreadable")

        server.plane.store.commit = hopeless  # type: ignore[method-assign]
        await commands.tell(env["uid"])
        server.plane.store.commit = commit  # type: ignore[method-assign]
        commands.ended(record, "exec", "request b", ExecResult(exit_code=0))
        assert [fact.cause for fact in await told(server, env["uid"])] == ["request b"]


async def test_commands_that_are_only_counted_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_log, "MOST_WAITING", 0)
    async with running() as server:
        env = await server.create()
        record = await server.record(env["uid"])
        for _ in range(3):
            server.plane.commands.ended(record, "exec", "request a", ExecResult(exit_code=0))
        (fact,) = await told(server, env["uid"])
        assert (fact.reason, fact.data) == ("omitted", {"count": "3"})


async def test_an_orderly_end_of_the_server_loses_nothing_that_is_being_told(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_log, "EVERY_S", 0.0)
    database, is_stuck = str(tmp_path / "fuse.db"), asyncio.Event()
    async with running(database=database) as server:
        env = await server.create()
        commit = server.plane.store.commit

        async def stuck_once(*_args: Any, **_more: Any) -> Any:
            server.plane.store.commit = commit  # type: ignore[method-assign]
            is_stuck.set()
            await asyncio.Event().wait()

        server.plane.store.commit = stuck_once  # type: ignore[method-assign]
        server.plane.commands.ended(await server.record(env["uid"]), "exec", "request a", ExecResult(exit_code=0))
        await is_stuck.wait()
    store = await open_sqlite(database, Policy(), FakeClock().now_ms)
    try:
        causes = [stored.fact.cause for stored in await store.facts_of(env["uid"], 0, 10)]
        assert causes[-1] == "request a"
    finally:
        await store.close()


async def test_an_orderly_end_of_the_server_tells_what_is_left(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_log, "EVERY_S", 3600.0)
    database = str(tmp_path / "fuse.db")
    async with running(database=database) as server:
        env = await server.create()
        assert (await server.act("t1", "exec", TRUE)).status_code == 200
    store = await open_sqlite(database, Policy(), FakeClock().now_ms)
    try:
        facts = [stored.fact.kind for stored in await store.facts_of(env["uid"], 0, 10)]
        assert facts[-1] is Kind.EXEC
    finally:
        await store.close()
