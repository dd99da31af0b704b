"""What reads strangers' layers: it has given up the network before it begins, or it does not begin. As root."""

import ctypes
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fusevm.cli.install.observe import read_units
from fusevm.host.images.confine import WORKER_UID, without_rights

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")]
#: CLONE_NEW* of linux/sched.h, by the names that RestrictNamespaces= has for them (systemd.exec(5)).
KINDS = {
    "cgroup": 0x0200_0000,
    "uts": 0x0400_0000,
    "ipc": 0x0800_0000,
    "user": 0x1000_0000,
    "pid": 0x2000_0000,
    "net": 0x4000_0000,
    "mnt": 0x0002_0000,
}
UNSHARE = {"x86_64": 272, "aarch64": 97}[platform.machine()]
PR_SET_SECCOMP, FILTER, LOAD, EQUAL, ANY_BIT, RETURN = 22, 2, 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE_EPERM = 0x7FFF_0000, 0x0005_0001
CONFINE = """
import os
from fusevm.host.images.confine import drop_rights
before = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "ipc")}
drop_rights(max_file_bytes=1 << 20)
print(os.getuid(), [kind for kind, name in before.items() if os.readlink(f"/proc/self/ns/{kind}") != name])
"""


class Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def restrict_namespaces(*allowed: str) -> None:
    """Refuse unshare(2) of any other kind of namespace to this process and its children, as systemd does."""
    refused = sum(flag for kind, flag in KINDS.items() if kind not in allowed)
    # struct seccomp_data: the call's number at 0, its first argument at 16.
    steps = [(LOAD, 0, 0, 0), (EQUAL, 0, 3, UNSHARE), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, refused)]
    steps += [(RETURN, 0, 0, REFUSE_EPERM), (RETURN, 0, 0, ALLOW)]
    raw = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = Program(len(steps), ctypes.cast(raw, ctypes.c_void_p))
    if ctypes.CDLL(None).prctl(PR_SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError("no filter")


def confine(*allowed: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", CONFINE],
        preexec_fn=lambda: restrict_namespaces(*allowed),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_under_the_daemons_unit_it_has_no_network_of_the_hosts():
    allowed = re.findall(r"^RestrictNamespaces=(.*)$", read_units()["fuse-host.service"], flags=re.MULTILINE)
    done = confine(*allowed[0].split())
    assert done.stdout == f"{WORKER_UID} ['net', 'ipc']\n", done.stderr


@pytest.mark.parametrize(("allowed", "missing"), [("net", "IPC"), ("ipc", "network"), ("mnt", "network")])
def test_what_it_cannot_give_up_keeps_it_from_beginning(allowed: str, missing: str):
    done = confine(allowed)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no {missing} namespace of its own for what reads layers: Operation not permitted" in done.stderr


@pytest.mark.parametrize("has_network", [False, True])
def test_tools_that_read_what_strangers_wrote_have_a_network_only_to_ask_registries(has_network: bool):
    """debugfs, e2fsck, mke2fs, zstd; and skopeo. As within the daemon's unit."""
    words = without_rights(
        ["sh", "-c", "id -u; readlink /proc/self/ns/net; cat /proc/net/dev"], has_network=has_network
    )
    (allowed,) = re.findall(r"^RestrictNamespaces=(.*)$", read_units()["fuse-host.service"], flags=re.MULTILINE)
    done = subprocess.run(
        words, preexec_fn=lambda: restrict_namespaces(*allowed.split()), capture_output=True, text=True, check=True
    )
    uid, network, _, _, *devices = done.stdout.splitlines()
    assert int(uid) == WORKER_UID
    assert (network == str(Path("/proc/self/ns/net").readlink())) == has_network
    assert has_network or [device.split(":")[0].strip() for device in devices] == ["lo"]
