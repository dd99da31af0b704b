"""Copies of disks: equal to the last byte, sparse, repeatable, and judged by QEMU's own tools."""

import asyncio
import hashlib
import json
import os
import random
import struct
import subprocess
from pathlib import Path

import pytest

from fusevm.host.disk.copy import CopyStopped, DiskImage, Stop, copy_disk, data_ranges
from fusevm.host.disk.overlay import allocated_bytes
from fusevm.host.disk.qcow2 import CLUSTER, QcowDamaged, Run, read_pieces, read_size, render_head, render_overlay

SIZE = 40 << 20
MIB = 1 << 20


def make_raw(path: Path, size: int, content: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in content.items():
            file.seek(at)
            file.write(data)
    return path


def qemu_img(*words: str | Path) -> str:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def overlay_on(folder: Path, backing: Path, size: int = SIZE) -> Path:
    path = folder / "overlay.qcow2"
    path.write_bytes(render_overlay(size, str(backing)))
    return path


def copied(disk: DiskImage, target: Path) -> bytes:
    asyncio.run(copy_disk(disk, target, Stop()))
    return target.read_bytes()


def test_a_raw_disk_is_copied_with_its_holes(tmp_path: Path) -> None:
    source = make_raw(tmp_path / "a", SIZE, {0: b"head", 7 * MIB: os.urandom(3 * MIB), SIZE - 4096: b"tail"})
    disk = DiskImage(path=source, format="raw", size_bytes=SIZE)
    assert copied(disk, tmp_path / "b") == source.read_bytes()
    assert allocated_bytes(tmp_path / "b") <= allocated_bytes(source) + CLUSTER


def test_a_second_copy_brings_what_has_changed_and_nothing_else(tmp_path: Path) -> None:
    source = make_raw(tmp_path / "a", SIZE, {MIB: os.urandom(2 * MIB), 20 * MIB: os.urandom(MIB)})
    disk = DiskImage(path=source, format="raw", size_bytes=SIZE)
    copied(disk, tmp_path / "b")
    with source.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(MIB))
        file.seek(30 * MIB)
        file.write(b"new")
    os.truncate(source, 20 * MIB)  # what was behind is a hole now
    os.truncate(source, SIZE)
    assert copied(disk, tmp_path / "b") == source.read_bytes()
    assert allocated_bytes(tmp_path / "b") <= MIB + CLUSTER


def test_a_qcow2_disk_is_what_qemu_reads_of_it(tmp_path: Path) -> None:
    backing = make_raw(tmp_path / "base", 30 * MIB, {0: b"base", 5 * MIB: os.urandom(4 * MIB)})
    overlay = overlay_on(tmp_path, backing)
    chance = random.Random(3)
    places = [chance.randrange(0, SIZE - 200_000) & ~511 for _ in range(40)]
    qemu_io(overlay, *[f"write -P {1 + n} {at} {512 * chance.randrange(1, 300)}" for n, at in enumerate(places)])
    qemu_io(overlay, f"write -z {6 * MIB} {MIB}", f"discard {places[0] // CLUSTER * CLUSTER} {CLUSTER}")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", overlay, tmp_path / "truth")
    disk = DiskImage(path=overlay, format="qcow2", size_bytes=SIZE, backing=backing)
    truth = (tmp_path / "truth").read_bytes()
    assert copied(disk, tmp_path / "b") == truth
    qemu_io(overlay, f"write -P 200 {9 * MIB} 70000", f"write -z {places[3] // CLUSTER * CLUSTER} {CLUSTER}")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", overlay, tmp_path / "truth")
    assert copied(disk, tmp_path / "b") == (tmp_path / "truth").read_bytes() != truth


def test_a_packed_disk_is_a_clean_qcow2_file_and_reads_back(tmp_path: Path) -> None:
    size = (600 << 20) + 3 * CLUSTER + 512  # more than one L2 table, and a last cluster that is not full
    runs = [Run(0, 2), Run(8190, 5), Run(size // CLUSTER, 1)]
    raw = make_raw(tmp_path / "a", size, {})
    with raw.open("r+b") as file:
        for run in runs:
            file.seek(run.first * CLUSTER)
            file.write(os.urandom(min(run.length * CLUSTER, size - run.first * CLUSTER)))
    packed = tmp_path / "packed.qcow2"
    with packed.open("wb") as out, raw.open("rb") as file:
        out.write(render_head(size, runs))
        for run in runs:
            file.seek(run.first * CLUSTER)
            out.write(file.read(run.length * CLUSTER).ljust(run.length * CLUSTER, b"\0"))
    qemu_img("check", "-f", "qcow2", packed)
    info = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", packed))
    assert (info["virtual-size"], info.get("backing-filename")) == (size, None)
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", packed, raw)
    with packed.open("rb") as file:
        assert read_size(file.fileno()) == size
    disk = DiskImage(path=packed, format="qcow2", size_bytes=size)
    asyncio.run(copy_disk(disk, tmp_path / "back", Stop()))
    assert hashlib.sha256((tmp_path / "back").read_bytes()).digest() == hashlib.sha256(raw.read_bytes()).digest()
    assert allocated_bytes(tmp_path / "back") <= 9 * CLUSTER


def test_many_runs_need_more_than_one_block_of_refcounts(tmp_path: Path) -> None:
    size = 3 << 30
    runs = [Run(0, size // CLUSTER)]
    head = render_head(size, runs)
    packed = tmp_path / "packed.qcow2"
    packed.write_bytes(head)
    os.truncate(packed, len(head) + size)
    assert "No errors" in qemu_img("check", "-f", "qcow2", packed)


@pytest.mark.parametrize(
    ("at", "data"),
    [
        (0, b"RAW!"),
        (4, struct.pack(">I", 2)),
        (20, struct.pack(">I", 9)),
        (24, struct.pack(">Q", SIZE * 2)),
        (32, struct.pack(">I", 1)),
        (36, struct.pack(">I", 0)),
        (36, struct.pack(">I", 0xFFFFFFFF)),
        (40, struct.pack(">Q", 12345)),
        (40, struct.pack(">Q", 1 << 50)),
        (72, struct.pack(">Q", 4)),
        (3 * CLUSTER, struct.pack(">Q", 1 << 40)),
        (3 * CLUSTER, struct.pack(">Q", 1 << 9)),
        (4 * CLUSTER, struct.pack(">Q", 1 << 62 | CLUSTER)),
        (4 * CLUSTER, struct.pack(">Q", 5 << 9)),
    ],
)
def test_a_qcow2_file_that_lies_is_refused(tmp_path: Path, at: int, data: bytes) -> None:
    overlay = overlay_on(tmp_path, make_raw(tmp_path / "base", SIZE, {}))
    qemu_io(overlay, "write -P 1 0 65536")
    with overlay.open("r+b") as file:
        file.seek(at)
        file.write(data)
        file.flush()
        with pytest.raises(QcowDamaged):
            list(read_pieces(file.fileno(), SIZE))


def test_a_qcow2_file_cannot_name_what_is_read(tmp_path: Path) -> None:
    secret = make_raw(tmp_path / "secret", SIZE, {0: b"another machine's"})
    overlay = overlay_on(tmp_path, secret)
    disk = DiskImage(path=overlay, format="qcow2", size_bytes=SIZE, backing=None)
    assert not any(copied(disk, tmp_path / "b"))


def test_a_copy_whose_time_is_over_stops(tmp_path: Path) -> None:
    source = make_raw(tmp_path / "a", SIZE, {0: os.urandom(SIZE)})
    disk = DiskImage(path=source, format="raw", size_bytes=SIZE)
    with pytest.raises(CopyStopped):
        asyncio.run(copy_disk(disk, tmp_path / "b", Stop(limit_s=-1.0)))


async def test_a_cancelled_copy_has_ended(tmp_path: Path) -> None:
    source = make_raw(tmp_path / "a", SIZE, {0: os.urandom(SIZE)})
    stop = Stop()
    copying = asyncio.create_task(
        copy_disk(DiskImage(path=source, format="raw", size_bytes=SIZE), tmp_path / "b", stop)
    )
    await asyncio.sleep(0)
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    with pytest.raises(CopyStopped):
        stop.check()


def test_data_ranges_keep_within_their_bounds(tmp_path: Path) -> None:
    source = make_raw(tmp_path / "a", SIZE, {MIB: bytes([1]) * MIB, 5 * MIB: bytes([1]) * MIB})
    with source.open("rb") as file:
        assert list(data_ranges(file.fileno(), 0, SIZE)) == [(MIB, MIB), (5 * MIB, MIB)]
        assert list(data_ranges(file.fileno(), MIB + 4096, 5 * MIB + 8192)) == [
            (MIB + 4096, MIB - 4096),
            (5 * MIB, 8192),
        ]
        assert list(data_ranges(file.fileno(), 2 * MIB, 3 * MIB)) == []


def unfolding(path: Path, l1: list[int], l2: list[int], size: int) -> DiskImage:
    """A qcow2 file with two tables and two clusters of data, which are where the entries (numbers of clusters) say."""
    head = bytearray(render_head(size, [Run(0, 1), Run(8192, 1)]))
    place = [cluster * CLUSTER | 1 << 63 for cluster in l1]
    struct.pack_into(f">{len(l1)}Q", head, 3 * CLUSTER, *place)
    for table in (4, 5):
        struct.pack_into(f">{len(l2)}Q", head, table * CLUSTER, *[cluster * CLUSTER | 1 << 63 for cluster in l2])
    path.write_bytes(head + bytes([1]) * 2 * CLUSTER)
    return DiskImage(path=path, format="qcow2", size_bytes=size)


@pytest.mark.parametrize(
    ("l1", "l2"),
    [([4, 4], [6]), ([4], [6] * 8192), ([4], [6, 7, 6]), ([4], [4]), ([4], [3]), ([3], [6]), ([4, 5], [6])],
)
def test_a_file_whose_clusters_are_used_twice_does_not_unfold(tmp_path: Path, l1: list[int], l2: list[int]) -> None:
    """Tables and data that are shared would make a disk of any size out of a few clusters."""
    disk = unfolding(tmp_path / "a", l1, l2, 1 << 30)
    with pytest.raises(QcowDamaged, match="used twice"):
        asyncio.run(copy_disk(disk, tmp_path / "b", Stop()))
    assert allocated_bytes(tmp_path / "b") <= 3 * CLUSTER


def test_what_is_behind_the_end_of_the_file_takes_no_room(tmp_path: Path) -> None:
    disk = unfolding(tmp_path / "a", [4, 0], [6, 9, 7, 1 << 30], 1 << 30)
    asyncio.run(copy_disk(disk, tmp_path / "b", Stop()))
    assert allocated_bytes(tmp_path / "b") <= 3 * CLUSTER
    with (tmp_path / "b").open("rb") as file:
        assert [any(file.read(CLUSTER)) for _ in range(4)] == [True, False, True, False]


def test_pieces_are_copied_as_they_are_found(tmp_path: Path) -> None:
    """However many a disk has: they are never kept together. Here the second table is found out after the first."""
    disk = unfolding(tmp_path / "a", [4, 4], [6], 1 << 30)
    with pytest.raises(QcowDamaged):
        asyncio.run(copy_disk(disk, tmp_path / "b", Stop()))
    with (tmp_path / "b").open("rb") as file:
        assert any(file.read(CLUSTER))
