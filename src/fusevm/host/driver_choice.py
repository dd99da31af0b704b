"""How machines are run on this host: by Firecracker or by QEMU, with KVM or in emulation, and why.

`auto` takes Firecracker where it boots our kernel to the agent's first answer, since that a KVM opens says little about
whether it runs an ordinary Linux; else QEMU, with KVM where that does, in emulation elsewhere. What was found out is
kept for as long as host, programs and kernel stay what they are.

Owns: the decision. Must not: run machines, but for the one that is tried.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Final

import structlog

from fusevm.host.agent import ask_health
from fusevm.host.boot_files import BootFileFinder, BootFiles
from fusevm.host.config import HostConfig
from fusevm.host.disk.overlay import Method
from fusevm.host.engine import Engine
from fusevm.host.run import run
from fusevm.host.vmm.driver import BootPlan, Confinement, Driver, Vmm
from fusevm.host.vmm.firecracker import staging
from fusevm.host.vmm.firecracker.driver import FIRECRACKER, JAILER, FirecrackerDriver
from fusevm.host.vmm.firecracker.pins import VERSION_TEXT, release_folder
from fusevm.host.vmm.firecracker.vmm import Count
from fusevm.host.vmm.probe import (
    FIRECRACKER_FILE,
    KVM,
    TIMEOUT_S,
    Choice,
    choose_accelerator,
    find_boot_problem,
    open_problem,
    remembered,
)
from fusevm.host.vmm.qemu import PROGRAM, QemuDriver
from fusevm.host.vmm.qemu_args import overhead_mib
from fusevm.model.errors import BadSetting, Error
from fusevm.model.machine import VmmProcess

log = structlog.get_logger()

#: What Firecracker takes of the host's memory beside its guest's, in MiB: itself 5, page tables 2 per GiB, and pages of
#: its disks that are charged to it.
FIRECRACKER_OVERHEAD_MIB: Final = 64
_VERSION_TIMEOUT_S: Final = 10.0
_PROBE_MEMORY_MIB: Final = 256


class AnyDriver:
    """Boots with the driver that was chosen, and adopts what another one has booted before."""

    def __init__(self, chosen: Driver, firecracker: Driver, qemu: Driver) -> None:
        self._chosen = chosen
        # Asked first is who cannot be mistaken: a jail tells Firecracker's machines from others.
        self._all = (firecracker, qemu)

    @property
    def name(self) -> str:
        """The chosen one's."""
        return self._chosen.name

    async def boot(self, plan: BootPlan) -> Vmm:
        """Start a machine with the chosen driver."""
        return await self._chosen.boot(plan)

    async def adopt(self, plan: BootPlan, process: VmmProcess) -> Vmm | None:
        """Take over a machine, whoever has booted it."""
        for driver in self._all:
            vmm = await driver.adopt(plan, process)
            if vmm is not None:
                return vmm
        return None


async def choose_engine(config: HostConfig, count: Count, *, kvm: Path = KVM) -> Engine:
    """Decide, as configured or by trying: 8 s each for Firecracker and for QEMU's KVM, once per boot of the host.

    What is missing is missing for creates, too, and they say so. Raises BadSetting for a driver that cannot be had.
    """
    firecracker = make_firecracker(config, count)
    is_root = os.geteuid() == 0
    if config.driver == "firecracker":
        if not is_root:
            raise BadSetting(setting="driver", problem="firecracker's jailer needs root; choose qemu or auto")
        await asyncio.to_thread(_check_folders, config)
        return await _by_firecracker(config, firecracker, "Firecracker, as configured")
    why_not = ""
    if config.driver == "auto":
        files = BootFileFinder(config, "firecracker")
        why_not = await find_refusal(config, firecracker, files, kvm)
        if not why_not:
            return await _by_firecracker(config, firecracker, "Firecracker: a machine booted to its agent with it")
    finder = BootFileFinder(config, "qemu")
    choice = await _choose_accelerator(config, await finder.try_find(), kvm)
    qemu = QemuDriver(accelerator=choice.accelerator, cache_dir=config.data_root)
    return Engine(
        driver=AnyDriver(qemu, firecracker, qemu) if is_root else qemu,
        title=f"qemu ({choice.accelerator})",
        why=f"{choice.why}; not Firecracker: {why_not}" if why_not else choice.why,
        overhead_mib=overhead_mib(choice.accelerator),
        boot_files=finder,
        version=await observe_vmm_version(),
    )


def make_firecracker(config: HostConfig, count: Count) -> FirecrackerDriver:
    """The driver with the programs of the settings, or those of `fuse host install`, or those on the path."""
    programs: dict[str, Path | None] = {FIRECRACKER: config.firecracker_binary, JAILER: config.jailer_binary}
    return FirecrackerDriver(
        firecracker=_find_program(config, FIRECRACKER, programs[FIRECRACKER]),
        jailer=_find_program(config, JAILER, programs[JAILER]),
        count=count,
    )


async def find_refusal(config: HostConfig, driver: FirecrackerDriver, files: BootFileFinder, kvm: Path = KVM) -> str:
    """Why machines cannot be run by Firecracker on this host, or "". Boots one, unless it is known already."""
    if os.geteuid() != 0:
        return "its jailer needs root"
    try:
        programs = await driver.find_programs()
        await asyncio.to_thread(_check_folders, config)
    except Error as e:
        return e.message
    if problem := await asyncio.to_thread(open_problem, kvm):
        return f"{kvm} cannot be used ({problem})"
    found = await files.try_find()
    if found is None:
        return "there is no kernel to try it with"
    uid = config.uid_base + config.uid_count  # no machine's
    confinement = Confinement(uid=uid, gid=uid)
    return await remembered(
        config.data_root / FIRECRACKER_FILE,
        (programs.firecracker, programs.jailer, found.kernel, found.initramfs),
        lambda: _try_firecracker(config, driver, found, confinement),
    )


async def observe_vmm_version() -> str:
    """The version that QEMU says it has; empty when it cannot be asked: the daemon serves without, too."""
    try:
        done = await run([PROGRAM, "--version"], timeout_s=_VERSION_TIMEOUT_S)
    except (Error, OSError) as e:
        log.warning("vmm_version_unknown", problem=str(e))
        return ""
    return parse_vmm_version(done.text)


def parse_vmm_version(text: str) -> str:
    """The number in what `qemu-system-x86_64 --version` prints; empty when there is none."""
    return next(iter(text.partition("version ")[2].split()), "")


async def _by_firecracker(config: HostConfig, driver: FirecrackerDriver, why: str) -> Engine:
    finder = BootFileFinder(config, "firecracker")
    await finder.try_find()
    version = VERSION_TEXT
    try:
        await driver.find_programs()
    except Error as e:
        log.warning("firecracker_not_ready", problem=e.message, remedy="creates are refused until this is solved")
        version = ""
    return Engine(
        driver=AnyDriver(driver, driver, QemuDriver(cache_dir=config.data_root)),
        title="firecracker (kvm)",
        why=why,
        overhead_mib=FIRECRACKER_OVERHEAD_MIB,
        version=version,
        boot_files=finder,
        overlays=Method.SPARSE_COPY,
        taps="name",
    )


async def _choose_accelerator(config: HostConfig, files: BootFiles | None, kvm: Path) -> Choice:
    if config.driver == "qemu":
        return Choice(accelerator="tcg", why="QEMU in software emulation, as configured")
    if files is None:
        return Choice(accelerator="tcg", why="software emulation: KVM could not be tried without a kernel")
    try:
        return await choose_accelerator(files.kernel, files.initramfs, config.data_root, kvm=kvm)
    except (Error, OSError) as e:
        log.warning("kvm_not_tried", problem=str(e))
        return Choice(accelerator="tcg", why=f"software emulation: KVM could not be tried ({e})")


async def _try_firecracker(
    config: HostConfig, driver: FirecrackerDriver, files: BootFiles, confinement: Confinement
) -> str:
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="probe-", dir=config.data_root))
    try:
        plan = BootPlan(
            machine_id=f"probe-{secrets.token_hex(4)}",
            cpus=1,
            memory_mib=_PROBE_MEMORY_MIB,
            kernel=files.kernel,
            initramfs=files.initramfs,
            command_line="",
            run_dir=folder,
            console_log=folder / "console.log",
            confinement=confinement,
        )
        return await find_boot_problem(driver.boot, plan, ask_health, TIMEOUT_S)
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _check_folders(config: HostConfig) -> None:
    """Raise BadSetting where jails cannot be: they are links to files, with devices and a program of their own."""
    for folder in (config.data_root, config.artefacts):
        folder.mkdir(parents=True, exist_ok=True)
    staging.check_file_system(config.data_root)
    # Tried: a file cannot even be linked from one mount of a file system to another.
    name = f".link-{secrets.token_hex(4)}"
    source, target = config.artefacts / name, config.data_root / f"{name}.target"
    try:
        source.touch()
        os.link(source, target)
    except OSError as e:
        problem = (
            f"files of {config.artefacts} cannot be linked to {config.data_root} ({e.strerror}), and jails are links"
        )
        raise BadSetting(setting="data_root", problem=f"{problem}; keep both on one file system") from e
    finally:
        for path in (source, target):
            path.unlink(missing_ok=True)


def _find_program(config: HostConfig, name: str, given: Path | None) -> str:
    if given is not None:
        return str(given)
    folders = (release_folder(config.data_root), release_folder(config.artefacts))
    return next((str(folder / name) for folder in folders if (folder / name).is_file()), name)
