"""Disks that guests write and strangers send: headers and tables that lie. Whatever comes, it is read or refused, in
bounded room. CI runs fixed mutations of real files; `--fuzz-seconds` goes on from other seeds."""

import contextlib
import os
import random
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest

import fuzz_rounds
from fusevm.host.disk.overlay import Method, allocated_bytes
from fusevm.host.disk.qcow2 import CLUSTER, QcowDamaged, read_backing, read_pieces, read_size, render_overlay
from fusevm.host.disk.room import DiskRoom
from fusevm.host.disk.superblock import is_cleanly_left
from fusevm.host.images.artifact import find_problem
from fusevm.host.images.fetch import FetchPolicy
from fusevm.host.snapshots.packed import PackedDisk, find_runs
from fusevm.host.snapshots.transfer import unpack
from fusevm.model.errors import Internal, SnapshotFailed
from fusevm.model.machine import Fence, Machine, MachineSpec, Phase

ROUNDS = 400
SIZE = 2 << 20
#: A disk of two L1 entries, hardly any of it there.
LARGE = 1 << 30
#: What a host of these tests has for disks; and the memory that reading and unpacking one may take.
MAX_DISK, MAX_MEMORY = 1 << 34, 48 << 20
POLICY = FetchPolicy(timeout_s=60, reserve_bytes=4096)
#: Where qcow2's header has its fields (`disk.qcow2`), and those of ext4's superblock that are looked at, and their
#: widths.
HEADER = [(0, 4), (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4)]
HEADER += [(72, 8), (100, 4), (104, 4), (108, 4)]
SUPERBLOCK = [(1024 + at, size) for at, size in ((0x4, 4), (0x18, 4), (0x38, 2), (0x3A, 2), (0x60, 4), (0x150, 4))]
#: Ends of what is allowed, for the most part.
NUMBERS = [0, 1, 2, 4, 6, 7, 16, 511, 512, CLUSTER, 3 * CLUSTER, 4 * CLUSTER, SIZE - 512, SIZE, LARGE, 64 << 40]
NUMBERS += [1 << 22, 1 << 31, (1 << 32) - 1, 1 << 56, (1 << 56) - CLUSTER, 1 << 62, (1 << 63) - 1, 1 << 63]
NUMBERS += [(1 << 63) - CLUSTER, 1 << 63 | 4 * CLUSTER, 1 << 62 | 5 * CLUSTER, (1 << 64) - CLUSTER, (1 << 64) - 1]


def run(*words: str | Path) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def file_system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real one."""
    path = tmp_path_factory.mktemp("whole") / "disk.raw"
    run("mke2fs", "-q", "-t", "ext4", "-O", "64bit", path, str(SIZE >> 10))
    return path


@pytest.fixture(scope="module")
def disks(file_system: Path) -> list[bytes]:
    """Whole qcow2 files: QEMU's, ours as they are carried away, and overlays without and with data."""
    folder, large = file_system.parent, file_system.with_name("large")
    by_qemu, written = folder / "qemu.qcow2", folder / "written.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", file_system, by_qemu)
    with large.open("wb") as file:
        file.truncate(LARGE)
        for at in (0, 700 << 20):
            os.pwrite(file.fileno(), b"data", at)
    packed = PackedDisk.open(large, msgspec.json.encode(find_runs(large)))
    carried = b"".join(packed.chunks(0, packed.size))
    packed.close()
    empty = render_overlay(SIZE, str(file_system))
    written.write_bytes(empty)
    run(
        "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4k", "-c", "write -z 128k 64k", "-c", "write -P 2 1M 64k", written
    )
    return [by_qemu.read_bytes(), carried, empty, written.read_bytes()]


def damage(chance: random.Random, whole: bytes, fields: list[tuple[int, int]]) -> bytes:
    """Change numbers of a header, entries of tables, single bits; cut it off."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        match chance.randrange(6):
            case 0 | 1:
                at, width = chance.choice(fields)
                put(data, at, width, chance.choice(NUMBERS), chance.choice(("big", "little")))
            case 2:
                # Tables are the first of a cluster, and what is used twice stands somewhere else already.
                at = chance.randrange(len(data) // CLUSTER or 1) * CLUSTER + 8 * chance.choice((0, 0, 1, 2, 16, 8191))
                put(data, at, 8, chance.choice((chance.choice(NUMBERS), chance.randrange(1, 12) * CLUSTER)), "big")
            case 3:
                source, target = (chance.randrange(len(data) // CLUSTER or 1) * CLUSTER for _ in range(2))
                data[target : target + CLUSTER] = data[source : source + CLUSTER]
            case 4:
                at = chance.randrange(min(len(data), 8 * CLUSTER))
                data[at] ^= 1 << chance.randrange(8)
            case _ if chance.random() < 0.3:
                del data[chance.choice((0, 40, 103, 1024, CLUSTER, 4 * CLUSTER + 8, max(len(data) - 512, 1))) :]
                data += bytes(1)
    return bytes(data)


def put(data: bytearray, at: int, width: int, number: int, order: Literal["big", "little"]) -> None:
    """A number, as much of it as there is room for, in place of another. qcow2 has them big-endian, ext4 little."""
    if at + width <= len(data):
        data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)


def attacks(name: str, corpus: list[bytes], fields: list[tuple[int, int]]) -> Iterator[bytes]:
    """The corpus itself, then what becomes of it."""
    yield from corpus
    for seed, chance in fuzz_rounds.rounds(name, ROUNDS):
        print(seed)
        yield damage(chance, chance.choice(corpus), fields)


def check_pieces(file: Path) -> int | None:
    """What is read of it is a disk, of no more than the file has: its size; None when it is refused."""
    length = file.stat().st_size
    with file.open("rb") as opened:
        fd = opened.fileno()
        with contextlib.suppress(QcowDamaged):
            assert len(read_backing(fd)) <= 1023
        try:
            size = read_size(fd)
            data, end = 0, 0
            for number, piece in enumerate(read_pieces(fd, size)):
                assert number < length // 8
                assert end <= piece.at < piece.at + piece.length <= size
                end = piece.at + piece.length
                data += piece.length if piece.offset else 0
        except QcowDamaged:
            return None
    assert data <= length + CLUSTER
    return size


async def test_a_disk_that_is_sent_is_unpacked_or_refused(tmp_path: Path, disks: list[bytes]):
    packed, target = tmp_path / "packed", tmp_path / "target"
    refused, taken = 0, 0
    tracemalloc.start()
    try:
        for data in attacks("disks", disks, HEADER):
            packed.write_bytes(data)
            size = check_pieces(packed)
            target.unlink(missing_ok=True)
            try:
                unpacked = await unpack("s-1", packed, target, POLICY, MAX_DISK)
            except SnapshotFailed:
                refused += 1
                assert size is None or size > MAX_DISK
            else:
                taken += 1
                assert unpacked == size == target.stat().st_size
            assert allocated_bytes(target) <= len(data) + 2 * CLUSTER
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY
    finally:
        tracemalloc.stop()
    assert min(refused, taken) >= len(disks)


async def test_a_disk_that_a_guest_has_written_is_its_own_or_refused(tmp_path: Path, disks: list[bytes]):
    folder, blanks = tmp_path / "machines" / "m-1", tmp_path / "blanks"
    folder.mkdir(parents=True)
    room = DiskRoom(
        tmp_path / "machines", tmp_path, tmp_path / "snapshots", is_confined=False, without_reflink=Method.QCOW2
    )
    machine = Machine(
        id="m-1",
        fence=Fence(cluster="c", uid="u", incarnation=1, action_seq=1),
        spec=MachineSpec(image="i", disk_bytes=SIZE),
        phase=Phase.CREATING,
        created_at_ms=0,
        updated_at_ms=0,
    )
    own, outcomes = render_overlay(SIZE, str(blanks / "2.ext4")), set()
    for data in attacks("overlays", [own, *disks], [*HEADER, (124, 4), (130, 8)]):
        (folder / "overlay.qcow2").write_bytes(data)
        try:
            image = await room.image(machine)
        except Internal:
            outcomes.add("refused")
        else:
            assert image.size_bytes <= SIZE
            assert image.backing is not None
            assert image.backing.parent in (blanks, folder)
            outcomes.add("taken")
    assert outcomes == {"refused", "taken"}


def test_how_a_disk_was_left_is_told_or_unknown(tmp_path: Path, file_system: Path, disks: list[bytes]):
    path, seen = tmp_path / "disk", set()
    for data in attacks("superblocks", [file_system.read_bytes(), *disks], [*HEADER, *SUPERBLOCK]):
        path.write_bytes(data)
        seen |= {is_cleanly_left(path, "raw"), is_cleanly_left(path, "qcow2")}
    assert seen == {True, False, None}


def test_a_root_file_system_is_taken_or_refused_with_a_reason(tmp_path: Path, file_system: Path):
    path, whole = tmp_path / "rootfs", file_system.read_bytes()
    reasons = set()
    for data in attacks("file systems", [whole[: 64 << 10], whole], SUPERBLOCK):
        path.write_bytes(data)
        reasons.add(find_problem(path).split(" of a file system")[0])
    assert len(reasons) > 4, reasons
    assert "" in reasons
