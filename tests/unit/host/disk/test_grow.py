"""Disks of machines at rest that become larger, as QEMU's own tools see them."""

import json
from pathlib import Path

import pytest

from fusevm.host.disk.grow import MAX_BYTES, check_size, grow_overlay
from fusevm.host.disk.overlay import Method, create_overlay
from fusevm.host.run import run
from fusevm.model.errors import BadField, Internal

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def blank(tmp_path: Path) -> Path:
    path = tmp_path / "blank"
    path.write_bytes(b"content".ljust(16 * MIB, b"\0"))
    return path


async def qemu_img(*words: str | Path) -> str:
    return (await run(["qemu-img", *words], timeout_s=120)).text


async def test_a_raw_disk_grows_and_never_shrinks(blank: Path):
    await grow_overlay(blank, "raw", 20 * MIB - 1)
    assert blank.stat().st_size == 20 * MIB
    await grow_overlay(blank, "raw", 16 * MIB)
    assert blank.stat().st_size == 20 * MIB
    assert blank.read_bytes() == b"content".ljust(20 * MIB, b"\0")


@pytest.mark.parametrize("size", [17 * MIB, 512 * MIB + MIB, 3 * GIB, MAX_BYTES])
async def test_a_qcow2_disk_grows_and_reads_zeros_behind_its_backing_file(blank: Path, tmp_path: Path, size: int):
    overlay = await create_overlay(blank, tmp_path / "overlay", without_reflink=Method.QCOW2)
    if overlay.format != "qcow2":
        pytest.fail("this file system shares blocks; the test needs one that does not")
    for _ in range(2):
        await grow_overlay(overlay.path, "qcow2", size)
    info = json.loads(await qemu_img("info", "--output=json", overlay.path))
    assert (info["virtual-size"], info["backing-filename"]) == (size, str(blank))
    assert "No errors" in await qemu_img("check", overlay.path)
    if size <= 3 * GIB:
        raw = tmp_path / "raw"
        await qemu_img("convert", "-O", "raw", overlay.path, raw)
        assert raw.stat().st_size == size
        with raw.open("rb") as file:
            assert file.read(8) == b"content\0"
            file.seek(size - MIB)
            assert file.read() == bytes(MIB)
    await grow_overlay(overlay.path, "qcow2", 16 * MIB)
    assert json.loads(await qemu_img("info", "--output=json", overlay.path))["virtual-size"] == size


async def test_what_is_written_behind_the_old_end_stays(blank: Path, tmp_path: Path):
    overlay = await create_overlay(blank, tmp_path / "overlay", without_reflink=Method.QCOW2)
    await grow_overlay(overlay.path, overlay.format, 2 * GIB)
    program = ["qemu-io", "-f", overlay.format, "-c", f"write -P 7 {2 * GIB - 4096} 4096", str(overlay.path)]
    await run(program, timeout_s=120)
    await grow_overlay(overlay.path, overlay.format, 4 * GIB)
    program = ["qemu-io", "-f", overlay.format, "-c", f"read -P 7 {2 * GIB - 4096} 4096", str(overlay.path)]
    assert "Pattern verification failed" not in (await run(program, timeout_s=120)).text


async def test_what_is_no_disk_is_left_alone(tmp_path: Path):
    path = tmp_path / "overlay.qcow2"
    path.write_bytes(bytes(4096))
    with pytest.raises(Internal, match="no qcow2"):
        await grow_overlay(path, "qcow2", GIB)
    assert path.read_bytes() == bytes(4096)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        await grow_overlay(link, "raw", GIB)
    assert path.stat().st_size == 4096


def test_no_disk_is_larger_than_its_tables():
    check_size(MAX_BYTES)
    with pytest.raises(BadField, match="storage_bytes"):
        check_size(MAX_BYTES + 1)
