"""Delivers a setup into a running machine, drains its daemon, and asks how it is.

Every step is idempotent in the guest (by id or key), so that another replica may begin again at any moment: files are
replaced as a whole, the startup script runs once per machine, the daemon is restarted only by another order.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from fusevm.control.guest_calls import GuestCalls
from fusevm.core.redaction import Redactor
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
#: Bytes: the end of the output in a message, and of each stream among which it is looked for.
_LAST_WORDS, _END_BYTES = 300, 16 << 10

#: Tells some of the script's output: stream, offset of its first byte and of the one after it, text without secrets.
#: The answer is up to where that stream has been told, by whomever.
Tell = Callable[[str, int, int, str], Awaitable[int]]


async def deliver(guest: GuestCalls, env: Environment, setup: Setup, redactor: Redactor, tell: Tell) -> None:
    """Write the files, run the startup script, start the daemon and the health check.

    Raises StartupFailed, DaemonFailed, and what the guest agent answers.
    """
    await _write(guest, env, setup)
    if setup.startup_script:
        await _run_script(guest, setup, _Told(env.startup_told, redactor, tell))
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


async def _run_script(guest: GuestCalls, setup: Setup, told: "_Told") -> None:
    limit_ms = setup.startup_timeout_s * 1000
    request = ExecRequest(shell=setup.startup_script, user="root", timeout_ms=limit_ms, key=STARTUP_KEY)
    await guest.ask("POST", "processes", Process, request)
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
    """From the beginning, whatever was told before: a value may begin before what was told, and end behind it."""
    while not await _read(guest, stream, told):
        pass


async def _read(guest: GuestCalls, stream: str, told: "_Told") -> bool:
    """Tell the stream to its end. False: somebody else tells it too; begin again behind that."""
    upstream = await guest.open("GET", f"{_SCRIPT}/output?stream={stream}&offset=0&follow=true")
    try:
        reading = _Reading(told, stream, int(upstream.headers.get("x-fuse-offset", "0")))
        async for chunk in upstream.chunks():
            if not await reading.add(chunk):
                return False
        return await reading.end()
    finally:
        await upstream.close()


class _Told:
    """What was told of a script's output, and how it ends."""

    def __init__(self, upto: Mapping[str, int], redactor: Redactor, tell: Tell) -> None:
        self.redactor = redactor
        self._upto = dict(upto)
        self._tell = tell
        #: Offset and content of the end of each stream, unmasked; what was written last is last.
        self._ends: dict[str, tuple[int, bytes]] = {}

    def upto(self, stream: str) -> int:
        """Offset of the first byte that was not told."""
        return self._upto.get(stream, 0)

    @property
    def is_enough(self) -> bool:
        """Is nothing more told?"""
        return sum(self._upto.values()) >= TOLD_BYTES

    async def tell(self, stream: str, offset: int, end: int, content: bytes) -> bool:
        """Tell a piece. False: somebody else has told another one."""
        before = self.upto(stream)
        self._upto[stream] = end
        now = await self._tell(stream, max(offset, before), end, content.decode("utf-8", "replace"))
        if now <= before:
            return True  # the environment has ended: nobody is told any more
        self._upto[stream] = now
        return now == end

    def ends_with(self, stream: str, offset: int, content: bytes) -> None:
        """Keep the newest output, for the last words."""
        self._ends.pop(stream, None)
        self._ends[stream] = offset, content

    def last_words(self) -> str:
        """The end of the output, for a message."""
        content = b""
        for offset, end in self._ends.values():
            masked = self.redactor.stream(offset)
            content += masked.feed(end) + masked.end()
        text = content[-_LAST_WORDS:].decode("utf-8", "replace").strip()
        return f": {text}" if text else ""


class _Reading:
    """One reading of one stream, from its oldest retained byte on."""

    def __init__(self, told: _Told, stream: str, offset: int) -> None:
        self._told = told
        self._stream = stream
        self._redacted = told.redactor.stream(offset, told.upto(stream))
        #: The newest output, and the offset after it.
        self._end, self._heard = b"", offset

    async def add(self, chunk: bytes) -> bool:
        """As `_Told.tell`."""
        self._end, self._heard = (self._end + chunk)[-_END_BYTES:], self._heard + len(chunk)
        self._told.ends_with(self._stream, self._heard - len(self._end), self._end)
        for begin in range(0, len(chunk), CHUNK_BYTES):
            if self._told.is_enough:
                break
            offset = self._redacted.passed
            if not await self._pass_on(offset, self._redacted.feed(chunk[begin : begin + CHUNK_BYTES])):
                return False
            await asyncio.sleep(0)  # others go on, even where nothing is told
        return True

    async def end(self) -> bool:
        """As `_Told.tell`."""
        return self._told.is_enough or await self._pass_on(self._redacted.passed, self._redacted.end())

    async def _pass_on(self, offset: int, content: bytes) -> bool:
        return not content or await self._told.tell(self._stream, offset, self._redacted.passed, content)
