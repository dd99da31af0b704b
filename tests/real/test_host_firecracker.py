"""The whole daemon on the Firecracker driver, with real guests: the fake boots them in emulation, from a real jail."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from real_host import Guest, Host, make_fence

from fusevm.model.errors import BootFailed

pytestmark = [pytest.mark.real, pytest.mark.root, pytest.mark.timeout(900)]


async def test_a_whole_machine_on_its_tap_with_its_limits_until_it_stops_in_order(jail_host: Host):
    host = jail_host
    await host.start("--disk-bytes-per-s", "200000000")
    await host.create("m-1", make_fence("u1", 1, 1), memory_mib=384)
    guest = Guest(host, "m-1", make_fence("u1", 1, 2))
    assert (await guest.shell("hostname")).strip() == "box"
    assert "bookworm" in await guest.shell("cat /etc/os-release")
    kib = int(await guest.shell("df -k --output=size / | tail -1"))
    assert kib > 900_000

    # Its tap is the slot's, opened by the machine's own user in the slot's namespace.
    words = dict(word.partition("=")[::2] for word in (await guest.shell("cat /proc/cmdline")).split())
    address = words["fuse.ip"].partition("/")[0]
    state = json.loads(await host.ask("GET", "/state"))
    machine = state["journal"]["entries"][0]["machine"]
    namespace = Path(f"/proc/{machine['vmm']['pid']}/ns/net")
    knock = f"import socket; socket.create_connection(({address!r}, 9), timeout=60)"
    words_inside = host.box.enter("nsenter", f"--net={namespace}", "--", sys.executable, "-c", knock)
    done = await asyncio.to_thread(subprocess.run, words_inside, capture_output=True, text=True, check=False)
    assert "ConnectionRefusedError" in done.stderr  # the guest's kernel has answered
    owner = host.box.run("stat", "-c", "%u", f"/proc/{machine['vmm']['pid']}").strip()
    assert int(owner) == machine["uid"] >= 200_000

    # What it has written is there after an orderly end and another start.
    await guest.shell("echo kept > /root/file")
    await host.ask("POST", "/machines/m-1/stop", make_fence("u1", 1, 3))
    assert (await host.machine("m-1")).phase == "stopped"
    await host.ask("POST", "/machines/m-1/start", make_fence("u1", 1, 4))
    assert await Guest(host, "m-1", make_fence("u1", 1, 5)).shell("cat /root/file") == "kept\n"
    await host.delete("m-1", make_fence("u1", 1, 6))
    assert await host.wait_empty() == []
    assert await host.stop() == 0


async def test_a_machine_of_qemu_runs_on_under_firecracker_and_its_disk_is_carried_over_by_a_snapshot(jail_host: Host):
    host = jail_host
    await host.start("--driver", "qemu")
    await host.create("m-1", make_fence("u1", 1, 1))
    await host.kill()
    await host.start()
    guest = Guest(host, "m-1", make_fence("u1", 1, 2))
    await guest.shell("echo kept > /root/file; sync")
    await host.ask("POST", "/machines/m-1/stop", make_fence("u1", 1, 3))
    with pytest.raises(BootFailed, match="made for another driver"):
        await host.ask("POST", "/machines/m-1/start", make_fence("u1", 1, 4))
    await host.ask("POST", "/machines/m-1/stop", make_fence("u1", 1, 5))

    # A snapshot is raw whatever it was taken of, and so is the disk that it is put back as.
    snapshot = json.dumps({"snapshot_id": "s-1"}).encode()
    await host.ask("POST", "/machines/m-1/snapshots", make_fence("u1", 1, 6), snapshot)
    await host.ask("POST", "/machines/m-1/restore", make_fence("u1", 1, 7), snapshot)
    assert [path.name for path in (host.data / "machines/m-1").glob("*.*") if path.suffix != ".log"] == ["overlay.raw"]
    assert await guest.shell("cat /root/file") == "kept\n"
    await host.delete("m-1", make_fence("u1", 1, 8))
    assert await host.wait_empty() == []
    assert await host.stop() == 0
