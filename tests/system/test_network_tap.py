"""Threads inside namespaces, and the taps they open."""

import asyncio
import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from namespaces import private_network
from network_lab import namespace_path, sh

from fusevm.host.net.namespace import is_namespace, run_inside
from fusevm.host.net.tap import ensure_tap, lend_tap, open_tap
from fusevm.model.errors import Timeout


def here() -> str:
    return str(Path(f"/proc/self/task/{threading.get_native_id()}/ns/net").readlink())


@private_network
async def test_work_inside_a_namespace_leaves_the_process_outside():
    sh("ip netns add a")
    outside = here()
    inside = await run_inside(namespace_path("a"), here)
    assert inside != outside
    assert here() == outside
    assert await asyncio.to_thread(here) == outside
    assert [thread for thread in threading.enumerate() if thread.name.startswith("netns:")] == []


def raise_timeout() -> None:
    raise TimeoutError("its own")


@private_network
async def test_a_failure_inside_is_raised_outside():
    sh("ip netns add a")
    with pytest.raises(ZeroDivisionError):
        await run_inside(namespace_path("a"), lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="its own"):
        await run_inside(namespace_path("a"), raise_timeout)
    with pytest.raises(FileNotFoundError):
        await run_inside(namespace_path("missing"), here)
    with pytest.raises(OSError, match="Invalid argument"):
        await run_inside("/etc/passwd", here)


@private_network
async def test_a_thread_that_hangs_is_abandoned_and_what_it_brings_late_is_closed():
    sh("ip netns add a")
    release, discarded = threading.Event(), []

    def hang() -> str:
        release.wait()
        return "late"

    with pytest.raises(Timeout):
        await run_inside(namespace_path("a"), hang, discard=discarded.append, timeout_s=0.05)
    task = asyncio.create_task(run_inside(namespace_path("a"), hang, discard=discarded.append))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await run_inside(namespace_path("a"), lambda: 1) == 1, "others are not kept"
    release.set()
    deadline = time.monotonic() + 60
    while discarded != ["late", "late"] and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert discarded == ["late", "late"]


@private_network
async def test_a_namespace_is_told_from_an_ordinary_file(tmp_path):
    sh("ip netns add a")
    assert is_namespace(namespace_path("a"))
    (tmp_path / "b").touch()
    assert not is_namespace(tmp_path / "b")
    assert not is_namespace(tmp_path / "missing")


@private_network
async def test_an_unprivileged_process_uses_a_tap_by_descriptor():
    sh("ip netns add a")
    await run_inside(namespace_path("a"), lambda: ensure_tap("tap0"))
    fd = await open_tap(namespace_path("a"), "tap0")
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    inside = f"nsenter --net={namespace_path('a')}"
    sh(f"{inside} sh -c 'echo 1 > /proc/sys/net/ipv6/conf/tap0/disable_ipv6'")
    sh("ip -n a link set tap0 up && ip -n a addr add 10.208.0.1/30 dev tap0")
    # A VMM asks for offloads (TUNSETOFFLOAD) and reads frames: neither needs a privilege.
    program = f"import fcntl, os; fcntl.ioctl({fd}, 0x400454D0, 1); os.set_blocking({fd}, True); "
    program += f"print(os.geteuid(), len(os.read({fd}, 2048)))"
    vmm = subprocess.Popen(
        [str(Path(sys.executable).resolve()), "-I", "-c", program],
        user=65534,
        group=65534,
        extra_groups=[],
        pass_fds=[fd],
        stdout=subprocess.PIPE,
        text=True,
    )
    sender = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('10.208.0.2', 9))"
    sh(f'{inside} {sys.executable} -c "{sender}"')
    out, _ = await asyncio.to_thread(vmm.communicate, timeout=60)
    # An ARP request is 42 bytes, after 10 of virtio_net_hdr (VIRTIO 1.2 section 5.1.6).
    assert out == "65534 52\n"
    with pytest.raises(OSError, match=r".*") as busy:
        await open_tap(namespace_path("a"), "tap0")
    assert busy.value.errno == errno.EBUSY
    os.close(fd)
    os.close(await open_tap(namespace_path("a"), "tap0"))
    assert "tap0" in sh("ip -n a link"), "the tap outlives its user"


@private_network
async def test_a_tap_is_made_once_and_belongs_to_root():
    sh("ip netns add a")
    await run_inside(namespace_path("a"), lambda: ensure_tap("tap0"))
    assert "user root" in sh("ip -n a tuntap show") or "user 0" in sh("ip -n a tuntap show")
    made = sh("ip -n a link show tap0")
    await run_inside(namespace_path("a"), lambda: ensure_tap("tap0"))
    assert sh("ip -n a link show tap0") == made


#: Attaches to a tap by its name, as Firecracker does, which is no root by then and has a device file of its own.
OPEN_BY_NAME = """
import fcntl, os, struct, sys
fd = os.open("/dev/net/tun", os.O_RDWR)
os.setgroups([])
os.setresuid(*[int(sys.argv[1])] * 3)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"tap0", 0x0002 | 0x1000 | 0x4000))
print(os.geteuid())
"""


def open_by_name(uid: int) -> "subprocess.CompletedProcess[str]":
    words = ["nsenter", f"--net={namespace_path('a')}", "--", sys.executable, "-c", OPEN_BY_NAME, str(uid)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@private_network
async def test_a_tap_that_is_lent_can_be_opened_by_that_user_and_by_root_alone():
    sh("ip netns add a")
    await run_inside(namespace_path("a"), lambda: ensure_tap("tap0"))
    assert open_by_name(71_234).returncode != 0
    await lend_tap(namespace_path("a"), "tap0", 71_234)
    assert open_by_name(71_234).stdout == "71234\n"
    assert open_by_name(71_235).returncode != 0
    await lend_tap(namespace_path("a"), "tap0", 71_235)
    assert open_by_name(71_234).returncode != 0
    os.close(await open_tap(namespace_path("a"), "tap0"))
