"""A control plane as a process of its own, as `fuse serve` starts it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 120.0


class Server:
    """A running process."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process = process
        self.url = url

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(START_S)


@contextlib.contextmanager
def serving(folder: Path, *options: str, code: str = "") -> Iterator[Server]:
    """Start `python -m fusevm.control` (or `code`) and wait until it serves."""
    ready = folder / "ready"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "fusevm.control"]
    common = [] if code else ["--listen", "127.0.0.1:0", "--ready-file", str(ready), "--log-level", "error"]
    with (folder / "out").open("a") as out:
        process = subprocess.Popen([*command, *common, *options], stdout=out, stderr=out, text=True, env=os.environ)
    try:
        until = time.monotonic() + START_S
        while not ready.exists():
            assert process.poll() is None, (folder / "out").read_text()
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.01)
        yield Server(process, ready.read_text().strip())
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(START_S)
