"""The local stack: a host daemon and a control plane as two child processes, their logs, their restarts.

The children run in sessions of their own, so Ctrl-C reaches only us; a pipe tells them when we are gone, whatever the
reason (`supervised`). Machines belong to nobody here: they outlive all three.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import msgspec

from fusevm.cli.failures import HINT_INDENT, UNAVAILABLE, CliError
from fusevm.cli.processes import Identity, identify
from fusevm.cli.supervised import VARIABLE

LOG_LIMIT_BYTES = 32 << 20
_TAIL_BYTES = 4096
_STOP_TIMEOUT_S = 20.0
#: A child that ends this often within this time is not started again.
_RESTARTS, _RESTART_WINDOW_S = 5, 120.0
_POLL_S = 0.1


class StartFailed(CliError):
    """A child did not come up, and its log may say why."""


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """One child: what to run, with which settings, and how to see that it serves."""

    name: str
    command: list[str]
    #: Added to our own environment.
    environ: Mapping[str, str]
    log: Path
    #: Raises nothing; True once it serves.
    is_ready: Callable[[], bool]
    #: Of the files it makes.
    umask: int = 0o022


class Child:
    """A program that runs."""

    def __init__(self, program: Program, read_fd: int) -> None:
        self.program = program
        self._read_fd = read_fd
        self.started_at = 0.0
        #: Length of the log when this run began.
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its output goes to its log."""
        rotate(self.program.log)
        environ = os.environ | dict(self.program.environ) | {VARIABLE: str(self._read_fd)}
        with self.program.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self.program.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                cwd="/",
                pass_fds=[self._read_fd],
                start_new_session=True,
                umask=self.program.umask,
            )
        self.started_at = time.monotonic()

    @property
    def identity(self) -> Identity | None:
        """Who it is; None once it has ended."""
        return identify(self._process.pid) if self._process is not None else None

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process is not None else None

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it serves. Raises CliError: what it said and its status when it refused, else StartFailed."""
        ends_at = time.monotonic() + timeout_s
        while not self.program.is_ready():
            status = self.exit_status
            if status is not None:
                refusal = last_error(self.program.log, self._log_start)
                if refusal is not None and status > 0:
                    raise CliError(refusal[0], hint=refusal[1], code=status)
                raise StartFailed(
                    f"the {self.program.name} did not start: {last_words(self.program.log)}",
                    hint=f"its log: {self.program.log}",
                    code=UNAVAILABLE,
                )
            if time.monotonic() > ends_at:
                raise StartFailed(
                    f"the {self.program.name} does not answer after {timeout_s:.0f} s",
                    hint=f"its log: {self.program.log}",
                    code=UNAVAILABLE,
                )
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Ask it to end, and after a while make it. Idempotent."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Stack:
    """Children in the order in which they need each other. Use as a context manager: they end with it."""

    def __init__(self, say: Callable[[str], None], pause: Callable[[float], None] = time.sleep) -> None:
        self._say = say
        self._pause = pause
        self.children: list[Child] = []
        self._failures: dict[str, list[float]] = {}
        self._read_fd, self._write_fd = os.pipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            self.stop()
        os.close(self._read_fd)
        os.close(self._write_fd)

    def start(self, program: Program, timeout_s: float) -> None:
        """Start a child and wait until it serves. Raises CliError."""
        child = Child(program, self._read_fd)
        self.children.append(child)
        child.start()
        child.wait_ready(timeout_s)

    def check(self) -> bool:
        """Start again what has ended; True if there was such. Raises CliError when that happens too often."""
        was_restarted = False
        for child in self.children:
            rotate(child.program.log)
            if child.exit_status is None:
                continue
            name = child.program.name
            now = time.monotonic()
            recent = [at for at in self._failures.get(name, []) if now - at < _RESTART_WINDOW_S]
            self._failures[name] = [*recent, now]
            words = last_words(child.program.log)
            if len(recent) >= _RESTARTS:
                raise CliError(f"the {name} keeps ending: {words}", hint=f"its log: {child.program.log}")
            self._say(f"the {name} ended ({describe_exit(child.exit_status)}) and is started again: {words}")
            self._pause(min(0.5 * 2 ** len(recent), 10))
            child.start()
            was_restarted = True
        return was_restarted

    def stop(self) -> None:
        """End the children, the last one first."""
        for child in reversed(self.children):
            child.stop()


def describe_exit(status: int) -> str:
    """An exit status of subprocess in words."""
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    said = [line.strip() for line in lines if line.strip()]
    # An error's second line is its hint; the sentence before it is what happened.
    errors = [line for line in said if line.startswith("fuse: ")]
    return (errors or said or ["it said nothing"])[-1].removeprefix("fuse: ")


def last_error(log: Path, start: int) -> tuple[str, str] | None:
    """The last error and its hint (`failures.report`) after a position of a log; None when there is none."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start, end - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    for index in reversed(range(len(lines))):
        if lines[index].startswith("fuse: "):
            following = lines[index + 1] if index + 1 < len(lines) else ""
            hint = following.strip() if following.startswith(HINT_INDENT) else ""
            return lines[index].removeprefix("fuse: "), hint
    return None


def rotate(log: Path) -> None:
    """Keep a log that grew too large as `.1`. Its writer appends, so the file itself is emptied."""
    try:
        if log.stat().st_size < LOG_LIMIT_BYTES:
            return
        with log.open("r+b") as file, log.with_suffix(".log.1").open("wb") as old:
            while piece := file.read(1 << 20):
                old.write(piece)
            file.truncate(0)
    except FileNotFoundError:
        return
