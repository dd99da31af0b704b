"""The whole daemon on Firecracker's fake, over its API: real jails, namespaces, taps, control groups and disks."""

import json

import pytest
from real_host import Guest, Host, make_fence, until

from fusevm.model.errors import BootFailed

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
