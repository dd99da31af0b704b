"""`fuse up --ephemeral` as a child process, for programs that need a Fuse of their own."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from fusevm.cli.failures import OTHER, CliError
from fusevm.cli.installation import fuse_command
from fusevm.cli.up import Ready

_STOP_TIMEOUT_S = 120.0


@contextlib.contextmanager
def ephemeral_stack(ready_file: Path, image: str) -> Iterator[Ready]:
    """A Fuse of its own, up; ended with all it made, whatever happened. Raises CliError when it does not come up."""
    words = ["up", "--ephemeral", "--no-context", "--ready-file", str(ready_file), "--image", image]
    process = subprocess.Popen(fuse_command(*words), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_ready(process, ready_file)
        yield msgspec.json.decode(ready_file.read_bytes(), type=Ready)
    except BaseException:
        _stop(process)
        raise
    if _stop(process) != 0:
        raise CliError("Fuse did not end well; the reason is above")


def _wait_ready(process: "subprocess.Popen[bytes]", ready_file: Path) -> None:
    """Wait as long as it takes: building an image takes minutes."""
    while not ready_file.exists():
        if (status := process.poll()) is not None:
            problem, hint = "Fuse did not start; the reason is above", "`fuse doctor` checks this machine"
            raise CliError(problem, hint=hint, code=max(status, OTHER))
        time.sleep(0.1)


def _stop(process: "subprocess.Popen[bytes]") -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)  # a shell lets what it runs in the background ignore SIGINT
    try:
        return process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
