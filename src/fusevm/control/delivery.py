"""Delivers a setup into a running machine, drains its daemon, and asks how it is.

Every step is idempotent in the guest (by id or key), so that another replica may begin again at any moment: files are
replaced as a whole, the startup script runs once per machine, the daemon is restarted only by another order.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable

import msgspec

from fusevm.control.guest_calls import GuestCalls
from fusevm.model.environment import Environment
from fusevm.model.errors import DaemonFailed, StartupFailed
from fusevm.model.setup import AGENT_PATH, AgentSpec, AgentState, Setup
from fusevm.wire.guest import (
    AgentOrder,
    DrainAnswer,
    DrainOrder,
    ExecRequest,
    GuestState,
    Process,
    SetupBody,
)

#: Key under which the startup script runs in the guest.
STARTUP_KEY = "startup"
_SCRIPT = f"processes/@{STARTUP_KEY}"
#: Output of the startup script that becomes facts: bytes a fact, and bytes in all; the log has the rest.
CHUNK_BYTES, TOLD_BYTES = 4 << 10, 64 << 10
#: Seconds that a script's end may be seen after its own limit.
GRACE_S = 10
#: Seconds within which a new daemon must be running, its download included.
AGENT_START_S = 45.0
_LOOK_S = 0.25
_LAST_WORDS = 300

#: Told of the script's output: stream, offset of the first byte, text.
Tell = Callable[[str, int, str], Awaitable[None]]


async def deliver(guest: GuestCalls, env: Environment, setup: Setup, tell: Tell) -> None:
    """Write the files, run the startup script, start the daemon and the health check.

    Raises StartupFailed, DaemonFailed, and what the guest agent answers.
    """
    await _write(guest, env, setup)
    if setup.startup_script:
        await _run_script(guest, setup, tell)
    await _start(guest, setup)


async def deliver_again(guest: GuestCalls, env: Environment, setup: Setup) -> None:
    """Like `deliver`, after a restore or with new credentials: the startup script has been run, and the files are the
    user's by now."""
    await _write(guest, env, msgspec.structs.replace(setup, files={}))
    await _start(guest, setup)


async def drain(guest: GuestCalls, limit_s: float) -> DrainAnswer:
    """Run the drain command and wait for the daemon's end."""
    order = DrainOrder(timeout_ms=round(limit_s * 1000))
    return await guest.ask("POST", "agent/drain", DrainAnswer, order, timeout_s=limit_s + GRACE_S)


async def look(guest: GuestCalls) -> GuestState:
    """How the daemon and the health check are."""
    return await guest.ask("GET", "state", GuestState)


# -- steps ---------------------------------------------------------------------------------------------------------


async def _write(guest: GuestCalls, env: Environment, setup: Setup) -> None:
    content = SetupBody(id="", fuse=setup.fuse, files=setup.files, env=setup.env, workdir=setup.workspace)
    body = msgspec.structs.replace(content, id=f"{env.uid}/{env.incarnation}/{_digest(content)}")
    await guest.ask("PUT", "setup", object, body)


async def _start(guest: GuestCalls, setup: Setup) -> None:
    if setup.healthcheck is not None:
        await guest.ask("PUT", "healthcheck", object, setup.healthcheck)
    if setup.agent is not None:
        await _start_agent(guest, setup.agent)


def _digest(record: msgspec.Struct) -> str:
    return hashlib.sha256(msgspec.json.encode(record)).hexdigest()[:16]


def agent_order(spec: AgentSpec) -> AgentOrder:
    """What the guest agent is to supervise. Its id changes with everything in it: a new token restarts the daemon."""
    order = AgentOrder(
        id="",
        command=list(spec.command) or [AGENT_PATH],
        env=spec.env,
        download_url=spec.download_url,
        sha256=spec.sha256,
        drain_command=list(spec.drain_command),
        restart=spec.restart,
    )
    return msgspec.structs.replace(order, id=_digest(order))


async def _start_agent(guest: GuestCalls, spec: AgentSpec) -> None:
    order = agent_order(spec)
    await guest.ask("PUT", "agent", object, order)
    loop = asyncio.get_running_loop()
    until = loop.time() + AGENT_START_S
    while True:
        state = await look(guest)
        seen = state.agent
        if seen is None or state.agent_id != order.id:
            raise DaemonFailed(problem="the guest agent does not know it")
        if seen.state is AgentState.FAILED:
            raise DaemonFailed(problem=seen.message)
        if seen.state is not AgentState.STARTING:
            return
        if loop.time() > until:
            raise DaemonFailed(problem=seen.message or f"it was not running after {AGENT_START_S:.0f} s")
        await asyncio.sleep(_LOOK_S)


# -- the startup script --------------------------------------------------------------------------------------------


async def _run_script(guest: GuestCalls, setup: Setup, tell: Tell) -> None:
    limit_ms = setup.startup_timeout_s * 1000
    request = ExecRequest(shell=setup.startup_script, user="root", timeout_ms=limit_ms, key=STARTUP_KEY)
    await guest.ask("POST", "processes", Process, request)
    told = _Told(tell)
    limit_s = setup.startup_timeout_s + GRACE_S
    try:
        async with asyncio.timeout(limit_s):
            await _follow_both(guest, told)
    except TimeoutError as error:
        raise StartupFailed(problem=f"it was not done within {setup.startup_timeout_s} s") from error
    ended = (await guest.ask("GET", _SCRIPT, Process)).exit
    if ended is None:
        raise StartupFailed(problem="its output ended, but it did not")
    if ended.timed_out:
        raise StartupFailed(problem=f"it was not done within {setup.startup_timeout_s} s")
    if ended.exit_code:
        raise StartupFailed(problem=f"exit status {ended.exit_code}{told.last_words()}")


async def _follow_both(guest: GuestCalls, told: "_Told") -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for stream in ("stdout", "stderr"):
                group.create_task(_follow(guest, stream, told))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


async def _follow(guest: GuestCalls, stream: str, told: "_Told") -> None:
    upstream = await guest.open("GET", f"{_SCRIPT}/output?stream={stream}&offset=0&follow=true")
    try:
        offset = int(upstream.headers.get("x-fuse-offset", "0"))
        async for chunk in upstream.chunks():
            await told.add(stream, offset, chunk)
            offset += len(chunk)
    finally:
        await upstream.close()


class _Told:
    """What was told of a script's output."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._left = TOLD_BYTES
        self._tail = b""

    async def add(self, stream: str, offset: int, chunk: bytes) -> None:
        """Tell as much of the chunk as may be told."""
        self._tail = (self._tail + chunk)[-_LAST_WORDS:]
        shown, self._left = chunk[: self._left], max(0, self._left - len(chunk))
        for start in range(0, len(shown), CHUNK_BYTES):
            part = shown[start : start + CHUNK_BYTES]
            await self._tell(stream, offset + start, part.decode("utf-8", "replace"))

    def last_words(self) -> str:
        """The end of the output, for a message."""
        text = self._tail.decode("utf-8", "replace").strip()
        return f": {text}" if text else ""
