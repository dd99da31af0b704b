"""A step that is killed within, before any one of its changes, is finished by the next run, and leaves nothing else."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import killed_steps

_spec = importlib.util.spec_from_file_location(
    "bzimages", Path(__file__).parents[1] / "host" / "images" / "test_bzimage.py"
)
bzimages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bzimages)


@pytest.mark.parametrize("kind", killed_steps.CASES)
def test_a_step_that_was_killed_anywhere_within_is_finished_by_the_next_run(kind: str, tmp_path: Path):
    (tmp_path / "vmlinux").write_bytes(bzimages.make_elf())
    (tmp_path / "work").mkdir()
    environ = {**os.environ, "FUSE_TEST_KERNEL": str(tmp_path / "vmlinux")}
    words = [sys.executable, killed_steps.__file__, kind, str(tmp_path / "work")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environ, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2
