"""A daemon that dies by SIGKILL at every kill point, with machines that outlive it in memory.

The daemon to be killed is a fork: at its point it writes down what exists outside of it and dies. The next daemon, in
the test's own process, finds the journal on the disk and the rest as it was written down. Kill points of the quarters
are not reached here, these are fakes; `tests/real/test_host_crashes.py` has them.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from fusevm.host import visitors
from fusevm.host.admission import Size
from fusevm.host.agent import ask_health
from fusevm.host.daemon import Daemon
from fusevm.host.faults import (
    CREATE_POINTS,
    DELETE_POINTS,
    NETWORK_POINTS,
    POINTS,
    RESIZE_POINTS,
    START_POINTS,
    STOP_POINTS,
    UNDONE_POINTS,
    VISIT_POINTS,
)
from fusevm.host.port_rows import PortDraft
from fusevm.host.vmm.driver import BootPlan
from fusevm.model.errors import CommandFailed, Error, StaleIncarnation
from fusevm.model.machine import Machine, Phase, VmmProcess
from fusevm.model.network import Exposure, Network
from fusevm.testing.fake_driver import FakeProcess
from fusevm.testing.host_world import NOTHING, World, fence, order, until

FIRST, SECOND, THIRD, FOURTH = (fence(action_seq=number) for number in (1, 2, 3, 4))


class Outside(msgspec.Struct, frozen=True):
    """What a dying daemon leaves behind but for its journal."""

    #: Machine, identity, nonce, and whether its disk was frozen.
    processes: list[tuple[str, VmmProcess, str, bool]]
    occupied: set[str]
    disks: set[str]


class DieAt:
    """Write down what there is, and die."""

    def __init__(self, point: str, world: World) -> None:
        assert point in POINTS
        self._point = point
        self._world = world

    def reached(self, point: str) -> None:
        if point != self._point:
            return
        driver, quarters = self._world.driver, self._world.quarters
        processes = [
            (name, running.identity, running.agent.nonce, running.agent.is_frozen)
            for name, running in driver.processes.items()
        ]
        outside = Outside(processes, quarters.occupied, quarters.disks)
        (self._world.root / "outside.json").write_bytes(msgspec.json.encode(outside))
        os.kill(os.getpid(), signal.SIGKILL)


def die(world: World, point: str, deed: Callable[[Daemon], Awaitable[object]]) -> None:
    """Run a daemon that dies at a point while it does something; `world` is then what it left."""
    pid = os.fork()
    if pid == 0:
        _do_and_die(world, point, deed)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"{point} was not reached"
    outside = msgspec.json.decode((world.root / "outside.json").read_bytes(), type=Outside)
    world.quarters.occupied, world.quarters.disks = outside.occupied, outside.disks
    for machine_id, identity, nonce, is_frozen in outside.processes:
        plan = BootPlan(
            machine_id=machine_id,
            cpus=1,
            memory_mib=256,
            kernel=world.root,
            initramfs=world.root,
            command_line="",
            run_dir=world.root,
            console_log=world.root / "console.log",
        )
        world.driver.processes[machine_id] = left = FakeProcess(world.driver, plan, identity, nonce)
        left.agent.is_frozen = is_frozen


def _do_and_die(world: World, point: str, deed: Callable[[Daemon], Awaitable[object]]) -> NoReturn:
    """The fork: never returns to pytest."""

    async def live() -> None:
        world.fault = DieAt(point, world)
        async with world.daemon() as daemon, asyncio.timeout(60):
            with suppress(Error):
                await deed(daemon)
            await asyncio.Event().wait()

    try:
        asyncio.run(live())
    finally:
        os._exit(1)


async def settled(daemon: Daemon) -> list[Machine]:
    """The machines, once no operation is open and nothing is occupied for a machine that rests."""
    async with asyncio.timeout(60):
        while True:
            entries = await daemon.journal.entries()
            records = daemon.machines.records()
            is_done = all(entry.operation is None for entry in entries) and [e.machine for e in entries] == records
            if is_done and all(machine.phase is Phase.RUNNING or machine.slot < 0 for machine in records):
                return records
            await asyncio.sleep(0.001)


async def check_running(world: World, daemon: Daemon, machine: Machine) -> None:
    """It runs, and it is the right guest that answers."""
    assert machine.phase is Phase.RUNNING
    assert (await ask_health(await daemon.machines.guest("m-1", FIRST))).nonce == machine.nonce
    assert world.leftovers == ({"m-1"}, {"m-1"}, {"m-1"})


async def make_stopped(daemon: Daemon) -> None:
    await daemon.machines.create(order(), FIRST)
    await daemon.machines.stop("m-1", SECOND)


@pytest.mark.parametrize("point", [point for point in CREATE_POINTS if not point.startswith("quarters.")])
def test_a_create(tmp_path: Path, point: str):
    world = World(tmp_path)
    die(world, point, lambda daemon: daemon.machines.create(order(), FIRST))

    async def look() -> None:
        async with world.daemon() as daemon:
            machines = await settled(daemon)
            if not machines:
                assert world.leftovers == NOTHING
            machine = await daemon.machines.create(order(), FIRST)
            assert not machines or machines == [machine]
            await check_running(world, daemon, machine)

    asyncio.run(look())


START = (*START_POINTS, "start.prepared.writing", "start.booted.writing", "start.answered", "start.running")


@pytest.mark.parametrize("point", START)
def test_a_start(tmp_path: Path, point: str):
    world = World(tmp_path)

    async def deed(daemon: Daemon) -> None:
        await make_stopped(daemon)
        await daemon.machines.start("m-1", THIRD)

    die(world, point, deed)

    async def look() -> None:
        async with world.daemon() as daemon:
            (machine,) = await settled(daemon)
            if machine.phase is not Phase.RUNNING:
                # What never began rests as it was; what could not be gone on with failed. The disk is there.
                assert machine.phase is (Phase.STOPPED if point == "start.intent.writing" else Phase.FAILED)
                assert world.leftovers == (set(), set(), {"m-1"})
                await daemon.machines.stop("m-1", THIRD)
            machine = await daemon.machines.start("m-1", FOURTH)
            await check_running(world, daemon, machine)
            await daemon.machines.delete("m-1", FOURTH)
            assert world.leftovers == NOTHING

    asyncio.run(look())


@pytest.mark.parametrize("point", ["create.undone.writing", "create.undone"])
def test_a_create_that_is_undone(tmp_path: Path, point: str):
    world = World(tmp_path)
    world.driver.is_impostor = True
    die(world, point, lambda daemon: daemon.machines.create(order(), FIRST))
    world.driver.is_impostor = False

    async def look() -> None:
        async with world.daemon() as daemon:
            assert await settled(daemon) == []
            assert world.leftovers == NOTHING
            await check_running(world, daemon, await daemon.machines.create(order(), FIRST))

    asyncio.run(look())


@pytest.mark.parametrize("point", ["start.undone.writing", "start.undone"])
def test_a_start_that_is_undone(tmp_path: Path, point: str):
    world = World(tmp_path)

    async def deed(daemon: Daemon) -> None:
        await make_stopped(daemon)
        world.driver.is_impostor = True
        await daemon.machines.start("m-1", THIRD)

    die(world, point, deed)

    async def look() -> None:
        async with world.daemon() as daemon:
            (machine,) = await settled(daemon)
            assert machine.phase is Phase.FAILED
            assert world.leftovers == (set(), set(), {"m-1"})
            await daemon.machines.stop("m-1", THIRD)
            await check_running(world, daemon, await daemon.machines.start("m-1", FOURTH))

    asyncio.run(look())


@pytest.mark.parametrize("point", STOP_POINTS)
def test_a_stop(tmp_path: Path, point: str):
    world = World(tmp_path)
    die(world, point, make_stopped)

    async def look() -> None:
        async with world.daemon() as daemon:
            (machine,) = await settled(daemon)
            assert machine.phase is (Phase.RUNNING if point == "stop.intent.writing" else Phase.STOPPED)
            assert (await daemon.machines.stop("m-1", SECOND)).phase is Phase.STOPPED
            assert world.leftovers == (set(), set(), {"m-1"})

    asyncio.run(look())


@pytest.mark.parametrize("point", RESIZE_POINTS)
def test_a_resize(tmp_path: Path, point: str):
    world = World(tmp_path)
    larger = Size(memory_mib=512, disk_bytes=2 << 30)

    async def deed(daemon: Daemon) -> None:
        await daemon.machines.create(order(), FIRST)
        await daemon.machines.resize("m-1", SECOND, larger)

    die(world, point, deed)

    async def look() -> None:
        async with world.daemon() as daemon:
            (machine,) = await settled(daemon)
            is_untouched = point == "resize.intent.writing"
            assert machine.phase is (Phase.RUNNING if is_untouched else Phase.STOPPED)
            resized = await daemon.machines.resize("m-1", SECOND, larger)
            assert (resized.phase, resized.spec.memory_mib, resized.spec.disk_bytes) == (Phase.STOPPED, 512, 2 << 30)
            assert world.leftovers == (set(), set(), {"m-1"})
            await check_running(world, daemon, await daemon.machines.start("m-1", THIRD))

    asyncio.run(look())


@pytest.mark.parametrize("point", VISIT_POINTS)
def test_a_visit(tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(visitors, "LINGER_S", 0.0)
    world = World(tmp_path)

    async def deed(daemon: Daemon) -> None:
        await make_stopped(daemon)
        async with daemon.machines.files("m-1", SECOND):
            pass

    _die_and_look_at_rest(world, point, deed)


@pytest.mark.parametrize("point", ["visit.undone.writing", "visit.undone"])
def test_a_visit_that_is_undone(tmp_path: Path, point: str):
    world = World(tmp_path)

    async def deed(daemon: Daemon) -> None:
        await make_stopped(daemon)
        world.driver.is_impostor = True
        async with daemon.machines.files("m-1", SECOND):
            pass

    _die_and_look_at_rest(world, point, deed)


def _die_and_look_at_rest(world: World, point: str, deed: Callable[[Daemon], Awaitable[object]]) -> None:
    die(world, point, deed)
    world.driver.is_impostor = False

    async def look() -> None:
        async with world.daemon() as daemon:
            (machine,) = await settled(daemon)
            assert machine.phase is Phase.STOPPED
            assert world.leftovers == (set(), set(), {"m-1"})
            await check_running(world, daemon, await daemon.machines.start("m-1", THIRD))

    asyncio.run(look())


@pytest.mark.parametrize("point", DELETE_POINTS)
def test_a_delete(tmp_path: Path, point: str):
    world = World(tmp_path)

    async def deed(daemon: Daemon) -> None:
        await daemon.machines.create(order(), FIRST)
        await daemon.machines.delete("m-1", SECOND)

    die(world, point, deed)

    async def look() -> None:
        async with world.daemon() as daemon:
            machines = await settled(daemon)
            assert [machine.phase for machine in machines] == ([Phase.RUNNING] if point == DELETE_POINTS[0] else [])
            await daemon.machines.delete("m-1", SECOND)
            assert world.leftovers == NOTHING
            with pytest.raises(StaleIncarnation):
                await daemon.machines.create(order(), FIRST)

    asyncio.run(look())


@pytest.mark.parametrize("point", ["exit.seen.writing", "exit.seen", "exit.vacated.writing", "exit.vacated"])
def test_the_end_of_a_vmm(tmp_path: Path, point: str):
    world = World(tmp_path)

    async def deed(daemon: Daemon) -> None:
        await daemon.machines.create(order(), FIRST)
        world.driver.processes["m-1"].end("killed by SIGKILL")

    die(world, point, deed)

    async def look() -> None:
        async with world.daemon() as daemon:
            await until(lambda: [machine.phase for machine in daemon.machines.records()] == [Phase.FAILED])
            (machine,) = await settled(daemon)
            wanted = (
                "unknown: the VMM ended while the daemon was away"
                if point == "exit.seen.writing"
                else "killed by SIGKILL"
            )
            assert (machine.phase, machine.error) == (Phase.FAILED, wanted)
            assert world.leftovers == (set(), set(), {"m-1"})
            await daemon.machines.stop("m-1", SECOND)
            await check_running(world, daemon, await daemon.machines.start("m-1", THIRD))

    asyncio.run(look())


@pytest.mark.parametrize("point", [*NETWORK_POINTS, *UNDONE_POINTS])
def test_a_change_of_the_network(tmp_path: Path, point: str):
    """It is in the journal or it is not; what is, is what the network is told after the restart, too."""
    world = World(tmp_path)
    policy, draft = Network(internet=False), PortDraft(id="web", exposure=Exposure(port=80))

    async def deed(daemon: Daemon) -> None:
        await daemon.machines.create(order(), FIRST)
        if point in UNDONE_POINTS:
            world.quarters.rewire_error = CommandFailed(command="nft", exit_status=1, stderr="no")
        if not point.startswith("network."):
            await daemon.machines.publish("m-1", SECOND, draft)
            await daemon.machines.unpublish("m-1", SECOND, "web")
        await daemon.machines.set_network("m-1", SECOND, policy)

    die(world, point, deed)

    async def look() -> None:
        async with world.daemon() as daemon:
            (machine,) = await settled(daemon)
            await check_running(world, daemon, machine)
            kept = ("port.published", "port.published.applied", "port.unpublished.writing", "port.undone.writing")
            assert [port.id for port in machine.ports] == (["web"] if point in kept else [])
            assert machine.spec.network.internet is (point not in ("network.changed", "network.changed.applied"))
            assert (await daemon.machines.publish("m-1", SECOND, draft)).host_port == 20_000
            await daemon.machines.unpublish("m-1", SECOND, "web")
            changed = await daemon.machines.set_network("m-1", SECOND, policy)
            assert (changed.ports, changed.spec.network) == ((), policy)

    asyncio.run(look())


#: Operations whose points `test_snapshot_kill_points.py` has.
SNAPSHOTS = {"snapshot", "freeze", "restore", "unsnapshot", "import"}


def test_no_kill_point_is_forgotten():
    undone = {f"{kind}.undone{end}" for kind in ("create", "start", "visit") for end in (".writing", "")}
    ends = {"exit.seen.writing", "exit.seen", "exit.vacated.writing", "exit.vacated"}
    assert {
        *CREATE_POINTS,
        *START,
        *STOP_POINTS,
        *DELETE_POINTS,
        *NETWORK_POINTS,
        *UNDONE_POINTS,
        *RESIZE_POINTS,
        *VISIT_POINTS,
        *undone,
        *ends,
    } == {point for point in POINTS if point.partition(".")[0] not in SNAPSHOTS}
