"""`fuse up` as a user without rights: everything lies in the user's own folders, and what is missing is said."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clean_environ import clean_environ
from local_stack import ARTEFACTS, LocalStack

from fusevm.cli.up import Ready

pytestmark = [
    pytest.mark.real,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root"),
    pytest.mark.timeout(900),
]
#: Nobody else's: the tests' PostgreSQL runs as nobody.
USER_ID = 65532
#: As a login makes it: short, as paths of sockets must be.
RUNTIME = Path(f"/run/user/{USER_ID}")


class OrdinaryUser(LocalStack):
    """A user with a home folder, and no settings of Fuse but the defaults."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {})
        self.home = self.data
        self.data = self.home / "data" / "fuse"
        self.base_environ = clean_environ(self.home) | {
            "XDG_RUNTIME_DIR": str(RUNTIME),
            "TMPDIR": str(self.home / "tmp"),
        }
        self.program = ["setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups", "--", *self.program]
        self._ready = self.home / "ready.json"
        RUNTIME.mkdir(mode=0o700, parents=True)
        (self.home / "tmp").mkdir()
        self.data.mkdir(parents=True)
        # Copies, as the user would have made them: stores are written to.
        for name in ("images", "kernels", "initramfs"):
            subprocess.run(["cp", "-r", "--sparse=always", ARTEFACTS / name, self.data], check=True)
        subprocess.run(["chown", "-R", f"{USER_ID}:{USER_ID}", self.home, RUNTIME], check=True)

    def up(self, *arguments: str) -> Ready:
        """As in the base, but the user's other commands find the stack by themselves."""
        ready = super().up(*arguments)
        self.environ = self.base_environ
        return ready

    def down(self) -> None:
        try:
            super().down()
        finally:
            shutil.rmtree(self.home)
            shutil.rmtree(RUNTIME)
            RUNTIME.parent.rmdir()


@pytest.fixture
def user(tmp_path: Path) -> Iterator[OrdinaryUser]:
    user = OrdinaryUser(tmp_path)
    try:
        yield user
    finally:
        user.down()


def test_the_life_of_a_stack_without_root(user: OrdinaryUser) -> None:
    user.up()
    said = user.log.read_text()
    assert f"Data    {user.home}/data/fuse\n" in said, said
    assert "Driver  qemu (" in said
    made = user.fuse("env", "create", "debian-12", "--task-id", "mine")
    assert (made.returncode, made.stdout) == (0, "fuse-mine\n"), made.stderr
    before = boot_id(user)

    for name in ("control/fuse.db", "log/host.log", "up.json", "api-token"):
        assert (user.data / name).is_file(), name
    state = json.loads(user.fuse("host", "state").stdout)
    (machine,) = (entry["machine"] for entry in state["journal"]["entries"])
    assert (user.data / "host/machines" / machine["id"]).is_dir()
    assert (state["host"]["isolation"], machine["isolation"]) == ("user-network", "user-network")
    (host,) = json.loads(user.fuse("host", "list", "-o", "json").stdout)
    assert host["driver"] == state["host"]["driver"]
    assert host["driver"].startswith("qemu (")

    assert user.process is not None
    record = json.loads((user.data / "up.json").read_text())
    daemons = [child["pid"] for child in record["children"]]
    assert len(daemons) == 2
    for pid in (user.process.pid, *daemons, machine["vmm"]["pid"]):
        assert Path(f"/proc/{pid}").stat().st_uid == USER_ID

    user.process.send_signal(signal.SIGSTOP)  # so that it does not start them again
    for pid in daemons:
        os.kill(pid, signal.SIGKILL)
    user.end(signal.SIGKILL)
    user.up()
    assert boot_id(user) == before, "the same machine, not a new one"

    done = user.fuse("down")
    assert done.returncode == 0, done.stderr
    assert "fuse-mine destroyed" in done.stderr
    assert list(RUNTIME.iterdir()) == []
    assert list((user.data / "host/machines").iterdir()) == []


def boot_id(user: OrdinaryUser) -> str:
    """Asked of the machine; another one after each boot."""
    done = user.fuse("exec", "-n", "mine", "cat", "/proc/sys/kernel/random/boot_id")
    assert done.returncode == 0, done.stderr
    return done.stdout
