"""The whole daemon on Firecracker's fake, over its API: real jails, namespaces, taps, control groups and disks."""

import itertools
import json

import pytest
from real_host import Guest, Host, make_fence, until

from fusevm.model.errors import BootFailed
from fusevm.model.machine import Fence

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

SPEC = {"memory_mib": 64, "disk_bytes": 64 << 20}


async def pid_of(host: Host, machine_id: str) -> int:
    state = json.loads(await host.ask("GET", "/state"))
    entry = next(entry for entry in state["journal"]["entries"] if entry["machine"]["id"] == machine_id)
    return entry["machine"]["vmm"]["pid"]


async def test_a_machine_lives_through_its_whole_life_and_that_of_its_daemon(jail_host: Host):
    host = jail_host
    await host.start()
    facts = json.loads(await host.ask("GET", "/info"))
    assert facts["driver"] == "firecracker (kvm)"
    assert facts["driver_reason"] == "Firecracker, as configured"
    assert facts["vmm_version"] == "1.16.1"
    await host.create("m-1", make_fence("u1", 1, 1), **SPEC)
    guest = Guest(host, "m-1", make_fence("u1", 1, 2))
    assert await guest.shell("echo right") == "right\n"
    disk = host.data / "machines" / "m-1" / "overlay.raw"
    assert disk.stat().st_size == 64 << 20
    assert disk.stat().st_nlink == 2  # the other name is in the jail

    # The machine outlives its daemon, in whatever way that ends.
    pid = await pid_of(host, "m-1")
    await host.kill()
    await host.start()
    assert await pid_of(host, "m-1") == pid
    assert await guest.shell("echo right") == "right\n"
    assert await host.stop() == 0
    await host.start()
    assert await guest.shell("echo right") == "right\n"

    await host.ask("POST", "/machines/m-1/stop", make_fence("u1", 1, 3))
    assert (await host.machine("m-1")).phase == "stopped"
    assert not (host.data / "machines/m-1/jail").exists()
    await host.ask("POST", "/machines/m-1/start", make_fence("u1", 1, 4))
    assert await Guest(host, "m-1", make_fence("u1", 1, 5)).shell("echo right") == "right\n"
    metrics = (await host.ask("GET", "/metrics")).decode().splitlines()
    counted = next(line for line in metrics if line.startswith("fuse_host_vmm_channel_connections_total "))
    assert float(counted.split()[1]) >= 2
    await host.delete("m-1", make_fence("u1", 1, 6))
    assert await host.wait_empty() == []
    assert await host.stop() == 0
    assert "thing_missing" not in host.log.read_text()


async def test_a_vmm_that_dies_is_told_and_its_machine_starts_again(jail_host: Host):
    host = jail_host
    await host.start()
    await host.create("m-1", make_fence("u1", 1, 1), **SPEC)
    host.box.run("kill", "-KILL", str(await pid_of(host, "m-1")))

    async def has_failed() -> bool:
        return (await host.machine("m-1")).phase == "failed"

    await until(has_failed, 60)
    assert "SIGKILL" in ((await host.machine("m-1")).error or "")
    await host.ask("POST", "/machines/m-1/stop", make_fence("u1", 1, 2))
    await host.ask("POST", "/machines/m-1/start", make_fence("u1", 1, 3))
    assert await Guest(host, "m-1", make_fence("u1", 1, 4)).shell("echo right") == "right\n"
    await host.delete("m-1", make_fence("u1", 1, 5))


async def test_a_boot_that_the_vmm_refuses_is_undone_and_says_why(jail_host: Host):
    host = jail_host
    program = host.folder / "programs" / "fused"
    program.chmod(0o644)
    await host.start()
    with pytest.raises(BootFailed, match="PUT /actions"):
        await host.create("m-1", make_fence("u1", 1, 1), **SPEC)
    assert await host.wait_empty() == []
    program.chmod(0o755)
    await host.create("m-1", make_fence("u1", 2, 1), **SPEC)
    await host.delete("m-1", make_fence("u1", 2, 2))
    assert await host.stop() == 0


async def test_a_jailed_vmm_that_nobody_knows_is_found_and_ended(jail_host: Host):
    """Its command line names no path of ours; its root directory does."""
    host = jail_host
    await host.start()
    await host.create("m-1", make_fence("u1", 1, 1), **SPEC)
    await host.kill()
    # The journal is lost.
    for path in host.data.glob("journal.db*"):
        path.unlink()
    await host.start()
    assert await host.machines() == []
    assert await host.wait_empty() == []
    assert "leftover_removed" in host.log.read_text()
    assert await host.stop() == 0


async def test_a_daemon_with_another_driver_takes_over_what_runs(jail_host: Host):
    host = jail_host
    await host.start()
    await host.create("m-1", make_fence("u1", 1, 1), **SPEC)
    pid = await pid_of(host, "m-1")
    await host.kill()
    await host.start("--driver", "qemu")
    assert json.loads(await host.ask("GET", "/info"))["driver"] == "qemu (tcg)"
    assert await pid_of(host, "m-1") == pid
    assert await Guest(host, "m-1", make_fence("u1", 1, 2)).shell("echo right") == "right\n"
    await host.ask("POST", "/machines/m-1/stop", make_fence("u1", 1, 3))
    assert (await host.machine("m-1")).phase == "stopped"
    await host.delete("m-1", make_fence("u1", 1, 4))
    assert await host.wait_empty() == []
    assert await host.stop() == 0


#: Behind all that the empty file system of a machine has written; its guest, a process, writes nothing.
PLACE = 48 << 20


class Disk:
    """A machine's disk, written and read as its guest would."""

    def __init__(self, host: Host, machine_id: str) -> None:
        self.folder = host.data / "machines" / machine_id
        self.path = self.folder / "overlay.raw"
        self._jailed = self.folder / "jail/firecracker" / machine_id / "root/overlay"

    def write(self, text: str) -> None:
        with self.path.open("r+b") as file:
            file.seek(PLACE)
            file.write(text.encode().ljust(16, b"\0"))

    def read(self) -> str:
        with self.path.open("rb") as file:
            file.seek(PLACE)
            return file.read(16).rstrip(b"\0").decode()

    def is_jailed(self) -> bool:
        """Does the VMM have this very file, and nobody another one?"""
        assert sorted(path.name for path in self.folder.glob("*.raw")) == ["overlay.raw"]
        found = self.path.stat()
        is_linked = self._jailed.exists() and self._jailed.stat().st_ino == found.st_ino
        assert found.st_nlink == (2 if is_linked else 1)
        return is_linked


async def crash(host: Host, point: str, target: str, fence: Fence, body: bytes) -> str:
    """Give an order to a daemon that dies on the way, and start the next; the machine's phase when it has settled."""
    assert await host.stop() == 0
    await host.start(fault=point)
    with pytest.raises(ConnectionError):
        await host.ask("POST", f"/machines/m-1/{target}", fence, body)
    assert await host.wait_end() == -9
    await host.start()

    async def is_settled() -> bool:
        state = json.loads(await host.ask("GET", "/state"))
        return state["journal"]["entries"][0]["operation"] is None and not state["observed"]["quarantine"]

    await until(is_settled, 60)
    return (await host.machine("m-1")).phase


async def test_a_jailed_disk_is_whole_wherever_the_daemon_dies(jail_host: Host):
    host, disk = jail_host, Disk(jail_host, "m-1")
    await host.start()
    await host.create("m-1", make_fence("u1", 1, 1), **SPEC)
    numbers = itertools.count(2)
    snapshot = b'{"snapshot_id":"s-1"}'

    def fence() -> Fence:
        return make_fence("u1", 1, next(numbers))

    await host.ask("POST", "/machines/m-1/stop", fence())
    disk.write("before")
    assert await crash(host, "snapshot.stopped", "snapshots", fence(), snapshot) == "stopped"
    assert list((host.data / "snapshots").iterdir()) == []
    await host.ask("POST", "/machines/m-1/snapshots", fence(), snapshot)
    await host.ask("POST", "/machines/m-1/start", fence())

    for point in ("staged", "committed", "vacated", "swapped", "prepared", "booted"):
        disk.write("after")
        assert await crash(host, f"restore.{point}", "restore", fence(), snapshot) == "running"
        assert disk.read() == ("after" if point == "staged" else "before")
        assert disk.is_jailed()
        assert await Guest(host, "m-1", fence()).shell("echo right") == "right\n"

    for point, size in (("killed", 96 << 20), ("grown", 128 << 20)):
        body = json.dumps({"storage_bytes": size}).encode()
        assert await crash(host, f"resize.{point}", "resize", fence(), body) == "stopped"
        assert disk.path.stat().st_size == size
        assert not disk.is_jailed()
        await host.ask("POST", "/machines/m-1/start", fence())
        assert disk.is_jailed()

    await host.ask("POST", "/machines/m-1/stop", fence())
    assert await crash(host, "visit.booted", "files/ops", fence(), b'{"operation":"list"}') == "stopped"
    assert not disk.is_jailed()
    assert disk.read() == "before"
    await host.delete("m-1", fence())
    assert await host.wait_empty() == []
    assert await host.stop() == 0
    # A sweep each second: what comes and goes on the way was missed by none.
    assert "thing_missing" not in host.log.read_text()
