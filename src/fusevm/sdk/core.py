"""The public API as pure functions: arguments to a `Call` (what to send, how to read the answer, whether it may be sent
twice), and answers to typed bodies or the model's errors.

No I/O, no clock, no randomness: `sdk.client` and `sdk.aio` carry calls over the wire. Keys for idempotency come from
there.
"""

import base64
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from fusevm.model.environment import State
from fusevm.model.errors import BootFailed, Error, IdempotencyInProgress, NotFound, ShuttingDown, StoreFull
from fusevm.sdk.failures import ConnectionLost, ProtocolBroken, ServerUnreachable
from fusevm.wire.errors import parse_error
from fusevm.wire.guest import ExecRequest, Extracted, FileEntry, FileList, FileWritten, Process, ProcessList
from fusevm.wire.rest import (
    CreateRequest,
    EnvironmentBody,
    EnvironmentPage,
    ExecAnswer,
    ExecBody,
    FileMkdir,
    FileMove,
    FilePath,
    HostBody,
    HostPage,
    NetworkInput,
    Ready,
    SignalBody,
    SpecInput,
    Version,
)

T = TypeVar("T")

#: The server waits at most 55 s for a create or delete; its answer is then under way.
WAIT_TIMEOUT_S = 75.0
#: The answer to an upload comes after the machine has written it to its disk.
UPLOAD_TIMEOUT_S = 600.0
QUICK_TIMEOUT_S = 30.0
#: How much longer than its own limit a command's answer may take.
EXEC_GRACE_S = 20.0
EXEC_DEFAULT_MS = 60_000
#: A command: program and arguments.
Argv = list[str]
JSON = "application/json"
OCTETS = "application/octet-stream"
_PAUSES_S = (0.05, 0.2, 0.6)
_UNREACHABLE_TRIES = 2
#: Tries, at most one per second, to learn the answer of a request that is still under way.
_IN_PROGRESS_TRIES = 64


class Retry(Enum):
    """When a call may be sent again after a failure on the way."""

    #: Repeating it changes nothing: by its nature, or by its Idempotency-Key.
    ALWAYS = "always"
    #: Only when it surely never arrived.
    UNSENT = "unsent"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What goes out. `target` is path and query, percent-encoded."""

    method: str
    target: str
    headers: Mapping[str, str] = {}
    body: bytes | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came back. Header names are lower case."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""


class Call(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One exchange: request, how to read its answer, how long to wait, whether to repeat."""

    request: Request
    #: Turns a 2xx answer into the result.
    read: Callable[[Answer], T]
    retry: Retry
    #: Seconds of silence before the call is given up.
    timeout_s: float = QUICK_TIMEOUT_S
    #: Errors by which a *repetition* says that the first try had worked.
    done_by: tuple[type[Error], ...] = ()

    def result(self, answer: Answer) -> T:
        """The typed body of an answer. Raises the error that the server sent, or ProtocolBroken."""
        raise_for_status(answer)
        return self.read(answer)


def raise_for_status(answer: Answer) -> None:
    """Raise the model's error for an answer that is no success; its note names the request id."""
    if 200 <= answer.status < 300:
        return
    error = parse_error(answer.status, answer.body)
    if request_id := answer.headers.get("x-request-id"):
        error.add_note(f"request id {request_id}")
    raise error


def may_repeat(call: Call[Any], error: Error) -> bool:
    """May this call be sent again after this error?"""
    if isinstance(error, ServerUnreachable | ShuttingDown | StoreFull):
        return True  # surely not carried out
    return call.retry is Retry.ALWAYS and isinstance(error, ConnectionLost | IdempotencyInProgress)


def pause_s(call: Call[Any], error: Error, attempt: int, jitter: float) -> float | None:
    """Seconds to wait before try number `attempt` (1 is the first repetition), `jitter` in 0..1; None: give up."""
    if not may_repeat(call, error):
        return None
    if isinstance(error, IdempotencyInProgress):
        return min(attempt * 0.1, 1.0) if attempt <= _IN_PROGRESS_TRIES else None
    # Who refuses connections will mostly go on to do so, and people wait for this answer.
    tries = _UNREACHABLE_TRIES if isinstance(error, ServerUnreachable) else len(_PAUSES_S)
    return _PAUSES_S[attempt - 1] * (0.5 + jitter) if attempt <= tries else None


def is_done(call: Call[Any], error: Error, attempt: int) -> bool:
    """True when a repetition was answered by what the first, lost answer had made true."""
    return attempt > 0 and isinstance(error, call.done_by)


# -- reading answers -----------------------------------------------------------------------------------------------


def json_reader(kind: type[T]) -> Callable[[Answer], T]:
    """A reader of JSON bodies of one type."""
    decoder = msgspec.json.Decoder(kind)

    def read(answer: Answer) -> T:
        try:
            return decoder.decode(answer.body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolBroken(url="the server", problem=f"body: {error}") from error

    return read


def read_nothing(answer: Answer) -> None:
    """A reader for answers without a body."""
    del answer


def read_text(answer: Answer) -> str:
    """A reader of plain text."""
    return answer.body.decode("utf-8", "replace")


# -- writing requests ----------------------------------------------------------------------------------------------


def make_target(*segments: str, query: Mapping[str, str | int | bool | None] | None = None) -> str:
    """A target below /v1: segments are encoded, query values of None or "" left out."""
    path = "/v1/" + "/".join(quote(segment, safe="") for segment in segments)
    pairs = {name: _text(value) for name, value in (query or {}).items() if value is not None and value != ""}
    return f"{path}?{urlencode(pairs)}" if pairs else path


def _text(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_json(value: object) -> bytes:
    """JSON of a body; None and unset fields are left out, as the contract wants."""
    return msgspec.json.encode(_without_none(msgspec.to_builtins(value)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return value


def _post(target: str, body: object = None, *, key: str = "", headers: Mapping[str, str] | None = None) -> Request:
    fields = dict(headers or {})
    if key:
        fields["Idempotency-Key"] = key
    if body is None:
        return Request(method="POST", target=target, headers=fields)
    return Request(method="POST", target=target, headers=fields | {"Content-Type": JSON}, body=to_json(body))


def _get(target: str, kind: type[T]) -> Call[T]:
    return Call(request=Request(method="GET", target=target), read=json_reader(kind), retry=Retry.ALWAYS)


# -- environments --------------------------------------------------------------------------------------------------


class CreateFields(TypedDict, total=False):
    """What `create` takes by keyword. What is absent, empty or 0 gets the server's default."""

    image: str
    cpus: int
    #: MiB.
    ram_mb: int
    #: GiB.
    storage_gb: int
    region: str
    arch: str
    host_id: str
    labels: dict[str, str]
    #: Seconds, or "unlimited".
    max_runtime_seconds: int | str
    idle_timeout_seconds: int
    internet: bool
    secrets: dict[str, str]
    startup_script: str
    startup_script_timeout_seconds: int
    #: Absolute path to contents; together at most 512 KiB.
    files: dict[str, bytes]
    #: Contents of a manifest file.
    manifest: bytes
    agent: dict[str, Any]
    #: Wait that long for capacity instead of failing at once.
    queue_seconds: int


_SPEC_FIELDS = frozenset(SpecInput.__struct_fields__)


def make_create_request(task_id: str, fields: CreateFields) -> CreateRequest:
    """The body of a create. Bytes are encoded as the contract wants them."""
    given: dict[str, Any] = {name: value for name, value in fields.items() if value}
    spec = {name: given.pop(name) for name in list(given) if name in _SPEC_FIELDS}
    if "files" in given:
        given["files"] = {path: _b64(content) for path, content in given["files"].items()}
    if "manifest" in given:
        given["manifest_inline"] = _b64(given.pop("manifest"))
    internet = fields.get("internet", True)
    given.pop("internet", None)
    network = None if internet else NetworkInput(internet=False)
    return CreateRequest(task_id=task_id, spec=SpecInput(**spec), network=network, **given)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def create_environment(request: CreateRequest, *, key: str, wait: bool = True) -> Call[EnvironmentBody]:
    """Create; answered when it runs, or `provisioning` after 55 s, or at once without `wait`. Safe to repeat by key."""
    headers = {} if wait else {"Prefer": "respond-async"}
    return Call(
        request=_post(make_target("environments"), request, key=key, headers=headers),
        read=json_reader(EnvironmentBody),
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S + (request.queue_seconds or 0),
    )


def list_environments(
    *,
    task_id: str = "",
    state: str = "",
    host_id: str = "",
    ended: bool = False,
    limit: int | None = None,
    cursor: str = "",
) -> Call[EnvironmentPage]:
    """One page of environments; the live ones, or the ended ones."""
    query = {
        "task_id": task_id,
        "state": state,
        "host_id": host_id,
        "ended": True if ended else None,
        "limit": limit,
        "cursor": cursor,
    }
    return _get(make_target("environments", query=query), EnvironmentPage)


def get_environment(env_id: str, *, uid: str = "") -> Call[EnvironmentBody]:
    """The live environment of an id, or with `uid` that one, ended or not."""
    return _get(make_target("environments", env_id, query={"uid": uid}), EnvironmentBody)


def raise_unless_up(environment: EnvironmentBody) -> None:
    """Raise BootFailed for an environment that ended instead of coming up."""
    if environment.state in (State.FAILED, State.DESTROYING, State.DESTROYED):
        problem = environment.error or environment.reason or environment.state
        raise BootFailed(id=environment.id, problem=problem)


def delete_environment(env_id: str, *, wait: bool = True) -> Call[bool]:
    """Destroy. True: it is gone; False: accepted, and still under way (after 55 s with `wait`). Safe to repeat."""
    headers = {} if wait else {"Prefer": "respond-async"}
    return Call(
        request=Request(method="DELETE", target=make_target("environments", env_id), headers=headers),
        read=lambda answer: answer.status != 202,
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S,
        done_by=(NotFound,),
    )


def drain_environment(env_id: str) -> Call[EnvironmentBody]:
    """Begin the end: the machine stays for inspection until it is deleted or lingered out. Safe to repeat."""
    return Call(
        request=_post(make_target("environments", env_id, query={"action": "drain"})),
        read=json_reader(EnvironmentBody),
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S,
    )


def make_exec_body(
    cmd: Argv | None,
    *,
    shell: str = "",
    env: dict[str, str] | None = None,
    cwd: str = "",
    user: str = "",
    timeout_ms: int = 0,
    stdin: bytes = b"",
    binary: bool = False,
) -> ExecBody:
    """The body of a one-shot exec; exactly one of `cmd` and `shell`."""
    return ExecBody(
        cmd=cmd or None,
        shell=shell or None,
        env=env or None,
        cwd=cwd or None,
        user=user or None,
        timeout_ms=timeout_ms or None,
        stdin_b64=_b64(stdin) if stdin else None,
        encoding="base64" if binary else "text",
    )


def output_of(answer: ExecAnswer) -> tuple[bytes, bytes]:
    """Standard output and standard error of a command as bytes, without loss."""

    def pick(text: str, encoded: str | msgspec.UnsetType) -> bytes:
        return base64.b64decode(encoded) if isinstance(encoded, str) else text.encode()

    return pick(answer.stdout, answer.stdout_b64), pick(answer.stderr, answer.stderr_b64)


def exec_environment(env_id: str, request: ExecBody) -> Call[ExecAnswer]:
    """Run a command and wait for its end. Never repeated once it was sent: the command may have run."""
    wait_ms = request.timeout_ms or EXEC_DEFAULT_MS
    return Call(
        request=_post(make_target("environments", env_id, query={"action": "exec"}), request),
        read=json_reader(ExecAnswer),
        retry=Retry.UNSENT,
        timeout_s=wait_ms / 1000 + EXEC_GRACE_S,
    )


def watch_events(env_id: str, *, uid: str = "", last_event_id: str = "") -> Request:
    """The event stream of one environment (`sse`), or of all with an empty id."""
    target = make_target("environments", env_id, "events", query={"uid": uid}) if env_id else make_target("events")
    headers = {"Accept": "text/event-stream"}
    return Request(
        method="GET", target=target, headers=headers | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    )


def first_event_id(uid: str) -> str:
    """The event id before the first event of an environment: the whole story is replayed after it."""
    return f"{uid}.0"


LogSource = Literal["console", "startup", "agent"]


def read_logs(env_id: str, *, source: LogSource = "console", follow: bool = False) -> Request:
    """The log of one source as bytes; with `follow` until the environment ends."""
    query = {"source": source, "follow": follow or None}
    return Request(method="GET", target=make_target("environments", env_id, "logs", query=query))


def exec_target(env_id: str) -> str:
    """WebSocket target for commands with streams; the first frame is START."""
    return make_target("environments", env_id, "exec")


def shell_target(env_id: str, *, rows: int = 24, cols: int = 80, cmd: Argv | None = None) -> str:
    """WebSocket target for a terminal, which the server starts by itself."""
    target = make_target("environments", env_id, "shell", query={"rows": rows, "cols": cols})
    return target + "".join("&cmd=" + quote(argument, safe="") for argument in cmd or [])


# -- files ---------------------------------------------------------------------------------------------------------


def read_file(env_id: str, path: str, *, offset: int = 0, length: int | None = None) -> Request:
    """The bytes of a file, or `length` of them from `offset`."""
    headers: dict[str, str] = {}
    if offset or length is not None:
        end = "" if length is None else str(offset + length - 1)
        headers["Range"] = f"bytes={offset}-{end}"
    return Request(
        method="GET", target=make_target("environments", env_id, "files", query={"path": path}), headers=headers
    )


def write_file(
    env_id: str, path: str, body: bytes | None, *, mode: str = "", user: str = "", mkdirs: bool = True
) -> Call[FileWritten]:
    """Replace a file atomically; body None: the client streams it. Safe to repeat when the body can be."""
    query = {"path": path, "mode": mode, "user": user, "mkdirs": mkdirs or None}
    target = make_target("environments", env_id, "files", query=query)
    return Call(
        request=Request(method="PUT", target=target, headers={"Content-Type": OCTETS}, body=body),
        read=json_reader(FileWritten),
        retry=Retry.UNSENT if body is None else Retry.ALWAYS,
        timeout_s=UPLOAD_TIMEOUT_S,
    )


def delete_file(env_id: str, path: str, *, recursive: bool = False) -> Call[None]:
    """Remove a file or folder. Safe to repeat."""
    query = {"path": path, "recursive": recursive or None}
    request = Request(method="DELETE", target=make_target("environments", env_id, "files", query=query))
    return Call(request=request, read=read_nothing, retry=Retry.ALWAYS, done_by=(NotFound,))


def _file_op(env_id: str, op: str, body: object, kind: type[T], retry: Retry) -> Call[T]:
    request = _post(make_target("environments", env_id, "files", query={"op": op}), body)
    return Call(request=request, read=json_reader(kind), retry=retry)


def stat_file(env_id: str, path: str) -> Call[FileEntry]:
    """What a path is; links are not followed."""
    return _file_op(env_id, "stat", FilePath(path=path), FileEntry, Retry.ALWAYS)


def list_files(env_id: str, path: str) -> Call[FileList]:
    """The entries of a folder, by name."""
    return _file_op(env_id, "list", FilePath(path=path), FileList, Retry.ALWAYS)


def make_directory(env_id: str, path: str, *, parents: bool = True, mode: str = "0755") -> Call[FileEntry]:
    """Make a folder. Safe to repeat with `parents`."""
    body = FileMkdir(path=path, parents=parents, mode=mode)
    return _file_op(env_id, "mkdir", body, FileEntry, Retry.ALWAYS if parents else Retry.UNSENT)


def move_file(env_id: str, path: str, to: str) -> Call[FileEntry]:
    """Rename; the entry of the new place."""
    return _file_op(env_id, "move", FileMove(path=path, to=to), FileEntry, Retry.UNSENT)


def read_archive(env_id: str, path: str) -> Request:
    """A tar of a file or folder, names relative to its parent."""
    return Request(method="GET", target=make_target("environments", env_id, "archive", query={"path": path}))


def write_archive(env_id: str, path: str, *, user: str = "") -> Call[Extracted]:
    """Extract a tar, streamed by the client, below a folder that exists."""
    target = make_target("environments", env_id, "archive", query={"path": path, "user": user})
    request = Request(method="PUT", target=target, headers={"Content-Type": "application/x-tar"})
    return Call(request=request, read=json_reader(Extracted), retry=Retry.UNSENT, timeout_s=UPLOAD_TIMEOUT_S)


# -- background processes ------------------------------------------------------------------------------------------


def start_process(env_id: str, request: ExecRequest) -> Call[Process]:
    """Start a process that outlives the connection."""
    target = make_target("environments", env_id, "processes")
    return Call(request=_post(target, request), read=json_reader(Process), retry=Retry.UNSENT)


def list_processes(env_id: str) -> Call[ProcessList]:
    """The processes started by the API, ended ones included."""
    return _get(make_target("environments", env_id, "processes"), ProcessList)


def get_process(env_id: str, pid: int) -> Call[Process]:
    """One process."""
    return _get(make_target("environments", env_id, "processes", str(pid)), Process)


def read_output(
    env_id: str, pid: int, *, stream: str = "stdout", offset: int | None = None, follow: bool = False
) -> Request:
    """Retained output from an absolute offset on; header `x-fuse-offset` tells where it begins."""
    query = {"stream": stream, "offset": offset, "follow": follow or None}
    return Request(
        method="GET", target=make_target("environments", env_id, "processes", str(pid), "output", query=query)
    )


def signal_process(env_id: str, pid: int, signal: str) -> Call[None]:
    """Send a signal to a process and its children."""
    target = make_target("environments", env_id, "processes", str(pid), query={"action": "signal"})
    return Call(request=_post(target, SignalBody(signal=signal)), read=read_nothing, retry=Retry.UNSENT)


def write_stdin(env_id: str, pid: int, data: bytes, *, eof: bool = False) -> Call[None]:
    """Append to the standard input of a process that keeps one."""
    target = make_target("environments", env_id, "processes", str(pid), query={"action": "stdin", "eof": eof or None})
    request = Request(method="POST", target=target, headers={"Content-Type": OCTETS}, body=data)
    return Call(request=request, read=read_nothing, retry=Retry.UNSENT)


# -- hosts and service ---------------------------------------------------------------------------------------------


def list_hosts(*, limit: int | None = None, cursor: str = "") -> Call[HostPage]:
    """One page of hosts."""
    return _get(make_target("hosts", query={"limit": limit, "cursor": cursor}), HostPage)


def get_host(host_id: str) -> Call[HostBody]:
    """One host."""
    return _get(make_target("hosts", host_id), HostBody)


def get_version() -> Call[Version]:
    """Name and version of the server; needs no token."""
    return _get(make_target("version"), Version)


def get_ready() -> Call[Ready]:
    """Whether the server can do its work. Not ready is an answer, not an error; needs no token."""
    read = json_reader(Ready)

    def read_any(answer: Answer) -> Ready:
        return read(answer)

    call = Call(request=Request(method="GET", target="/ready"), read=read_any, retry=Retry.ALWAYS, timeout_s=5.0)
    return _accepting(call, 503)


class _AcceptingCall(Call[T], Generic[T], frozen=True, kw_only=True):
    """A call for which one more status is a success."""

    accepted: int

    def result(self, answer: Answer) -> T:
        if answer.status != self.accepted:
            raise_for_status(answer)
        return self.read(answer)


def _accepting(call: Call[T], status: int) -> Call[T]:
    return _AcceptingCall(
        request=call.request, read=call.read, retry=call.retry, timeout_s=call.timeout_s, accepted=status
    )
