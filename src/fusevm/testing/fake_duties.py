"""The setup, the processes, the daemon and the health check of a fake machine: docs/guest-protocol.md, section 6.

Commands are those of `fake_commands`. Downloads come from a dictionary; a downloaded program is a script. What a test
makes happen beside that: `kill_daemon`, `health_problem`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from signal import Signals

import msgspec

from fusevm.model.errors import BadPath, BadRequest, Error, ProcessNotFound, StdinClosed, UnknownSignal
from fusevm.model.setup import AGENT_PATH, AgentState, AgentStatus, Healthcheck, HealthStatus, Restart, Verdict
from fusevm.testing.fake_answer import FakeAnswer, decode, flag, render, whole_number
from fusevm.testing.fake_commands import Ran, run, run_script
from fusevm.wire.guest import (
    AgentOrder,
    DrainAnswer,
    DrainOrder,
    ExecRequest,
    Exit,
    GuestState,
    Output,
    Process,
    ProcessList,
    SetupBody,
    Span,
)

_KERNEL = ("/fuse", "/proc", "/sys", "/dev")
_KILLED, _TERMINATED = 137, 143
_LAST_SIGNAL = 64


class _Signal(msgspec.Struct, frozen=True):
    """Body of `POST /processes/{pid}/signal`."""

    signal: str


class FakeLog:
    """Output that grows, by absolute offset."""

    def __init__(self) -> None:
        self.data = b""
        self.is_over = False
        self._changed = asyncio.Event()

    def write(self, data: bytes, *, is_over: bool = False) -> None:
        """Append; the end ends followers."""
        self.data += data
        self.is_over = is_over
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, offset: int) -> AsyncIterator[bytes]:
        """Yield what there is and what comes, to the end."""
        while True:
            changed = self._changed
            if offset < len(self.data):
                yield self.data[offset:]
                offset = len(self.data)
            elif self.is_over:
                return
            else:
                await changed.wait()


class FakeRun:
    """A process that runs or has run."""

    def __init__(self, pid: int, request: ExecRequest, ran: Ran) -> None:
        self.pid = pid
        self.request = request
        #: `cat`, and its standard input is a pipe that is kept open.
        self.is_reading = request.stdin and request.cmd == ["cat"]
        self.logs = {"stdout": FakeLog(), "stderr": FakeLog()}
        self.exit: Exit | None = None
        self.ended = asyncio.Event()
        self.logs["stdout"].write(ran.stdout)
        self.logs["stderr"].write(ran.stderr)
        if ran.code is not None and not self.is_reading:
            self.end(Exit(exit_code=ran.code))

    def end(self, how: Exit) -> None:
        """It is over; nothing if it is already."""
        if self.exit is None:
            self.exit = how
            for log in self.logs.values():
                log.write(b"", is_over=True)
            self.ended.set()

    def describe(self) -> Process:
        """The process of the protocol."""
        spans = {name: Span(start=0, end=len(log.data)) for name, log in self.logs.items()}
        return Process(
            pid=self.pid,
            key=self.request.key,
            cmd=list(self.request.cmd) or ["/bin/sh", "-lc", self.request.shell],
            state="running" if self.exit is None else "exited",
            started_at_unix_ms=1,
            exit=self.exit,
            output=Output(**spans),
        )


class FakeDuties:
    """State and routes. `close` ends what runs."""

    def __init__(self, files: dict[str, bytes]) -> None:
        #: Of the whole machine: by absolute path, `/fuse` included.
        self.files = files
        self.setups: list[SetupBody] = []
        self.orders: list[AgentOrder] = []
        #: What `download_url`s lead to; others are not found.
        self.downloads: dict[str, bytes] = {}
        #: Why an HTTP health check fails; empty: it passes.
        self.health_problem = ""
        #: Seconds before a daemon is started again.
        self.restart_pause_s = 0.0
        self.runs: list[FakeRun] = []
        self._pids = itertools.count(100)
        self._version = 1
        self._changed = asyncio.Event()
        self._agent: AgentStatus | None = None
        self._health: HealthStatus | None = None
        self._logs = {"stdout": FakeLog(), "stderr": FakeLog()}
        self._daemon: FakeRun | None = None
        self._is_retired = False
        self._drained: DrainAnswer | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._checker: asyncio.Task[None] | None = None
        for log in self._logs.values():
            log.write(b"", is_over=True)

    # -- what tests do -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> GuestState:
        """What `GET /state` answers now."""
        return GuestState(
            version=self._version,
            setup_id=self.setups[-1].id if self.setups else "",
            agent_id=self.orders[-1].id if self.orders else "",
            agent=self._agent,
            health=self._health,
        )

    def kill_daemon(self, code: int = _KILLED) -> None:
        """The daemon's process ends, as by somebody in the machine."""
        if self._daemon is not None:
            self._daemon.end(Exit(exit_code=code))

    def close(self) -> None:
        """The machine is no more."""
        for task in (self._supervisor, self._checker):
            if task is not None:
                task.cancel()

    # -- environment of commands -------------------------------------------------------------------------------------

    def run(self, request: ExecRequest, env: dict[str, str] | None = None) -> Ran:
        """Run a command of the fake machine, with what the setup adds. Raises CommandNotFound, BadRequest."""
        if bool(request.cmd) == bool(request.shell):
            raise BadRequest(field="cmd")
        setup = self.setups[-1] if self.setups else SetupBody(id="")
        joined = {**(env or {}), **setup.env, **request.env}
        cwd = request.cwd or setup.workdir or "/"
        if request.shell:
            return run_script(request.shell, joined, cwd)
        program = self.files.get(request.cmd[0])
        if program is not None:
            return run_script(program.decode("utf-8", "replace"), joined, cwd)
        return run(request.cmd, _content("stdin", request.stdin_b64 or ""), joined, cwd)

    # -- routes ------------------------------------------------------------------------------------------------------

    async def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> FakeAnswer | None:
        """Answer one request; None for a route that is not of these. Raises Error."""
        match method, path.strip("/").split("/"):
            case "GET", ["state"]:
                return await self._get_state(query)
            case "PUT", ["setup"]:
                self._put_setup(decode(body, SetupBody))
            case "PUT", ["agent"]:
                self._put_agent(decode(body, AgentOrder))
            case "GET", ["agent", "output"]:
                return _output(self._logs, query)
            case "POST", ["agent", "drain"]:
                return render(200, await self._drain(decode(body, DrainOrder)))
            case "PUT", ["healthcheck"]:
                self._put_healthcheck(decode(body, Healthcheck))
            case "DELETE", ["healthcheck"]:
                self._put_healthcheck(Healthcheck())
            case _, ["processes", *rest]:
                return self._processes(method, rest, query, body)
            case _:
                return None
        return render(200, self.state)

    async def _get_state(self, query: dict[str, str]) -> FakeAnswer:
        after = whole_number(query, "after", -1, most=1 << 62)
        wait_ms = whole_number(query, "wait_ms", 0, most=60_000)
        try:
            async with asyncio.timeout(wait_ms / 1000):
                while self._version == after:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return render(200, self.state)

    def _processes(self, method: str, rest: list[str], query: dict[str, str], body: bytes) -> FakeAnswer | None:
        match method, rest:
            case "POST", []:
                request = decode(body, ExecRequest)
                known = [old for old in self.runs if request.key and old.request.key == request.key]
                if known:
                    return render(200, known[0].describe())
                self.runs.append(FakeRun(next(self._pids), request, self.run(request)))
                return render(201, self.runs[-1].describe())
            case "GET", []:
                return render(200, ProcessList(processes=[started.describe() for started in self.runs]))
            case "GET", [name]:
                return render(200, self._find(name).describe())
            case "GET", [name, "output"]:
                return _output(self._find(name).logs, query)
            case "POST", [name, "signal"]:
                self._signal(name, decode(body, _Signal).signal)
                return FakeAnswer(204)
            case "POST", [name, "stdin"]:
                self._feed(name, body, is_end=flag(query, "eof", otherwise=False))
                return render(200, {"bytes": len(body)})
            case _:
                return None

    def _signal(self, name: str, signal: str) -> None:
        found = self._find(name)
        if found.exit is not None:
            raise ProcessNotFound(pid=name)
        found.end(Exit(exit_code=128 + _number_of(signal), signal=signal))

    def _feed(self, name: str, data: bytes, *, is_end: bool) -> None:
        """What the process reads it says again; at the end it ends."""
        found = self._find(name)
        if found.exit is not None or not found.is_reading:
            raise StdinClosed(pid=name)
        found.logs["stdout"].write(data)
        if is_end:
            found.end(Exit())

    def _find(self, name: str) -> FakeRun:
        for started in self.runs:
            if name in (str(started.pid), f"@{started.request.key}"):
                return started
        raise ProcessNotFound(pid=name)

    # -- setup -------------------------------------------------------------------------------------------------------

    def _put_setup(self, body: SetupBody) -> None:
        _check_id(body.id)
        before = self.setups[-1] if self.setups else SetupBody(id="")
        if before.id == body.id:
            return
        written = {}
        for name, file in body.fuse.items():
            if name == "agent" or PurePosixPath(name).is_absolute() or str(PurePosixPath(name)) != name or ".." in name:
                raise BadPath(path=name)
            written[f"/fuse/{name}"] = _content(name, file.content_b64)
        for path, file in body.files.items():
            if not path.startswith("/") or any(path == place or path.startswith(f"{place}/") for place in _KERNEL):
                raise BadPath(path=path)
            written[path] = _content(path, file.content_b64)
        for name in before.fuse:
            self.files.pop(f"/fuse/{name}", None)
        self.files |= written
        self.setups.append(body)
        self._change()

    def _change(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    # -- the daemon --------------------------------------------------------------------------------------------------

    def _put_agent(self, order: AgentOrder) -> None:
        _check_id(order.id)
        if not order.command and not order.download_url:
            raise BadRequest(field="command")
        if self.orders and self.orders[-1].id == order.id:
            return
        self.orders.append(order)
        self.kill_daemon(_TERMINATED)
        if self._supervisor is not None:
            self._supervisor.cancel()
        self._is_retired, self._drained, self._daemon = False, None, None
        for log in self._logs.values():
            log.write(b"")
        self._agent = AgentStatus(state=AgentState.STARTING, since_ms=_now_ms())
        self._change()
        self._supervisor = asyncio.create_task(self._supervise(order), name="fake daemon")

    async def _supervise(self, order: AgentOrder) -> None:
        problem = self._fetch(order)
        for restarts in itertools.count():
            if self._is_retired:
                return
            if not problem:
                try:
                    self._daemon = self._start(order, order.command or [AGENT_PATH])
                except Error as error:
                    problem = error.message
            if problem or self._daemon is None:
                self._say(AgentState.FAILED, message=problem)
                return
            self._say(AgentState.RUNNING, restarts=restarts)
            await self._daemon.ended.wait()
            code = self._daemon.exit.exit_code if self._daemon.exit else 0
            again = order.restart is Restart.ALWAYS or (order.restart is Restart.ON_FAILURE and code != 0)
            state = AgentState.STARTING if again and not self._is_retired else AgentState.EXITED
            self._say(state, exit_code=code, message=f"it ended with exit code {code}")
            if state is AgentState.EXITED:
                return
            await asyncio.sleep(self.restart_pause_s)

    def _fetch(self, order: AgentOrder) -> str:
        """Why the download failed; empty when all is well."""
        if not order.download_url:
            return ""
        content = self.downloads.get(order.download_url)
        if content is None:
            return f"the download from {order.download_url} failed: the server answered 404 Not Found"
        found = hashlib.sha256(content).hexdigest()
        if order.sha256 and found != order.sha256:
            return f"the download from {order.download_url} failed: its sha256 is {found}, not {order.sha256}"
        self.files[AGENT_PATH] = content
        return ""

    def _start(self, order: AgentOrder, cmd: list[str]) -> FakeRun:
        """Start the daemon or its drain command. Raises CommandNotFound."""
        request = ExecRequest(cmd=cmd, env={**self._credentials(), **order.env})
        started = FakeRun(next(self._pids), request, self.run(request))
        for name, log in started.logs.items():
            self._logs[name].write(log.data)
        return started

    def _credentials(self) -> dict[str, str]:
        env = {}
        if (token := self.files.get("/fuse/auth-token")) is not None:
            env = {"FUSE_AUTH_TOKEN": token.decode().rstrip("\r\n"), "FUSE_AUTH_TOKEN_FILE": "/fuse/auth-token"}
        if (gateway := self.files.get("/fuse/gateway.json")) is not None:
            parts = msgspec.json.decode(gateway)
            env |= {"FUSE_GATEWAY_URL": parts["url"], "FUSE_GATEWAY_TOKEN": parts["token"]}
        for name, file in (("FUSE_SECRETS_FILE", "secrets.json"), ("FUSE_MANIFEST_FILE", "manifest.json")):
            if f"/fuse/{file}" in self.files:
                env[name] = f"/fuse/{file}"
        return env

    def _say(self, state: AgentState, **changes: int | str | None) -> None:
        before = self._agent or AgentStatus(state=state)
        since = before.since_ms if before.state is state else _now_ms()
        self._agent = msgspec.structs.replace(before, state=state, since_ms=since, **changes)
        is_over = state is AgentState.DRAINED or (
            state in (AgentState.EXITED, AgentState.FAILED) and not self._is_retired
        )
        for log in self._logs.values():
            log.write(b"", is_over=is_over)
        self._change()

    async def _drain(self, order: DrainOrder) -> DrainAnswer:
        if order.timeout_ms < 1:
            raise BadRequest(field="timeout_ms")
        if not self.orders:
            return DrainAnswer()
        if self._drained is None:
            self._is_retired = True
            message = self._run_drain_command(self.orders[-1])
            self.kill_daemon(_TERMINATED)
            code = self._daemon.exit.exit_code if self._daemon is not None and self._daemon.exit is not None else None
            self._drained = DrainAnswer(exit_code=code, message=message)
            if self._supervisor is not None:
                await asyncio.wait([self._supervisor])
            self._say(AgentState.DRAINED, exit_code=code, message=message)
        return self._drained

    def _run_drain_command(self, order: AgentOrder) -> str:
        if not order.drain_command:
            return ""
        try:
            done = self._start(order, order.drain_command)
        except Error as error:
            return f"the drain command was not started: {error.message}"
        if done.exit is None:
            return "the drain command was not done in time and was killed"
        return f"the drain command ended with exit code {done.exit.exit_code}" if done.exit.exit_code else ""

    # -- the health check --------------------------------------------------------------------------------------------

    def _put_healthcheck(self, check: Healthcheck) -> None:
        if check.http is not None and (check.exec or not 0 < check.http.port < 65536):
            raise BadRequest(field="http")
        if not 1 <= check.timeout_seconds <= check.interval_seconds:
            raise BadRequest(field="timeout_seconds")
        if self._checker is not None:
            self._checker.cancel()
        self._health = self._checker = None
        if check.http is not None or check.exec:
            self._health = HealthStatus(state=Verdict.STARTING, since_ms=_now_ms())
            self._checker = asyncio.create_task(self._watch(check), name="fake health check")
        self._change()

    async def _watch(self, check: Healthcheck) -> None:
        began = time.monotonic()
        while True:
            self._judge(check, self._problem(check), time.monotonic() - began)
            await asyncio.sleep(check.interval_seconds)

    def _problem(self, check: Healthcheck) -> str:
        if check.http is not None:
            return self.health_problem
        try:
            done = self.run(ExecRequest(cmd=list(check.exec)))
        except Error as error:
            return error.message
        if done.code is None:
            return f"{check.exec[0]} was not done within {check.timeout_seconds}s"
        return f"{check.exec[0]} ended with exit code {done.code}" if done.code else ""

    def _judge(self, check: Healthcheck, problem: str, age_s: float) -> None:
        before = self._health or HealthStatus(state=Verdict.STARTING)
        state, failures = before.state, 0
        if not problem:
            state = Verdict.PASSING
        elif state is not Verdict.STARTING or age_s >= check.start_period_seconds:
            failures = before.failures + 1
            state = Verdict.FAILING if failures >= check.retries else state
        since = before.since_ms if state is before.state else _now_ms()
        self._health = HealthStatus(state=state, since_ms=since, failures=failures, message=problem)
        if state is not before.state:
            self._change()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _number_of(signal: str) -> int:
    """Of `TERM`, `SIGTERM` or `15`. Raises UnknownSignal, BadRequest."""
    if not signal:
        raise BadRequest(field="signal")
    name = f"SIG{signal.upper().removeprefix('SIG')}"
    if name in Signals.__members__:
        return Signals[name].value
    if signal in map(str, range(1, _LAST_SIGNAL + 1)):
        return int(signal)
    raise UnknownSignal(signal=signal)


def _check_id(text: str) -> None:
    if not 1 <= len(text) <= 200 or not text.isprintable():
        raise BadRequest(field="id")


def _content(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # not base64, or not even ASCII
        raise BadRequest(field=f"{name}.content_b64") from None


def _output(logs: dict[str, FakeLog], query: dict[str, str]) -> FakeAnswer:
    log = logs.get(query.get("stream", "stdout"))
    if log is None:
        raise BadRequest(field="stream")
    offset = whole_number(query, "offset", 0, most=len(log.data))
    headers = {"content-type": "application/octet-stream", "x-fuse-offset": str(offset), "x-fuse-lost": "0"}
    if flag(query, "follow", otherwise=False):
        return FakeAnswer(200, headers=headers, chunks=log.follow(offset))
    return FakeAnswer(200, log.data[offset:], headers)
