"""Waiting for an apt that outlives a killed run."""

import subprocess
import sys
from pathlib import Path

import pytest

from fusevm.cli.failures import CliError
from fusevm.cli.install.packages import wait_for_dpkg

HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


@pytest.mark.parametrize("which", [0, 1])
async def test_any_of_its_locks_is_waited_for(tmp_path: Path, which: int):
    locks = [tmp_path / "frontend", tmp_path / "lists"]
    for lock in locks:
        lock.touch()
    locks.append(tmp_path / "archives")  # not there: nobody has it
    pipe = subprocess.PIPE
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(locks[which])], stdin=pipe, stdout=pipe, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "\n"
        with pytest.raises(CliError, match=str(locks[which])):
            await wait_for_dpkg(locks, limit_s=0)
    finally:
        holder.communicate("\n")
    await wait_for_dpkg(locks, limit_s=0)
    assert not locks[-1].exists()
