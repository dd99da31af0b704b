"""Registry and host differ, in every kind of thing: what is nobody's goes, what a machine at rest should not have goes,
what is missing is told. Everything is real but the VMMs, which are small processes."""

import contextlib
import json
import shutil
import sqlite3
import subprocess

import pytest
from real_host import Host, make_fence, until

from fusevm.host.process import boot_id
from fusevm.wire.host_api import CLUSTER_HEADER

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

SPEC = {"memory_mib": 64, "disk_bytes": 64 << 20}


async def drift(host: Host) -> dict[str, list[tuple[str, str]]]:
    state = json.loads(await host.ask("GET", "/state"))["observed"]["drift"]
    return {how: sorted((thing["kind"], thing["name"]) for thing in things) for how, things in state.items()}


async def gauge(host: Host, kind: str, state: str) -> float:
    text = (await host.ask("GET", "/metrics")).decode()
    start = f'fuse_host_drift{{kind="{kind}",state="{state}"}} '
    return next(float(line.removeprefix(start)) for line in text.splitlines() if line.startswith(start))


async def test_what_is_missing_of_a_machine_is_told_by_kind(agent_host: Host):
    host = agent_host
    await host.start()
    await host.create("m-1", make_fence("u1"), **SPEC)
    await host.create("m-2", make_fence("u2"), **SPEC)
    slots = json.loads(await host.ask("GET", "/state"))["journal"]["reservations"]
    slot = next(row["number"] for row in slots if row["kind"] == "slot" and row["machine_id"] == "m-1")
    disk = next((host.data / "machines/m-1").glob("overlay.*"))
    # Its processes keep what they have open; others would not find it any more.
    disk.rename(disk.with_name("elsewhere"))
    socket = host.data / "machines/m-1/jail/agent.sock"
    socket.rename(host.data / "hidden.sock")
    links = host.box.run("ip", "-n", f"{host.instance}-{slot}", "-o", "link", "show")
    tap = next(line.split()[1].strip(":") for line in links.splitlines() if "tap" in line)
    host.box.run("ip", "-n", f"{host.instance}-{slot}", "link", "del", tap)
    wanted = [("disk", "m-1"), ("socket", "m-1"), ("tap", "m-1")]

    async def is_told() -> bool:
        return (await drift(host))["missing"] == wanted

    await until(is_told, 60)
    assert [await gauge(host, kind, "missing") for kind, _name in wanted] == [1, 1, 1]
    assert await gauge(host, "disk", "leftover") == 0
    assert "thing_missing" in host.tail()
    # Nobody makes them again, nobody else is affected, and what is put back is there.
    assert [machine.phase for machine in await host.machines()] == ["running", "running"]
    disk.with_name("elsewhere").rename(disk)
    (host.data / "hidden.sock").rename(socket)

    async def is_back() -> bool:
        return (await drift(host))["missing"] == [("tap", "m-1")]

    await until(is_back, 60)
    for number in (1, 2):
        await host.delete(f"m-{number}", make_fence(f"u{number}", action_seq=2))
    assert await host.stop() == 0


async def test_a_jail_that_is_missing_is_told(jail_host: Host):
    host = jail_host
    await host.start()
    await host.create("m-1", make_fence(), **SPEC)
    jail = host.data / "machines/m-1/jail"
    jail.rename(host.data / "elsewhere")

    async def is_told() -> bool:
        return (await drift(host))["missing"] == [("jail", "m-1"), ("socket", "m-1")]

    await until(is_told, 60)
    assert await gauge(host, "jail", "missing") == 1
    (host.data / "elsewhere").rename(jail)

    async def is_back() -> bool:
        return (await drift(host))["missing"] == []

    await until(is_back, 60)
    # One that comes and goes is missed by nobody.
    told = host.log.read_text().count("thing_missing")
    for action_seq in (2, 4):
        await host.ask("POST", "/machines/m-1/stop", make_fence(action_seq=action_seq))
        await host.ask("POST", "/machines/m-1/files/ops", make_fence(action_seq=action_seq), b'{"operation":"list"}')
        await host.ask("POST", "/machines/m-1/start", make_fence(action_seq=action_seq + 1))
    await host.delete("m-1", make_fence(action_seq=6))
    assert host.log.read_text().count("thing_missing") == told
    assert await host.stop() == 0


async def test_a_snapshot_that_has_lost_its_disk_is_told(agent_host: Host):
    host = agent_host
    await host.start()
    await host.create("m-1", make_fence(), **SPEC)
    await host.ask("POST", "/machines/m-1/stop", make_fence(action_seq=2))
    for number in (1, 2):
        body = json.dumps({"snapshot_id": f"s-{number}"}).encode()
        await host.ask("POST", "/machines/m-1/snapshots", make_fence(action_seq=2 + number), body)
    disk = host.data / "snapshots/s-1/disk.raw"
    disk.rename(host.data / "elsewhere")

    async def is_told() -> bool:
        return (await drift(host))["missing"] == [("snapshot", "s-1")]

    await until(is_told, 60)
    assert await gauge(host, "snapshot", "missing") == 1
    assert '"snapshot": "s-1"' in next(line for line in host.log.read_text().splitlines() if "thing_missing" in line)
    (host.data / "elsewhere").rename(disk)

    async def is_back() -> bool:
        return (await drift(host))["missing"] == []

    await until(is_back, 60)
    for number in (1, 2):
        await host.ask("DELETE", f"/snapshots/s-{number}", headers={CLUSTER_HEADER: "test"})
    await host.delete("m-1", make_fence(action_seq=5))
    assert host.log.read_text().count("thing_missing") == 1
    assert await host.stop() == 0


async def test_what_a_machine_at_rest_should_not_have_is_removed(agent_host: Host):
    host = agent_host
    await host.start()
    await host.create("m-1", make_fence(), **SPEC)
    await host.ask("POST", "/machines/m-1/stop", make_fence(action_seq=2))
    folder = host.data / "machines/m-1"
    disk = next(folder.glob("overlay.*")).read_bytes()
    (folder / "jail/root/run").mkdir(parents=True)
    (host.run_dir / "m-1").mkdir()
    words = host.box.enter("sh", "-c", "sleep 1000; true", "m-1", f"{folder}/overlay.raw")
    stray = subprocess.Popen(words)
    await until(lambda: not (folder / "jail").exists() and not (host.run_dir / "m-1").exists(), 60)
    assert stray.wait(60) != 0
    assert "surplus_removed" in host.tail()
    assert next(folder.glob("overlay.*")).read_bytes() == disk
    assert (await host.machine("m-1")).phase == "stopped"
    await host.ask("POST", "/machines/m-1/start", make_fence(action_seq=3))
    await host.delete("m-1", make_fence(action_seq=4))
    assert await host.stop() == 0


async def test_a_mount_below_a_directory_is_taken_off_before_the_directory_goes(agent_host: Host):
    """Removing what is below would remove somebody else's files."""
    host = agent_host
    await host.start()
    await host.create("m-1", make_fence(), **SPEC)
    precious = host.folder / "precious"
    precious.mkdir()
    (precious / "file").write_text("not ours")
    for place in (host.data / "machines/m-1/mnt", host.data / "machines/m-lost/a b", host.run_dir / "m-lost/mnt"):
        place.mkdir(parents=True)
        host.box.run("mount", "--bind", precious, place)
    await until(lambda: not (host.data / "machines/m-lost").exists() and not (host.run_dir / "m-lost").exists(), 60)
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.wait_empty() == []
    assert (precious / "file").read_text() == "not ours"
    assert await host.stop() == 0


async def test_after_a_reboot_of_the_host_every_machines_fate_is_stated(agent_host: Host):
    """Processes, namespaces, rules, groups and sockets are gone at once; what the disk holds is still there."""
    host = agent_host
    await host.start()
    for number in (1, 2, 3):
        await host.create(f"m-{number}", make_fence(f"u{number}"), **SPEC)
    await host.ask("POST", "/machines/m-2/stop", make_fence("u2", action_seq=2))
    disks = {number: next((host.data / f"machines/m-{number}").glob("overlay.*")) for number in (1, 2)}
    await host.kill()
    _reboot(host)

    await host.start()
    await until(lambda: _are(host, {"m-1": "failed", "m-2": "stopped", "m-3": "failed"}), 60)
    told = {machine.id: machine.error for machine in await host.machines()}
    assert told == {"m-1": "host rebooted", "m-2": "", "m-3": "host rebooted"}
    assert all(disk.exists() for disk in disks.values())
    # What failed may be started again with its disk, or deleted; the host takes new machines.
    await host.ask("POST", "/machines/m-1/stop", make_fence("u1", action_seq=2))
    await host.ask("POST", "/machines/m-1/start", make_fence("u1", action_seq=3))
    await host.create("m-4", make_fence("u4"), **SPEC)
    for number in (1, 2, 3, 4):
        await host.delete(f"m-{number}", make_fence(f"u{number}", action_seq=9))
    assert await host.wait_empty() == []
    assert await host.stop() == 0


async def _are(host: Host, phases: dict[str, str]) -> bool:
    return {machine.id: machine.phase for machine in await host.machines()} == phases


def _reboot(host: Host) -> None:
    """Take away what a reboot takes, and give the host another boot id than the machines' VMMs had."""
    for line in [line for line in host.leftovers() if line.startswith("process")]:
        host.box.run("kill", "-9", line.split()[1])
    host.box.run("sh", "-c", "for name in $(ip netns list | cut -d' ' -f1); do ip netns del $name; done")
    host.box.run("nft", "flush", "ruleset")
    shutil.rmtree(host.run_dir)
    with contextlib.closing(sqlite3.connect(host.data / "journal.db", isolation_level=None)) as db:
        record = "replace(CAST(record AS TEXT), ?, ?)"
        db.execute(f"UPDATE machines SET record = CAST({record} AS BLOB)", (boot_id(), "another-boot"))


async def test_a_machine_whose_policy_cannot_be_enforced_costs_the_start_nothing(agent_host: Host):
    """Its record is of another version, or damaged: that machine reaches nothing, the others what they may."""
    host = agent_host
    await host.start()
    for number in (1, 2):
        await host.create(f"m-{number}", make_fence(f"u{number}"), **SPEC)
    await host.kill()
    with contextlib.closing(sqlite3.connect(host.data / "journal.db", isolation_level=None)) as db:
        (record,) = db.execute("SELECT record FROM machines WHERE id = 'm-1'").fetchone()
        changed = json.loads(record)
        changed["spec"]["network"] = {"internet": True, "rules": [{"action": "deny", "cidr": "999.1.1.1/99"}]}
        db.execute("UPDATE machines SET record = ? WHERE id = 'm-1'", (json.dumps(changed).encode(),))
    await host.start()
    assert [machine.phase for machine in await host.machines()] == ["running", "running"]
    # Slot 0 was the first machine's.
    assert '"slot": 0' in next(line for line in host.tail().splitlines() if "slot_not_taken_over" in line)
    for number in (1, 2):
        await host.delete(f"m-{number}", make_fence(f"u{number}", action_seq=2))
    assert await host.stop() == 0
