"""Disks of machines in jails, with real guests on Firecracker's fake: copied, put back, begun with, enlarged, visited.

They are raw files, of which the jail has a second name; `test_host_snapshots.py` and `test_machine_api.py` do the same
with QEMU's.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from real_host import Guest, Host, make_fence, until

from artefacts import IMAGE
from fusevm.model.machine import Fence
from fusevm.wire.host_api import CLUSTER_HEADER

pytestmark = [pytest.mark.real, pytest.mark.root, pytest.mark.timeout(900)]

GIB = 1 << 30
#: Programs that write all the time, with and without syncing, so that the moment is never a quiet one.
WRITERS = (
    "for n in 1 2 3; do (i=0; while :; do i=$((i+1)); echo $i > /w$n.$((i%50)); [ $n = 1 ] && sync /w$n.$((i%50)); "
    "rm -f /w$n.$(((i+25)%50)); done) >/dev/null 2>&1 & done"
)


async def ask(host: Host, method: str, target: str, fence: Fence | None = None, /, **body: Any) -> Any:
    content = await host.ask(method, target, fence, json.dumps(body).encode() if body else None)
    return json.loads(content) if content else None


def disk_of(host: Host, machine_id: str) -> Path:
    """The machine's disk, which must be a raw one and the only one."""
    (disk,) = (host.data / "machines" / machine_id).glob("*.raw")
    assert disk.name == "overlay.raw"
    return disk


def jailed_disk_of(host: Host, machine_id: str) -> Path:
    return host.data / "machines" / machine_id / "jail/firecracker" / machine_id / "root/overlay"


def assert_sparse(disk: Path, size: int) -> None:
    """As long as said, and most of it holes."""
    found = disk.stat()
    assert found.st_size == size
    assert found.st_blocks * 512 < size // 4


def check_file_system(disk: Path) -> None:
    """The kernel would have nothing to repair, and no journal to replay."""
    checked = subprocess.run(["e2fsck", "-f", "-n", str(disk)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    header = subprocess.run(["dumpe2fs", "-h", str(disk)], capture_output=True, text=True, check=True).stdout
    assert "needs_recovery" not in header


async def mib_of(guest: Guest) -> int:
    """Size of the guest's root file system."""
    return int((await guest.shell("df -m --output=size / | tail -1")).strip())


async def test_a_running_machines_disk_is_copied_begun_with_and_put_back(jail_host: Host):
    host = jail_host
    await host.start()
    await host.create("m-1", make_fence("u1", 1, 1))
    guest = Guest(host, "m-1", make_fence("u1", 1, 1))
    await guest.shell(f"echo before > /state; {WRITERS}")
    taken = await ask(host, "POST", "/machines/m-1/snapshots", make_fence("u1", 1, 2), snapshot_id="s-1")
    await guest.shell("echo after > /state; sync")
    assert taken["snapshot"]["consistency"] == "frozen"
    copied = host.data / "snapshots/s-1/disk.raw"
    assert_sparse(copied, GIB)
    check_file_system(copied)
    facts = json.loads((host.data / "snapshots/s-1/manifest.json").read_bytes())
    assert (facts["driver"], facts["disk_bytes"]) == ("firecracker", GIB)

    # A new machine begins with it, on a larger disk of its own: nothing of the snapshot is needed any more.
    spec = {"image": IMAGE, "memory_mib": 256, "disk_bytes": 2 * GIB}
    made = await ask(host, "POST", "/machines", make_fence("u2"), machine_id="m-2", spec=spec, snapshot_id="s-1")
    assert made["machine"]["phase"] == "running"
    seeded = Guest(host, "m-2", make_fence("u2"))
    assert await seeded.shell("cat /state") == "before\n"
    assert await mib_of(seeded) > 1500
    assert_sparse(disk_of(host, "m-2"), 2 * GIB)
    assert copied.stat().st_nlink == 1

    # The same machine goes back to it: what its jail has from now on is the new disk.
    replaced = disk_of(host, "m-1").stat().st_ino
    restored = await ask(host, "POST", "/machines/m-1/restore", make_fence("u1", 1, 3), snapshot_id="s-1")
    assert restored["machine"]["generation"] == 2
    assert await guest.shell("cat /state") == "before\n"
    disk = disk_of(host, "m-1").stat()
    assert disk.st_ino != replaced
    assert jailed_disk_of(host, "m-1").stat().st_ino == disk.st_ino
    assert disk.st_nlink == 2

    # Both keep what they write, whatever becomes of the snapshot.
    await host.ask("DELETE", "/snapshots/s-1", headers={CLUSTER_HEADER: "test"})
    assert list((host.data / "snapshots").iterdir()) == []
    for number in (1, 2):
        one = Guest(host, f"m-{number}", make_fence(f"u{number}", 1, 5))
        await one.shell("echo more > /more; sync")
        await host.ask("POST", f"/machines/m-{number}/stop", make_fence(f"u{number}", 1, 6))
        await host.ask("POST", f"/machines/m-{number}/start", make_fence(f"u{number}", 1, 7))
        assert await one.shell("cat /state /more") == "before\nmore\n"
        await host.delete(f"m-{number}", make_fence(f"u{number}", 1, 8))
    assert await host.wait_empty() == []
    assert await host.stop() == 0


async def test_a_machine_at_rest_is_copied_enlarged_visited_and_put_back(jail_host: Host, tmp_path: Path):
    host = jail_host
    await host.start()
    body = {"machine_id": "m-1", "image": IMAGE, "memory_mib": 256, "storage_bytes": 256 << 20}
    assert (await ask(host, "POST", "/machines", **body))["machine"]["phase"] == "running"

    async def files(operation: str, **fields: Any) -> Any:
        return await ask(host, "POST", "/machines/m-1/files/ops", operation=operation, **fields)

    async def shell(text: str) -> str:
        command = {"command": ["sh", "-c", text], "user": "root", "timeout_ms": 120_000}
        answer = await ask(host, "POST", "/machines/m-1/exec", **command)
        assert answer["exit_code"] == 0, answer
        return str(answer["stdout"])

    await files("write_text", path="a.txt", content="before\n")
    size = int(await shell("df -m --output=size / | tail -1"))
    await ask(host, "POST", "/machines/m-1/stop")
    taken = await ask(host, "POST", "/machines/m-1/snapshots", snapshot_id="s-1")
    assert taken["snapshot"]["consistency"] == "stopped"
    check_file_system(host.data / "snapshots/s-1/disk.raw")

    # It can be carried away, and a machine of the contract begins with it.
    packed = tmp_path / "packed.qcow2"
    packed.write_bytes(await host.ask("GET", "/snapshots/s-1/artifacts/disk-system"))
    words = ["qemu-img", "compare", str(packed), str(host.data / "snapshots/s-1/disk.raw")]
    assert "identical" in subprocess.run(words, capture_output=True, text=True, check=True).stdout
    body = {"machine_id": "m-2", "local_snapshot": {"snapshot_id": "s-1"}, "memory_mib": 256}
    assert (await ask(host, "POST", "/snapshots/s-1/restore", **body))["machine"]["phase"] == "running"
    read = {"operation": "read_text", "path": "a.txt"}
    assert await ask(host, "POST", "/machines/m-2/files/ops", **read) == {"content": "before\n"}
    await host.delete("m-2", None)

    # Enlarged, and visited in its new size; a visit has a jail for as long as it lasts.
    resized = (await ask(host, "POST", "/machines/m-1/resize", storage_bytes=512 << 20))["machine"]
    assert resized["phase"] == "stopped"
    assert_sparse(disk_of(host, "m-1"), 512 << 20)
    assert await files("read_text", path="a.txt") == {"content": "before\n"}
    await files("write_text", path="a.txt", content="by a visitor\n")
    assert (await ask(host, "GET", "/machines/m-1"))["machine"]["phase"] == "stopped"
    assert jailed_disk_of(host, "m-1").exists()
    await until(lambda: disk_of(host, "m-1").stat().st_nlink == 1)

    await ask(host, "POST", "/machines/m-1/start")
    assert await files("read_text", path="a.txt") == {"content": "by a visitor\n"}
    assert int(await shell("df -m --output=size / | tail -1")) > size + 200

    # The smaller disk of before grows to what the machine has now.
    await ask(host, "POST", "/machines/m-1/stop")
    restored = (await ask(host, "POST", "/machines/m-1/restore", snapshot_id="s-1"))["machine"]
    assert restored["phase"] == "running"
    assert await files("read_text", path="a.txt") == {"content": "before\n"}
    assert_sparse(disk_of(host, "m-1"), 512 << 20)
    assert int(await shell("df -m --output=size / | tail -1")) > size + 200
    await host.delete("m-1", None)
    assert await host.wait_empty() == []
    assert await host.stop() == 0


async def test_a_guest_is_let_go_when_the_daemon_dies_while_it_is_held(jail_host: Host):
    host = jail_host
    await host.start(fault="freeze.copied")
    await host.create("m-1", make_fence())
    guest = Guest(host, "m-1", make_fence())
    with pytest.raises(ConnectionError):
        await ask(host, "POST", "/machines/m-1/snapshots", make_fence(action_seq=2), snapshot_id="s-1")
    assert await host.wait_end() == -9
    await host.start()
    assert await guest.shell("echo written > /state; sync; cat /state") == "written\n"
    assert list((host.data / "snapshots").iterdir()) == []
    await ask(host, "POST", "/machines/m-1/snapshots", make_fence(action_seq=3), snapshot_id="s-1")
    check_file_system(host.data / "snapshots/s-1/disk.raw")
    await host.delete("m-1", make_fence(action_seq=4))
    assert await host.wait_empty() == []
    assert await host.stop() == 0
