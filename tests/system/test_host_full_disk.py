"""A disk that is really full: creates are refused, the daemon lives, and deleting makes room."""

import subprocess
from pathlib import Path

import msgspec
import pytest
from namespaces import private_network

from fusevm.host.config import HostConfig
from fusevm.host.daemon import Daemon
from fusevm.host.watermarks import observe_places
from fusevm.model.errors import HostFull, NoSpace
from fusevm.model.machine import Phase
from fusevm.testing.host_world import NOTHING, World, fence, order


@private_network
async def test_a_full_disk_refuses_creates_and_deleting_makes_room(tmp_path: Path):
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "fuse-test", root], check=True)
    world = World(root)
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), fence("u1"))
        await daemon.journal.ensure_ballast()
        assert (root / "data/ballast").exists()
        _fill(root / "filler")
        with pytest.raises(NoSpace):
            await _create_many(daemon)
        # It still answers, runs what runs, and deletes: the ballast gives way.
        assert daemon.machines.record("m-1").phase is Phase.RUNNING
        await daemon.machines.delete("m-1", fence("u1", action_seq=2))
        assert not (root / "data/ballast").exists()
        (root / "filler").unlink()
        for machine in daemon.machines.records():
            await daemon.machines.delete(machine.id, machine.fence)
        assert (await daemon.machines.create(order("m-0"), fence("u0"))).phase is Phase.RUNNING
        await daemon.machines.delete("m-0", fence("u0", action_seq=2))
    assert world.leftovers == NOTHING


async def _create_many(daemon: Daemon) -> None:
    for number in range(2, 200):
        await daemon.machines.create(order(f"m-{number}"), fence(f"u{number}"))


@private_network
async def test_the_watermark_refuses_before_the_disk_is_full(tmp_path: Path):
    world = World(tmp_path)
    world.quarters.limits_now = msgspec.structs.replace(world.quarters.limits_now, disk_free_bytes=1 << 30)
    async with world.daemon() as daemon:
        with pytest.raises(HostFull, match="kept free"):
            await daemon.machines.create(order(), fence())
        await daemon.machines.delete("m-1", fence(action_seq=2))


@private_network
async def test_a_file_system_without_inodes_refuses_before_anything_fails(tmp_path: Path):
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m,nr_inodes=2000", "fuse-test", root], check=True)
    config = HostConfig(data_root=root / "data", run_dir=root / "run", disk_reserve_bytes=1 << 20)
    world = World(root)
    async with world.daemon() as daemon:
        world.quarters.limits_now = msgspec.structs.replace(world.quarters.limits_now, places=observe_places(config))
        await daemon.machines.create(order("m-1"), fence("u1"))
        for number in range(1920):
            (root / f"file-{number}").touch()
        world.quarters.limits_now = msgspec.structs.replace(world.quarters.limits_now, places=observe_places(config))
        with pytest.raises(HostFull, match="inodes kept free below"):
            await daemon.machines.create(order("m-2"), fence("u2"))
        assert [place.is_low for place in (await daemon.facts()).admission.places] == [True]
        await daemon.machines.delete("m-1", fence("u1", action_seq=2))
    assert world.leftovers == NOTHING


def _fill(path: Path) -> None:
    """Write until nothing goes any more."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
