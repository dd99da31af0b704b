"""Plans of machines, and machines on the fake whose guests are processes: as root, each in a real jail."""

import contextlib
import os
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from fusevm.host.cgroup import Cgroups, Limits, observe_mounts
from fusevm.host.channel import AgentClient
from fusevm.host.images.initramfs import agent_path
from fusevm.host.vmm.driver import BootPlan, Confinement, Nic, Vmm
from fusevm.host.vmm.firecracker import staging
from fusevm.host.vmm.firecracker.driver import FirecrackerDriver
from fusevm.host.vmm.firecracker.overwatch import PATIENCE, Patience
from fusevm.model.machine import VmmProcess
from fusevm.testing.fake_firecracker.install import Programs, install

sys.path.insert(0, str(Path(__file__).parents[4]))

from own_world import run_prefix

UID = 71_234


@pytest.fixture
def whole_plan(tmp_path: Path) -> BootPlan:
    """A machine with everything that one can have. Nothing of it exists."""
    return BootPlan(
        machine_id="m-1",
        cpus=2,
        memory_mib=512,
        kernel=tmp_path / "vmlinux",
        initramfs=tmp_path / "initramfs",
        command_line="fuse.nonce=abc",
        image=tmp_path / "image",
        overlay=tmp_path / "overlay",
        overlay_format="raw",
        run_dir=tmp_path,
        console_log=tmp_path / "console.log",
        nic=Nic(tap="tap0", mac="06:00:0a:09:00:02"),
    )


class Bench:
    """A driver on the fake, and machines that are killed after the test."""

    uid = UID

    def __init__(self, folder: Path, cgroups: Cgroups) -> None:
        self.folder = folder
        self.counted: Counter[str] = Counter()
        self.programs = self.install("programs")
        self.driver = self.make_driver()
        self._cgroups = cgroups
        self._vmms: list[Vmm] = []

    def install(self, folder: str, **changes) -> Programs:
        """Another installation of the fake."""
        (self.folder / folder).mkdir()
        return install(self.folder / folder, agent_path(), guests="process", **changes)

    def make_driver(self, programs: Programs | None = None, patience: Patience = PATIENCE) -> FirecrackerDriver:
        """A driver as a daemon has it."""
        programs = programs or self.programs
        return FirecrackerDriver(
            firecracker=str(programs.firecracker),
            jailer=str(programs.jailer),
            count=self.counted.update,
            patience=patience,
        )

    async def plan(self, **changes) -> BootPlan:
        """A machine of its own, with control groups and a user."""
        machine_id = f"m-{secrets.token_hex(5)}"
        folder = self.folder / machine_id
        folder.mkdir()
        for name in ("vmlinux", "initramfs", "overlay"):
            (folder / name).write_bytes(b"content")
        os.chown(folder / "overlay", UID, UID)
        group = await self._cgroups.ensure(machine_id, Limits(memory_bytes=1 << 30, cpus=1))
        fields = {
            "machine_id": machine_id,
            "cpus": 1,
            "memory_mib": 128,
            "kernel": folder / "vmlinux",
            "initramfs": folder / "initramfs",
            "command_line": f"fuse.nonce={machine_id}",
            "overlay": folder / "overlay",
            "overlay_format": "raw",
            "run_dir": folder,
            "console_log": folder / "console.log",
            "confinement": Confinement(uid=UID, gid=UID, cgroups=group.paths),
        }
        return BootPlan(**(fields | changes))

    async def boot(self, plan: BootPlan | None = None, driver: FirecrackerDriver | None = None) -> Vmm:
        """Boot a machine."""
        vmm = await (driver or self.driver).boot(plan or await self.plan())
        self._vmms.append(vmm)
        return vmm

    async def adopt(self, plan: BootPlan, process: VmmProcess, driver: FirecrackerDriver | None = None) -> Vmm:
        """Take over a machine, as a later daemon does."""
        vmm = await (driver or self.driver).adopt(plan, process)
        assert vmm is not None
        self._vmms.append(vmm)
        return vmm

    async def ask_nonce(self, vmm: Vmm) -> str:
        """Ask the agent for its nonce."""
        agent = AgentClient(vmm.open_stream)
        try:
            async with await agent.request("GET", "/health") as response:
                return msgspec.json.decode(await response.read())["nonce"]
        finally:
            await agent.close()

    def sweep(self) -> None:
        """Remove what a driver with a bug has left."""
        for folder in self.folder.glob("m-*"):
            staging.remove(folder / "jail")
            (folder / "vmm.out").unlink(missing_ok=True)

    async def close(self) -> None:
        """Kill every machine."""
        for vmm in self._vmms:
            with contextlib.suppress(ConnectionError):
                await vmm.kill()
            await vmm.close()


@pytest.fixture
def cgroups() -> Iterator[Cgroups]:
    """A parent of our own, removed afterwards."""
    parent = f"{run_prefix()}-fc{secrets.token_hex(2)}"
    groups = Cgroups(parent, observe_mounts())
    yield groups
    for root in groups.roots():
        with contextlib.suppress(FileNotFoundError):
            (root / parent).rmdir()


@pytest.fixture
async def bench(tmp_path: Path, cgroups: Cgroups) -> AsyncIterator[Bench]:
    """Machines of this test alone. Afterwards nothing may be left of them."""
    tmp_path.chmod(0o755)
    made = Bench(tmp_path, cgroups)
    yield made
    await made.close()
    for name in await cgroups.names():
        await cgroups.remove(name)
    left = [path for path in tmp_path.glob("m-*/*") if path.name in ("jail", "vmm.out")]
    assert not left, f"left behind: {left}"
