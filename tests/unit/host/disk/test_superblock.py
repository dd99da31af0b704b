"""Whether a guest took leave of its disk in order, on real file systems in both formats."""

import subprocess
from pathlib import Path
from typing import Literal

import pytest

from fusevm.host.disk.superblock import is_cleanly_left

Kind = Literal["raw", "qcow2"]


def run(*words: str | Path) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True, timeout=60)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A clean file system."""
    path = tmp_path / "disk.raw"
    run("mke2fs", "-q", "-t", "ext4", path, "8M")
    return path


def in_format(disk: Path, kind: Kind) -> Path:
    if kind == "raw":
        return disk
    target = disk.with_suffix(".qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, target)
    return target


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_disk_that_was_left_in_order(disk: Path, kind: Kind):
    assert is_cleanly_left(in_format(disk, kind), kind) is True


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("change", ["feature needs_recovery", "ssv state 0"])
def test_a_disk_that_was_torn_away(disk: Path, kind: Kind, change: str):
    run("debugfs", "-w", "-R", change, disk)
    assert is_cleanly_left(in_format(disk, kind), kind) is False


def test_what_cannot_be_read_tells_nothing(tmp_path: Path, disk: Path):
    empty, foreign, short = tmp_path / "empty.qcow2", tmp_path / "foreign", tmp_path / "short"
    run("qemu-img", "create", "-q", "-f", "qcow2", empty, "8M")
    foreign.write_bytes(bytes(1 << 16))
    short.write_bytes(b"QFI\xfb")
    assert is_cleanly_left(empty, "qcow2") is None
    assert is_cleanly_left(foreign, "raw") is None
    assert is_cleanly_left(foreign, "qcow2") is None
    assert is_cleanly_left(short, "qcow2") is None
    assert is_cleanly_left(short, "raw") is None
    assert is_cleanly_left(tmp_path / "missing", "raw") is None
    compressed = tmp_path / "compressed.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", disk, compressed)
    assert is_cleanly_left(compressed, "qcow2") is None
