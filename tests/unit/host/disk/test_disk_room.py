"""Where machines' disks are: made of blanks and of snapshots, put in place, and never what a disk itself claims."""

import asyncio
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

from fusevm.host.disk.copy import Stop, copy_disk, share_blocks
from fusevm.host.disk.overlay import Method, Overlay, WithoutReflink, allocated_bytes, create_overlay
from fusevm.host.disk.qcow2 import render_overlay
from fusevm.host.disk.room import DiskRoom
from fusevm.host.snapshots.folders import SnapshotFolders
from fusevm.model.errors import Internal, SnapshotNotFound
from fusevm.model.machine import DiskSeed, Fence, Machine, MachineSpec, Phase

SIZE = 32 << 20
SEED = DiskSeed(snapshot_id="s-1", base="0123456789abcdef")
FORMATS: list[WithoutReflink] = [Method.QCOW2, Method.SPARSE_COPY]


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """Of the snapshot's disk; there is a folder for machine m-1, too."""
    (tmp_path / "machines" / "m-1").mkdir(parents=True)
    disk = tmp_path / "snapshots" / "s-1" / "disk.raw"
    disk.parent.mkdir(parents=True)
    data = os.urandom(1 << 20).ljust(SIZE, b"\0")
    disk.write_bytes(data)
    disk.chmod(0o444)
    return data


def room(folder: Path, method: WithoutReflink = Method.QCOW2) -> DiskRoom:
    return DiskRoom(folder / "machines", folder, folder / "snapshots", is_confined=False, without_reflink=method)


def machine(seed: DiskSeed | None = None) -> Machine:
    return Machine(
        id="m-1",
        fence=Fence(cluster="c", uid="u", incarnation=1, action_seq=1),
        spec=MachineSpec(image="i", disk_bytes=SIZE),
        phase=Phase.CREATING,
        seed=seed,
        created_at_ms=0,
        updated_at_ms=0,
    )


async def read(disks: DiskRoom, owner: Machine, folder: Path) -> bytes:
    """What a guest would see."""
    target = folder / "seen"
    target.unlink(missing_ok=True)
    await copy_disk(await disks.image(owner), target, Stop())
    return target.read_bytes()


@pytest.mark.parametrize("method", FORMATS)
async def test_a_disk_begins_with_a_snapshot_and_outlives_it(
    tmp_path: Path, content: bytes, method: WithoutReflink
) -> None:
    disks, owner = room(tmp_path, method), machine(SEED)
    assert await disks.ensure(owner)
    assert not await disks.ensure(owner)
    snapshot = tmp_path / "snapshots" / "s-1" / "disk.raw"
    assert allocated_bytes(snapshot) > 0
    snapshot.unlink()
    assert await read(disks, owner, tmp_path) == content


@pytest.mark.parametrize("is_restored", [False, True])
@pytest.mark.parametrize("method", FORMATS)
async def test_a_snapshot_deleted_while_its_disk_is_copied_gives_a_whole_disk(
    tmp_path: Path, content: bytes, method: WithoutReflink, is_restored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks, owner = room(tmp_path, method), machine(SEED)
    if is_restored:
        await disks.ensure(machine())
    reached, gate = asyncio.Event(), asyncio.Event()

    async def hold(*arguments: Any, **options: Any) -> Overlay:
        reached.set()
        await gate.wait()
        return await create_overlay(*arguments, **options)

    monkeypatch.setattr("fusevm.host.disk.room.create_overlay", hold)
    making = asyncio.create_task(disks.stage(owner, SEED) if is_restored else disks.ensure(owner))
    await reached.wait()
    await SnapshotFolders(tmp_path / "snapshots").remove("s-1")
    assert not (tmp_path / "snapshots" / "s-1").exists()
    gate.set()
    await making
    if is_restored:
        await disks.swap(owner)
    assert await read(disks, owner, tmp_path) == content
    kept = list((tmp_path / "machines" / "m-1").glob("base-*"))
    assert bool(kept) == ((await disks.image(owner)).format == "qcow2"), "a copy needs no base any more"


@pytest.mark.parametrize("method", FORMATS)
async def test_a_staged_disk_takes_the_place_of_the_old_one(
    tmp_path: Path, content: bytes, method: WithoutReflink
) -> None:
    disks = room(tmp_path, method)
    await disks.ensure(machine())
    before = await read(disks, machine(), tmp_path)
    await disks.stage(machine(), SEED)
    assert await read(disks, machine(), tmp_path) == before
    for _ in range(2):
        await disks.swap(machine(SEED))
    assert await read(disks, machine(SEED), tmp_path) == content
    await disks.stage(machine(SEED), SEED)
    await disks.unstage(machine(SEED))
    assert await read(disks, machine(SEED), tmp_path) == content
    assert not list((tmp_path / "machines" / "m-1").glob("next*"))


async def test_links_go_with_the_disks_that_need_them(tmp_path: Path, content: bytes) -> None:
    disks = room(tmp_path)
    await disks.ensure(machine(SEED))
    snapshot = tmp_path / "snapshots" / "s-1" / "disk.raw"
    linked = snapshot.stat().st_nlink
    other = tmp_path / "snapshots" / "s-2"
    other.mkdir()
    (other / "disk.raw").write_bytes(content)
    await disks.stage(machine(SEED), DiskSeed(snapshot_id="s-2", base="fedcba9876543210"))
    await disks.swap(machine(SEED))
    assert snapshot.stat().st_nlink == 1 <= linked


async def test_a_snapshot_that_is_gone_is_said_so(tmp_path: Path, content: bytes) -> None:
    assert content
    with pytest.raises(SnapshotNotFound):
        await room(tmp_path).ensure(machine(DiskSeed(snapshot_id="s-9", base="0" * 16)))


@pytest.mark.parametrize("name", ["../m-2/base-0.raw", "/etc/shadow", "blanks/../journal.db"])
async def test_a_disk_cannot_name_what_is_not_its_own(tmp_path: Path, content: bytes, name: str) -> None:
    assert content
    folder = tmp_path / "machines" / "m-1"
    (folder / "overlay.qcow2").write_bytes(render_overlay(SIZE, str(folder / name) if name[0] == "." else name))
    with pytest.raises(Internal, match="not its own"):
        await room(tmp_path).image(machine())


async def test_a_disk_is_not_larger_than_its_machines_record_says(tmp_path: Path, content: bytes) -> None:
    assert content
    disks, overlay = room(tmp_path), tmp_path / "machines" / "m-1" / "overlay.qcow2"
    await disks.ensure(machine())
    backing = (await disks.image(machine())).backing
    overlay.write_bytes(render_overlay(64 << 40, str(backing)))
    with pytest.raises(Internal, match="claims"):
        await disks.image(machine())
    overlay.unlink()
    (tmp_path / "machines" / "m-1" / "overlay.raw").touch()
    os.truncate(tmp_path / "machines" / "m-1" / "overlay.raw", 1 << 40)
    assert (await disks.image(machine())).size_bytes == SIZE


async def test_only_a_copy_takes_room_at_once(tmp_path: Path, content: bytes) -> None:
    size = allocated_bytes(tmp_path / "snapshots" / "s-1" / "disk.raw")
    assert 1 << 20 <= size <= len(content)
    copying = room(tmp_path, Method.SPARSE_COPY)
    with TemporaryFile(dir=tmp_path) as one, TemporaryFile(dir=tmp_path) as other:
        one.write(bytes(1 << 16))
        one.flush()
        shares = share_blocks(one.fileno(), other.fileno())
    assert await copying.seed_bytes("s-1") == (0 if shares else size)
    assert await copying.seed_bytes("s-gone") == 0
    assert await room(tmp_path, Method.QCOW2).seed_bytes("s-1") == 0
