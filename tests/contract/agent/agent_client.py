"""A client of one guest agent, for tests: a connection a request."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import msgspec

from fusevm.model.setup import SetupFile
from fusevm.wire.errors import parse_error
from fusevm.wire.guest import AgentOrder, DrainAnswer, ExecRequest, ExecResult, GuestState, ProcessList
from fusevm.wire.http1 import Connection, Response
from fusevm.wire.streams import ByteStream

T = TypeVar("T")
#: Generous: whatever else the machine does.
PATIENCE_S = 60.0


class Machine(Protocol):
    """Where streams to an agent come from."""

    async def open_stream(self) -> ByteStream: ...


class AgentClient:
    """What tests ask."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @asynccontextmanager
    async def exchange(self, method: str, target: str, body: Any = None, **headers: str) -> AsyncIterator[Response]:
        """Bytes are sent as they are, everything else as JSON."""
        connection = Connection(await self._machine.open_stream())
        try:
            encoded = body if body is None or isinstance(body, bytes) else msgspec.json.encode(body)
            yield await connection.request(method, target, body=encoded, headers=headers)
        finally:
            await connection.close()

    async def call(self, method: str, target: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of a success; errors are raised as what they are."""
        async with asyncio.timeout(PATIENCE_S), self.exchange(method, target, body) as response:
            content = await response.read()
            if response.status >= 400:
                raise parse_error(response.status, content)
            return response.status, content

    async def ask(self, method: str, target: str, kind: type[T], body: Any = None) -> T:
        return msgspec.json.decode((await self.call(method, target, body))[1], type=kind)

    async def state(self) -> GuestState:
        return await self.ask("GET", "/state", GuestState)

    async def await_state(self, holds: Callable[[GuestState], bool]) -> GuestState:
        """Wait by the long poll until the state is what is wanted."""
        async with asyncio.timeout(PATIENCE_S):
            state = await self.state()
            while not holds(state):
                state = await self.ask("GET", f"/state?after={state.version}&wait_ms=10000", GuestState)
            return state

    async def run(self, *cmd: str, **more: Any) -> tuple[int, str]:
        """Exit code and output of a command."""
        result = await self.ask("POST", "/exec", ExecResult, ExecRequest(cmd=list(cmd), **more))
        return result.exit_code, base64.b64decode(result.stdout_b64).decode()

    async def daemon_output(self, stream: str = "stdout") -> str:
        return (await self.call("GET", f"/agent/output?stream={stream}"))[1].decode()

    async def await_daemon_output(self, text: str, stream: str = "stdout") -> None:
        """Follow the daemon's output until it contains a text."""
        async with asyncio.timeout(PATIENCE_S):
            async with self.exchange("GET", f"/agent/output?stream={stream}&offset=0&follow=true") as response:
                seen = b""
                async for chunk in response.chunks():
                    seen += chunk
                    if text.encode() in seen:
                        return
        raise AssertionError(f"the daemon's output ended without {text!r}: {seen!r}")

    async def stop_everything(self) -> None:
        """End what an agent that is no machine's first process would leave behind."""
        await self.call("DELETE", "/healthcheck")
        await self.call("PUT", "/agent", AgentOrder(id="the end", command=["true"], restart="never"))
        await self.await_state(lambda state: state.agent is not None and state.agent.state == "exited")
        for process in (await self.ask("GET", "/processes", ProcessList)).processes:
            if process.state == "running":
                await self.call("POST", f"/processes/{process.pid}/signal", {"signal": "KILL"})

    async def drain(self, timeout_ms: int = 30_000) -> DrainAnswer:
        return await self.ask("POST", "/agent/drain", DrainAnswer, {"timeout_ms": timeout_ms})


def file(content: str, mode: str = "0600") -> SetupFile:
    """A file of a setup."""
    return SetupFile(content_b64=base64.b64encode(content.encode()).decode(), mode=mode)
