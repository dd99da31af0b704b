"""A QEMU that ends at once is heard, however late the driver comes to listen."""

import asyncio
import os
from pathlib import Path

import pytest

from fusevm.host.vmm.driver import BootPlan
from fusevm.host.vmm.qemu import QemuDriver
from fusevm.model.errors import BootFailed


def children() -> set[int]:
    """Also those that have ended, and that nobody has waited for."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return {int(pid) for line in lists for pid in line.split()}


async def test_the_last_words_of_a_qemu_that_has_ended_before_the_driver_goes_on(tmp_path):
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 3\n")
    program.chmod(0o755)
    plan = BootPlan(
        machine_id="m-1",
        cpus=1,
        memory_mib=64,
        kernel=tmp_path / "kernel",
        initramfs=tmp_path / "initramfs",
        command_line="",
        run_dir=tmp_path,
        console_log=tmp_path / "console.log",
    )
    before = children()
    booting = asyncio.create_task(QemuDriver(accelerator="kvm", program=str(program)).boot(plan))
    # It is started in a thread. This task has a turn in every round of the loop, so it sees the process before the
    # driver is told of it, and then lets nobody else have one until the process has ended.
    while not (started := children() - before):
        assert not booting.done()
        await asyncio.sleep(0)
    os.waitid(os.P_PID, started.pop(), os.WEXITED | os.WNOWAIT)
    with pytest.raises(BootFailed, match="no such luck"):
        await booting
