"""Calls about what is in a machine: files, folders, background processes."""

from typing import TypeVar

from fusevm.model.errors import NotFound
from fusevm.sdk.core.exchange import (
    OCTETS,
    UPLOAD_TIMEOUT_S,
    Call,
    Request,
    Retry,
    get,
    json_reader,
    make_target,
    post,
    read_nothing,
)
from fusevm.wire.guest import ExecRequest, Extracted, FileEntry, FileList, FileWritten, Process, ProcessList
from fusevm.wire.rest import FileMkdir, FileMove, FilePath, SignalBody

T = TypeVar("T")

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
    request = post(make_target("environments", env_id, "files", query={"op": op}), body)
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
    return Call(request=post(target, request), read=json_reader(Process), retry=Retry.UNSENT)


def list_processes(env_id: str) -> Call[ProcessList]:
    """The processes started by the API, ended ones included."""
    return get(make_target("environments", env_id, "processes"), ProcessList)


def get_process(env_id: str, pid: int) -> Call[Process]:
    """One process."""
    return get(make_target("environments", env_id, "processes", str(pid)), Process)


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
    return Call(request=post(target, SignalBody(signal=signal)), read=read_nothing, retry=Retry.UNSENT)


def write_stdin(env_id: str, pid: int, data: bytes, *, eof: bool = False) -> Call[None]:
    """Append to the standard input of a process that keeps one."""
    target = make_target("environments", env_id, "processes", str(pid), query={"action": "stdin", "eof": eof or None})
    request = Request(method="POST", target=target, headers={"Content-Type": OCTETS}, body=data)
    return Call(request=request, read=read_nothing, retry=Retry.UNSENT)
