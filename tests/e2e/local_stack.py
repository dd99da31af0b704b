"""`fuse up` for tests: a stack of its own, with names that collide with nobody's, and its own way to be ended."""

from __future__ import annotations

import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
from terminal_window import FUSE

from artefacts import ensure_artefacts
from fusevm.cli.ephemeral import free_range
from fusevm.cli.leftovers import find_leftovers
from fusevm.cli.up import Ready
from own_world import DATA as ARTEFACTS
from own_world import run_prefix

START_S = 600.0


class LocalStack:
    """One data folder. `up` and `kill` as often as needed; `down` at the end."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        ensure_artefacts()
        # Not below pytest's own folder, which is private: the users that machines run as must get through.
        self.data = Path(tempfile.mkdtemp(prefix="fuse-test-", dir="/var/tmp"))
        self.data.chmod(0o711)
        self.instance = f"{run_prefix()}{secrets.token_hex(2)[:3]}"
        self.base_environ = dict(environ) | {
            "FUSE_DATA_DIR": str(self.data),
            "FUSE_INSTANCE": self.instance,
            "FUSE_ARTEFACT_ROOT": str(ARTEFACTS),
            "FUSE_NETWORK_RANGE": free_range(Path("/proc/net/route").read_text()),
        }
        self.environ = dict(self.base_environ)
        #: The words that run the program.
        self.program = list(FUSE)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "up.log"
        self._ready = folder / "ready.json"

    def up(self, *arguments: str) -> Ready:
        if self.process is not None:
            self.process.wait(240)
        self._ready.unlink(missing_ok=True)
        command = [*self.program, "up", "--ready-file", str(self._ready), *arguments]
        with self.log.open("ab") as log:
            settings = {"env": self.base_environ, "stdout": log, "stderr": log, "start_new_session": True}
            self.process = subprocess.Popen(command, **settings)  # type: ignore[call-overload]
        ends_at = time.monotonic() + START_S
        while not self._ready.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < ends_at, self.log.read_text()
            time.sleep(0.05)
        ready = msgspec.json.decode(self._ready.read_bytes(), type=Ready)
        self.environ = self.base_environ | {"FUSE_BASE_URL": ready.context.url, "FUSE_TOKEN": ready.context.token}
        return ready

    def end(self, number: int, timeout_s: float = 240.0) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def fuse(self, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        settings = {"capture_output": True, "text": True, "env": self.environ, "timeout": 400}
        command = [*self.program, *arguments]
        return subprocess.run(command, check=False, **(settings | options))  # type: ignore[call-overload,no-any-return]

    def down(self) -> None:
        """End everything; whatever stays is an error of the test that was before."""
        done = self.fuse("down")
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
        shutil.rmtree(self.data, ignore_errors=True)
        assert done.returncode == 0, done.stderr + self.log.read_text()

    def leftovers(self, timeout_s: float = 120.0) -> list[str]:
        """What is still there after a while, but for the data folder itself."""
        ends_at = time.monotonic() + timeout_s
        while left := [name for name in find_leftovers(self.data, self.instance) if name != f"folder {self.data}"]:
            if time.monotonic() > ends_at:
                break
            time.sleep(0.1)
        return left


def interrupt(process: subprocess.Popen[bytes], number: int = signal.SIGINT) -> int:
    process.send_signal(number)
    return process.wait(240)
