"""Joins a session to this program's own stdin, stdout and stderr: one thread, one poll loop, nothing that can stall.

Input is read only while the session takes more, output is written at once. On a terminal the keyboard is raw while the
session lasts, so Ctrl-C, Ctrl-Z and Ctrl-\\ go to the remote side; whatever ends the session, the terminal is restored.
"""

import contextlib
import os
import select
import signal
import termios
import tty
from collections.abc import Callable, Iterator
from types import FrameType as StackFrame
from typing import Self

from fusevm.model.errors import Error
from fusevm.sdk.session import HIGH_WATER, STDIN_CHUNK, Session
from fusevm.wire.frames import Frame, FrameType
from fusevm.wire.guest import Exit

STDIN, STDOUT, STDERR = 0, 1, 2
#: Modes that a remote program may have left switched on: mouse reports, bracketed paste, hidden cursor, colours.
_RESET = b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?25h\x1b[0m"
_PING_CHECK_MS = 5_000

Sink = Callable[[FrameType, bytes], None]


class HungUp(Exception):
    """The terminal has gone, or this program was told to end by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def write_output(kind: FrameType, data: bytes) -> None:
    """Write a command's output to our own stdout or stderr. Raises BrokenPipeError."""
    fd = STDERR if kind is FrameType.STDERR else STDOUT
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # somebody set the shared description to non-blocking
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()


def terminal_size(fd: int = STDIN) -> tuple[int, int]:
    """Rows and columns of a terminal; 24 and 80 where there is none."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return 24, 80
    return size.lines or 24, size.columns or 80


def is_foreground(fd: int) -> bool:
    """May we read from this terminal? A background job that does is stopped by the system."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return True


def usable_stdin(*, is_wanted: bool = True) -> int | None:
    """Descriptor of our standard input, or None where there is none to read."""
    try:
        os.fstat(STDIN)
    except OSError:
        return None
    return STDIN if is_wanted and not (os.isatty(STDIN) and not is_foreground(STDIN)) else None


@contextlib.contextmanager
def raw_keyboard(fd: int) -> Iterator[None]:
    """Raw mode. Restored in any case; after a failure unread input is dropped, so that a half-sent paste does not
    end up as commands of the local shell."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(fd, _RESET)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSAFLUSH, before)
        raise
    termios.tcsetattr(fd, termios.TCSADRAIN, before)


class _Signals:
    """Signals as readable bytes: handlers only take notes, the poll loop acts."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self._numbers = numbers
        self._caught: list[int] = []

    def __enter__(self) -> Self:
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def fileno(self) -> int:
        return self._read_fd

    def _note(self, number: int, stack: StackFrame | None) -> None:
        del stack
        if number == signal.SIGINT and signal.SIGINT in self._caught:
            raise KeyboardInterrupt  # the second one while we are stuck in a write
        self._caught.append(number)

    def take(self) -> list[int]:
        """What was caught since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read_fd, 4096)
        caught, self._caught = self._caught, []
        return caught


class Pump:
    """Runs one session to its end."""

    def __init__(self, session: Session, *, stdin: int | None, is_tty: bool, sink: Sink = write_output) -> None:
        self._session = session
        self._stdin = stdin
        self._is_tty = is_tty
        self._sink = sink
        self._interrupts = 0

    def run(self) -> Exit:
        """Move bytes until the command has ended.

        Raises the session's error, BrokenPipeError when our reader has gone, KeyboardInterrupt on the second Ctrl-C of
        a session without a terminal, HungUp for SIGTERM and SIGHUP.
        """
        keyboard: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._is_tty and self._stdin is not None and os.isatty(self._stdin):
            keyboard = raw_keyboard(self._stdin)
        numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH if self._is_tty else signal.SIGINT)
        with keyboard, _Signals(numbers) as signals:
            if self._stdin is None:
                self._session.close_stdin()
            self._give(self._session.receive())
            while self._session.exit is None:
                self._step(signals)
        return self._session.exit

    def _step(self, signals: _Signals) -> None:
        session = self._session
        poller = select.poll()
        poller.register(session, select.POLLIN | (select.POLLOUT if session.unsent_bytes else 0))
        poller.register(signals, select.POLLIN)
        takes_input = self._stdin is not None and session.unsent_bytes < HIGH_WATER
        if takes_input and self._stdin is not None:
            poller.register(self._stdin, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(_PING_CHECK_MS)}
        for number in signals.take():
            self._on_signal(number)
        if session.fileno() in ready:
            session.flush()
            self._give(session.receive())
        if takes_input and self._stdin in ready and session.exit is None:
            self._take_input()
        session.ping_if_due()

    def _give(self, frames: list[Frame]) -> None:
        for frame in frames:
            self._sink(frame.type, frame.payload)

    def _take_input(self) -> None:
        assert self._stdin is not None  # noqa: S101 - the caller polled it
        try:
            data = os.read(self._stdin, STDIN_CHUNK)
        except BlockingIOError:
            return
        except OSError:  # EIO: the terminal has gone
            data = b""
        if data:
            self._session.queue(Frame(FrameType.STDIN, data))
            return
        if self._is_tty and os.isatty(self._stdin):
            raise HungUp(signal.SIGHUP)
        self._stdin = None
        self._session.queue(Frame(FrameType.STDIN_EOF))

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._session.resize(*terminal_size())
        elif number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            self._session.signal("INT")
        else:
            raise HungUp(number)


def converse(session: Session, *, stdin: int | None, is_tty: bool, sink: Sink = write_output) -> int:
    """Run a session to its end and return the exit code for our caller."""
    with session:
        try:
            return Pump(session, stdin=stdin, is_tty=is_tty, sink=sink).run().exit_code
        except HungUp as error:
            return error.code
        except Error:
            if session.exit is not None:
                return session.exit.exit_code
            raise
