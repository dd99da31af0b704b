"""What the host daemon itself says to a guest agent: health, configure, shutdown, one-shot exec.

Every conversation has a stream of its own: opening one is a frame, and nothing of a broken one reaches the next. What
comes from the guest is not trusted: sizes are bounded, shapes are checked. Streams for users go through `relay`.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import msgspec

from fusevm.model.errors import AgentFailure, Timeout
from fusevm.wire.decode import UNREADABLE
from fusevm.wire.errors import parse_error
from fusevm.wire.guest import PROTOCOL_MAJOR, AgentHealth, Configure, ExecRequest, ExecResult, Thawed
from fusevm.wire.http1 import Connection
from fusevm.wire.streams import ByteStream

T = TypeVar("T")

#: Two output streams of 16 MiB in base64, and their JSON.
_MAX_ANSWER_BYTES = 48 << 20
_MAX_ERROR_BYTES = 1 << 20
#: Seconds beyond a command's own limit: its output, twice 16 MiB, has to come through an emulated channel.
_ANSWER_GRACE_S = 60.0


class Guest(Protocol):
    """Where streams to one agent come from (a `Vmm`)."""

    async def open_stream(self) -> ByteStream: ...


class Conversation:
    """One stream to an agent, for a few requests one after another. Use within `converse`."""

    def __init__(self, stream: ByteStream) -> None:
        self._connection = Connection(stream)

    async def health(self) -> AgentHealth:
        """Ask the agent who it is."""
        return await self.call("GET", "/health", None, AgentHealth)

    async def configure(self, configure: Configure) -> AgentHealth:
        """Tell the agent what it must know."""
        return await self.call("POST", "/configure", msgspec.json.encode(configure), AgentHealth)

    async def call(self, method: str, target: str, body: bytes | None, kind: type[T]) -> T:
        """Make one request. Raises ConnectionError, or what the agent answers."""
        headers = {"content-type": "application/json"} if body is not None else {}
        response = await self._connection.request(method, target, headers=headers, body=body)
        is_good = 200 <= response.status < 300
        answer = await response.read(_MAX_ANSWER_BYTES if is_good else _MAX_ERROR_BYTES)
        if not is_good:
            raise parse_error(response.status, answer)
        try:
            return msgspec.json.decode(answer or b"{}", type=kind)
        except UNREADABLE as e:
            raise AgentFailure(problem=f"{method} {target} was answered with something else ({e})") from e


@asynccontextmanager
async def converse(guest: Guest) -> AsyncIterator[Conversation]:
    """Open a stream, as soon as the guest serves. Raises ConnectionError."""
    stream = await guest.open_stream()
    try:
        yield Conversation(stream)
    finally:
        await asyncio.shield(stream.close())


async def ask_health(guest: Guest) -> AgentHealth:
    """Ask the agent who it is. Raises ConnectionError."""
    async with converse(guest) as talk:
        return await talk.health()


async def ask_shutdown(guest: Guest) -> None:
    """Ask the machine to end in order; its VMM exits a little later. Raises ConnectionError."""
    async with converse(guest) as talk:
        await talk.call("POST", "/shutdown", b'{"reboot":false}', dict)


async def quiesce(guest: Guest, limit_s: float) -> None:
    """Hold every write to the machine's disk until `thaw`; the agent lets go by itself after the limit.

    Raises ConnectionError, NotSupported for an agent that cannot, or what else it answers.
    """
    async with converse(guest) as talk:
        await talk.call("POST", "/quiesce", msgspec.json.encode({"limit_ms": round(limit_s * 1000)}), dict)


async def thaw(guest: Guest) -> bool:
    """Let writes through again; True when they were held until now. Raises ConnectionError."""
    async with converse(guest) as talk:
        answer = await talk.call("POST", "/thaw", b"{}", Thawed)
    return answer.was_frozen


async def run_command(guest: Guest, request: ExecRequest) -> ExecResult:
    """Run a command to its end; its request must have a limit. Cancelled: the agent kills it.

    Raises ConnectionError, Timeout for an agent that does not keep the limit, or what the agent answers.
    """
    limit_s = request.timeout_ms / 1000 + _ANSWER_GRACE_S
    try:
        async with asyncio.timeout(limit_s), converse(guest) as talk:
            return await talk.call("POST", "/exec", msgspec.json.encode(request), ExecResult)
    except TimeoutError as error:
        raise Timeout(what="the agent's answer to a command", limit_s=math.ceil(limit_s)) from error


def decode_output(result: ExecResult) -> tuple[bytes, bytes]:
    """Standard output and error of a command. Raises AgentFailure for what is no base64."""
    try:
        return base64.b64decode(result.stdout_b64, validate=True), base64.b64decode(result.stderr_b64, validate=True)
    except ValueError as e:
        raise AgentFailure(problem=f"its output is not base64 ({e})") from e


def is_compatible(protocol: str) -> bool:
    """Does the daemon speak the agent's protocol (`major.minor`): this major or the one before?"""
    major, dot, minor = protocol.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        return False
    return int(major) in (PROTOCOL_MAJOR, PROTOCOL_MAJOR - 1)
