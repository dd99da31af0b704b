"""One suite for the guest agent: the real one as an ordinary process, and the fake of the host daemon's tests."""

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fusevm.host.images.initramfs import agent_path
from fusevm.model.errors import VmmMissing

sys.path.insert(0, str(Path(__file__).parent))

from agent_client import AgentClient
from agent_process import RealAgent, run_agent

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


@pytest.fixture(params=["real", "fake"])
async def machine(request: pytest.FixtureRequest) -> AsyncIterator[Machine]:
    """An agent; at the end nothing of it runs."""
    if request.param == "fake":
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


@pytest.fixture
async def agent(machine: Machine) -> AgentClient:
    """A client of the machine's agent."""
    return AgentClient(machine)
