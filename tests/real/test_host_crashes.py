"""The daemon is killed (SIGKILL) at every point of a create, a stop and a delete, and at one of each other operation;
its next run puts it right. Freezes: `test_host_snapshots.py`.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable

import msgspec
import pytest
from real_host import Guest, Host, make_fence, reason_of, until

from artefacts import IMAGE
from fusevm.host.faults import CREATE_POINTS, DELETE_POINTS, STOP_POINTS
from fusevm.wire.host_api import CLUSTER_HEADER, MachineBody
from fusevm.wire.host_snapshots import SnapshotList

pytestmark = pytest.mark.real

FENCE = make_fence()
OWNER = {CLUSTER_HEADER: FENCE.cluster}
#: From here on the VMM is in the journal, and a restarted daemon goes on with the boot.
_RESUMED = ("create.booted", "create.answered", "create.running.writing", "create.running")


async def _settled(host: Host) -> list[MachineBody]:
    """The machines, once nothing is under way any more."""

    async def is_settled() -> bool:
        entries = json.loads(await host.ask("GET", "/state"))["journal"]["entries"]
        return not any(entry["operation"] for entry in entries)

    await until(is_settled, 180)
    return await host.machines()


def _nothing_but_disks(host: Host) -> bool:
    return all(line.startswith("machine directory") for line in host.leftovers())


@pytest.mark.parametrize("point", CREATE_POINTS)
async def test_a_create_survives_a_crash_at(host: Host, point: str):
    await host.start(fault=point)
    with pytest.raises(ConnectionError):
        await host.create("m-1", FENCE)
    assert await host.wait_end() == -9

    await host.start()
    machines = await _settled(host)
    if point in _RESUMED:
        assert [(machine.phase, machine.generation) for machine in machines] == [("running", 1)]
    else:
        assert machines == []
        await until(lambda: host.leftovers() == [])
    # Whoever got no answer asks again, and gets the machine.
    machine = await host.create("m-1", FENCE)
    assert (machine.phase, machine.uid, machine.incarnation) == ("running", "u1", 1)
    assert await Guest(host, "m-1", FENCE).shell("echo works") == "works\n"
    assert len([line for line in host.leftovers() if line.startswith("process")]) == 1
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0


@pytest.mark.parametrize("point", DELETE_POINTS)
async def test_a_delete_survives_a_crash_at(host: Host, point: str):
    await host.start(fault=point)
    await host.create("m-1", FENCE)
    with pytest.raises(ConnectionError):
        await host.delete("m-1", make_fence(action_seq=2))
    assert await host.wait_end() == -9

    await host.start()
    machines = await _settled(host)
    if point == "delete.intent.writing":
        # The order was never accepted: the machine runs on.
        assert [machine.phase for machine in machines] == ["running"]
        assert await Guest(host, "m-1", FENCE).shell("echo works") == "works\n"
    else:
        assert machines == []
        await until(lambda: host.leftovers() == [])
    await host.delete("m-1", make_fence(action_seq=2))
    assert await reason_of(host.create("m-1", FENCE)) == "stale_incarnation"
    assert await host.stop() == 0


@pytest.mark.parametrize("point", STOP_POINTS)
async def test_a_stop_survives_a_crash_at(host: Host, point: str):
    await host.start(fault=point)
    await host.create("m-1", FENCE)
    await Guest(host, "m-1", FENCE).shell("echo kept > /kept")
    with pytest.raises(ConnectionError):
        await host.ask("POST", "/machines/m-1/stop", make_fence(action_seq=2))
    assert await host.wait_end() == -9

    await host.start()
    machines = await _settled(host)
    wanted = "running" if point == "stop.intent.writing" else "stopped"
    assert [machine.phase for machine in machines] == [wanted]
    await host.ask("POST", "/machines/m-1/stop", make_fence(action_seq=2))
    await until(lambda: _nothing_but_disks(host))
    await host.delete("m-1", make_fence(action_seq=3))
    assert await host.stop() == 0


async def _stop(host: Host, action_seq: int) -> None:
    await host.ask("POST", "/machines/m-1/stop", make_fence(action_seq=action_seq))


async def _reach(host: Host, point: str) -> None:
    """What leads to a point of the other operations; the machine runs."""
    fence = make_fence(action_seq=3)
    match point.partition(".")[0]:
        case "start":
            await _stop(host, 2)
            await host.ask("POST", "/machines/m-1/start", fence)
        case "resize":
            await host.ask("POST", "/machines/m-1/resize", fence, b'{"storage_bytes":2147483648}')
        case "visit":
            await _stop(host, 2)
            await host.ask("POST", "/machines/m-1/files/ops", fence, b'{"operation":"list"}')
        case "exit":
            (line,) = (line for line in host.leftovers() if line.startswith("process"))
            host.box.run("kill", "-9", line.split()[1])
            await asyncio.sleep(60)
        case "network":
            await host.ask("PUT", "/machines/m-1/network", fence, b'{"internet":false}')
        case other:
            raise AssertionError(other)


@pytest.mark.parametrize(
    ("point", "phase"),
    [
        # The VMM is in the journal: the boot goes on.
        ("start.booted", "running"),
        ("resize.killed", "stopped"),
        ("visit.booted", "stopped"),
        ("exit.seen", "failed"),
        ("network.changed", "running"),
    ],
)
async def test_every_other_operation_survives_a_crash_at(host: Host, point: str, phase: str):
    await host.start(fault=point)
    await host.create("m-1", FENCE)
    await Guest(host, "m-1", FENCE).shell("echo kept > /kept; sync")
    reaching = asyncio.create_task(_reach(host, point))
    assert await host.wait_end() == -9
    reaching.cancel()
    with contextlib.suppress(ConnectionError, asyncio.CancelledError):
        await reaching

    await host.start()
    assert [machine.phase for machine in await _settled(host)] == [phase]
    if phase != "running":
        await until(lambda: _nothing_but_disks(host))
        await _stop(host, 4)
        await host.ask("POST", "/machines/m-1/start", make_fence(action_seq=5))
    assert await Guest(host, "m-1", make_fence(action_seq=6)).shell("cat /kept") == "kept\n"
    await host.delete("m-1", make_fence(action_seq=7))
    assert await host.stop() == 0


async def test_a_crash_while_a_boot_is_undone_is_undone_once_more(host: Host):
    for point in ("create.undone.writing", "create.undone"):
        await host.start(fault=point)
        with pytest.raises(ConnectionError):
            await host.create("m-1", FENCE, boot_timeout_ms=300)
        assert await host.wait_end() == -9
        await host.start()
        assert await _settled(host) == []
        await until(lambda: host.leftovers() == [])
        assert await host.stop() == 0


# -- one machine, one crash after the other ---------------------------------------------------------------------------

#: Of a program that gets a URL, or says why not.
GET = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode(), end="")
except urllib.error.URLError:
    print("nobody", end="")
"""


def get(host: Host, url: str) -> str:
    """What somebody on the host gets."""
    return host.box.run(sys.executable, "-c", GET, url)


async def _dies(host: Host, deed: Awaitable[object]) -> None:
    """The daemon dies of an order, which gets no answer."""
    with pytest.raises(ConnectionError):
        await deed
    assert await host.wait_end() == -9


async def test_a_machine_outlives_crashes_at_its_ports_and_its_snapshots(host: Host):
    host.options["--artifact-networks"] = "127.0.0.0/8"
    await host.start(fault="port.published")
    await host.create("m-1", FENCE)
    guest = Guest(host, "m-1", FENCE)
    await guest.shell("mkdir /srv/www; echo before > /srv/www/state; sync")
    await guest.shell("cd /srv/www; setsid python3 -m http.server 80 > /dev/null 2>&1 &")

    # The reservation is in the journal, and nothing is forwarded yet.
    publishing = host.ask("POST", "/machines/m-1/published-ports", FENCE, b'{"published_port_id":"web","port":80}')
    await _dies(host, publishing)
    assert get(host, "http://127.0.0.1:20000/state") == "nobody"
    await host.start(fault="port.unpublished")
    await until(lambda: get(host, "http://127.0.0.1:20000/state") == "before\n")
    assert await _ports(host) == [20_000]

    # It is in the journal no more, and still forwarded.
    await _dies(host, host.ask("DELETE", "/machines/m-1/published-ports/web", FENCE))
    assert get(host, "http://127.0.0.1:20000/state") == "before\n"
    await host.start(fault="restore.vacated")
    assert await _ports(host) == []
    assert get(host, "http://127.0.0.1:20000/state") == "nobody"

    # It has ended, and its disk is not in its place yet.
    body = b'{"snapshot_id":"s-1"}'
    await host.ask("POST", "/machines/m-1/snapshots", make_fence(action_seq=2), body)
    await guest.shell("echo after > /srv/www/state; sync")
    await _dies(host, host.ask("POST", "/machines/m-1/restore", make_fence(action_seq=3), body))
    await host.start(fault="unsnapshot.removed")
    assert [(one.phase, one.generation) for one in await _settled(host)] == [("running", 2)]
    assert await guest.shell("cat /srv/www/state") == "before\n"
    # Whoever got no answer asks again: it is the same restore.
    await host.ask("POST", "/machines/m-1/restore", make_fence(action_seq=3), body)
    assert (await host.machine("m-1")).generation == 2

    # The bytes of the snapshot have gone, its record has not.
    packed = await host.ask("GET", "/snapshots/s-1/artifacts/disk-system", headers=OWNER)
    (host.folder / "packed").write_bytes(packed)
    await _dies(host, host.ask("DELETE", "/snapshots/s-1", headers=OWNER))
    await host.start(fault="import.copied")
    await until(lambda: _has_states(host, []), 60)
    await host.delete("m-1", make_fence(action_seq=4))

    # The bytes of what was carried away are here again, and nobody knows their digest yet.
    disk = {"id": "disk-system", "size_bytes": len(packed), "download_url": ""}
    wanted = {"machine_id": "m-2", "memory_mib": 256, "snapshot": {"image_id": IMAGE, "artifacts": [disk]}}
    async with host.box.serve(host.folder) as url:
        disk["download_url"] = f"{url}/packed"
        await _dies(host, host.ask("POST", "/snapshots/s-2/restore", body=json.dumps(wanted).encode()))
    await host.start()
    await until(lambda: _has_states(host, ["ready"]), 60)
    assert await host.machines() == []
    # From here on nothing is fetched any more.
    await host.ask("POST", "/snapshots/s-2/restore", body=json.dumps(wanted).encode())
    command = b'{"command":["cat","/srv/www/state"]}'
    assert json.loads(await host.ask("POST", "/machines/m-2/exec", body=command))["stdout"] == "before\n"
    await host.ask("DELETE", "/snapshots/s-2")
    await host.delete("m-2", None)
    await until(lambda: host.leftovers() == [])
    assert list((host.data / "snapshots").iterdir()) == []
    assert await host.stop() == 0


async def _ports(host: Host) -> list[int]:
    """Published ones, once the daemon has put everything right."""
    await _settled(host)
    listed = json.loads(await host.ask("GET", "/machines/m-1/published-ports"))["ports"]
    return [port["host_port"] for port in listed]


async def _has_states(host: Host, wanted: list[str]) -> bool:
    """Of all snapshots."""
    known = msgspec.json.decode(await host.ask("GET", "/snapshots"), type=SnapshotList).snapshots
    return [one.state for one in known] == wanted
