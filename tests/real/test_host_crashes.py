"""The daemon is killed (SIGKILL) at every point of a create, a stop and a delete; its next run puts it right."""

import asyncio
import contextlib
import json

import pytest
from real_host import Guest, Host, make_fence, reason_of, until

from fusevm.host.faults import CREATE_POINTS, DELETE_POINTS, STOP_POINTS
from fusevm.wire.host_api import MachineBody

pytestmark = pytest.mark.real

FENCE = make_fence()
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
