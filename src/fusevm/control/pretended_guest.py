"""A guest agent that only pretends, behind the stub host and the fake host.

It takes a setup, "runs" scripts and daemons without doing anything, and says that all is well.
"""

import shlex
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl

import msgspec

from fusevm.control.host_api import GuestRequest
from fusevm.model.setup import AgentState, AgentStatus, Healthcheck, HealthStatus, Verdict
from fusevm.wire.decode import decode_body
from fusevm.wire.guest import (
    AgentOrder,
    DrainAnswer,
    ExecRequest,
    Exit,
    GuestState,
    Output,
    Process,
    SetupBody,
    Span,
)

_encode = msgspec.json.Encoder().encode
_JSON, _BYTES = "application/json", "application/octet-stream"


class Said(NamedTuple):
    """An answer."""

    status: int
    kind: str
    body: bytes


class PretendedGuest:
    """The guest of one machine. Its attributes are for tests to read, and to set what it pretends."""

    def __init__(self, name: str) -> None:
        #: What it says instead of running things: `<name>: <command>`.
        self.name = name
        self.setup: SetupBody | None = None
        self.order: AgentOrder | None = None
        self.agent: AgentStatus | None = None
        self.health: HealthStatus | None = None
        #: How every background process ends.
        self.exit = Exit()
        #: What every process and the daemon write to their standard error.
        self.stderr = b""
        self.drained = DrainAnswer(exit_code=0)
        #: What becomes of a daemon that is started.
        self.started = AgentState.RUNNING
        #: By the place that stands for them in paths: `@` and their key.
        self.processes: dict[str, ExecRequest] = {}

    def hear(self, request: GuestRequest) -> Said | None:
        """The answer to a request whose body is whole, or None where nothing is pretended."""
        path, _, query = request.target.removeprefix("guest/").partition("?")
        body = request.body if isinstance(request.body, bytes) else b""
        return self.answer(request.method, path, dict(parse_qsl(query)), body)

    def answer(self, method: str, path: str, params: Mapping[str, str], body: bytes) -> Said | None:
        """As `hear`, of a path below `guest/`."""
        match method, path.split("/"):
            case "PUT", ["setup"]:
                self.setup = msgspec.json.decode(body, type=SetupBody)
            case "PUT", ["agent"]:
                self._supervise(msgspec.json.decode(body, type=AgentOrder))
            case "PUT", ["healthcheck"]:
                msgspec.json.decode(body, type=Healthcheck)
                self.health = self.health or HealthStatus(state=Verdict.PASSING)
            case "POST", ["agent", "drain"]:
                return self._drain()
            case "GET", ["state"]:
                pass
            case "POST", ["processes"]:
                return self._start(decode_body(body, ExecRequest)[0])
            case "GET", ["processes", place] if place in self.processes:
                return _json(self._process(place))
            case "GET", ["processes", place, "output"] if place in self.processes:
                return self._told(self._output(place), params)
            case "GET", ["agent", "output"]:
                return self._told(self._agent_output(), params)
            case _:
                return None
        return _json(self._state())

    def _supervise(self, order: AgentOrder) -> None:
        if self.order is None or self.order.id != order.id:
            restarts = self.agent.restarts if self.agent is not None else 0
            self.agent = AgentStatus(state=self.started, restarts=restarts)
        self.order = order

    def _drain(self) -> Said:
        if self.agent is not None:
            self.agent = AgentStatus(state=AgentState.DRAINED, exit_code=self.drained.exit_code)
        return _json(self.drained)

    def _start(self, asked: ExecRequest) -> Said | None:
        if not asked.key:
            return None  # a user's own: only the server's scripts are pretended
        place = f"@{asked.key}"
        is_new = place not in self.processes
        self.processes.setdefault(place, asked)
        return _json(self._process(place), 201 if is_new else 200)

    def _process(self, place: str) -> Process:
        written = Span(end=len(self._output(place)))
        pid = 1 + list(self.processes).index(place)
        cmd = list(self.processes[place].cmd)
        return Process(pid=pid, cmd=cmd, state="exited", exit=self.exit, output=Output(stdout=written))

    def _output(self, place: str) -> bytes:
        asked = self.processes[place]
        return f"{self.name}: {asked.shell or shlex.join(asked.cmd)}\n".encode()

    def _agent_output(self) -> bytes:
        return b"" if self.order is None else f"{self.name}: {shlex.join(self.order.command)}\n".encode()

    def _told(self, stdout: bytes, params: Mapping[str, str]) -> Said:
        return Said(200, _BYTES, stdout if params.get("stream", "stdout") == "stdout" else self.stderr)

    def _state(self) -> GuestState:
        return GuestState(
            setup_id=self.setup.id if self.setup is not None else "",
            agent_id=self.order.id if self.order is not None else "",
            agent=self.agent,
            health=self.health,
        )


def _json(record: msgspec.Struct, status: int = 200) -> Said:
    return Said(status, _JSON, _encode(record))
