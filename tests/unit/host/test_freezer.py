"""Pausing control groups: on files that look like a kernel's, and on a real group."""

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from fusevm.host.cgroup import Cgroups, Limits, observe_mounts
from fusevm.host.freezer import freeze, is_frozen, thaw
from fusevm.model.errors import NotSupported, Timeout

sys.path.insert(0, str(Path(__file__).parents[2]))

from own_world import run_prefix


def make_v2(folder: Path, state: str) -> Path:
    (folder / "cgroup.freeze").write_text("0")
    (folder / "cgroup.events").write_text(state)
    return folder


async def test_v2_is_ordered_by_one_file_and_looked_at_in_another(tmp_path):
    group = make_v2(tmp_path, "populated 1\nfrozen 0\n")
    freezing = asyncio.ensure_future(freeze([tmp_path / "absent", group]))
    while (group / "cgroup.freeze").read_text() != "1":
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    assert not freezing.done()
    (group / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    await freezing
    assert is_frozen([group])
    thaw([group])
    assert (group / "cgroup.freeze").read_text() == "0"


async def test_what_does_not_stop_is_let_go_on(tmp_path):
    group = make_v2(tmp_path, "frozen 0\n")
    with pytest.raises(Timeout):
        await freeze([group], limit_s=0.02)
    assert (group / "cgroup.freeze").read_text() == "0"


async def test_a_cancelled_pause_leaves_nothing_frozen(tmp_path):
    group = make_v2(tmp_path, "frozen 0\n")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await freeze([group])
    assert (group / "cgroup.freeze").read_text() == "0"


async def test_without_a_freezer_a_pause_is_refused_and_a_resume_needs_nothing(tmp_path):
    with pytest.raises(NotSupported, match="without a control group"):
        await freeze([tmp_path])
    thaw([tmp_path])
    assert not is_frozen([tmp_path])
    assert not is_frozen([])


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_a_real_process_stops_and_goes_on():
    parent = f"{run_prefix()}-fz{secrets.token_hex(2)}"
    cgroups = Cgroups(parent, observe_mounts())
    group = await cgroups.ensure("busy", Limits(memory_bytes=1 << 28, cpus=1))
    words = ["sh", "-c", 'for f in "$@"; do echo 0 > "$f/cgroup.procs"; done; while :; do echo x; done', "sh"]
    process = subprocess.Popen([*words, *map(str, group.paths)], stdout=subprocess.PIPE, bufsize=0)
    try:
        assert process.stdout.read(2) == b"x\n"
        await freeze(group.paths)
        assert is_frozen(group.paths)
        os.set_blocking(process.stdout.fileno(), False)
        while process.stdout.read(1 << 16):  # what it wrote before
            pass
        await asyncio.sleep(0.1)
        assert process.stdout.read(1) is None
        thaw(group.paths)
        os.set_blocking(process.stdout.fileno(), True)
        assert process.stdout.read(1) == b"x"
    finally:
        thaw(group.paths)
        process.kill()
        process.wait()
        process.stdout.close()
        await cgroups.remove("busy")
        for root in cgroups.roots():
            with contextlib.suppress(FileNotFoundError):
                (root / parent).rmdir()
