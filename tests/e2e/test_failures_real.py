"""What goes wrong below the whole stack, and how it is told: a VMM that dies, images that are no images, no QEMU.

Everything is done with `fuse up` as a user has it, with images of its own so that one of them can be damaged.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clean_environ import clean_environ
from local_stack import ARTEFACTS, LocalStack
from terminal_window import FUSE

from fusevm.host.config import HostConfig

pytestmark = [
    pytest.mark.real,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="`fuse up` with its own network needs root"),
    pytest.mark.timeout(600),
    pytest.mark.shared_stack,
]
QEMU = "qemu-system-x86_64"
#: Offset of the magic number of ext4 (ext4(5)).
_MAGIC_AT, _MAGIC = 1024 + 0x38, b"\x53\xef"
#: Network slots that wait for machines.
WARM_SLOTS = HostConfig(data_root=Path("/nowhere")).warm_slots
REMEDY = f"{QEMU} is not installed; install it with `apt-get install qemu-system-x86`"
#: Exit status of a command that can never work (400), and of one that the servers could not do.
INVALID, UNAVAILABLE = 2, 5


class Lab(LocalStack):
    """A stack with an artefact directory of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, clean_environ(folder))
        self.artefacts = Path(tempfile.mkdtemp(prefix="fuse-test-", dir="/var/tmp"))
        self.artefacts.chmod(0o755)
        (self.artefacts / "images").mkdir()
        for entry in ("kernels", "initramfs", "blanks"):
            (self.artefacts / entry).symlink_to(ARTEFACTS / entry)
        self.base_environ |= {"FUSE_ARTEFACT_ROOT": str(self.artefacts)}
        self._add_images()
        #: Network slots that wait for machines.
        self.spare = 0

    def _add_images(self) -> None:
        """`debian-12` is the one that all tests share, `fragile` looks like it and will be damaged."""
        names = json.loads((ARTEFACTS / "images/names.json").read_text())["names"]
        good = ARTEFACTS / "images" / names["debian-12"].replace(":", "-")
        (self.artefacts / "images" / good.name).symlink_to(good)
        fragile = self.artefacts / "images" / f"sha256-{'b' * 64}"
        fragile.mkdir()
        record = json.loads((good / "image.json").read_text()) | {"digest": f"sha256:{'b' * 64}"}
        (fragile / "image.json").write_text(json.dumps(record))
        self.fragile = fragile / "rootfs.ext4"
        with (good / "rootfs.ext4").open("rb") as whole, self.fragile.open("wb") as copy:
            copy.write(whole.read(1 << 20))
            copy.truncate((good / "rootfs.ext4").stat().st_size)
        mine = {"debian-12": names["debian-12"], "fragile": f"sha256:{'b' * 64}"}
        (self.artefacts / "images/names.json").write_text(json.dumps({"names": mine}))

    def down(self) -> None:
        try:
            super().down()
        finally:
            shutil.rmtree(self.artefacts)

    def environments(self) -> list[str]:
        return self.fuse("env", "list", "-q").stdout.split()

    def vmm(self) -> int:
        """The one QEMU of this stack."""
        (pid,) = (int(folder.name) for folder in Path("/proc").glob("[0-9]*") if self._is_machine(folder))
        return pid

    def _is_machine(self, process: Path) -> bool:
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            return False
        return f"{self.data}/host/machines/".encode() in command and QEMU.encode() in command.split(b"\0")[0]

    def machine_traces(self) -> list[str]:
        """What is there of machines, in words."""
        host = json.loads(self.fuse("host", "state").stdout)
        found = [f"journal entry {entry['machine']['id']}" for entry in host["journal"]["entries"]]
        found += [f"process {folder.name}" for folder in Path("/proc").glob("[0-9]*") if self._is_machine(folder)]
        found += [f"namespace {name}" for name in self.namespaces()[self.spare :]]
        for folder in (self.data / "host/machines", Path("/run") / self.instance):
            found += [f"folder {path}" for path in folder.glob("*") if path.is_dir()]
        groups = Path("/sys/fs/cgroup").glob(f"**/{self.instance}/machines/*")
        return found + [f"group {path}" for path in groups if path.is_dir()]

    def namespaces(self) -> list[str]:
        """As the daemons see them, which may have a mount namespace of their own."""
        assert self.process is not None
        words = ["nsenter", "-t", str(self.process.pid), "--mount", "ls", "/run/netns"]
        listed = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout.split()
        return [name for name in listed if name.startswith(f"{self.instance}-")]

    def count_spare(self) -> None:
        """Before there is any machine."""
        wait_until(lambda: len(self.namespaces()) == WARM_SLOTS)
        self.spare = WARM_SLOTS

    def check_nothing_left(self) -> None:
        ends_at = time.monotonic() + 120
        while left := self.machine_traces():
            assert time.monotonic() < ends_at, left
            time.sleep(0.2)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    lab = Lab(tmp_path_factory.mktemp("failures"))
    try:
        lab.up()
        lab.count_spare()
        yield lab
    finally:
        lab.down()


# -- a machine that dies ---------------------------------------------------------------------------------------------


def test_a_vmm_that_is_killed_is_told_everywhere(stack: Lab) -> None:
    made = stack.fuse("env", "create", "debian-12", "--task-id", "victim", "--ram", "256M", "-o", "json")
    assert made.returncode == 0, made.stderr
    uid = json.loads(made.stdout)["uid"]
    words = [*FUSE, "env", "events", "victim", "-o", "json"]
    with subprocess.Popen(words, env=stack.environ, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        first = json.loads(follower.stdout.readline())
        assert (first["uid"], first["state"]) == (uid, "running")
        os.kill(stack.vmm(), signal.SIGKILL)
        # The stream ends by itself.
        told = [json.loads(line) for line in follower.stdout]
        assert follower.wait(120) == 0
    assert (told[-1]["state"], told[-1]["reason"]) == ("failed", "machine_exited")
    assert "SIGKILL" in told[-1]["error"]

    ended = json.loads(stack.fuse("env", "get", "victim", "--uid", uid, "-o", "json").stdout)
    assert (ended["state"], ended["reason"], ended["uid"]) == ("failed", "machine_exited", uid)
    assert "SIGKILL" in ended["error"]
    story = stack.fuse("story", "victim").stdout
    assert "it failed (machine_exited)" in story
    assert story.rstrip().splitlines()[-1].startswith("It is failed")
    # A stream that is opened after the end tells it again.
    again = stack.fuse("env", "events", "victim", "--uid", uid, "-o", "json").stdout.splitlines()
    assert json.loads(again[-1])["state"] == "failed"
    stack.check_nothing_left()


# -- images ----------------------------------------------------------------------------------------------------------


def refused(stack: Lab, image: str, *, code: int) -> str:
    """The message of a create that does not succeed; nothing of it is left."""
    done = stack.fuse("env", "create", image, "--task-id", "never", "--ram", "256M", "-o", "json")
    return error_of(stack, done, code=code)


def error_of(stack: Lab, done: subprocess.CompletedProcess[str], *, code: int) -> str:
    """The message of a command that failed with this code; nothing of it is left."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert stack.environments() == []
    stack.check_nothing_left()
    return str(json.loads(done.stderr)["error"]["message"])


def put_magic(rootfs: Path, magic: bytes) -> None:
    with rootfs.open("r+b") as file:
        file.seek(_MAGIC_AT)
        file.write(magic)


def wait_until(is_true: Callable[[], bool], timeout_s: float = 120.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < ends_at
        time.sleep(0.1)


def last_failure(stack: Lab) -> tuple[str, str]:
    """State and reason of the environment that ended last."""
    listed = json.loads(stack.fuse("env", "list", "--ended", "--task-id", "never", "-o", "json").stdout)
    last = max(listed, key=lambda one: one["created_at"])
    return last["state"], last["reason"]


def test_an_unknown_image_is_refused(stack: Lab) -> None:
    assert "There is no image 'no-such-image'" in refused(stack, "no-such-image", code=INVALID)


def test_a_damaged_image_is_refused(stack: Lab) -> None:
    hosts = json.loads(stack.fuse("host", "list", "-o", "json").stdout)
    assert "fragile" in json.dumps(hosts), "the control plane believes in it"
    for _ in range(20):  # until the create comes before the host has told the control plane
        put_magic(stack.fragile, b"\0\0")
        if "fragile" in stack.fuse("host", "list", "-o", "json").stdout:
            done = stack.fuse("env", "create", "fragile", "--task-id", "never", "--ram", "256M", "-o", "json")
            if "is damaged" in done.stderr:
                break
        put_magic(stack.fragile, _MAGIC)
        wait_until(lambda: "fragile" in stack.fuse("host", "list", "-o", "json").stdout)
    # The host sees it, the environment fails with this reason.
    message = error_of(stack, done, code=INVALID)
    assert f"{stack.fragile} is damaged (it is no ext4 file system)" in message
    assert "fuse image build --force fragile" in message
    assert last_failure(stack) == ("failed", "image_corrupt")
    # Soon the control plane knows that no host has it.
    wait_until(lambda: "fragile" not in stack.fuse("host", "list", "-o", "json").stdout)
    assert "There is no image 'fragile'" in refused(stack, "fragile", code=INVALID)


# -- no QEMU ---------------------------------------------------------------------------------------------------------

#: The daemons look for programs in the system's folders, too, whatever PATH says: QEMU is hidden in a mount namespace.
_APART = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]


def hiding() -> str:
    return f"mount --bind /dev/null {shutil.which(QEMU)}"


def test_without_qemu_fuse_does_not_start(stack: Lab) -> None:
    assert stack.end(signal.SIGINT) == 0
    words = [*_APART, f'{hiding()}; exec "$@"', "sh", *FUSE, "up"]
    done = subprocess.run(
        words,
        env=stack.base_environ,
        capture_output=True,
        text=True,
        timeout=180,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == UNAVAILABLE, done.stderr
    assert REMEDY in done.stderr
    assert "Traceback" not in done.stderr
    stack.up()


def test_qemu_that_goes_away_is_told_with_its_remedy(stack: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stack.end(signal.SIGINT) == 0
    with monkeypatch.context() as patch:
        patch.setattr(stack, "program", [*_APART, 'exec "$@"', "sh", *FUSE])
        stack.up()
    assert stack.process is not None
    stack.count_spare()
    hide = ["nsenter", "-t", str(stack.process.pid), "--mount", "sh", "-c", hiding()]
    subprocess.run(hide, check=True, timeout=30)
    try:
        message = refused(stack, "debian-12", code=UNAVAILABLE)
        assert REMEDY in message
        assert last_failure(stack) == ("failed", "vmm_missing")
    finally:
        assert stack.end(signal.SIGINT) == 0
        stack.up()
