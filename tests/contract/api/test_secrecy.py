"""What a create brings along stays between its maker and the machine: nothing that people read shows it."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import structlog
from control_harness import Running, next_message, running, stream, until

from fusevm.control.host_api import GuestRequest
from fusevm.control.vault import redactor_of
from fusevm.model.errors import DaemonFailed, HostUnreachable
from fusevm.model.host import Resources
from fusevm.model.setup import AgentState, AgentStatus, HealthStatus, Setup, Verdict
from fusevm.testing.fake_host import FakeAnswer, FakeHost
from fusevm.wire.guest import DrainAnswer, Exit

SECRET, TOKEN, VARIABLE, GATE = "hush-hush-hush", "daemon-token-1", "value-of-MODE", "gate-token-22"
SECRETS = (SECRET, TOKEN, VARIABLE, GATE)
CHATTY = f"echo {' '.join(SECRETS)}"
BRINGS: dict[str, Any] = {
    "secrets": {"API_KEY": SECRET},
    "manifest_inline": base64.b64encode(json.dumps({"version": "1", "env": {"MODE": VARIABLE}}).encode()).decode(),
    "gateway_url": "https://gateway.example",
    "gateway_token": GATE,
    "agent": {"command": ["/opt/run", *SECRETS], "auth_token": TOKEN},
    "healthcheck": {"exec": ["/opt/check"]},
}
READER = {"name": "monitor", "scopes": ["environments:read"]}


def shown(text: str) -> list[str]:
    return [value for value in SECRETS if value in text]


async def machine_of(server: Running) -> str:
    return (await server.record((await server.get()).json()["uid"])).machine_id


async def everything_told(server: Running, uid: str) -> str:
    """The record and all its facts, as they are in the database and as they are shown."""
    facts = await server.plane.store.facts_of(uid, 0, 1000)
    record = await server.record(uid)
    shown_by_api = (await server.get(uid=uid)).text
    return msgspec.json.encode([record, [stored.fact for stored in facts]]).decode() + shown_by_api


async def test_output_of_the_startup_script_is_told_without_secrets() -> None:
    async with running() as server:
        env = await server.create(**BRINGS, startup_script=CHATTY)
        told = await everything_told(server, env["uid"])
        assert "fake: echo *** *** *** ***" in told
        assert not shown(told)


async def test_a_startup_script_that_fails_says_so_without_secrets() -> None:
    host = FakeHost("h1")
    with structlog.testing.capture_logs() as logs:
        async with running(host) as server:
            host.hold["relay"] = asyncio.Event()
            body = {"task_id": "t1", **BRINGS, "startup_script": CHATTY}
            creating = asyncio.ensure_future(server.http.post("/v1/environments", json=body))
            await until(lambda: host.guests)
            next(iter(host.guests.values())).exit = Exit(exit_code=3)
            host.hold.pop("relay").set()
            answer = await creating
            await until(lambda: host.count("destroy"))
            uid = next(uid for uid in (await server.plane.store.world()).environments)
            told = await everything_told(server, uid)
            assert "exit status 3: fake: echo ***" in told
            assert not shown(told + answer.text)
    assert not shown(repr(logs))


async def test_the_daemon_and_the_health_check_are_told_without_secrets() -> None:
    async with running() as server:
        env = await server.create(**BRINGS)
        guest = server.host.guests[await machine_of(server)]
        async with stream(server, "/v1/environments/fuse-t1/events") as events:
            await next_message(events)
            guest.agent = AgentStatus(state=AgentState.RUNNING, restarts=1, message=f"it said {SECRET}")
            guest.health = HealthStatus(state=Verdict.FAILING, failures=3, message=f"no {VARIABLE} at {GATE}")
            messages: dict[str, str] = {}
            while messages.keys() < {"health", "agent"}:
                message = (await next_message(events))[1]
                if message.get("message"):
                    messages[message["event"]] = message["message"]
        assert messages == {"health": "no *** at ***", "agent": "it said ***"}
        told = await everything_told(server, env["uid"])
        assert not shown(told)
        feeds = len(await server.plane.store.facts_of(env["uid"], 0, 1000))
        await asyncio.sleep(0.3)
        assert len(await server.plane.store.facts_of(env["uid"], 0, 1000)) == feeds, "the same news is told once"


async def test_a_drain_is_told_without_secrets() -> None:
    async with running() as server:
        env = await server.create(**BRINGS)
        server.host.guests[await machine_of(server)].drained = DrainAnswer(exit_code=1, message=f"lost {SECRET}")
        drained = await server.act("t1", "drain")
        assert drained.json()["error"] == "lost ***"
        assert not shown(await everything_told(server, env["uid"]))


class Chatty(FakeHost):
    """Its guests refuse another daemon, and tell too much."""

    async def relay(self, request: GuestRequest) -> FakeAnswer:
        if request.target == "guest/agent" and self.is_fed_up:
            raise DaemonFailed(problem=f"cannot use {GATE} and {SECRET}")
        return await super().relay(request)

    is_fed_up = False


async def test_an_error_of_the_guest_is_told_without_secrets() -> None:
    host = Chatty("h1")
    async with running(host) as server:
        env = await server.create(**BRINGS)
        host.is_fed_up = True
        answer = await server.act("t1", "rotate-token")
        assert not shown(answer.text)
        told = await everything_told(server, env["uid"])
        assert "and ***" in told
        assert not shown(told)


@pytest.mark.parametrize("source", ["console", "startup", "agent"])
@pytest.mark.parametrize("follow", ["false", "true"])
async def test_logs_show_no_secrets(source: str, follow: str) -> None:
    async with running() as server:
        await server.create(**BRINGS, startup_script=CHATTY)
        server.host.log_lines = f"[ 1.0] {CHATTY}\n".encode()
        server.host.guests[await machine_of(server)].stderr = f"{SECRET}\n".encode()
        answer = await server.http.get(f"/v1/environments/fuse-t1/logs?source={source}&follow={follow}")
        assert answer.status_code == 200
        assert "*** *** *** ***" in answer.text
        assert not shown(answer.text)


async def test_a_token_that_was_to_be_replaced_is_not_shown_either() -> None:
    host = Chatty("h1")
    async with running(host) as server:
        await server.create(**BRINGS)
        host.is_fed_up = True
        assert (await server.act("t1", "rotate-token")).status_code == 400
        server.host.guests[await machine_of(server)].stderr = f"it is still {TOKEN}\n".encode()
        answer = await server.http.get("/v1/environments/fuse-t1/logs?source=agent")
        assert "it is still ***" in answer.text
        assert not shown(answer.text)


class Written(FakeAnswer):
    """What a daemon writes while it is followed."""

    def __init__(self) -> None:
        super().__init__(200, {}, b"")
        self.lines: asyncio.Queue[bytes] = asyncio.Queue()

    async def chunks(self) -> AsyncIterator[bytes]:
        while line := await self.lines.get():
            yield line


class Followed(FakeHost):
    """Its daemons go on writing."""

    async def relay(self, request: GuestRequest) -> FakeAnswer:
        return self.written if "agent/output?stream=stdout" in request.target else await super().relay(request)

    written = Written()


async def test_a_new_token_is_masked_in_a_log_that_is_followed() -> None:
    host = Followed("h1")
    host.written = Written()
    async with running(host) as server:
        await server.create(**BRINGS)
        host.written.lines.put_nowait(f"began with {TOKEN}\n".encode())
        following = asyncio.ensure_future(server.http.get("/v1/environments/fuse-t1/logs?source=agent&follow=true"))
        await until(lambda: not host.written.lines.qsize())
        for _ in range(3):
            assert (await server.act("t1", "rotate-token")).status_code == 204
            order = host.guests[await machine_of(server)].order
            assert order is not None
            host.written.lines.put_nowait(f"goes on with {order.env['FUSE_AUTH_TOKEN']}\n".encode())
        host.written.lines.put_nowait(b"")
        lines = (await following).text.splitlines()
        assert [line for line in lines if "with" in line] == ["began with ***", *["goes on with ***"] * 3]


async def test_what_masks_many_values_is_made_once() -> None:
    def setup() -> Setup:
        return Setup(env={"MANY": "\n".join(f"{number:08}" for number in range(20_000))})

    redactor = await redactor_of(setup())
    assert redactor is await redactor_of(setup())
    assert redactor.text("no 00001234 here") == "no *** here"


class Tail(FakeHost):
    """Keeps the end of its consoles only."""

    async def relay(self, request: GuestRequest) -> FakeAnswer:
        answer = await super().relay(request)
        return FakeAnswer(200, {**answer.headers, "x-fuse-lost": "100"}, answer.content)


async def test_half_a_secret_at_the_beginning_of_a_cut_log_is_left_out() -> None:
    async with running(Tail("h1")) as server:
        server.host.log_lines = f"{SECRET[1:]}\nnext line\n".encode()
        await server.create(secrets={"API_KEY": SECRET})
        answer = await server.http.get(f"{ENV}/logs?tail_bytes=20")
        assert (answer.text, answer.headers["x-fuse-lost"]) == ("next line\n", "100")
        (asked,) = (call[1].target for call in server.host.calls if call[0] == "relay" and "logs" in call[1].target)
        assert "tail_bytes" not in asked, "nobody chooses where it is cut"


# -- rights --------------------------------------------------------------------------------------------------------

ENV = "/v1/environments/fuse-t1"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/files?path=/fuse/secrets.json", None),
        ("HEAD", "/files?path=/fuse/secrets.json", None),
        ("POST", "/files?op=list", {"path": "/fuse"}),
        ("POST", "/files?op=stat", {"path": "/fuse"}),
        ("GET", "/archive?path=/fuse", None),
        ("GET", "/processes", None),
        ("GET", "/processes/1", None),
        ("GET", "/processes/@startup/output", None),
        ("GET", "/computer", None),
    ],
)
async def test_who_may_only_read_environments_sees_nothing_inside(method: str, path: str, body: object) -> None:
    async with running(auth_token="master") as server:
        master = {"authorization": "Bearer master"}
        made = await server.http.post("/v1/api-keys", json=READER, headers=master)
        reader = {"authorization": f"Bearer {made.json()['key']}"}
        body_of_create = {"task_id": "t1", "secrets": {"API_KEY": SECRET}}
        assert (await server.http.post("/v1/environments", json=body_of_create, headers=master)).status_code == 201
        relayed = server.host.count("relay")
        answer = await server.http.request(method, ENV + path, json=body, headers=reader)
        assert answer.status_code == 403
        assert server.host.count("relay") == relayed
        for allowed in (ENV, ENV + "/logs"):
            assert (await server.http.get(allowed, headers=reader)).status_code == 200


async def test_files_can_still_be_read_while_an_environment_drains() -> None:
    async with running() as server:
        await server.create()
        server.host.files["/a"] = b"content"
        assert (await server.act("t1", "drain")).status_code == 200
        assert (await server.http.get(f"{ENV}/files?path=/a")).content == b"content"
        assert (await server.http.post(f"{ENV}/files?op=stat", json={"path": "/a"})).status_code == 200
        assert (await server.http.put(f"{ENV}/files?path=/a", content=b"x")).status_code == 409


# -- a line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["console", "startup", "agent"])
async def test_who_waits_for_a_place_has_no_log_of_any_kind(source: str) -> None:
    host = FakeHost("h1", capacity=Resources(cpus=9, ram_mb=1 << 20, storage_gb=900, vm_count=1))
    async with running(host) as server:
        await server.create("a")
        body = {"task_id": "t1", "queue_seconds": 600, "startup_script": "true", "agent": {"command": ["/opt/run"]}}
        answer = await server.http.post("/v1/environments", json=body, headers={"prefer": "respond-async"})
        assert answer.status_code == 202
        answer = await server.http.get(f"{ENV}/logs?source={source}")
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (404, "log_not_found")
        assert "waits for a place" in answer.json()["error"]["message"]
        await server.delete()


# -- once ----------------------------------------------------------------------------------------------------------


class Forgetful(FakeHost):
    """Is gone at the first question how the startup script ended: whoever tells its output begins again."""

    async def relay(self, request: GuestRequest) -> FakeAnswer:
        if request.target == "guest/processes/@startup" and not self.is_forgiven:
            self.is_forgiven = True
            raise HostUnreachable(id=self.id, problem="gone for a moment")
        return await super().relay(request)

    is_forgiven = False


async def test_output_is_told_once_when_its_teller_begins_again() -> None:
    async with running(Forgetful("h1")) as server:
        env = await server.create(startup_script="echo ready")
        assert env["state"] == "running"
        facts = await server.plane.store.facts_of(env["uid"], 0, 1000)
        told = [stored.fact.message for stored in facts if stored.fact.kind == "startup_output"]
        assert told == ["fake: echo ready\n"]
        assert (await server.record(env["uid"])).startup_told == {"stdout": len("fake: echo ready\n")}
