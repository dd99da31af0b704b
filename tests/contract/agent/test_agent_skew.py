"""The agent of the release before, as this release finds it."""

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_client import AgentClient
from agent_process import run_agent

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fusevm.control.guest_calls import GuestCalls
from fusevm.control.host_api import GuestRequest
from fusevm.model.errors import NotSupported, RouteNotFound
from fusevm.model.machine import Fence
from fusevm.wire.errors import parse_error
from fusevm.wire.guest import PROTOCOL_MAJOR, AgentHealth, AgentOrder, GuestState, SetupBody
from fusevm.wire.http1 import Connection, Response
from fusevm.wire.streams import ByteStream
from previous_agent import PROTOCOL, CommitMissing, NotAvailable, previous_agent

FENCE = Fence(cluster="c", uid="u", incarnation=1, action_seq=1)


class Answered:
    """The answer of a guest, as a host passes it on."""

    def __init__(self, stream: ByteStream, response: Response) -> None:
        self._stream = stream
        self._response = response
        self.status = response.status
        self.headers = response.headers

    def chunks(self) -> AsyncIterator[bytes]:
        return self._response.chunks()

    async def close(self) -> None:
        await self._stream.close()


class OneMachineHost:
    """A host whose relay leads to one agent."""

    def __init__(self, machine) -> None:
        self._machine = machine

    async def relay(self, request: GuestRequest) -> Answered:
        stream = await self._machine.open_stream()
        target = request.target.removeprefix("guest")
        response = await Connection(stream).request(request.method, target, body=request.body)
        if response.status >= 400:
            content = await response.read()
            await stream.close()
            raise parse_error(response.status, content)
        return Answered(stream, response)


@pytest.fixture(scope="session")
def previous_binary() -> Path:
    try:
        return previous_agent()
    except NotAvailable as e:
        pytest.skip(str(e))


@pytest.fixture
async def previous(previous_binary: Path):
    async with run_agent(previous_binary) as agent:
        yield agent


async def test_the_previous_agent_speaks_a_protocol_that_is_accepted(previous):
    health = await AgentClient(previous).ask("GET", "/health", AgentHealth)
    assert health.protocol == PROTOCOL
    assert int(health.protocol.split(".")[0]) == PROTOCOL_MAJOR


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("PUT", "setup", SetupBody(id="1")),
        ("PUT", "agent", AgentOrder(id="1", command=["true"])),
        ("POST", "agent/drain", {"timeout_ms": 1}),
        ("PUT", "healthcheck", {}),
        ("DELETE", "healthcheck", None),
        ("GET", "state?after=1&wait_ms=1", None),
        ("GET", "agent/output?stream=stdout", None),
    ],
)
async def test_what_the_previous_agent_lacks_is_said_to_be_not_supported(previous, method, target, body):
    with pytest.raises(RouteNotFound):
        await AgentClient(previous).call(method, f"/{target}", body)
    calls = GuestCalls(OneMachineHost(previous), FENCE, "m-1")
    with pytest.raises(NotSupported, match=f"{method} /{target.partition('?')[0]}"):
        await calls.ask(method, target, GuestState, body)


def test_a_commit_that_a_whole_clone_lacks_is_a_failure(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "init", "-q", clone], check=True)
    with pytest.raises(CommitMissing, match="is not in this clone"):
        previous_agent(cache=tmp_path, root=clone)


def test_a_commit_that_a_shallow_clone_lacks_is_a_reason_to_skip(tmp_path):
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    subprocess.run(["git", "init", "-q", origin], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for message in ("one", "two"):
        subprocess.run(["git", "-C", origin, *author, "commit", "-q", "--allow-empty", "-m", message], check=True)
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{origin}", clone], check=True)
    with pytest.raises(NotAvailable, match="it is shallow"):
        previous_agent(cache=tmp_path, root=clone)


def test_a_folder_that_is_no_clone_is_a_reason_to_skip(tmp_path):
    with pytest.raises(NotAvailable, match="is no clone"):
        previous_agent(cache=tmp_path, root=tmp_path)
