"""Setup, daemon, health check and state of a guest through the host's relay: every method, and answers that wait."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.listeners import bind_unix, serving
from fusevm.model.errors import BadPath, RouteNotFound
from fusevm.model.setup import AgentState, Healthcheck, HttpCheck, SetupFile, Verdict
from fusevm.testing.fake_agent import FakeAgent
from fusevm.testing.host_world import SPEC, World, fence, until
from fusevm.wire.errors import parse_error
from fusevm.wire.guest import AgentOrder, DrainAnswer, DrainOrder, ExecRequest, GuestState, Process, SetupBody
from fusevm.wire.host_api import fence_headers
from fusevm.wire.http1 import Connection
from fusevm.wire.streams import open_unix

T = TypeVar("T")
FENCE = fence_headers(fence())
SECRET = SetupFile(content_b64=base64.b64encode(b"t0ken").decode(), mode="0600")


class Guest:
    """A running machine of a host daemon, its fake agent, and a client."""

    def __init__(self, world: World, path: Path) -> None:
        self._world = world
        self._path = path

    @property
    def agent(self) -> FakeAgent:
        return self._world.driver.processes["m-1"].agent

    async def call(self, method: str, target: str, body: Any = None) -> tuple[int, bytes]:
        connection = Connection(await open_unix(str(self._path)))
        try:
            encoded = msgspec.json.encode(body) if body is not None else None
            response = await connection.request(method, f"/machines/m-1{target}", headers=FENCE, body=encoded)
            content = await response.read()
            if response.status >= 400:
                raise parse_error(response.status, content)
            return response.status, content
        finally:
            await connection.close()

    async def ask(self, method: str, target: str, kind: type[T], body: Any = None) -> T:
        return msgspec.json.decode((await self.call(method, f"/guest{target}", body))[1], type=kind)


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    world = World(tmp_path)
    async with world.daemon() as daemon:
        path = tmp_path / "api.sock"
        app = Boundary(make_router(daemon), daemon.metrics, secret=None)
        async with serving(bind_unix(path), app):
            body = msgspec.json.encode({"machine_id": "m-1", "spec": SPEC})
            connection = Connection(await open_unix(str(path)))
            response = await connection.request("POST", "/machines", headers=FENCE, body=body)
            assert response.status == 201, await response.read()
            await connection.close()
            guest = Guest(world, path)
            yield guest
            with contextlib.suppress(KeyError):
                guest.agent.close()
            daemon.events.close()


async def test_a_setup_a_daemon_and_a_health_check_pass_through(guest: Guest):
    body = SetupBody(id="1", fuse={"auth-token": SECRET}, env={"A": "1"})
    assert (await guest.ask("PUT", "/setup", GuestState, body)).setup_id == "1"
    assert guest.agent.files["/fuse/auth-token"] == b"t0ken"
    await guest.ask("PUT", "/agent", GuestState, AgentOrder(id="o", command=["hang"], drain_command=["echo", "bye"]))
    await until(lambda: guest.agent.duties.state.agent.state is AgentState.RUNNING)
    check = Healthcheck(http=HttpCheck(port=80))
    await guest.ask("PUT", "/healthcheck", GuestState, check)
    await until(lambda: guest.agent.duties.state.health.state is Verdict.PASSING)
    assert (await guest.ask("DELETE", "/healthcheck", GuestState)).health is None
    answer = await guest.ask("POST", "/agent/drain", DrainAnswer, DrainOrder(timeout_ms=1000))
    assert answer == DrainAnswer(exit_code=143)
    assert (await guest.call("GET", "/guest/agent/output?offset=1&follow=true"))[1] == b"ye\n"


async def test_a_process_with_a_key_passes_through_with_both_statuses(guest: Guest):
    request = ExecRequest(shell="echo once", key="startup")
    first, again = [await guest.call("POST", "/guest/processes", request) for _ in range(2)]
    assert (first[0], again[0]) == (201, 200)
    assert msgspec.json.decode(again[1], type=Process).key == "startup"
    assert (await guest.call("GET", "/guest/processes/@startup/output?follow=true"))[1] == b"once\n"


async def test_news_arrive_while_a_client_waits_for_them(guest: Guest):
    version = (await guest.ask("GET", "/state", GuestState)).version
    target = f"/state?after={version}&wait_ms=60000"
    waiting = asyncio.create_task(guest.ask("GET", target, GuestState))
    await until(lambda: f"GET {target}" in guest.agent.requests)
    await guest.ask("PUT", "/setup", GuestState, SetupBody(id="news"))
    assert (await waiting).setup_id == "news"


async def test_errors_of_a_setup_keep_their_class(guest: Guest):
    with pytest.raises(BadPath):
        await guest.ask("PUT", "/setup", GuestState, SetupBody(id="1", files={"/proc/x": SECRET}))
    with pytest.raises(RouteNotFound):
        await guest.ask("PUT", "/set-up", GuestState, SetupBody(id="1"))


async def test_what_the_host_configures_does_not_replace_what_a_setup_says(guest: Guest):
    await guest.ask("PUT", "/setup", GuestState, SetupBody(id="1", env={"COLOUR": "blue"}, workdir="/work"))
    state = await guest.ask("GET", "/state", GuestState)
    guest.agent.configured.append(guest.agent.configured[-1])  # as after a restart of the daemon
    assert await guest.ask("GET", "/state", GuestState) == state
    _, content = await guest.call("POST", "/exec", {"command": ["sh", "-c", "printenv COLOUR; pwd"]})
    assert msgspec.json.decode(content)["stdout"] == "blue\n/work\n"


async def test_a_stopped_machine_has_lost_what_it_was_told(guest: Guest):
    await guest.ask("PUT", "/setup", GuestState, SetupBody(id="1"))
    await guest.call("POST", "/stop")
    await guest.call("POST", "/start")
    assert (await guest.ask("GET", "/state", GuestState)).setup_id == ""
