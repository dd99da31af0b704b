"""A guest agent that only pretends, behind the stub host and the fake host.

It takes a setup, "runs" scripts and daemons without doing anything, and says that all is well. What it answers is held
to the suite of the guest agent (docs/guest-protocol.md, section 6). Its limits: nothing of a setup can be read again,
and only its id is checked; a process is one with a key, and has ended with its first breath; a daemon runs at once and
never ends by itself; a health check passes at once, whatever it says; and nobody can wait for news.
"""

import shlex
from collections.abc import Mapping
from typing import NamedTuple, TypeVar
from urllib.parse import parse_qsl

import msgspec

from fusevm.control.host_api import GuestRequest
from fusevm.model.errors import BadRequest, ProcessNotFound
from fusevm.model.setup import AgentState, AgentStatus, Healthcheck, HealthStatus, Verdict
from fusevm.wire.decode import decode_body
from fusevm.wire.guest import (
    AgentOrder,
    DrainAnswer,
    DrainOrder,
    ExecRequest,
    Exit,
    GuestState,
    Output,
    Process,
    SetupBody,
    Span,
)

T = TypeVar("T")
#: Of an offset.
_MOST_DIGITS = 18
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
        self._version = 1
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
                self._set_up(_read(body, SetupBody))
            case "PUT", ["agent"]:
                self._supervise(_read(body, AgentOrder))
            case "PUT", ["healthcheck"]:
                self._check(_read(body, Healthcheck))
            case "DELETE", ["healthcheck"]:
                self._check(Healthcheck())
            case "POST", ["agent", "drain"]:
                return self._drain(_read(body, DrainOrder))
            case "GET", ["state"]:
                pass
            case "POST", ["processes"]:
                return self._start(decode_body(body, ExecRequest)[0])
            case "GET", ["processes", place] if place.startswith("@"):
                return _json(self._process(place))
            case "GET", ["processes", place, "output"] if place.startswith("@"):
                return self._told(self._output(place), params)
            case "GET", ["agent", "output"]:
                return self._told(self._agent_output(), params)
            case _:
                return None
        return _json(self._state())

    def _set_up(self, body: SetupBody) -> None:
        _check_id(body.id)
        if self.setup is None or self.setup.id != body.id:
            self.setup = body
            self._version += 1

    def _supervise(self, order: AgentOrder) -> None:
        _check_id(order.id)
        if not order.command and not order.download_url:
            raise BadRequest(field="command")
        if self.order is None or self.order.id != order.id:
            self.agent = AgentStatus(state=self.started)
            self.order = order
            self._version += 1

    def _check(self, check: Healthcheck) -> None:
        is_one = check.http is not None or bool(check.exec)
        self.health = (self.health or HealthStatus(state=Verdict.PASSING)) if is_one else None
        self._version += 1

    def _drain(self, order: DrainOrder) -> Said:
        if order.timeout_ms < 1:
            raise BadRequest(field="timeout_ms")
        if self.agent is None:
            return _json(DrainAnswer())
        if self.agent.state is not AgentState.DRAINED:
            self.agent = AgentStatus(state=AgentState.DRAINED, exit_code=self.drained.exit_code)
            self._version += 1
        return _json(self.drained)

    def _start(self, asked: ExecRequest) -> Said | None:
        if not asked.key:
            return None  # a user's own: only the server's scripts are pretended
        place = f"@{asked.key}"
        is_new = place not in self.processes
        self.processes.setdefault(place, asked)
        return _json(self._process(place), 201 if is_new else 200)

    def _process(self, place: str) -> Process:
        output = Output(stdout=Span(end=len(self._output(place))), stderr=Span(end=len(self.stderr)))
        asked = self.processes[place]
        cmd = list(asked.cmd) or ["/bin/sh", "-lc", asked.shell]
        pid = 1 + list(self.processes).index(place)
        return Process(pid=pid, key=asked.key, cmd=cmd, state="exited", exit=self.exit, output=output)

    def _output(self, place: str) -> bytes:
        if place not in self.processes:
            raise ProcessNotFound(pid=place)
        asked = self.processes[place]
        return f"{self.name}: {asked.shell or shlex.join(asked.cmd)}\n".encode()

    def _agent_output(self) -> bytes:
        return b"" if self.order is None else f"{self.name}: {shlex.join(self.order.command)}\n".encode()

    def _told(self, stdout: bytes, params: Mapping[str, str]) -> Said:
        streams = {"stdout": stdout, "stderr": self.stderr}
        written = streams.get(params.get("stream", "stdout"))
        if written is None:
            raise BadRequest(field="stream")
        offset = params.get("offset", "") or "0"
        if not offset.isdecimal() or len(offset) > _MOST_DIGITS or int(offset) > len(written):
            raise BadRequest(field="offset")
        return Said(200, _BYTES, written[int(offset) :])

    def _state(self) -> GuestState:
        return GuestState(
            version=self._version,
            setup_id=self.setup.id if self.setup is not None else "",
            agent_id=self.order.id if self.order is not None else "",
            agent=self.agent,
            health=self.health,
        )


def _json(record: msgspec.Struct, status: int = 200) -> Said:
    return Said(status, _JSON, _encode(record))


def _read(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.MsgspecError as error:
        raise BadRequest(field=str(error)) from error


def _check_id(text: str) -> None:
    if not text:
        raise BadRequest(field="id")
