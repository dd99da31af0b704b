"""What the host daemon itself says to a guest agent: health, configure, shutdown, one-shot exec.

Every exchange has a stream of its own: opening one is a frame, and nothing of a broken exchange reaches the next. What
comes from the guest is not trusted: sizes are bounded, shapes are checked. Streams for users go through `relay`.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Protocol, TypeVar

import msgspec

from fusevm.model.errors import AgentFailure
from fusevm.wire.errors import parse_error
from fusevm.wire.guest import PROTOCOL_MAJOR, AgentHealth, Configure, ExecRequest, ExecResult
from fusevm.wire.http1 import Connection
from fusevm.wire.streams import ByteStream

T = TypeVar("T")

#: Two output streams of 16 MiB in base64, and their JSON.
_MAX_ANSWER_BYTES = 48 << 20
_MAX_ERROR_BYTES = 1 << 20


class Guest(Protocol):
    """Where streams to one agent come from (a `Vmm`)."""

    async def open_stream(self) -> ByteStream: ...


async def ask_health(guest: Guest) -> AgentHealth:
    """Ask the agent who it is. Raises ConnectionError."""
    return await _call(guest, "GET", "/health", None, AgentHealth)


async def send_configuration(guest: Guest, configure: Configure) -> AgentHealth:
    """Tell the agent what it must know. Raises ConnectionError, or what the agent answers."""
    return await _call(guest, "POST", "/configure", msgspec.json.encode(configure), AgentHealth)


async def ask_shutdown(guest: Guest) -> None:
    """Ask the machine to end in order; its VMM exits a little later. Raises ConnectionError."""
    await _call(guest, "POST", "/shutdown", b'{"reboot":false}', dict)


async def run_command(guest: Guest, request: ExecRequest) -> ExecResult:
    """Run a command to its end. Cancelled: the agent kills it. Raises ConnectionError, or what the agent answers."""
    return await _call(guest, "POST", "/exec", msgspec.json.encode(request), ExecResult)


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


async def _call(guest: Guest, method: str, target: str, body: bytes | None, kind: type[T]) -> T:
    stream = await guest.open_stream()
    try:
        headers = {"content-type": "application/json"} if body is not None else {}
        response = await Connection(stream).request(method, target, headers=headers, body=body)
        is_good = 200 <= response.status < 300
        answer = await response.read(_MAX_ANSWER_BYTES if is_good else _MAX_ERROR_BYTES)
    finally:
        await asyncio.shield(stream.close())
    if not is_good:
        raise parse_error(response.status, answer)
    try:
        return msgspec.json.decode(answer or b"{}", type=kind)
    except msgspec.DecodeError as e:
        raise AgentFailure(problem=f"{method} {target} was answered with something else ({e})") from e
