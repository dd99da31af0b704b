"""Machines whose agent is of the release before: what it can do works, and what it cannot is said in a sentence."""

from collections.abc import AsyncIterator

import pytest
from agent_process import RealAgent, run_agent
from control_harness import running, until

from fusevm.control.host_api import GuestRequest
from fusevm.testing.fake_host import FakeAnswer, FakeHost
from fusevm.wire.errors import parse_error
from fusevm.wire.http1 import Connection
from previous_agent import NotAvailable, previous_agent

URL = "/v1/environments/fuse-t1"


class OlderHost(FakeHost):
    """A host in memory whose machines are all one process of an older agent."""

    def __init__(self, agent: RealAgent) -> None:
        super().__init__("h1")
        self._agent = agent

    async def relay(self, request: GuestRequest) -> FakeAnswer:
        body = request.body
        if body is not None and not isinstance(body, bytes):
            body = b"".join([chunk async for chunk in body])
        connection = Connection(await self._agent.open_stream())
        try:
            target = request.target.removeprefix("guest")
            response = await connection.request(request.method, target, headers=request.headers, body=body)
            content = await response.read()
        finally:
            await connection.close()
        if response.status >= 400:
            raise parse_error(response.status, content)
        headers = {
            name: response.headers[name] for name in ("content-type", "content-length") if name in response.headers
        }
        return FakeAnswer(response.status, headers, content)


@pytest.fixture
async def host() -> AsyncIterator[OlderHost]:
    try:
        program = previous_agent()
    except NotAvailable as error:
        pytest.skip(str(error))
    async with run_agent(program) as agent:
        (agent.root / "disk").mkdir()
        yield OlderHost(agent)


async def test_commands_and_files_work(host: OlderHost) -> None:
    async with running(host) as server:
        await server.create()
        ran = await server.act("t1", "exec", {"shell": "printf out; printf err >&2; exit 3"})
        assert (ran.json()["exit_code"], ran.json()["stdout"], ran.json()["stderr"]) == (3, "out", "err")
        place = {"path": str(host._agent.root / "disk" / "file")}
        written = await server.http.put(f"{URL}/files", params=place, content=b"contents")
        assert written.json()["size_bytes"] == 8
        assert (await server.http.get(f"{URL}/files", params=place)).content == b"contents"
        missing = await server.act("t1", "exec", {"cmd": ["/no/such/program"]})
        assert missing.json()["error"]["details"]["reason"] == "command_not_found"
        assert (await server.delete()).status_code == 204


@pytest.mark.parametrize(
    "body",
    [
        {"startup_script": "true"},
        {"secrets": {"A": "b"}},
        {"files": {"/etc/x": "YQ=="}},
        {"healthcheck": {"exec": ["true"]}},
        {"agent": {"command": ["sleep", "1"]}},
    ],
    ids=lambda body: next(iter(body)),
)
async def test_what_it_would_have_to_deliver_ends_the_environment_with_a_sentence(
    host: OlderHost, body: dict[str, object]
) -> None:
    async with running(host) as server:
        refused = await server.http.post("/v1/environments", json={"task_id": "t1", **body})
        assert refused.status_code == 501
        await until(lambda: host.count("destroy"))
        shown = (await server.get(uid=refused.json()["error"]["details"]["uid"])).json()
        assert (shown["reason"], shown["code"]) == ("not_supported", "unimplemented")
        assert "the machine's agent is older" in shown["error"]
        await until(lambda: not host.table)
