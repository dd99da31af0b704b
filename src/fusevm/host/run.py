"""The one door to subprocesses of the host daemon.

Every external program is started here, from an argv list, with a deadline, in its own process group. Whatever happens
to the caller (timeout, cancellation), the whole group is killed and reaped before the call returns. Failures carry a
command line that can be pasted into a shell.

Programs get a small environment (`INHERITED`): the daemon's own settings hold tokens that no tool needs to see.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shlex
import signal
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec

from fusevm.model.errors import CommandFailed, Timeout, ToolMissing

#: Debian and Ubuntu packages of the programs that are run through here, for the message when one is missing.
PACKAGES = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "ip": "iproute2",
    "lz4": "lz4",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "nft": "nftables",
    "nsenter": "util-linux",
    "prlimit": "util-linux",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "skopeo": "skopeo",
    "tar": "tar",
    "unshare": "util-linux",
    "xz": "xz-utils",
    "zstd": "zstd",
}

#: Variables that reach a program when the caller names none; the rest of the daemon's environment stays private.
INHERITED = frozenset({
    *("HOME", "USER", "LOGNAME", "TMPDIR", "TZ", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "APT_CONFIG"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE", "http_proxy", "https_proxy", "ftp_proxy", "no_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY"),
})  # fmt: skip

#: Searched besides the caller's PATH: system tools live in sbin, which a user's PATH leaves out.
SYSTEM_PATH = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")

#: Default limit of a stream: more is a fault of the program (callers parse listings).
MAX_OUTPUT_BYTES = 64 * 1024 * 1024

#: How much of each stream `run_streaming` keeps for its result and for error messages.
TAIL_BYTES = 64 * 1024

_MAX_LINE_BYTES = 16 * 1024
_REAP_TIMEOUT_S = 10.0


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """A program that has ended."""

    argv: tuple[str, ...]
    stdout: bytes
    stderr: bytes
    #: Exit status; negative is the signal that killed it.
    returncode: int

    @property
    def text(self) -> str:
        """Return standard output as text; bytes that are not UTF-8 are replaced."""
        return self.stdout.decode(errors="replace")


async def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    stdin: bytes | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    pass_fds: Sequence[int] = (),
    max_output_bytes: int = MAX_OUTPUT_BYTES,
) -> Completed:
    """Run a program to its end and return its output.

    `env` is laid over the inherited variables. Without `stdin` it reads /dev/null. With `check`, a status other than
    0 raises CommandFailed; ToolMissing when there is no such program, Timeout at the deadline. Cancel-safe: the process
    group is dead when this returns or raises.
    """
    out, err = _Collector(max_output_bytes), _Collector(max_output_bytes)
    return await _run(argv, out, err, timeout_s, stdin, cwd, env, check, pass_fds)


async def run_streaming(
    argv: Sequence[str | Path],
    *,
    on_line: Callable[[str], None],
    timeout_s: float,
    stdin: bytes | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a program and hand each line of both its streams to `on_line` as it comes.

    A carriage return ends a line, too (progress bars). The result keeps the last `TAIL_BYTES` of each stream. An
    exception of `on_line` ends the program and is raised. The rest is as for `run`.
    """
    out, err = _LineSink(on_line), _LineSink(on_line)
    return await _run(argv, out, err, timeout_s, stdin, cwd, env, check, pass_fds)


def command_line(argv: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Render what a person pastes into a shell to do the same."""
    parts = [f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()]
    line = " ".join([*parts, shlex.join(argv)])
    return f"cd {shlex.quote(str(cwd))} && {line}" if cwd is not None else line


def program_environment(overrides: Mapping[str, str] | None = None) -> dict[str, str]:
    """Build the environment a program gets: the inherited few, a full PATH, C.UTF-8, then the overrides."""
    env = {name: value for name, value in os.environ.items() if name in INHERITED}
    own_path = [part for part in os.environ.get("PATH", "").split(":") if part]
    env["PATH"] = ":".join(dict.fromkeys([*own_path, *SYSTEM_PATH]))
    env["LC_ALL"] = "C.UTF-8"
    env.update(overrides or {})
    return env


class _TooMuchOutput(Exception):
    """A program went over the limit of its output."""


class _Collector:
    """Keeps everything, up to a limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._data = bytearray()

    def feed(self, chunk: bytes) -> None:
        self._data += chunk
        if len(self._data) > self._limit_bytes:
            raise _TooMuchOutput(f"it wrote more than {self._limit_bytes} bytes and was killed")

    def tail(self) -> bytes:
        return bytes(self._data[-TAIL_BYTES:])

    def close(self) -> bytes:
        return bytes(self._data)


class _LineSink:
    """Cuts a stream into lines for a callback and keeps its tail."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._partial = bytearray()
        self._tail = bytearray()

    def feed(self, chunk: bytes) -> None:
        self._tail += chunk
        del self._tail[:-TAIL_BYTES]
        self._partial += chunk.replace(b"\r", b"\n")
        *lines, rest = self._partial.split(b"\n")
        self._partial = bytearray(rest)
        for line in lines:
            self._emit(line)
        if len(self._partial) > _MAX_LINE_BYTES:
            self._emit(self._partial)
            self._partial = bytearray()

    def tail(self) -> bytes:
        return bytes(self._tail)

    def close(self) -> bytes:
        self._emit(self._partial)
        self._partial = bytearray()
        return bytes(self._tail)

    def _emit(self, line: bytes | bytearray) -> None:
        if line:
            self._on_line(line.decode(errors="replace"))


_Sink = _Collector | _LineSink


class _Conversation(asyncio.SubprocessProtocol):
    """Feeds the output of a program to its sinks; `over` when it has ended and its output is complete."""

    def __init__(self, out: _Sink, err: _Sink) -> None:
        self._sinks = {1: out, 2: err}
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = asyncio.Event()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        try:
            self._sinks[fd].feed(data)
        except Exception as e:  # noqa: BLE001 - raised to who waits for `over`
            if not self.over.done():
                self.over.set_exception(e)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.closed.set()
        if not self.over.done():
            self.over.set_result(None)


_Started = tuple[asyncio.SubprocessTransport, _Conversation]


async def _run(
    argv: Sequence[str | Path],
    out: _Sink,
    err: _Sink,
    timeout_s: float,
    stdin: bytes | None,
    cwd: Path | None,
    env: Mapping[str, str] | None,
    check: bool,
    pass_fds: Sequence[int],
) -> Completed:
    words = tuple(str(word) for word in argv)
    line = command_line(words, cwd, env)
    transport, talk = await _start(words, out, err, stdin is not None, cwd, env, pass_fds)
    try:
        async with asyncio.timeout(timeout_s):
            _send(transport, stdin)
            await talk.over
    except TimeoutError as e:
        await _end(transport, talk, blame=e)
        error = Timeout(what=f"`{line}`", limit_s=math.ceil(timeout_s))
        error.add_note(f"last words on stderr: {_tail(err.tail())}")
        raise error from e
    except _TooMuchOutput as e:
        await _end(transport, talk, blame=e)
        raise CommandFailed(command=line, exit_status=-signal.SIGKILL, stderr=str(e)) from e
    except BaseException as e:
        await _end(transport, talk, blame=e)
        raise
    finally:
        transport.close()
    done = Completed(argv=words, stdout=out.close(), stderr=err.close(), returncode=transport.get_returncode() or 0)
    if check and done.returncode != 0:
        said = _tail(done.stderr) or _tail(done.stdout) or "(it said nothing)"
        raise CommandFailed(command=line, exit_status=done.returncode, stderr=said)
    return done


async def _start(
    words: tuple[str, ...],
    out: _Sink,
    err: _Sink,
    has_stdin: bool,
    cwd: Path | None,
    env: Mapping[str, str] | None,
    pass_fds: Sequence[int],
) -> _Started:
    if cwd is not None and not await asyncio.to_thread(cwd.is_dir):
        raise NotADirectoryError(f"{cwd}: the working directory of {words[0]} does not exist")
    program_env = program_environment(env)
    # The search for the program uses the PATH it will get, not the caller's.
    program = next(_candidates(words[0], program_env["PATH"]), None)
    if program is None:
        raise ToolMissing(program=words[0], package=PACKAGES.get(words[0], words[0]))
    starting = asyncio.ensure_future(
        asyncio.get_running_loop().subprocess_exec(
            lambda: _Conversation(out, err),
            program,
            *words[1:],
            stdin=PIPE if has_stdin else DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            cwd=cwd,
            env=program_env,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError as e:
        await _end_unwanted(starting, blame=e)
        raise


async def _end_unwanted(starting: asyncio.Future[_Started], blame: BaseException) -> None:
    """End a program whose caller was cancelled while it started.

    The start itself must not be cancelled: asyncio would kill the leader alone and wait for its pipes, which are never
    connected then (Python 3.11, `_make_subprocess_transport`). It takes a few turns of the loop.
    """
    while not starting.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({starting})
    if starting.exception() is None:
        transport, talk = starting.result()
        try:
            await _end(transport, talk, blame)
        finally:
            transport.close()


def _candidates(program: str, path: str) -> Iterator[str]:
    folders = [""] if "/" in program else path.split(":")
    for folder in folders:
        name = os.path.join(folder, program)  # noqa: PTH118 - "" keeps the name as given
        if os.access(name, os.X_OK) and os.path.isfile(name):  # noqa: PTH113
            yield name


def _send(transport: asyncio.SubprocessTransport, stdin: bytes | None) -> None:
    """Queue all input. A program may end without reading it; its status says whether that was right."""
    if stdin is None:
        return
    # uvloop's transports do not derive from asyncio's, and refuse calls once the other end is closed.
    pipe = cast("asyncio.WriteTransport", transport.get_pipe_transport(0))
    if not pipe.is_closing():
        pipe.write(stdin)
    if not pipe.is_closing():
        pipe.write_eof()


async def _end(transport: asyncio.SubprocessTransport, talk: _Conversation, blame: BaseException) -> None:
    """Kill the process group and reap its leader; also when the caller is cancelled once more."""
    pid = transport.get_pid()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    try:
        await asyncio.shield(asyncio.wait_for(talk.closed.wait(), _REAP_TIMEOUT_S))
    except TimeoutError:
        blame.add_note(f"pid {pid} did not end within {_REAP_TIMEOUT_S:.0f} s after SIGKILL")


def _tail(data: bytes, lines: int = 20) -> str:
    text = data[-8192:].decode(errors="replace").strip()
    return "\n".join(text.splitlines()[-lines:])
