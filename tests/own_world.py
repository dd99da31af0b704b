"""Gives the process of the tests a world of its own, so that nothing it makes can meet anybody else's.

As root: a network namespace with only `lo`, and a mount namespace with `/run` and `/var/tmp` of its own. All
threads and programs that are started afterwards are in it. For everybody: a folder for temporary files, and a word in
the environment by which processes of this run are known.

Must not: touch the world outside. The namespaces end with the last process in them.
"""

import contextlib
import ctypes
import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: Kernel and image of the tests, kept between runs.
DATA = Path(os.environ.get("FUSE_TEST_DATA", "/var/cache/fuse-test"))
#: In the environment of every process of this run.
MARK = "FUSE_TEST_RUN"
#: Set by `namespaces.private_network`: this pytest is in a world that was made for one test.
INSIDE = "FUSE_TEST_PRIVATE_NETWORK"

#: linux/sched.h
_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000
_PREPARE = """
set -e
mount --make-rprivate /
names=$(readlink -f /etc/resolv.conf || true)
mkdir "$1"
mount --bind /run "$1"
mount -t tmpfs -o mode=755 fuse-test /run
case "$names" in /run/*)
  mkdir -p "${names%/*}"
  cat "$1${names#/run}" >"$names" || true
esac
umount "$1"
mkdir -m 1777 /run/lock
mkdir /run/netns
mount -t tmpfs fuse-test /run/netns
mount -t sysfs fuse-test "$1"
for folder in class/net devices/virtual/net; do mount --bind "$1/$folder" "/sys/$folder"; done
umount "$1"
rmdir "$1"
ip link set lo up
"""

# os.unshare and os.setns exist from Python 3.12 on.
_libc = ctypes.CDLL(None, use_errno=True)
#: The machine's network namespace, open once we have left it.
_machines_network: list[int] = []


def run_prefix() -> str:
    """Names outside the namespaces, those of control groups, begin with this. Letters and digits, at most four."""
    return os.environ.setdefault(MARK, f"t{secrets.token_hex(2)[:3]}")


def keep_temporary_files_in(folder: Path) -> None:
    """Make every temporary file of this process and its children appear in one folder."""
    folder.mkdir()
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None


def enter_own_world(folder: Path, *visible: Path) -> None:
    """Enter new namespaces for good; `folder` serves as /var/tmp unless one of `visible` is there. Needs root.

    Only the calling thread enters, and what it starts later.
    """
    _machines_network.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET), "unshare")
    subprocess.run(["sh", "-c", _PREPARE, "prepare", str(folder / "sys")], check=True, timeout=60)
    if not any(path.resolve().is_relative_to("/var/tmp") for path in (folder, *visible)):
        shared = folder / "var-tmp"
        shared.mkdir()
        shared.chmod(0o1777)
        subprocess.run(["mount", "--bind", shared, "/var/tmp"], check=True, timeout=60)


@contextlib.contextmanager
def machines_network() -> Iterator[None]:
    """Be in the network of the machine for a while: kernels and images come from the Internet."""
    with contextlib.ExitStack() as stack:
        if _machines_network:
            own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            stack.callback(os.close, own)
            stack.callback(_enter_network, own)
            _enter_network(_machines_network[0])
        yield


def _enter_network(descriptor: int) -> None:
    _check(_libc.setns(descriptor, _CLONE_NEWNET), "setns")


def _check(status: int, call: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
