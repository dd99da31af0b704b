"""What a create brings along: delivered, tracked, rotated, drained; and never shown."""

import asyncio
import base64
import json
from typing import Any

import httpx
import pytest
from control_harness import Running, next_message, rest_of, running, stream, until

from fusevm.core.policy import Policy
from fusevm.model.errors import GuestUnreachable
from fusevm.model.event import AgentSeen
from fusevm.model.setup import AgentState, AgentStatus, HealthStatus, Verdict
from fusevm.testing.fake_host import FakeHost
from fusevm.wire.guest import DrainAnswer, Exit


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def machine_of(server: Running, task_id: str = "t1") -> str:
    env = (await server.get(task_id)).json()
    return (await server.record(env["uid"])).machine_id


async def facts(server: Running, uid: str) -> list[Any]:
    return [stored.fact for stored in await server.plane.store.facts_of(uid, 0, 1000)]


FULL = {
    "manifest_inline": b64('{"version":"1","workspace":"/work","env":{"MODE":"fast","KEY":{"secret":"API_KEY"}}}'),
    "secrets": {"API_KEY": "hush-hush-hush"},
    "files": {"/etc/app.conf": b64("a=1"), "/opt/run": {"content_b64": b64("#!/bin/sh"), "mode": "0755"}},
    "startup_script": "echo ready",
    "gateway_url": "https://gateway.example",
    "gateway_token": "gate-token",
    "healthcheck": {"http": {"port": 8000}},
    "agent": {"command": ["/opt/run", "--serve"], "drain_command": ["/opt/run", "--drain"], "env": {"A": "b"}},
}


async def test_everything_that_a_create_brings_reaches_the_guest() -> None:
    async with running() as server:
        env = await server.create(**FULL)
        assert env["state"] == "running"
        guest = server.host.guests[await machine_of(server)]
        setup, order = guest.setup, guest.order
        assert setup is not None
        assert order is not None
        assert json.loads(base64.b64decode(setup.fuse["secrets.json"].content_b64)) == {"API_KEY": "hush-hush-hush"}
        assert base64.b64decode(setup.files["/etc/app.conf"].content_b64) == b"a=1"
        assert setup.files["/opt/run"].mode == "0755"
        assert (setup.env["MODE"], setup.env["KEY"], setup.workdir) == ("fast", "hush-hush-hush", "/work")
        assert order.command == ["/opt/run", "--serve"]
        assert order.drain_command == ["/opt/run", "--drain"]
        token = base64.b64decode(setup.fuse["auth-token"].content_b64).decode().strip()
        assert len(token) >= 32
        assert order.env["FUSE_AUTH_TOKEN"] == token
        assert order.env["FUSE_GATEWAY_URL"] == "https://gateway.example"
        assert [asked.shell for asked in guest.processes.values()] == ["echo ready"]


async def test_the_startup_scripts_output_is_told_as_events() -> None:
    async with running() as server:
        env = await server.create(startup_script="echo ready")
        told = [fact for fact in await facts(server, env["uid"]) if fact.kind == "startup_output"]
        assert [(fact.message, fact.data) for fact in told] == [
            ("fake: echo ready\n", {"stream": "stdout", "offset": "0"})
        ]
        assert env["timings"]["setup_ms"] > 0


async def test_a_startup_script_that_fails_ends_the_environment_and_says_why() -> None:
    host = FakeHost("h1")
    async with running(host) as server:
        host.hold["relay"] = asyncio.Event()
        creating = asyncio.create_task(server.create_ends(startup_script="false"))
        await until(lambda: host.guests)
        next(iter(host.guests.values())).exit = Exit(exit_code=3)
        host.hold.pop("relay").set()
        env = await creating
        await until(lambda: host.count("destroy"))
        shown = (await server.get(uid=env["uid"])).json()
        assert (shown["reason"], shown["state"]) in {("startup_failed", "failed"), ("startup_failed", "destroying")}
        assert "exit status 3" in shown["error"]
        assert "fake: false" in shown["error"]


async def test_a_daemon_that_cannot_be_started_ends_the_environment_and_says_why() -> None:
    host = FakeHost("h1")
    async with running(host) as server:
        host.hold["relay"] = asyncio.Event()
        creating = asyncio.create_task(server.create_ends(agent={"command": ["/no/such/daemon"]}))
        await until(lambda: host.guests)
        next(iter(host.guests.values())).started = AgentState.FAILED
        host.hold.pop("relay").set()
        env = await creating
        await until(lambda: host.count("destroy"))
        shown = (await server.get(uid=env["uid"])).json()
        assert (shown["reason"], shown["code"]) == ("daemon_failed", "invalid_argument")
        assert shown["state"] in ("failed", "destroying")


async def test_nothing_sealed_is_shown_or_kept_after_the_end() -> None:
    async with running() as server:
        env = await server.create(**FULL)
        sealed = await server.plane.store.get_secret(f"env:{env['uid']}", "setup")
        assert sealed is not None
        assert "hush" not in sealed
        everything = json.dumps([env, (await server.get()).json()])
        assert "hush-hush-hush" not in everything
        assert "gate-token" not in everything
        assert (await server.delete()).status_code == 204
        assert await server.plane.store.get_secret(f"env:{env['uid']}", "setup") is None


async def test_an_environment_that_brings_nothing_is_not_set_up() -> None:
    async with running() as server:
        await server.create()
        assert server.host.count("relay") == 0


async def test_a_guest_that_does_not_answer_at_first_is_asked_again() -> None:
    host = FakeHost("h1")
    host.script("relay", GuestUnreachable(id="m", problem="still booting"))
    async with running(host) as server:
        env = await server.create(startup_script="true")
        assert env["state"] == "running"


async def test_the_daemon_and_the_health_check_are_tracked() -> None:
    async with running() as server:
        env = await server.create(**FULL)
        guest = server.host.guests[await machine_of(server)]
        async with stream(server, "/v1/environments/fuse-t1/events") as events:
            await next_message(events)
            guest.health = HealthStatus(state=Verdict.FAILING, failures=3, message="connection refused")
            guest.agent = AgentStatus(state=AgentState.RUNNING, restarts=1, exit_code=137)
            kinds = set()
            while kinds < {"health", "agent"}:
                kinds.add((await next_message(events))[1]["event"])

        async def shown() -> bool:
            body = (await server.get()).json()
            return body.get("health", {}).get("state") == "failing" and body.get("agent", {}).get("restarts") == 1

        await until(shown)
        body = (await server.get()).json()
        assert body["health"]["failures"] == 3
        assert body["agent"]["exit_code"] == 137
        assert body["uid"] == env["uid"]


async def test_rotation_gives_the_daemon_another_token() -> None:
    async with running() as server:
        await server.create(**FULL)
        guest = server.host.guests[await machine_of(server)]
        assert guest.order is not None
        before, first_id = guest.order.env["FUSE_AUTH_TOKEN"], guest.order.id
        answer = await server.act("t1", "rotate-token")
        assert (answer.status_code, answer.content) == (204, b"")
        after = guest.order.env["FUSE_AUTH_TOKEN"]
        assert after != before
        assert guest.order.id != first_id
        assert len(guest.processes) == 1, "the startup script is not run again"


async def test_rotation_without_a_daemon_replaces_the_token_in_its_file() -> None:
    async with running() as server:
        await server.create(secrets={"A": "b"})
        guest = server.host.guests[await machine_of(server)]
        assert guest.setup is not None
        before = guest.setup.fuse["auth-token"]
        assert (await server.act("t1", "rotate-token")).status_code == 204
        assert guest.setup.fuse["auth-token"] != before
        assert guest.setup.fuse.keys() >= {"secrets.json", "env"}


async def test_rotation_without_a_token_has_nothing_to_do() -> None:
    async with running() as server:
        await server.create()
        assert (await server.act("t1", "rotate-token")).status_code == 204
        assert server.host.count("relay") == 0


async def rotating(server: Running) -> asyncio.Task[httpx.Response]:
    """A rotation that is held up on its way into the guest."""
    server.host.hold["relay"] = asyncio.Event()
    asked = server.host.count("relay")
    task = asyncio.create_task(server.act("t1", "rotate-token"))
    await until(lambda: server.host.count("relay") > asked)
    return task


async def test_rotation_in_a_silent_guest_is_a_timeout_and_not_the_clients_fault() -> None:
    async with running(policy=Policy(rotate_deadline_ms=1500)) as server:
        await server.create(secrets={"A": "b"})
        server.host.script("relay", *[GuestUnreachable(id="m", problem="no answer")] * 100)
        answer = await server.act("t1", "rotate-token")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert "no answer" in answer.json()["error"]["message"]
        assert (await server.get()).json()["state"] == "running"


async def test_rotation_says_that_the_daemon_did_not_start_again() -> None:
    async with running() as server:
        await server.create(**FULL)
        server.host.guests[await machine_of(server)].started = AgentState.FAILED
        answer = await server.act("t1", "rotate-token")
        error = answer.json()["error"]
        assert (answer.status_code, error["details"]["reason"]) == (400, "daemon_failed")
        assert error["message"].count("could not be started") == 1


async def test_rotation_is_not_held_to_fail_for_other_news_of_the_daemon() -> None:
    async with running() as server:
        env = await server.create(secrets={"A": "b"})
        task = await rotating(server)
        for restarts in range(1, 150):
            seen = AgentStatus(state=AgentState.RUNNING, restarts=restarts, exit_code=137, message="killed by signal 9")
            await server.plane.entry.feed(env["uid"], AgentSeen(cause="guest", status=seen))
        server.host.hold.pop("relay").set()
        assert (await task).status_code == 204


async def test_rotation_that_a_destroy_comes_before_says_so() -> None:
    async with running() as server:
        await server.create(secrets={"A": "b"})
        task = await rotating(server)
        assert (await server.delete()).status_code == 204
        server.host.hold.pop("relay").set()
        answer = await task
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (404, "ended")


async def test_two_environments_never_share_a_token() -> None:
    async with running() as server:
        await server.create("a", agent={"command": ["x"]})
        await server.create("b", agent={"command": ["x"]})
        orders = [guest.order for guest in server.host.guests.values()]
        assert len({order.env["FUSE_AUTH_TOKEN"] for order in orders if order is not None}) == 2


async def test_a_drain_waits_for_the_daemons_end() -> None:
    async with running() as server:
        await server.create(**FULL)
        drained = await server.act("t1", "drain")
        assert drained.status_code == 200
        assert drained.json()["state"] == "draining"
        assert drained.json()["agent"]["state"] == "drained"
        assert drained.json().get("error", "") == ""


async def test_a_drain_that_goes_wrong_says_so_and_the_environment_stays() -> None:
    async with running() as server:
        await server.create(**FULL)
        server.host.guests[await machine_of(server)].drained = DrainAnswer(
            exit_code=137, message="killed at the deadline"
        )
        drained = (await server.act("t1", "drain")).json()
        assert drained["state"] == "draining"
        assert drained["error"] == "killed at the deadline"
        assert drained["agent"]["exit_code"] == 137


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"secrets": {"A": "x" * (65 << 10)}}, "secrets"),
        ({"files": {"relative": b64("x")}}, "files"),
        ({"files": {"/a": "not base64!"}}, "files"),
        ({"healthcheck": {}}, "healthcheck"),
        ({"healthcheck": {"exec": ["a"], "timeout_seconds": 20}}, "healthcheck"),
        ({"agent": {"sha256": "abc", "download_url": "https://x/y"}}, "agent"),
        ({"agent": "nobody"}, "agent"),
        ({"manifest_inline": "!!"}, "manifest_inline"),
        ({"startup_script": "true", "startup_script_timeout_seconds": -1}, "startup_script_timeout_seconds"),
    ],
)
async def test_what_is_wrong_is_named_and_nothing_is_made(body: dict[str, Any], field: str) -> None:
    async with running() as server:
        answer = await server.http.post("/v1/environments", json={"task_id": "t1", **body})
        assert answer.status_code == 400, answer.text
        assert field in answer.json()["error"]["message"]
        assert server.host.count("create") == 0


async def test_a_profile_of_the_settings_is_used_by_name() -> None:
    from fusevm.model.setup import AgentSpec  # noqa: PLC0415 - only here

    profiles = {"helper": AgentSpec(command=("/usr/bin/helper",), env={"LEVEL": "1"})}
    async with running(agents=profiles) as server:
        await server.create("a", agent="helper")
        await server.create("b", agent={"profile": "helper", "env": {"LEVEL": "2"}})
        orders = [guest.order for guest in server.host.guests.values()]
        assert [order.command for order in orders if order is not None] == [["/usr/bin/helper"]] * 2
        assert sorted(order.env["LEVEL"] for order in orders if order is not None) == ["1", "2"]


async def test_a_stream_that_is_opened_after_the_end_has_the_scripts_output_too() -> None:
    async with running() as server:
        env = await server.create(startup_script="echo ready")
        await server.delete()
        async with stream(server, f"/v1/environments/fuse-t1/events?uid={env['uid']}") as events:
            kinds = [message["event"] for message in await rest_of(events)]
        assert "startup_output" in kinds
        assert kinds[-1] == "state"
