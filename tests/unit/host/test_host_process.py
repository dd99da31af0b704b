"""`python -m fusevm.host` as a process: what it says and how it ends when it cannot start; versions it observes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusevm.host.driver_choice import parse_vmm_version
from fusevm.host.journal import lock_directory


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run directory with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="fh-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder)


def serve(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fusevm.host", "--instance", f"h{os.getpid()}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_a_directory_in_use_is_a_conflict(run_dir: Path, tmp_path: Path) -> None:
    fd = lock_directory(run_dir)
    try:
        done = serve("--data-root", str(tmp_path), "--run-dir", str(run_dir))
    finally:
        os.close(fd)
    assert done.returncode == 4
    assert f"fuse host: {run_dir} is in use by another process (pid {os.getpid()})" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_setting_is_wrong_usage(run_dir: Path) -> None:
    done = serve("--data-root", "relative", "--run-dir", str(run_dir))
    assert done.returncode == 2
    assert "fuse host: data_root: 'relative' is not an absolute path" in done.stderr


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright (c) 2003-2022", "7.2.22"),
        ("QEMU emulator version 10.0.2\n", "10.0.2"),
        ("version ", ""),
        ("", ""),
    ],
)
def test_the_version_of_the_vmm_is_read(text: str, version: str) -> None:
    assert parse_vmm_version(text) == version
