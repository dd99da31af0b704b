"""Which driver runs the machines, and why: with Firecracker's fake, and hosts that lack this or that."""

import os
import sys
from pathlib import Path
from typing import Literal

import pytest

from fusevm.host.boot_files import BootFileFinder, BootFiles
from fusevm.host.config import HostConfig
from fusevm.host.disk.overlay import Method
from fusevm.host.driver_choice import choose_engine, find_refusal, make_firecracker
from fusevm.host.images.initramfs import agent_path
from fusevm.host.images.kernel import DEFAULT, KernelStore
from fusevm.host.images.names import Names
from fusevm.host.vmm.driver import BootPlan
from fusevm.host.vmm.firecracker.pins import KERNELS, VERSION_TEXT, release_folder
from fusevm.model.errors import BadSetting, VmmMissing
from fusevm.testing.fake_firecracker.install import install
from fusevm.testing.processes import find_processes

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
#: An ELF file, to be taken for a kernel.
KERNEL = Path(sys.executable).resolve()


class Files(BootFileFinder):
    """Boot files of the test."""

    def __init__(self, config: HostConfig, found: BootFiles | None) -> None:
        super().__init__(config, "firecracker")
        self.found = found

    async def try_find(self) -> BootFiles | None:
        return self.found


class Host:
    """A host with a data directory, and whatever is installed on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir()
        self.kvm = folder / "kvm"
        self.kvm.write_bytes(b"")
        for name in ("vmlinux", "initramfs.cpio"):
            (self.data / name).write_bytes(name.encode())

    def config(self, driver: Literal["auto", "firecracker", "qemu"] = "auto", **changes) -> HostConfig:
        return HostConfig(data_root=self.data, run_dir=self.folder / "run", driver=driver, **changes)

    def install(self, **changes) -> dict[str, Path]:
        """The fake; the settings that name it."""
        (self.folder / "programs").mkdir()
        programs = install(self.folder / "programs", agent_path(), guests="process", **changes)
        return {"firecracker_binary": programs.firecracker, "jailer_binary": programs.jailer}

    async def refusal(self, config: HostConfig, found: BootFiles | None) -> str:
        driver = make_firecracker(config, lambda _added: None)
        return await find_refusal(config, driver, Files(config, found), self.kvm)

    @property
    def boot_files(self) -> BootFiles:
        return BootFiles(
            kernel=self.data / "vmlinux",
            initramfs=self.data / "initramfs.cpio",
            kernel_digest="k",
            kernel_version="6",
            agent_version="a",
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    tmp_path.chmod(0o755)
    return Host(tmp_path)


def ignore(_added) -> None:
    """Nobody counts."""


async def test_a_host_on_which_a_machine_boots_takes_firecracker_and_remembers_it(host):
    config = host.config(**host.install())
    assert await host.refusal(config, host.boot_files) == ""
    assert not list(host.data.glob("probe-*"))
    assert find_processes("probe-") == []
    (host.data / "initramfs.cpio").write_bytes(b"another")
    (host.folder / "programs" / "fused").unlink()  # no machine would boot now
    assert await host.refusal(config, host.boot_files) != ""


async def test_what_was_found_out_is_not_tried_again(host):
    config = host.config(**host.install())
    assert await host.refusal(config, host.boot_files) == ""
    (host.folder / "programs" / "fused").unlink()
    assert await host.refusal(config, host.boot_files) == ""


@pytest.mark.parametrize(
    ("versions", "changes", "words"),
    [
        (None, {}, "firecracker is not installed"),
        ({"version": "1.16.0", "jailer_version": "1.16.0"}, {}, "loses connections"),
        ({}, {"kvm": "nothing"}, "nothing cannot be used (No such file or directory)"),
        ({}, {"kernel": None}, "there is no kernel to try it with"),
        ({}, {"artefact_root": Path("/dev/shm")}, "keep both on one file system"),
    ],
)
async def test_a_host_without_something_says_what(host, monkeypatch, versions, changes, words):
    monkeypatch.setenv("PATH", "/nowhere")
    programs = host.install(**versions) if versions is not None else {}
    config = host.config(**programs, **{name: changes[name] for name in changes if name == "artefact_root"})
    host.kvm = host.folder / changes.get("kvm", "kvm")
    found = changes.get("kernel", host.boot_files)
    assert words in await host.refusal(config, found)


async def test_a_vmm_that_ends_at_once_is_not_waited_for_and_its_words_are_the_reason(host):
    programs = host.install()
    (host.data / "vmlinux").write_bytes(b"")
    assert "invalid kernel image" in await host.refusal(host.config(**programs), host.boot_files)


async def test_as_configured_nothing_is_tried(host):
    engine = await choose_engine(host.config("firecracker", kernel=KERNEL, **host.install()), ignore, kvm=host.kvm)
    assert (engine.driver.name, engine.title) == ("firecracker", "firecracker (kvm)")
    assert engine.why == "Firecracker, as configured"
    assert engine.version == VERSION_TEXT
    assert engine.overlays is Method.SPARSE_COPY
    assert not (host.data / "firecracker-probe.json").exists()
    engine = await choose_engine(host.config("qemu", kernel=KERNEL), ignore, kvm=host.kvm)
    assert engine.why == "QEMU in software emulation, as configured"
    assert engine.overlays is Method.QCOW2


async def test_firecracker_that_is_not_there_is_missing_for_creates_and_not_for_the_daemon(host, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    engine = await choose_engine(host.config("firecracker", kernel=KERNEL), ignore, kvm=host.kvm)
    assert engine.version == ""
    plan = BootPlan(
        machine_id="m-1",
        cpus=1,
        memory_mib=128,
        kernel=host.data / "vmlinux",
        initramfs=host.data / "initramfs.cpio",
        command_line="",
        run_dir=host.folder,
        console_log=host.folder / "console.log",
    )
    with pytest.raises(VmmMissing, match="fuse host install"):
        await engine.driver.boot(plan)


async def test_auto_names_both_reasons(host, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    host.kvm = host.folder / "nothing"
    engine = await choose_engine(host.config(kernel=KERNEL), ignore, kvm=host.kvm)
    assert engine.title == "qemu (tcg)"
    assert "software emulation" in engine.why
    assert "not Firecracker: firecracker is not installed" in engine.why


async def test_firecracker_where_it_cannot_be_is_a_bad_setting(host):
    config = host.config("firecracker", artefact_root=Path("/dev/shm"), **host.install())
    with pytest.raises(BadSetting, match="one file system"):
        await choose_engine(config, ignore, kvm=host.kvm)


async def test_what_was_installed_is_found_before_the_path(host, monkeypatch):
    folder = release_folder(host.data)
    folder.mkdir(parents=True)
    install(folder, agent_path(), guests="process")
    monkeypatch.setenv("PATH", "/nowhere")
    programs = await make_firecracker(host.config(), ignore).find_programs()
    assert programs.firecracker == folder / "firecracker"


@pytest.mark.parametrize(
    ("driver", "is_installed", "named"),
    [("firecracker", True, "pinned"), ("firecracker", False, "debian"), ("qemu", True, "debian")],
)
async def test_firecracker_boots_the_kernel_that_it_is_tested_with(host, driver, is_installed, named):
    store, names = KernelStore(host.data), Names(host.data / "kernels")
    kernels = {"debian": await store.ensure(KERNEL), "pinned": await store.ensure(agent_path())}
    names.set(DEFAULT, kernels["debian"].digest)
    if is_installed:
        names.set(KERNELS[os.uname().machine].key, kernels["pinned"].digest)
    found = await BootFileFinder(host.config(), driver).find()
    assert found.kernel == kernels[named].vmlinux
    assert found.initramfs.stem.endswith("-vsock") == (driver == "firecracker")
