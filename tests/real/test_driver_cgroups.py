"""Control groups of the kernel at hand: limits hold, groups are killed and removed."""

import asyncio
import contextlib
import os
import secrets
import signal

import pytest

from fusevm.host.cgroup import Cgroup, Cgroups, Limits, has_run_out_of_memory, observe_mounts
from fusevm.host.process import ProcessHandle
from fusevm.host.vmm.driver import Confinement
from fusevm.host.vmm.launch import Launch, open_output, start_process

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
LIMITS = Limits(memory_bytes=64 << 20, cpus=0.5, pids=12)


@pytest.fixture
async def groups():
    parent = f"fuse-test-{secrets.token_hex(3)}"
    made = Cgroups(parent, observe_mounts())
    if not made.roots():
        pytest.skip("this host has no control groups")
    yield made
    for name in await made.names():
        await made.remove(name)
    for root in made.roots():
        with contextlib.suppress(FileNotFoundError):
            (root / parent).rmdir()


def start(tmp_path, group: Cgroup, script: str) -> ProcessHandle:
    output = open_output(tmp_path / "out")
    try:
        confinement = Confinement(cgroups=group.paths)
        launch = Launch(argv=["sh", "-c", script], pass_fds=(), output_fd=output, confinement=confinement)
        return ProcessHandle.of_child(start_process(launch))
    finally:
        os.close(output)


async def ensure(groups: Cgroups, limited: str) -> Cgroup:
    group = await groups.ensure("m-1", LIMITS)
    if any(reason.startswith(f"no {limited} limit") for reason in group.degraded):
        pytest.skip(f"no {limited} controller for us here: {group.degraded}")
    return group


async def test_more_memory_than_the_limit_ends_the_process(groups, tmp_path):
    group = await ensure(groups, "memory")
    handle = start(tmp_path, group, "head -c 200000000 /dev/zero | tail -c 190000000 | wc -c; exit 7")
    async with asyncio.timeout(60):
        assert await handle.wait() in (7, -signal.SIGKILL, 137)
    usage = [p / "memory.max_usage_in_bytes" for p in group.paths] + [p / "memory.peak" for p in group.paths]
    peaks = [int(path.read_text()) for path in usage if path.exists()]
    assert all(peak <= LIMITS.memory_bytes for peak in peaks)


async def test_a_group_that_ran_out_of_memory_says_so_and_another_does_not(groups, tmp_path):
    group = await ensure(groups, "memory")
    handle = start(tmp_path, group, "head -c 200000000 /dev/zero | tail -c 190000000")
    async with asyncio.timeout(60):
        await handle.wait()
    assert await groups.find("m-1") == Cgroup(paths=group.paths)
    assert has_run_out_of_memory(group.paths)
    other = await groups.ensure("m-2", LIMITS)
    killed = start(tmp_path, other, "exec sleep 60")
    killed.send(signal.SIGKILL)
    async with asyncio.timeout(60):
        await killed.wait()
    assert not has_run_out_of_memory(other.paths)
    await groups.remove("m-1")
    assert not has_run_out_of_memory(group.paths)
    assert await groups.find("m-1") == Cgroup()


async def test_more_processes_than_the_limit_are_refused(groups, tmp_path):
    group = await ensure(groups, "pids")
    script = "for i in $(seq 30); do sleep 30 & done; sleep 30"
    handle = start(tmp_path, group, script)
    async with asyncio.timeout(30):
        counts = [path / "pids.current" for path in group.paths if (path / "pids.current").exists()]
        for _ in range(200):
            await asyncio.sleep(0.01)
            assert all(int(count.read_text()) <= LIMITS.pids for count in counts)
        await groups.kill("m-1")
        await handle.wait()


async def test_kill_ends_all_of_a_group_and_remove_leaves_nothing(groups, tmp_path):
    group = await groups.ensure("m-1", LIMITS)
    other = await groups.ensure("m-2", LIMITS)
    doomed = start(tmp_path, group, "sleep 60 & sleep 60")
    spared = start(tmp_path, other, "exec sleep 60")
    await asyncio.sleep(0.1)
    async with asyncio.timeout(30):
        await groups.remove("m-1")
        assert await doomed.wait() == -signal.SIGKILL
    assert not spared.has_ended
    assert await groups.names() == {"m-2"}
    async with asyncio.timeout(30):
        await groups.remove("m-2")
        await spared.wait()
    assert await groups.names() == set()


async def test_ensuring_twice_changes_the_limits(groups):
    first = await groups.ensure("m-1", LIMITS)
    second = await groups.ensure("m-1", Limits(memory_bytes=128 << 20, cpus=2, pids=50))
    assert first.paths == second.paths
    for path in second.paths:
        for name in ("memory.limit_in_bytes", "memory.max"):
            if (path / name).exists():
                assert int((path / name).read_text()) == 128 << 20
