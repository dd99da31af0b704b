"""Drivers under test, and what their machines are made of.

One machine per driver and session is shared by the tests that do not harm it: each adopts it in its own event loop and
lets it go, as a restarted daemon does. Programs of the tests import this file, too.
"""

import asyncio
import base64
import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from fusevm.host.boot_files import BootFileFinder
from fusevm.host.cgroup import Cgroups, Limits, observe_mounts
from fusevm.host.channel import AgentClient
from fusevm.host.config import HostConfig
from fusevm.host.disk.overlay import Method, create_overlay
from fusevm.host.driver_choice import find_refusal
from fusevm.host.driver_choice import make_firecracker as make_driver
from fusevm.host.images.blank import ensure_blank
from fusevm.host.images.debian import build_debian
from fusevm.host.images.initramfs import agent_path, ensure_initramfs
from fusevm.host.images.kernel import KernelStore
from fusevm.host.images.store import ImageStore
from fusevm.host.vmm.driver import BootPlan, Confinement, Driver, Vmm
from fusevm.host.vmm.firecracker.driver import FirecrackerDriver
from fusevm.host.vmm.qemu import PROGRAM, QemuDriver
from fusevm.model.errors import VmmMissing
from fusevm.model.machine import VmmProcess
from fusevm.testing.fake_firecracker.install import install

sys.path.insert(0, str(Path(__file__).parents[2]))

from own_world import machines_network, run_prefix

#: Generous: two cores, software emulation, and whatever else the machine does.
BOOT_S = 120
DISK_BYTES = 1 << 30
#: Of machines whose VMM has a user of its own.
UID = 71_236
#: The real programs, for the processes of the tests, too; empty for the fake.
REAL = "FUSE_TEST_REAL_FIRECRACKER"
DATA = Path(os.environ.get("FUSE_TEST_DATA", "/var/cache/fuse-test"))


class Artefacts(msgspec.Struct, frozen=True, kw_only=True):
    """Files that machines are made of."""

    data: Path
    kernel: Path
    initramfs: Path
    #: With the modules of the vsock device.
    vsock_initramfs: Path
    image: Path
    blank: Path


class DriverUnderTest(msgspec.Struct, frozen=True, kw_only=True):
    """A driver and what its suite has to know about it."""

    name: str
    make: Callable[[Path], Driver]
    #: The same driver where its program is not installed.
    make_missing: Callable[[], Driver]
    #: How a private disk is made where blocks cannot be shared.
    overlays: Literal[Method.QCOW2, Method.SPARSE_COPY]


def look_for_real() -> None:
    """Note Firecracker and its jailer, where they are installed and boot our kernel: then they are what is tested."""
    names = [os.environ.get(name) for name in ("FIRECRACKER_BINARY_PATH", "JAILER_BINARY_PATH")]
    firecracker, jailer = (Path(name) if name else None for name in names)
    config = HostConfig(data_root=DATA, firecracker_binary=firecracker, jailer_binary=jailer)
    driver = make_driver(config, lambda _added: None)

    async def look() -> str:
        refusal = await find_refusal(config, driver, BootFileFinder(config, "firecracker"))
        print(f"the contract's firecracker is {'a fake: ' + refusal if refusal else 'the real one'}")
        return "" if refusal else "\n".join(map(str, await driver.find_programs()))

    with machines_network():
        os.environ[REAL] = asyncio.run(look())


def make_firecracker(folder: Path) -> FirecrackerDriver:
    """The driver on the real one, or on the fake, whose machines are real guests in emulation."""
    if real := os.environ.get(REAL):
        return FirecrackerDriver(**dict(zip(("firecracker", "jailer"), real.split("\n"), strict=True)))
    programs = folder / "programs"
    if not programs.exists():
        programs.mkdir()
        install(programs, agent_path(), guests="qemu")
    return FirecrackerDriver(firecracker=str(programs / "firecracker"), jailer=str(programs / "jailer"))


DRIVERS = {
    "qemu": DriverUnderTest(
        name="qemu",
        make=lambda data: QemuDriver(cache_dir=data),
        make_missing=lambda: QemuDriver(program="qemu-of-nowhere"),
        overlays=Method.QCOW2,
    ),
    "firecracker": DriverUnderTest(
        name="firecracker",
        make=make_firecracker,
        make_missing=lambda: FirecrackerDriver(firecracker="firecracker-of-nowhere"),
        overlays=Method.SPARSE_COPY,
    ),
}


@pytest.fixture(scope="session")
def drivers() -> dict[str, DriverUnderTest]:
    """All of them, by name."""
    return DRIVERS


#: The jailer is for root alone.
NAMES = sorted(DRIVERS) if os.geteuid() == 0 else ["qemu"]


@pytest.fixture(scope="session", params=NAMES)
def under_test(request: pytest.FixtureRequest) -> DriverUnderTest:
    """One driver after the other."""
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"{PROGRAM} is not installed")
    if request.param == "firecracker":
        look_for_real()
    return DRIVERS[request.param]


@pytest.fixture(scope="session")
def guest_artefacts() -> Artefacts:
    """Kernel, initramfs, image and blank: found in the data directory of the tests, else made there."""
    data = DATA
    try:
        data.mkdir(parents=True, exist_ok=True)
        agent_path()
    except OSError as e:
        pytest.skip(f"no test data directory ({e}); name one with FUSE_TEST_DATA")
    except VmmMissing as e:
        pytest.skip(str(e))
    with machines_network():
        return asyncio.run(_ensure_artefacts(data))


async def _ensure_artefacts(data: Path) -> Artefacts:
    agent = os.environ.get("FUSE_TEST_AGENT")
    kernel = await KernelStore(data).ensure()
    image = await ImageStore(data).find("debian-12")
    if image is None:
        image = (await build_debian(ImageStore(data), "debian-12")).image
    return Artefacts(
        data=data,
        kernel=kernel.vmlinux,
        initramfs=await ensure_initramfs(data, kernel, Path(agent) if agent else None),
        vsock_initramfs=await ensure_initramfs(data, kernel, Path(agent) if agent else None, with_vsock=True),
        image=image.rootfs,
        blank=await ensure_blank(data, DISK_BYTES),
    )


@pytest.fixture(scope="session")
def workshop(guest_artefacts: Artefacts) -> Iterator[Path]:
    """A folder with a short path (sockets have 107 bytes), on the file system of the artefacts (jails link to them)."""
    folder = Path(tempfile.mkdtemp(prefix="fuse-", dir=guest_artefacts.data))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


class Workbench:
    """Makes plans and machines; everything is killed and removed at the end."""

    def __init__(
        self, under_test: DriverUnderTest, artefacts: Artefacts, folder: Path, cgroups: Cgroups | None = None
    ) -> None:
        self.under_test = under_test
        self.artefacts = artefacts
        self.folder = folder
        self.driver = under_test.make(folder)
        self._vmms: list[Vmm] = []
        self._cgroups = cgroups

    async def plan(self, *, disks: bool = True, parameters: str = "", **changes) -> BootPlan:
        """Plan a machine of its own; `changes` are fields of BootPlan."""
        machine_id = f"m-{secrets.token_hex(5)}"
        run_dir = self.folder / machine_id
        run_dir.mkdir()
        fields: dict = {
            "machine_id": machine_id,
            "cpus": 1,
            "memory_mib": 256,
            "kernel": self.artefacts.kernel,
            "initramfs": self.artefacts.vsock_initramfs
            if self.under_test.name == "firecracker"
            else self.artefacts.initramfs,
            "command_line": f"fuse.nonce={render_nonce(machine_id)} {parameters}".strip(),
            "run_dir": run_dir,
            "console_log": run_dir / "console.log",
        }
        if disks:
            overlay = await create_overlay(
                self.artefacts.blank, run_dir / "overlay", without_reflink=self.under_test.overlays
            )
            fields |= {"image": self.artefacts.image, "overlay": overlay.path, "overlay_format": overlay.format}
        return BootPlan(**(fields | changes))

    async def grouped_plan(self) -> BootPlan:
        """Plan a machine with control groups, as a daemon that is root does."""
        plan = await self.plan()
        if self._cgroups is None:
            return plan
        group = await self._cgroups.ensure(plan.machine_id, Limits(memory_bytes=1 << 30, cpus=2))
        return msgspec.structs.replace(plan, confinement=Confinement(cgroups=group.paths))

    async def confined_plan(self) -> BootPlan:
        """Plan a machine whose VMM has a user of its own, as a daemon that is root does; as others, without."""
        plan = await self.plan()
        if os.geteuid() != 0 or plan.overlay is None:
            return plan
        os.chown(plan.overlay, UID, UID)
        return msgspec.structs.replace(plan, confinement=Confinement(uid=UID, gid=UID))

    async def boot(self, plan: BootPlan | None = None, **changes) -> Vmm:
        """Boot a machine that is killed after the test."""
        vmm = await self.driver.boot(plan or await self.plan(**changes))
        self._vmms.append(vmm)
        return vmm

    async def close(self) -> None:
        """Kill every machine of this bench."""
        for vmm in self._vmms:
            with contextlib.suppress(ConnectionError):
                await vmm.kill()
            await vmm.close()
        if self._cgroups is not None:
            for name in await self._cgroups.names():
                await self._cgroups.remove(name)


def render_nonce(machine_id: str) -> str:
    """Return the nonce that a machine of the bench is given."""
    return machine_id.removeprefix("m-").ljust(32, "0")


class Agent:
    """The few calls that the suite needs."""

    def __init__(self, vmm: Vmm) -> None:
        self.http = AgentClient(vmm.open_stream)

    async def health(self) -> dict:
        async with asyncio.timeout(BOOT_S), await self.http.request("GET", "/health") as response:
            assert response.status == 200
            return json.loads(await response.read())

    async def configure(self, body: dict) -> None:
        """Tell the guest what a host tells it after its boot."""
        sent = json.dumps(body).encode()
        async with asyncio.timeout(BOOT_S), await self.http.request("POST", "/configure", body=sent) as response:
            assert response.status == 200, await response.read()

    async def shell(self, text: str) -> str:
        """Run a command that must succeed and return its output."""
        body = json.dumps({"shell": text}).encode()
        async with asyncio.timeout(BOOT_S), await self.http.request("POST", "/exec", body=body) as response:
            answer = json.loads(await response.read())
        assert response.status == 200, answer
        output = base64.b64decode(answer["stdout_b64"]).decode()
        assert answer["exit_code"] == 0, (answer, base64.b64decode(answer["stderr_b64"]))
        return output


class Shared(msgspec.Struct, frozen=True):
    """The machine that many tests share."""

    plan: BootPlan
    process: VmmProcess


@pytest.fixture(scope="session")
def shared(under_test: DriverUnderTest, guest_artefacts: Artefacts, workshop: Path) -> Iterator[Shared]:
    """A running machine with disks."""
    bench = Workbench(under_test, guest_artefacts, workshop)

    async def start() -> Shared:
        plan = await bench.plan()
        vmm = await bench.driver.boot(plan)
        try:
            await Agent(vmm).health()
        except BaseException:
            await vmm.kill()
            raise
        await vmm.close()
        return Shared(plan, vmm.process)

    async def stop(machine: Shared) -> None:
        vmm = await bench.driver.adopt(machine.plan, machine.process)
        if vmm is not None:
            await vmm.kill()

    machine = asyncio.run(start())
    yield machine
    asyncio.run(stop(machine))
    shutil.rmtree(machine.plan.run_dir)


@pytest.fixture
async def vmm(shared: Shared, under_test: DriverUnderTest, workshop: Path) -> AsyncIterator[Vmm]:
    """The shared machine, adopted for this test."""
    adopted = await under_test.make(workshop).adopt(shared.plan, shared.process)
    assert adopted is not None
    yield adopted
    await adopted.close()


@pytest.fixture
def agent(vmm: Vmm) -> Agent:
    return Agent(vmm)


@pytest.fixture
def machine_groups() -> Iterator[Cgroups | None]:
    """Control groups below a parent of our own, removed afterwards; None without root."""
    if os.geteuid() != 0:
        yield None
        return
    parent = f"{run_prefix()}-{secrets.token_hex(3)}"
    groups = Cgroups(parent, observe_mounts())
    yield groups
    for root in groups.roots():
        with contextlib.suppress(FileNotFoundError):
            (root / parent).rmdir()


@pytest.fixture
async def bench(
    under_test: DriverUnderTest, guest_artefacts: Artefacts, workshop: Path, machine_groups: Cgroups | None
) -> AsyncIterator[Workbench]:
    """Machines of this test alone. Afterwards nothing may be left of them."""
    folder = workshop / secrets.token_hex(3)
    folder.mkdir()
    made = Workbench(under_test, guest_artefacts, folder, machine_groups)
    yield made
    await made.close()
    for path in folder.glob("*/overlay"):
        path.unlink()
    shutil.rmtree(folder / "programs", ignore_errors=True)
    left = [p for p in folder.rglob("*") if not p.is_dir() and not p.name.startswith(("console.log", "tsc.json"))]
    shutil.rmtree(folder)
    assert not left, f"left behind: {left}"


@pytest.fixture
def agent_of() -> Callable[[Vmm], Agent]:
    """Talk to the agent of a machine."""
    return Agent


@pytest.fixture
def nonce_of() -> Callable[[str], str]:
    """The nonce that the agent of a machine must repeat."""
    return render_nonce
