"""Overlays: a valid qcow2 made without a process, reflink and sparse copies, owners, space."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fusevm.host.disk.overlay import Method, allocated_bytes, create_overlay, sync_overlay
from fusevm.host.disk.qcow2 import CLUSTER, MAX_BYTES, render_overlay
from fusevm.model.errors import NoSpace

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
MIB = 1 << 20


@pytest.fixture
def blank(tmp_path) -> Path:
    """A sparse file with some content."""
    path = tmp_path / "blank.ext4"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(1 * MIB)
        file.write(os.urandom(MIB))
        file.seek(40 * MIB)
        file.write(b"end of content")
    path.chmod(0o444)
    return path


def no_reflink(monkeypatch) -> None:
    for module in ("overlay", "copy"):
        monkeypatch.setattr(f"fusevm.host.disk.{module}.share_blocks", lambda *_: False)


def qemu_img(*words) -> str:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_qemu_img
@pytest.mark.parametrize("size", [512, MIB, 511 * MIB, 512 * MIB + 512, 4 << 30, 1 << 40, 5 << 40, MAX_BYTES])
def test_qemu_finds_the_rendered_file_whole(tmp_path, size):
    (tmp_path / "backing").write_bytes(bytes(512))
    path = tmp_path / "overlay"
    path.write_bytes(render_overlay(size, str(tmp_path / "backing")))
    assert "No errors" in qemu_img("check", "-f", "qcow2", path)
    info = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", path))
    assert info["virtual-size"] == size
    assert info["backing-filename"] == str(tmp_path / "backing")
    assert info["backing-filename-format"] == "raw"
    assert info["cluster-size"] == CLUSTER
    assert info["format-specific"]["data"]["compat"] == "1.1"


@needs_qemu_img
def test_a_written_overlay_stays_whole_and_the_blank_untouched(tmp_path, blank):
    before = blank.read_bytes()
    path = tmp_path / "overlay"
    path.write_bytes(render_overlay(64 * MIB, str(blank)))
    writes = [word for at in (0, 1, 33, 63) for word in ("-c", f"write -P {at + 1} {at}M 1M")]
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, path], check=True, capture_output=True)
    assert "No errors" in qemu_img("check", "-f", "qcow2", path)
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    expected = bytearray(before)
    for at in (0, 1, 33, 63):
        expected[at * MIB : (at + 1) * MIB] = bytes([at + 1]) * MIB
    assert raw.read_bytes() == bytes(expected)
    assert blank.read_bytes() == before


@pytest.mark.parametrize("size", [0, 100, MAX_BYTES + 512])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="multiple of 512"):
        render_overlay(size, "/x")


def test_a_backing_name_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1023"):
        render_overlay(512, "/" + "x" * 1023)


@needs_qemu_img
async def test_without_reflink_it_is_a_small_qcow2_of_the_blanks_size(tmp_path, blank, monkeypatch):
    no_reflink(monkeypatch)
    overlay = await create_overlay(blank, tmp_path / "overlay")
    assert (overlay.format, overlay.method, overlay.size_bytes) == ("qcow2", Method.QCOW2, 64 * MIB)
    assert allocated_bytes(overlay.path) <= 4 * CLUSTER
    assert overlay.path.stat().st_mode & 0o777 == 0o600
    qemu_img("compare", "-f", "qcow2", "-F", "raw", overlay.path, blank)


async def test_a_sparse_copy_has_the_content_and_the_holes(tmp_path, blank, monkeypatch):
    no_reflink(monkeypatch)
    overlay = await create_overlay(blank, tmp_path / "overlay", without_reflink=Method.SPARSE_COPY)
    assert (overlay.format, overlay.method) == ("raw", Method.SPARSE_COPY)
    assert overlay.path.read_bytes() == blank.read_bytes()
    assert allocated_bytes(overlay.path) < 3 * MIB


async def test_a_reflink_is_raw(tmp_path, blank, monkeypatch):
    def share(source: int, target: int) -> bool:
        os.pwrite(target, os.pread(source, 64 * MIB, 0), 0)
        return True

    monkeypatch.setattr("fusevm.host.disk.overlay.share_blocks", share)
    overlay = await create_overlay(blank, tmp_path / "overlay")
    assert (overlay.format, overlay.method) == ("raw", Method.REFLINK)


async def test_what_is_there_is_not_overwritten(tmp_path, blank):
    (tmp_path / "overlay").write_text("precious")
    with pytest.raises(FileExistsError):
        await create_overlay(blank, tmp_path / "overlay")
    assert (tmp_path / "overlay").read_text() == "precious"


async def test_a_missing_blank_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        await create_overlay(tmp_path / "nothing", tmp_path / "overlay")
    assert list(tmp_path.iterdir()) == []


async def test_a_full_disk_is_an_error_of_ours_and_leaves_nothing(tmp_path, blank, monkeypatch):
    no_reflink(monkeypatch)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusevm.host.disk.overlay.os.write", full)
    with pytest.raises(NoSpace):
        await create_overlay(blank, tmp_path / "overlay")
    assert not (tmp_path / "overlay").exists()


async def test_a_disk_that_is_gone_takes_no_space_and_cannot_be_synced(tmp_path, blank):
    overlay = await create_overlay(blank, tmp_path / "overlay")
    await sync_overlay(overlay.path)
    overlay.path.unlink()
    assert allocated_bytes(overlay.path) == 0
    with pytest.raises(FileNotFoundError):
        await sync_overlay(overlay.path)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_the_owner_is_set(tmp_path, blank):
    overlay = await create_overlay(blank, tmp_path / "overlay", uid=70123, gid=70124)
    assert (overlay.path.stat().st_uid, overlay.path.stat().st_gid) == (70123, 70124)
