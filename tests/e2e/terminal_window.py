"""A terminal window for tests: a program in a pseudo-terminal, its screen as bytes, its keyboard."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Mapping
from typing import Self

FUSE = [sys.executable, "-m", "fusevm"]


class TerminalWindow:
    """Use as a context manager: whatever still runs is killed at the end."""

    def __init__(
        self,
        arguments: list[str],
        environ: Mapping[str, str],
        *,
        rows: int = 24,
        cols: int = 80,
    ) -> None:
        self.screen = b""
        self.status: int | None = None
        self.pid, self._fd = pty.fork()
        if self.pid == 0:  # the child
            try:
                os.execve(arguments[0], arguments, dict(environ))
            finally:
                os._exit(127)
        os.set_blocking(self._fd, False)
        self.resize(rows, cols)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    @property
    def modes(self) -> list[int]:
        """Input, output and local modes, by which raw and ordinary terminals differ."""
        attributes = termios.tcgetattr(self._fd)
        return [attributes[0], attributes[1], attributes[3]]

    @property
    def is_raw(self) -> bool:
        return not self.modes[2] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def type(self, data: bytes | str, timeout_s: float = 240.0) -> None:
        """Type or paste; reads the screen meanwhile, as a window does."""
        rest = memoryview(data.encode() if isinstance(data, str) else data)
        ends_at = time.monotonic() + timeout_s
        while rest:
            readable, writable, _ = select.select([self._fd], [self._fd], [], 1.0)
            if readable:
                self._read()
            if writable:
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(self._fd, rest[:4096]) :]
            assert time.monotonic() < ends_at, f"{len(rest)} bytes were not taken"

    def wait_for(self, pattern: str | bytes, timeout_s: float = 120.0) -> re.Match[bytes]:
        """Wait until the screen shows a regular expression, and forget everything up to its end."""
        sought = re.compile(pattern.encode() if isinstance(pattern, str) else pattern, re.DOTALL)
        ends_at = time.monotonic() + timeout_s
        while not (found := sought.search(self.screen)):
            rest = ends_at - time.monotonic()
            assert rest > 0, f"no {pattern!r} on the screen: {self.screen[-2000:]!r}"
            ready, _, _ = select.select([self._fd], [], [], rest)
            if ready and not self._read():
                found = sought.search(self.screen)
                assert found, f"the program ended without {pattern!r}: {self.screen[-2000:]!r}"
                break
        self.screen = self.screen[found.end() :]
        return found

    def wait_until(self, is_true: object, timeout_s: float = 120.0) -> None:
        """Wait until a function says True; the screen is read meanwhile."""
        ends_at = time.monotonic() + timeout_s
        while not is_true():  # type: ignore[operator]
            assert time.monotonic() < ends_at, f"still not; the screen: {self.screen[-2000:]!r}"
            if select.select([self._fd], [], [], 0.02)[0]:
                self._read()

    def wait_size(self, rows: int, cols: int, timeout_s: float = 60.0) -> None:
        """Ask a shell for the size of its terminal until it is this one."""
        ends_at = time.monotonic() + timeout_s
        while True:
            self.type("stty size\n")
            size = self.wait_for(r"(\d+ \d+)\r\n")[1].decode()
            if size == f"{rows} {cols}":
                return
            assert time.monotonic() < ends_at, f"the size stays {size}"

    def start_sleep(self) -> None:
        """Have a shell wait for a program of which it is sure that it runs."""
        self.type("sh -c 'echo asl\"\"eep; exec sleep 1000'\n")
        self.wait_for("asleep\r\n")

    def wait_end(self, timeout_s: float = 120.0) -> int:
        """Wait for the end of the program; the exit code as a shell would have it."""
        ends_at = time.monotonic() + timeout_s
        while True:
            if select.select([self._fd], [], [], 0.02)[0]:
                self._read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                while self._read():
                    pass
                code = os.waitstatus_to_exitcode(status)
                self.status = 128 - code if code < 0 else code
                return self.status
            assert time.monotonic() < ends_at, f"it still runs; the screen: {self.screen[-2000:]!r}"

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:  # EIO: the other side is closed
            return False
        self.screen += data
        return bool(data)
