"""A daemon that dies by SIGKILL at every point of taking a snapshot, putting it back, deleting it: `test_kill_points`
says how. Disks are small real files, so what they hold afterwards tells on which side of the moment they are.
"""

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "images"))

from file_server import ok, serving
from test_kill_points import FIRST, FOURTH, SECOND, SNAPSHOTS, THIRD, check_running, die, settled

from fusevm.host.daemon import Daemon
from fusevm.host.disk.qcow2 import CLUSTER, Run, render_head
from fusevm.host.faults import IMPORT_POINTS, POINTS, RESTORE_POINTS, SNAPSHOT_POINTS, UNSNAPSHOT_POINTS
from fusevm.host.images.addresses import parse_networks
from fusevm.host.images.fetch import FetchPolicy
from fusevm.host.snapshots.record import HostSnapshot
from fusevm.model.errors import NoSpace, SnapshotNotFound
from fusevm.model.machine import Phase
from fusevm.testing.host_world import NOTHING, World, fence, order, until
from fusevm.wire.host_snapshots import DurableArtifact, DurableSnapshot


def folders(world: World) -> set[str]:
    """Snapshots of which there are bytes."""
    root = world.root / "data" / "snapshots"
    return {entry.name for entry in root.iterdir()} if root.exists() else set()


async def settled_snapshots(daemon: Daemon) -> list[str]:
    """The phases of all snapshots, once nothing is under way with them."""
    async with asyncio.timeout(60):
        while True:
            phases = [snapshot.phase.value for snapshot in await daemon.snapshots.load_all()]
            if phases in ([], ["ready"]):
                return phases
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("point", [*SNAPSHOT_POINTS, "snapshot.stopped"])
def test_a_snapshot(tmp_path: Path, point: str):
    world = World(tmp_path)
    is_stopped = point == "snapshot.stopped"

    async def deed(daemon: Daemon) -> None:
        await daemon.machines.create(order(), FIRST)
        world.disks.write("m-1", b"before")
        if is_stopped:
            await daemon.machines.stop("m-1", SECOND)
        await daemon.snapshots.take("m-1", "s-1", SECOND, live=False)

    die(world, point, deed)

    async def look() -> None:
        async with world.daemon() as daemon:
            (machine,) = await settled(daemon)
            assert machine.phase is (Phase.STOPPED if is_stopped else Phase.RUNNING)
            phases = await settled_snapshots(daemon)
            is_copied = point in ("snapshot.copied", "snapshot.ready.writing", "snapshot.ready")
            assert phases == (["ready"] if is_copied else [])
            assert folders(world) == ({"s-1"} if is_copied else set())
            # Its guest is told last of all that it may write.
            await until(lambda: not any(running.agent.is_frozen for running in world.driver.processes.values()))
            world.disks.write("m-1", b"after")
            taken = await daemon.snapshots.take("m-1", "s-1", SECOND, live=False)
            await daemon.machines.create(order("m-2", snapshot_id=taken.id), fence("u2"))
            assert world.disks.read("m-2") == (b"before" if is_copied else b"after")

    asyncio.run(look())


async def make_restorable(world: World, daemon: Daemon) -> None:
    await daemon.machines.create(order(), FIRST)
    world.disks.write("m-1", b"before")
    await daemon.snapshots.take("m-1", "s-1", FIRST, live=False)
    world.disks.write("m-1", b"after")


@pytest.mark.parametrize("was_running", [True, False])
@pytest.mark.parametrize("point", RESTORE_POINTS)
def test_a_restore(tmp_path: Path, point: str, was_running: bool):
    world = World(tmp_path)

    async def deed(daemon: Daemon) -> None:
        await make_restorable(world, daemon)
        if not was_running:
            await daemon.machines.stop("m-1", SECOND)
        await daemon.machines.restore("m-1", "s-1", THIRD)

    die(world, point, deed)

    async def look() -> None:
        async with world.daemon() as daemon:
            (machine,) = await settled(daemon)
            is_committed = RESTORE_POINTS.index(point) >= RESTORE_POINTS.index("restore.committed")
            assert world.disks.read("m-1") == (b"before" if is_committed else b"after")
            assert machine.phase is (Phase.RUNNING if is_committed or was_running else Phase.STOPPED)
            assert not world.disks.is_staged("m-1")
            generation = machine.generation
            machine = await daemon.machines.restore("m-1", "s-1", THIRD)
            assert (machine.generation == generation) is is_committed
            assert world.disks.read("m-1") == b"before"
            await check_running(world, daemon, machine)
            await daemon.machines.delete("m-1", FOURTH)
            assert world.leftovers == NOTHING

    asyncio.run(look())


@pytest.mark.parametrize("point", ["restore.undone.writing", "restore.undone"])
def test_a_restore_that_is_undone(tmp_path: Path, point: str):
    world = World(tmp_path)

    async def deed(daemon: Daemon) -> None:
        await make_restorable(world, daemon)
        world.disks.stage_error = NoSpace(path="/", needed=1, free=0)
        await daemon.machines.restore("m-1", "s-1", SECOND)

    die(world, point, deed)
    world.disks.stage_error = None

    async def look() -> None:
        async with world.daemon() as daemon:
            (machine,) = await settled(daemon)
            assert (machine.phase, world.disks.read("m-1")) == (Phase.RUNNING, b"after")
            await check_running(world, daemon, await daemon.machines.restore("m-1", "s-1", SECOND))
            assert world.disks.read("m-1") == b"before"

    asyncio.run(look())


@pytest.mark.parametrize("point", ["snapshot.undone.writing", "snapshot.undone"])
def test_a_snapshot_that_is_undone(tmp_path: Path, point: str):
    world = World(tmp_path)

    async def deed(daemon: Daemon) -> None:
        await daemon.machines.create(order(), FIRST)
        world.driver.processes["m-1"].agent.freeze_expires = True
        await daemon.snapshots.take("m-1", "s-1", SECOND, live=False)

    die(world, point, deed)

    async def look() -> None:
        async with world.daemon() as daemon:
            (machine,) = await settled(daemon)
            assert machine.phase is Phase.RUNNING
            assert (await settled_snapshots(daemon), folders(world)) == ([], set())

    asyncio.run(look())


@pytest.mark.parametrize("point", UNSNAPSHOT_POINTS)
def test_the_deletion_of_a_snapshot(tmp_path: Path, point: str):
    world = World(tmp_path)

    async def deed(daemon: Daemon) -> None:
        await make_restorable(world, daemon)
        await daemon.snapshots.delete("s-1", "c1")

    die(world, point, deed)

    async def look() -> None:
        async with world.daemon() as daemon:
            await settled(daemon)
            is_kept = point == "unsnapshot.intent.writing"
            assert await settled_snapshots(daemon) == (["ready"] if is_kept else [])
            assert folders(world) == ({"s-1"} if is_kept else set())
            with suppress(SnapshotNotFound):
                await daemon.snapshots.delete("s-1", "c1")
            with pytest.raises(SnapshotNotFound):
                await daemon.snapshots.take("m-1", "s-1", SECOND, live=False)
            assert folders(world) == set()

    asyncio.run(look())


@pytest.mark.parametrize("point", IMPORT_POINTS)
def test_a_snapshot_that_is_fetched(tmp_path: Path, point: str):
    world = World(tmp_path)
    world.policy = FetchPolicy(allowed=parse_networks(["127.0.0.0/8"]))
    packed = render_head(1 << 20, [Run(0, 1)]) + b"content".ljust(CLUSTER, b"\0")

    async def get(daemon: Daemon) -> HostSnapshot:
        async with serving(lambda _target, _headers: ok(packed)) as files:
            disk = DurableArtifact(id="disk-system", size_bytes=len(packed), download_url=files.url("/"))
            return await daemon.snapshots.fetch("s-1", DurableSnapshot(artifacts=[disk]), "sha256:debian-12")

    die(world, point, get)

    async def look() -> None:
        async with world.daemon() as daemon:
            is_copied = point == "import.copied"
            assert await settled_snapshots(daemon) == (["ready"] if is_copied else [])
            assert folders(world) == ({"s-1"} if is_copied else set())
            assert (await get(daemon)).phase.value == "ready"
            await daemon.machines.create(order(snapshot_id="s-1"), None)
            assert world.disks.read("m-1") == b"content"

    asyncio.run(look())


def test_no_kill_point_is_forgotten():
    undone = {f"{kind}.undone{half}" for kind in ("snapshot", "restore") for half in ("", ".writing")}
    reached = {*SNAPSHOT_POINTS, *RESTORE_POINTS, *UNSNAPSHOT_POINTS, *IMPORT_POINTS, *undone, "snapshot.stopped"}
    assert reached == {point for point in POINTS if point.partition(".")[0] in SNAPSHOTS}
