"""What goes on in a machine: commands, processes, files, logs.

Whatever shows what is in a machine needs the right to run commands there: files, arguments and output may hold secrets.
Logs do not, since known values are masked in them.
"""

from fusevm.model import errors as e
from fusevm.wire import guest, rest
from fusevm.wire.routes.parts import (
    COMMAND_ERRORS,
    ENVIRONMENT,
    FILE_ERRORS,
    GUEST_ERRORS,
    PATH,
    PROCESS_ERRORS,
    RANGE,
    later,
)
from fusevm.wire.routes.table import JSON_LIMIT, MIB, NO_LIMIT, Param, Payload, Route, Scope

#: Values of `?source=`, the first is the default.
LOG_SOURCES = ("console", "startup", "agent")
_LOG_SOURCES_SUMMARY = (
    "`console` (default), `startup` (what the startup script wrote) or `agent` (what the daemon writes); both streams "
    "of the latter two in one text"
)
_PROC = ENVIRONMENT + "/processes/{pid}"

INSIDE: tuple[Route, ...] = (
    Route(
        method="GET",
        path=ENVIRONMENT + "/exec",
        name="exec_stream",
        scope=Scope.EXEC,
        summary="Run a command interactively: the client's first frame is START (exec request), the last one is EXIT",
        gives=Payload.FRAMES,
        statuses=(101,),
        errors=COMMAND_ERRORS,
    ),
    Route(
        method="GET",
        path=ENVIRONMENT + "/shell",
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
        errors=COMMAND_ERRORS,
    ),
    Route(
        method="POST",
        path=ENVIRONMENT + "/processes",
        name="start_process",
        scope=Scope.EXEC,
        summary="Start a background process",
        takes=Payload.JSON,
        request=guest.ExecRequest,
        answer=guest.Process,
        # 200: it was started before, under the same `key`.
        statuses=(201, 200),
        makes=_PROC,
        limit=MIB,
        errors=COMMAND_ERRORS,
    ),
    Route(
        method="GET",
        path=ENVIRONMENT + "/processes",
        name="list_processes",
        scope=Scope.EXEC,
        summary="Background processes",
        answer=guest.ProcessList,
        errors=GUEST_ERRORS,
    ),
    Route(
        method="GET",
        path=_PROC,
        name="get_process",
        scope=Scope.EXEC,
        summary="One process",
        answer=guest.Process,
        errors=PROCESS_ERRORS,
    ),
    Route(
        method="GET",
        path=_PROC + "/output",
        name="read_process_output",
        scope=Scope.EXEC,
        summary="Output from an absolute offset on; `X-Fuse-Offset` and `X-Fuse-Lost` say what is sent",
        gives=Payload.BYTES,
        params=(
            Param(name="stream", summary="stdout (default) or stderr"),
            Param(name="offset", kind="integer", summary="First byte; default: the oldest retained"),
            Param(name="follow", kind="boolean", summary="Go on until the process has ended"),
        ),
        errors=PROCESS_ERRORS,
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
        errors=(*PROCESS_ERRORS, e.UnknownSignal),
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
        errors=(*PROCESS_ERRORS, e.StdinClosed),
    ),
    Route(
        method="GET",
        path=ENVIRONMENT + "/files",
        name="read_file",
        scope=Scope.EXEC,
        summary="Contents of a file; a Range is answered with 206",
        gives=Payload.BYTES,
        statuses=(200, 206),
        params=(PATH, RANGE),
        errors=(*FILE_ERRORS, e.BadRange),
    ),
    Route(
        method="HEAD",
        path=ENVIRONMENT + "/files",
        name="head_file",
        scope=Scope.EXEC,
        summary="Size, mode and time of a file",
        gives=Payload.NONE,
        params=(PATH,),
        errors=FILE_ERRORS,
    ),
    Route(
        method="PUT",
        path=ENVIRONMENT + "/files",
        name="write_file",
        scope=Scope.EXEC,
        summary="Write a file atomically; a cut-off upload leaves nothing",
        takes=Payload.BYTES,
        answer=guest.FileWritten,
        limit=NO_LIMIT,
        params=(
            PATH,
            Param(name="mode", summary="Octal, default 0644"),
            Param(name="user", summary="Owner, default root"),
            Param(name="mkdirs", kind="boolean", summary="Make missing parents"),
        ),
        errors=FILE_ERRORS,
    ),
    Route(
        method="DELETE",
        path=ENVIRONMENT + "/files",
        name="delete_file",
        scope=Scope.EXEC,
        summary="Remove a file, or a directory with `recursive=true`",
        gives=Payload.NONE,
        statuses=(204,),
        params=(PATH, Param(name="recursive", kind="boolean", summary="With its contents")),
        errors=FILE_ERRORS,
    ),
    *(
        Route(
            method="POST",
            path=ENVIRONMENT + "/files",
            selector="op",
            value=op,
            name=f"{op}_path",
            scope=Scope.EXEC,
            summary=summary,
            takes=Payload.JSON,
            request=request,
            gives=Payload.JSON if answer is not None else Payload.NONE,
            answer=answer,
            statuses=(200,) if answer is not None else (204,),
            errors=FILE_ERRORS,
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
        path=ENVIRONMENT + "/archive",
        name="read_archive",
        scope=Scope.EXEC,
        summary="A file or folder as tar",
        gives=Payload.TAR,
        params=(PATH,),
        errors=FILE_ERRORS,
    ),
    Route(
        method="PUT",
        path=ENVIRONMENT + "/archive",
        name="write_archive",
        scope=Scope.EXEC,
        summary="Extract a tar (or gzip) below a folder",
        takes=Payload.TAR,
        answer=guest.Extracted,
        limit=NO_LIMIT,
        params=(PATH, Param(name="user", summary="Owner, default root")),
        errors=FILE_ERRORS,
    ),
    Route(
        method="GET",
        path=ENVIRONMENT + "/logs",
        name="read_logs",
        summary="Logs of the machine; values of the environment's secrets, tokens and variables are masked",
        gives=Payload.TEXT,
        params=(
            Param(name="source", summary=_LOG_SOURCES_SUMMARY),
            Param(name="follow", kind="boolean", summary="Go on until the machine, the script or the daemon ends"),
        ),
        errors=(*GUEST_ERRORS, e.LogNotFound),
    ),
    *(
        later(method, ENVIRONMENT + path, name, summary, scope, "images with a desktop are not built yet", limit=limit)
        for method, path, name, summary, scope, limit in (
            ("GET", "/computer", "get_display", "The display", Scope.EXEC, JSON_LIMIT),
            ("POST", "/computer", "use_computer", "One computer action", Scope.EXEC, MIB),
            ("GET", "/computer/stream", "stream_display", "VNC", Scope.EXEC, JSON_LIMIT),
        )
    ),
    later(
        "GET",
        ENVIRONMENT + "/attach",
        "attach",
        "A terminal by HTTP upgrade",
        Scope.EXEC,
        "use the WebSocket at .../shell",
    ),
    later("GET", ENVIRONMENT + "/ports/{port}", "forward_port", "Tunnel to a port", Scope.EXEC),
)
