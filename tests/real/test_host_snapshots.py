"""Snapshots of real machines: what was written before is there after a restore, and what was written after is not."""

import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from real_host import Guest, Host, make_fence, until

from artefacts import IMAGE
from fusevm.model.errors import SnapshotNotFound
from fusevm.wire.host_api import CLUSTER_HEADER, MachineAnswer

pytestmark = pytest.mark.real

FENCE = make_fence()
#: Programs that write all the time, with and without syncing, so that the moment is never a quiet one.
WRITERS = (
    "for n in 1 2 3; do (i=0; while :; do i=$((i+1)); echo $i > /w$n.$((i%50)); [ $n = 1 ] && sync /w$n.$((i%50)); "
    "rm -f /w$n.$(((i+25)%50)); done) >/dev/null 2>&1 & done"
)


async def snapshot(host: Host, snapshot_id: str, action_seq: int) -> dict[str, Any]:
    body = json.dumps({"snapshot_id": snapshot_id}).encode()
    return dict(json.loads(await host.ask("POST", "/machines/m-1/snapshots", make_fence(action_seq=action_seq), body)))


async def restore(host: Host, snapshot_id: str, action_seq: int) -> dict[str, Any]:
    body = json.dumps({"snapshot_id": snapshot_id}).encode()
    return dict(json.loads(await host.ask("POST", "/machines/m-1/restore", make_fence(action_seq=action_seq), body)))


def check_file_system(disk: Path) -> None:
    """The kernel would have nothing to repair, and no journal to replay."""
    checked = subprocess.run(["e2fsck", "-f", "-n", str(disk)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    header = subprocess.run(["dumpe2fs", "-h", str(disk)], capture_output=True, text=True, check=True).stdout
    assert "needs_recovery" not in header


async def test_a_snapshot_is_of_one_moment_and_needs_no_repair(host: Host):
    await host.start()
    await host.create("m-1", FENCE)
    guest = Guest(host, "m-1", FENCE)
    await guest.shell(f"echo before > /state; {WRITERS}")
    taken = await snapshot(host, "s-1", 2)
    await guest.shell("echo after > /state; sync")
    check_file_system(host.data / "snapshots" / "s-1" / "disk.raw")
    assert taken["snapshot"]["consistency"] == "frozen"

    # A new machine begins with it, and may outlive it.
    body = {"machine_id": "m-2", "spec": {"image": IMAGE, "memory_mib": 256, "disk_bytes": 2 << 30}}
    other = make_fence("u2")
    made = await host.ask("POST", "/machines", other, json.dumps({**body, "snapshot_id": "s-1"}).encode())
    assert msgspec.json.decode(made, type=MachineAnswer).machine.phase == "running"
    seeded = Guest(host, "m-2", other)
    assert await seeded.shell("cat /state") == "before\n"
    assert int((await seeded.shell("df -m / | awk 'END {print $2}'")).strip()) > 1500, (
        "its disk is as large as asked for"
    )

    # The same machine goes back to it.
    assert (await restore(host, "s-1", 3))["machine"]["generation"] == 2
    assert await guest.shell("cat /state") == "before\n"

    await host.ask("DELETE", "/snapshots/s-1", headers={CLUSTER_HEADER: FENCE.cluster})
    assert list((host.data / "snapshots").iterdir()) == []
    await seeded.shell("echo more > /more; sync")
    await host.ask("POST", "/machines/m-2/stop", make_fence("u2", action_seq=2))
    await host.ask("POST", "/machines/m-2/start", make_fence("u2", action_seq=3))
    assert await seeded.shell("cat /state /more") == "before\nmore\n"
    with pytest.raises(SnapshotNotFound):
        await host.ask(
            "POST", "/machines/m-1/restore", make_fence(action_seq=4), json.dumps({"snapshot_id": "s-1"}).encode()
        )
    await host.delete("m-1", make_fence(action_seq=5))
    await host.delete("m-2", make_fence("u2", action_seq=4))
    await until(lambda: host.leftovers() == [])
    assert await host.stop() == 0


@pytest.mark.parametrize("point", ["freeze.held", "freeze.copied"])
async def test_a_guest_is_let_go_when_the_daemon_dies_while_it_is_held(host: Host, point: str):
    await host.start(fault=point)
    await host.create("m-1", FENCE)
    guest = Guest(host, "m-1", FENCE)
    with pytest.raises(ConnectionError):
        await snapshot(host, "s-1", 2)
    assert await host.wait_end() == -9
    await host.start()
    assert await guest.shell("echo written > /state; sync; cat /state") == "written\n"
    assert list((host.data / "snapshots").iterdir()) == []
    await snapshot(host, "s-1", 3)
    check_file_system(host.data / "snapshots" / "s-1" / "disk.raw")
    await host.delete("m-1", make_fence(action_seq=4))
    assert await host.stop() == 0
