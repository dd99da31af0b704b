"""`fuse console` as a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from browser_window import PATIENCE_S
from clean_environ import clean_environ
from terminal_window import FUSE

sys.path.append(str(Path(__file__).parents[1] / "unit" / "control"))

from control_process import serving as control_plane

__all__ = ["ConsoleProcess", "children", "control_plane", "environ_of", "free_address", "running_console"]


class ConsoleProcess:
    """A running console."""

    def __init__(self, process: subprocess.Popen[str], address: str, folder: Path) -> None:
        self.process = process
        #: With the key.
        self.address = address
        #: Without it; no slash at the end.
        self.origin, _, self.key = address.partition("/?key=")
        #: Its working directory.
        self.folder = folder

    @property
    def authority(self) -> str:
        return self.origin.removeprefix("http://")

    @property
    def said(self) -> str:
        return (self.folder.parent / "console.log").read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def running_console(folder: Path, environ: Mapping[str, str], *options: str) -> Iterator[ConsoleProcess]:
    """Start it on a free port, in an empty working directory, and wait until it serves."""
    ready, log, home = folder / "ready", folder / "console.log", folder / "cwd"
    home.mkdir(parents=True, exist_ok=True)
    ready.unlink(missing_ok=True)
    command = [*FUSE, "console", "--listen", "localhost:0", "--ready-file", str(ready), *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, text=True, env=dict(environ), cwd=home)
    try:
        until = time.monotonic() + PATIENCE_S
        while not ready.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, "the console does not start"
            time.sleep(0.02)
        yield ConsoleProcess(process, ready.read_text().strip(), home)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def children(pid: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if entry.name.isdecimal() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def free_address() -> str:
    """An address of loopback on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


def environ_of(home: Path, url: str, token: str = "") -> dict[str, str]:
    """A user's environment with a control plane."""
    return clean_environ(home) | {"FUSE_BASE_URL": url, "FUSE_TOKEN": token}
