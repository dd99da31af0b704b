"""Disks on a file system that shares blocks, with both drivers and real guests: a snapshot and what begins with it take
no room. The file system is a real XFS in a file; where the tests' own data is, there may be none.
"""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from real_host import Box, Guest, Host, emptied, make_fence, make_jail_host

from artefacts import IMAGE
from fusevm.host.images.store import ImageStore
from fusevm.wire.host_api import CLUSTER_HEADER, MachineAnswer
from own_world import run_prefix

pytestmark = [
    pytest.mark.real,
    pytest.mark.root,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("mkfs.xfs") is None, reason="xfsprogs is not installed"),
]

MIB = 1 << 20
#: What the guest writes; a copy of it could not be overlooked.
WRITTEN = 100 * MIB


@pytest.fixture(scope="module")
def sharing_artefacts(artefacts: Path) -> Iterator[Path]:
    """Kernel, initramfs and image on a file system that shares blocks."""
    folder = Path(tempfile.mkdtemp(prefix="fuse-xfs-", dir="/var/tmp"))
    folder.chmod(0o755)
    root, file = folder / "root", folder / "file"
    root.mkdir()
    with file.open("wb") as made:
        made.truncate(8192 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(file)], check=True)
    subprocess.run(["mount", "-o", "loop", str(file), str(root)], check=True)
    try:
        image = asyncio.run(ImageStore(artefacts).find(IMAGE))
        assert image is not None
        (root / "images").mkdir()
        parts = [artefacts / "kernels", artefacts / "initramfs"]
        subprocess.run(["cp", "-a", *map(str, parts), str(root)], check=True)
        inside = [artefacts / "images" / "names.json", image.rootfs.parent]
        subprocess.run(["cp", "-a", "--sparse=always", *map(str, inside), str(root / "images")], check=True)
        yield root
    finally:
        subprocess.run(["umount", str(root)], check=True)
        shutil.rmtree(folder)


@pytest.fixture(params=["qemu", "firecracker"])
def sharing_host(sharing_artefacts: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    """As `host`, of either driver, with all that it has on that file system."""
    name = f"{run_prefix()}x"
    if request.param == "qemu":
        host = Host(Box(), sharing_artefacts, name, where=sharing_artefacts)
    else:
        host = make_jail_host(sharing_artefacts, name, "qemu")
    with emptied(host):
        yield host


def used_bytes(folder: Path) -> int:
    """What the file system has given away."""
    os.sync()
    stats = os.statvfs(folder)
    return (stats.f_blocks - stats.f_bfree) * stats.f_frsize


async def test_a_snapshot_and_what_begins_with_it_take_no_room(sharing_host: Host):
    host = sharing_host
    await host.start()
    await host.create("m-1", make_fence())
    guest = Guest(host, "m-1", make_fence())
    await guest.shell(f"head -c {WRITTEN} /dev/urandom > /big; echo before > /state; sync")
    digest = await guest.shell("sha256sum /big")
    before = used_bytes(host.data)
    body = json.dumps({"snapshot_id": "s-1"}).encode()
    await host.ask("POST", "/machines/m-1/snapshots", make_fence(action_seq=2), body)
    await guest.shell("echo after > /state; sync")
    assert json.loads((host.data / "snapshots/s-1/manifest.json").read_bytes())["is_reflink"]
    copied = host.data / "snapshots/s-1/disk.raw"
    checked = subprocess.run(["e2fsck", "-f", "-n", str(copied)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    spec = {"image": IMAGE, "memory_mib": 256, "disk_bytes": 2048 * MIB}
    create = {"machine_id": "m-2", "spec": spec, "snapshot_id": "s-1"}
    made = await host.ask("POST", "/machines", make_fence("u2"), json.dumps(create).encode())
    assert msgspec.json.decode(made, type=MachineAnswer).machine.phase == "running"
    await host.ask("POST", "/machines/m-1/restore", make_fence(action_seq=3), body)
    for number in (1, 2):
        (disk,) = (host.data / "machines" / f"m-{number}").glob("overlay.*")
        assert disk.name == "overlay.raw"
        one = Guest(host, f"m-{number}", make_fence(f"u{number}", action_seq=3))
        assert await one.shell("cat /state; sha256sum /big") == f"before\n{digest}"
    assert used_bytes(host.data) - before < WRITTEN // 2

    # What one of them writes is nobody else's, and stays when the snapshot goes.
    await guest.shell("echo later > /state; sync")
    await host.ask("DELETE", "/snapshots/s-1", headers={CLUSTER_HEADER: "test"})
    assert await Guest(host, "m-2", make_fence("u2", action_seq=3)).shell("cat /state") == "before\n"
    assert await guest.shell("sha256sum /big; cat /state") == f"{digest}later\n"
    for number in (1, 2):
        await host.delete(f"m-{number}", make_fence(f"u{number}", action_seq=4))
    assert await host.wait_empty() == []
    assert await host.stop() == 0
