"""The one table of public routes. The server's router, the OpenAPI document, the SDK's and the docs' tests read it.

A row is one operation. Operations that share method and path differ in the value of a selector (`?action=` or `?op=`).
A row with `unimplemented` is part of the contract and answers 501 with that sentence. Handlers are found by `name`.
"""

from enum import StrEnum
from typing import Any, Literal

import msgspec

from fusevm.model import errors as e
from fusevm.wire import guest, rest

KIB, MIB = 1 << 10, 1 << 20
#: Largest JSON body unless a row says otherwise.
JSON_LIMIT = 64 * KIB
NO_LIMIT = 0


class Scope(StrEnum):
    """What a key must be allowed to do. `OPEN` needs no key."""

    OPEN = ""
    READ = "environments:read"
    WRITE = "environments:write"
    EXEC = "environments:exec"
    SNAPSHOTS = "snapshots"
    HOSTS = "hosts"
    ADMIN = "admin"


class Payload(StrEnum):
    """What a body is."""

    NONE = ""
    JSON = "application/json"
    BYTES = "application/octet-stream"
    TAR = "application/x-tar"
    EVENTS = "text/event-stream"
    #: One JSON object a line (the host daemon's events).
    LINES = "application/x-ndjson"
    TEXT = "text/plain"
    #: A WebSocket; one binary message is one exec frame (`wire.frames`).
    FRAMES = "websocket"


class Param(msgspec.Struct, frozen=True, kw_only=True):
    """A query parameter or a header."""

    name: str
    summary: str
    kind: Literal["string", "integer", "boolean"] = "string"
    place: Literal["query", "header"] = "query"
    is_required: bool = False
    is_repeated: bool = False


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One operation."""

    method: str
    #: Segments in braces match one percent-decoded segment.
    path: str
    name: str
    summary: str
    scope: Scope = Scope.READ
    #: `action` or `op`, and the value that selects this row.
    selector: str = ""
    value: str = ""
    takes: Payload = Payload.NONE
    request: Any = None
    gives: Payload = Payload.JSON
    answer: Any = None
    #: Every status of success.
    statuses: tuple[int, ...] = (200,)
    #: Largest body in bytes; 0: unlimited, streamed.
    limit: int = JSON_LIMIT
    params: tuple[Param, ...] = ()
    errors: tuple[type[e.Error], ...] = ()
    #: Why it answers 501; empty: it is there.
    unimplemented: str = ""

    @property
    def is_websocket(self) -> bool:
        return self.gives is Payload.FRAMES


#: What every route may answer: the gate, the store, the process.
COMMON_ERRORS: tuple[type[e.Error], ...] = (
    e.Unauthorized,
    e.Forbidden,
    e.BadField,
    e.StoreFull,
    e.ShuttingDown,
    e.Internal,
)
BODY_ERRORS: tuple[type[e.Error], ...] = (e.BadJson, e.PayloadTooLarge, e.Timeout)
_ENVIRONMENT: tuple[type[e.Error], ...] = (e.EnvironmentNotFound, e.EnvironmentEnded)
_HOST: tuple[type[e.Error], ...] = (
    e.HostUnreachable,
    e.HostRejected,
    e.Timeout,
    e.WrongCluster,
    e.StaleIncarnation,
    e.StaleAction,
    e.MachineNotFound,
)
_GUEST: tuple[type[e.Error], ...] = (
    *_ENVIRONMENT,
    *_HOST,
    e.WrongState,
    e.GuestUnreachable,
    e.AgentFailure,
    e.NotSupported,
    e.BadRequest,
)
_COMMAND: tuple[type[e.Error], ...] = (*_GUEST, e.CommandNotFound, e.BadCwd, e.UnknownUser, e.NoSpaceInGuest)
_PROCESS: tuple[type[e.Error], ...] = (*_GUEST, e.ProcessNotFound)
_FILES: tuple[type[e.Error], ...] = (
    *_GUEST,
    e.FileNotFound,
    e.BadPath,
    e.IsADirectory,
    e.NotADirectory,
    e.PermissionDenied,
    e.NoSpaceInGuest,
    e.UnknownUser,
    e.DirectoryNotEmpty,
    e.FileExists,
)
_IDEMPOTENCY: tuple[type[e.Error], ...] = (e.IdempotencyKeyReused, e.IdempotencyInProgress)

_KEY = Param(
    name="Idempotency-Key", place="header", summary="Same key and body within 24 h: the stored answer. At most 255."
)
_PREFER = Param(name="Prefer", place="header", summary="`respond-async`: answer 202 at once instead of waiting")
_LIMIT = Param(name="limit", kind="integer", summary="Page size, default 50, at most 200")
_CURSOR = Param(name="cursor", summary="`next_cursor` of the page before")
_PATH = Param(name="path", is_required=True, summary="Absolute path in the machine")
_RANGE = Param(name="Range", place="header", summary="One byte range")
_UID = Param(name="uid", summary="Exact environment; the only way to ask for one that has ended")
_LAST_ID = Param(name="last_event_id", summary="As the header `Last-Event-ID`: replay what came after that event")
_RESUME = Param(name="Last-Event-ID", place="header", summary="Replay what came after that event")

_ENVS, _ENV = "/v1/environments", "/v1/environments/{id}"
_PROC = _ENV + "/processes/{pid}"
_NOT_YET = "it is not built yet"

#: Values of `?source=`, the first is the default; and those that answer 501, with the reason.
LOG_SOURCES = ("console",)
LOG_SOURCES_LATER = {
    "startup": "startup scripts are not built yet",
    "agent": "the agent writes to the console; ask for source=console",
}
_LOG_SOURCES_SUMMARY = f"{LOG_SOURCES[0]} (default). 501: " + "; ".join(
    f"`{source}` ({why})" for source, why in LOG_SOURCES_LATER.items()
)

_LIFE: tuple[Route, ...] = (
    Route(
        method="POST",
        path=_ENVS,
        name="create_environment",
        scope=Scope.WRITE,
        summary="Create an environment; waits until it runs, at most 55 s, then answers with state provisioning",
        takes=Payload.JSON,
        request=rest.CreateRequest,
        answer=rest.EnvironmentBody,
        statuses=(201, 202),
        limit=MIB,
        params=(_KEY, _PREFER),
        errors=(
            e.BadTaskId,
            e.TaskExists,
            e.NoHosts,
            e.NoCapacity,
            e.HostNotFound,
            e.ImageNotFound,
            e.Unimplemented,
            *_IDEMPOTENCY,
        ),
    ),
    Route(
        method="GET",
        path=_ENVS,
        name="list_environments",
        summary="List environments, oldest first; ended ones, newest first, with `ended=true`",
        answer=rest.EnvironmentPage,
        params=(
            Param(name="task_id", summary="Exact task id"),
            Param(name="state", summary="Exact state; destroyed and failed list ended environments"),
            Param(name="host_id", summary="Exact host"),
            Param(name="ended", kind="boolean", summary="List ended environments instead of live ones"),
            _LIMIT,
            _CURSOR,
        ),
    ),
    Route(
        method="GET",
        path=_ENV,
        name="get_environment",
        summary="One environment. An ended one is 404 with its uid in the details, and found by `?uid=`",
        answer=rest.EnvironmentBody,
        params=(_UID,),
        errors=_ENVIRONMENT,
    ),
    Route(
        method="DELETE",
        path=_ENV,
        name="delete_environment",
        scope=Scope.WRITE,
        summary="Destroy; waits at most 55 s for the confirmation, then 202 with the environment; meanwhile 202, too",
        answer=rest.EnvironmentBody,
        statuses=(204, 202),
        params=(_UID, _PREFER),
        errors=_ENVIRONMENT,
    ),
    Route(
        method="POST",
        path=_ENV,
        selector="action",
        value="drain",
        name="drain_environment",
        scope=Scope.WRITE,
        summary="End the work but keep the machine for inspection; it ends by DELETE or when its linger limit is over",
        answer=rest.EnvironmentBody,
        errors=(*_ENVIRONMENT, e.WrongState),
    ),
    Route(
        method="POST",
        path=_ENV,
        selector="action",
        value="exec",
        name="exec_command",
        scope=Scope.EXEC,
        summary="Run a command to its end; 60 s by default, at most 600 s. A failing command is a 200 all the same",
        takes=Payload.JSON,
        request=rest.ExecBody,
        answer=rest.ExecAnswer,
        limit=MIB,
        params=(_KEY,),
        errors=(*_COMMAND, *_IDEMPOTENCY),
    ),
    *(
        Route(
            method="POST",
            path=_ENV,
            selector="action",
            value=value,
            name=name,
            scope=Scope.WRITE,
            summary=summary,
            takes=Payload.JSON,
            answer=rest.EnvironmentBody,
            unimplemented=why,
        )
        for value, name, summary, why in (
            ("rotate-token", "rotate_token", "Replace the credentials of the machine", _NOT_YET),
            ("fork", "fork_environment", "Clone a running environment", "it comes with snapshots; " + _NOT_YET),
            ("migrate", "migrate_environment", "Move to another host", "it comes with live snapshots; " + _NOT_YET),
        )
    ),
    Route(
        method="GET",
        path=_ENV + "/events",
        name="stream_environment_events",
        summary="Events of one environment. The first message is the present state and has no id, unless a replay is "
        "asked for. An ended environment is replayed from its first event on; the stream closes after the terminal one",
        gives=Payload.EVENTS,
        answer=rest.EventBody,
        params=(_LAST_ID, _RESUME, _UID),
        errors=_ENVIRONMENT,
    ),
    Route(
        method="GET",
        path="/v1/events",
        name="stream_events",
        summary="Events of all environments from now on, or after Last-Event-ID",
        gives=Payload.EVENTS,
        answer=rest.EventBody,
        params=(_LAST_ID, _RESUME),
    ),
)

_INSIDE: tuple[Route, ...] = (
    Route(
        method="GET",
        path=_ENV + "/exec",
        name="exec_stream",
        scope=Scope.EXEC,
        summary="Run a command interactively: the client's first frame is START (exec request), the last one is EXIT",
        gives=Payload.FRAMES,
        statuses=(101,),
        errors=_COMMAND,
    ),
    Route(
        method="GET",
        path=_ENV + "/shell",
        name="shell_stream",
        scope=Scope.EXEC,
        summary="A terminal: the server sends START itself; the client sends STDIN and RESIZE frames",
        gives=Payload.FRAMES,
        statuses=(101,),
        params=(
            Param(name="rows", kind="integer", summary="Height, default 24"),
            Param(name="cols", kind="integer", summary="Width, default 80"),
            Param(name="cmd", is_repeated=True, summary="Arguments of the command; default: a login shell"),
        ),
        errors=_COMMAND,
    ),
    Route(
        method="POST",
        path=_ENV + "/processes",
        name="start_process",
        scope=Scope.EXEC,
        summary="Start a background process",
        takes=Payload.JSON,
        request=guest.ExecRequest,
        answer=guest.Process,
        statuses=(201,),
        limit=MIB,
        errors=_COMMAND,
    ),
    Route(
        method="GET",
        path=_ENV + "/processes",
        name="list_processes",
        summary="Background processes",
        answer=guest.ProcessList,
        errors=_GUEST,
    ),
    Route(method="GET", path=_PROC, name="get_process", summary="One process", answer=guest.Process, errors=_PROCESS),
    Route(
        method="GET",
        path=_PROC + "/output",
        name="read_process_output",
        summary="Output from an absolute offset on; `X-Fuse-Offset` and `X-Fuse-Lost` say what is sent",
        gives=Payload.BYTES,
        params=(
            Param(name="stream", summary="stdout (default) or stderr"),
            Param(name="offset", kind="integer", summary="First byte; default: the oldest retained"),
            Param(name="follow", kind="boolean", summary="Go on until the process has ended"),
        ),
        errors=_PROCESS,
    ),
    Route(
        method="POST",
        path=_PROC,
        selector="action",
        value="signal",
        name="signal_process",
        scope=Scope.EXEC,
        summary="Send a signal",
        takes=Payload.JSON,
        request=rest.SignalBody,
        gives=Payload.NONE,
        statuses=(204,),
        errors=(*_PROCESS, e.UnknownSignal),
    ),
    Route(
        method="POST",
        path=_PROC,
        selector="action",
        value="stdin",
        name="write_process_stdin",
        scope=Scope.EXEC,
        summary="Append to its standard input",
        takes=Payload.BYTES,
        answer=rest.StdinWritten,
        limit=NO_LIMIT,
        params=(Param(name="eof", kind="boolean", summary="Close it afterwards"),),
        errors=(*_PROCESS, e.StdinClosed),
    ),
    Route(
        method="GET",
        path=_ENV + "/files",
        name="read_file",
        summary="Contents of a file; a Range is answered with 206",
        gives=Payload.BYTES,
        statuses=(200, 206),
        params=(_PATH, _RANGE),
        errors=(*_FILES, e.BadRange),
    ),
    Route(
        method="HEAD",
        path=_ENV + "/files",
        name="head_file",
        summary="Size, mode and time of a file",
        gives=Payload.NONE,
        params=(_PATH,),
        errors=_FILES,
    ),
    Route(
        method="PUT",
        path=_ENV + "/files",
        name="write_file",
        scope=Scope.EXEC,
        summary="Write a file atomically; a cut-off upload leaves nothing",
        takes=Payload.BYTES,
        answer=guest.FileWritten,
        limit=NO_LIMIT,
        params=(
            _PATH,
            Param(name="mode", summary="Octal, default 0644"),
            Param(name="user", summary="Owner, default root"),
            Param(name="mkdirs", kind="boolean", summary="Make missing parents"),
        ),
        errors=_FILES,
    ),
    Route(
        method="DELETE",
        path=_ENV + "/files",
        name="delete_file",
        scope=Scope.EXEC,
        summary="Remove a file, or a directory with `recursive=true`",
        gives=Payload.NONE,
        statuses=(204,),
        params=(_PATH, Param(name="recursive", kind="boolean", summary="With its contents")),
        errors=_FILES,
    ),
    *(
        Route(
            method="POST",
            path=_ENV + "/files",
            selector="op",
            value=op,
            name=f"{op}_path",
            scope=Scope.READ if op in ("stat", "list") else Scope.EXEC,
            summary=summary,
            takes=Payload.JSON,
            request=request,
            gives=Payload.JSON if answer is not None else Payload.NONE,
            answer=answer,
            statuses=(200,) if answer is not None else (204,),
            errors=_FILES,
        )
        for op, summary, request, answer in (
            ("stat", "What is at a path", rest.FilePath, guest.FileEntry),
            ("list", "Entries of a directory, by name", rest.FilePath, guest.FileList),
            ("mkdir", "Make a directory", rest.FileMkdir, guest.FileEntry),
            ("move", "Rename", rest.FileMove, guest.FileEntry),
            ("remove", "Remove", rest.FileRemove, None),
        )
    ),
    Route(
        method="GET",
        path=_ENV + "/archive",
        name="read_archive",
        summary="A file or folder as tar",
        gives=Payload.TAR,
        params=(_PATH,),
        errors=_FILES,
    ),
    Route(
        method="PUT",
        path=_ENV + "/archive",
        name="write_archive",
        scope=Scope.EXEC,
        summary="Extract a tar (or gzip) below a folder",
        takes=Payload.TAR,
        answer=guest.Extracted,
        limit=NO_LIMIT,
        params=(_PATH, Param(name="user", summary="Owner, default root")),
        errors=_FILES,
    ),
    Route(
        method="GET",
        path=_ENV + "/logs",
        name="read_logs",
        summary="Logs of the machine",
        gives=Payload.TEXT,
        params=(
            Param(name="source", summary=_LOG_SOURCES_SUMMARY),
            Param(name="follow", kind="boolean", summary="Go on until the machine ends"),
        ),
        errors=(*_GUEST, e.Unimplemented),
    ),
)

_FLEET: tuple[Route, ...] = (
    Route(
        method="GET",
        path="/v1/hosts",
        name="list_hosts",
        scope=Scope.HOSTS,
        summary="List hosts by id",
        answer=rest.HostPage,
        params=(_LIMIT, _CURSOR),
    ),
    Route(
        method="GET",
        path="/v1/hosts/{id}",
        name="get_host",
        scope=Scope.HOSTS,
        summary="One host",
        answer=rest.HostBody,
        errors=(e.HostNotFound,),
    ),
)

_SERVICE: tuple[Route, ...] = (
    Route(
        method="GET", path="/health", name="health", scope=Scope.OPEN, summary="The process lives", answer=rest.Health
    ),
    Route(
        method="GET",
        path="/ready",
        name="ready",
        scope=Scope.OPEN,
        summary="The store answers (200) or not (503)",
        answer=rest.Ready,
        statuses=(200, 503),
    ),
    Route(
        method="GET",
        path="/metrics",
        name="metrics",
        scope=Scope.OPEN,
        summary="Prometheus text",
        gives=Payload.TEXT,
    ),
    Route(
        method="GET",
        path="/v1/version",
        name="version",
        scope=Scope.OPEN,
        summary="Which server this is",
        answer=rest.Version,
    ),
    Route(
        method="GET",
        path="/v1/debug/invariants",
        name="check_invariants",
        scope=Scope.ADMIN,
        summary="Check everything in the store against the rules of the core, and tell every broken one in a sentence. "
        "Reads the whole store: for people, not for monitors",
        answer=rest.Invariants,
    ),
    Route(method="GET", path="/openapi.json", name="openapi", scope=Scope.OPEN, summary="This API as OpenAPI 3.1"),
)


def _later(method: str, path: str, name: str, summary: str, scope: Scope, why: str = _NOT_YET, **more: Any) -> Route:
    takes = Payload.JSON if method == "POST" else Payload.NONE
    return Route(
        method=method, path=path, name=name, summary=summary, scope=scope, takes=takes, unimplemented=why, **more
    )


_DESKTOP = "images with a desktop are " + "not built yet"
_KEYS = "use the master token; API keys are " + "not built yet"

_LATER: tuple[Route, ...] = (
    _later("POST", _ENV + "/snapshots", "create_snapshot", "Take a snapshot", Scope.SNAPSHOTS),
    _later("GET", "/v1/snapshots", "list_snapshots", "List snapshots", Scope.SNAPSHOTS),
    _later("GET", "/v1/snapshots/resolve", "resolve_snapshot", "Find a build layer", Scope.SNAPSHOTS),
    _later("GET", "/v1/snapshots/{id}", "get_snapshot", "One snapshot", Scope.SNAPSHOTS),
    _later(
        "POST",
        "/v1/snapshots/{id}",
        "restore_snapshot",
        "Restore in place",
        Scope.SNAPSHOTS,
        selector="action",
        value="restore",
    ),
    _later("DELETE", "/v1/snapshots/{id}", "delete_snapshot", "Delete a snapshot", Scope.SNAPSHOTS),
    _later("POST", "/v1/hosts", "register_host", "Register a host", Scope.ADMIN, "name it with --firecracker-url"),
    _later("POST", "/v1/hosts/{id}", "cordon_host", "Cordon", Scope.ADMIN, selector="action", value="cordon"),
    _later("POST", "/v1/hosts/{id}", "uncordon_host", "Uncordon", Scope.ADMIN, selector="action", value="uncordon"),
    _later("DELETE", "/v1/hosts/{id}", "delete_host", "Remove a host", Scope.ADMIN),
    _later("POST", "/v1/api-keys", "create_api_key", "Create a key", Scope.ADMIN, _KEYS),
    _later("GET", "/v1/api-keys", "list_api_keys", "List keys", Scope.ADMIN, _KEYS),
    _later("DELETE", "/v1/api-keys/{id}", "revoke_api_key", "Revoke a key", Scope.ADMIN, _KEYS),
    _later("POST", "/login", "login", "Begin a session", Scope.OPEN, "send the token as a bearer token"),
    _later("POST", "/logout", "logout", "End a session", Scope.OPEN, "there are no sessions"),
    _later("GET", _ENV + "/computer", "get_display", "The display", Scope.READ, _DESKTOP),
    _later("POST", _ENV + "/computer", "use_computer", "One computer action", Scope.EXEC, _DESKTOP, limit=MIB),
    _later("GET", _ENV + "/computer/stream", "stream_display", "VNC", Scope.EXEC, _DESKTOP),
    _later(
        "GET", _ENV + "/attach", "attach", "A terminal by HTTP upgrade", Scope.EXEC, "use the WebSocket at .../shell"
    ),
    _later("GET", _ENV + "/ports/{port}", "forward_port", "Tunnel to a port", Scope.EXEC),
)

ROUTES: tuple[Route, ...] = (*_LIFE, *_INSIDE, *_FLEET, *_SERVICE, *_LATER)


def errors_of(route: Route) -> tuple[type[e.Error], ...]:
    """Every error class that the route may answer with."""
    found = [*route.errors, *COMMON_ERRORS]
    if route.takes is not Payload.NONE:
        found += BODY_ERRORS
    if route.selector:
        found.append(e.UnknownAction)
    if route.unimplemented:
        found.append(e.Unimplemented)
    return tuple(dict.fromkeys(found))
