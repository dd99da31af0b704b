"""One suite for the guest agent: the real one as an ordinary process, and the fake of the host daemon's tests; what the
pretended guest of the stub host claims to do is held to it, too."""

import asyncio
import contextlib
import hashlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import pytest

from fusevm.host.images.initramfs import agent_path
from fusevm.model.errors import VmmMissing

sys.path.insert(0, str(Path(__file__).parent))

from agent_client import AgentClient
from agent_process import RealAgent, run_agent

from fusevm.control.pretended_guest import PretendedGuest
from fusevm.testing.fake_agent import FakeAgent, memory_pair
from fusevm.wire.streams import ByteStream


class FakeMachine:
    """A `FakeAgent` on in-memory streams."""

    folder = "/fuse"

    def __init__(self) -> None:
        self.agent = FakeAgent("nonce", lambda: None)
        self._serving: list[asyncio.Task[None]] = []

    async def open_stream(self) -> ByteStream:
        ours, theirs = memory_pair()
        self._serving.append(asyncio.create_task(self.agent.serve(theirs)))
        return ours

    def path(self, name: str) -> str:
        return f"/disk/{name}"

    def read(self, path: str) -> bytes | None:
        return self.agent.files.get(path)

    def publish(self, content: bytes) -> str:
        url = f"http://site/{hashlib.sha256(content).hexdigest()}"
        self.agent.duties.downloads[url] = content
        return url

    async def kill_daemon(self, _client: AgentClient) -> None:
        self.agent.duties.kill_daemon()

    async def close(self) -> None:
        self.agent.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)


Machine = RealAgent | FakeMachine


class PretendedClient(AgentClient):
    """A client of a guest that is only pretended, whose answers are there at once."""

    def __init__(self) -> None:
        self._guest = PretendedGuest("pretended")

    async def call(self, method: str, target: str, body: Any = None) -> tuple[int, bytes]:
        path, _, query = target.removeprefix("/").partition("?")
        content = msgspec.json.encode(body) if body is not None else b""
        said = self._guest.answer(method, path, dict(parse_qsl(query)), content)
        assert said is not None, f"{method} {target} is not pretended"
        return said.status, said.body


@contextlib.asynccontextmanager
async def running(kind: str) -> AsyncIterator[Machine]:
    """An agent; at the end nothing of it runs."""
    if kind == "fake":
        fake = FakeMachine()
        yield fake
        await fake.close()
        return
    try:
        program = agent_path()
    except VmmMissing as e:
        pytest.skip(str(e))
    async with run_agent(program) as real:
        yield real
        client = AgentClient(real)
        await client.stop_everything()


@pytest.fixture(params=["real", "fake"])
async def machine(request: pytest.FixtureRequest) -> AsyncIterator[Machine]:
    """An agent."""
    async with running(request.param) as found:
        yield found


@pytest.fixture(params=["real", "fake", "pretended"])
async def any_agent(request: pytest.FixtureRequest) -> AsyncIterator[AgentClient]:
    """A client of an agent, or of a guest that is only pretended: nothing is to be seen of what runs in that one."""
    if request.param == "pretended":
        yield PretendedClient()
        return
    async with running(request.param) as found:
        yield AgentClient(found)


@pytest.fixture
async def agent(machine: Machine) -> AgentClient:
    """A client of the machine's agent."""
    return AgentClient(machine)
