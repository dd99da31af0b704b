"""What a machine occupies on the host besides its VMM: directories, disk, control groups, network slot.

    <data_root>/machines/<id>/overlay.{raw,qcow2}   the disk, and what belongs to it (`disk.room`)
    <data_root>/machines/<id>/console.log           what the guest said (and console.log.1)
    <run_dir>/<id>/                                 sockets of the VMM

Everything follows from the machine's record, so that undoing needs no memory: `vacate` removes whatever is there.

Owns: those directories, and the order of making and removing. Must not: start VMMs, or change records.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from fusevm.host.admission import Limits
from fusevm.host.boot_files import BootFileFinder, BootFiles
from fusevm.host.cgroup import Cgroup, Cgroups, has_run_out_of_memory
from fusevm.host.cgroup import Limits as CgroupLimits
from fusevm.host.config import HostConfig
from fusevm.host.disk.grow import grow_overlay
from fusevm.host.disk.overlay import Method, WithoutReflink
from fusevm.host.disk.room import DiskRoom
from fusevm.host.disk.superblock import is_cleanly_left
from fusevm.host.faults import Fault
from fusevm.host.images.store import Image, ImageStore
from fusevm.host.images.store import ImageConfig as StoredConfig
from fusevm.host.net.terms import Terms
from fusevm.host.removal import remove_tree
from fusevm.host.rows import Numbers
from fusevm.host.strays import kill_strays
from fusevm.host.surroundings import Blueprint, Lodging, Remains
from fusevm.host.tasks import CleanUp, run_all
from fusevm.host.vmm.console import last_lines
from fusevm.host.vmm.driver import JAIL, BootPlan, Confinement, Rate
from fusevm.host.watermarks import observe_places
from fusevm.host.wiring import Wire, Wiring
from fusevm.model.errors import BadSetting, Internal, NoSpace
from fusevm.model.machine import Isolation, Machine, MachineSpec
from fusevm.wire.guest import Configure, ImageConfig

log = structlog.get_logger()

_TAIL_BYTES = 16 << 10
#: QEMU's own threads, in CPUs.
_VMM_CPUS = 0.5
#: A machine that runs needs its kernel no more.
_NO_FILES = BootFiles(kernel=Path(), initramfs=Path(), kernel_digest="", kernel_version="", agent_version="")


class HostQuarters:
    """Makes and removes quarters."""

    def __init__(
        self,
        config: HostConfig,
        *,
        images: ImageStore,
        boot_files: BootFileFinder,
        wiring: Wiring,
        cgroups: Cgroups | None,
        driver: str,
        overhead_mib: int,
        overlays: WithoutReflink = Method.QCOW2,
        fault: Fault,
    ) -> None:
        self._config = config
        self._images = images
        self._boot_files = boot_files
        self._wiring = wiring
        self._cgroups = cgroups
        self._driver = driver
        self._overhead_mib = overhead_mib
        self._fault = fault
        self._machines = config.data_root / "machines"
        self._is_confined = wiring.isolation is Isolation.NAMESPACE
        self.disks = DiskRoom(
            self._machines,
            config.artefacts,
            config.data_root / "snapshots",
            is_confined=self._is_confined,
            without_reflink=overlays,
        )
        self._said: set[str] = set()

    # -- the daemon's side ------------------------------------------------------------------------------------------

    async def open(self, slots: Mapping[int, Terms]) -> None:
        """Make the directories and take the network over. Raises BadSetting when VMMs could not reach their files."""
        await asyncio.to_thread(self._make_roots)
        await self._wiring.open(slots)

    async def close(self) -> None:
        """Stop serving; machines run on."""
        await self._wiring.close()

    async def resolve(self, spec: MachineSpec) -> Blueprint:
        """Find out what a machine would be made of. Raises ImageNotFound, ImageCorrupt, or why there is no kernel."""
        image = await self._images.resolve(spec.image)
        await self._images.touch(image)
        boot_files = await self._boot_files.find()
        return Blueprint(
            image_digest=image.digest,
            kernel_digest=boot_files.kernel_digest,
            driver=self._driver,
            isolation=self._wiring.isolation,
        )

    async def limits(self) -> Limits:
        """What there is to book, as of now."""
        return await asyncio.to_thread(self._observe_limits)

    def numbers(self) -> Numbers:
        """Slots, warm ones first, and uids."""
        numbers = self._wiring.numbers()
        if not self._is_confined:
            return numbers
        return msgspec.structs.replace(numbers, uid_base=self._config.uid_base, uid_count=self._config.uid_count)

    # -- a machine's side -------------------------------------------------------------------------------------------

    async def prepare(self, machine: Machine, *, is_visit: bool = False) -> Lodging:
        """Make everything that is missing; what it made is gone if it fails or is cancelled, but for an older disk."""
        image = await self._images.resolve(machine.image_digest)
        boot_files = await self._boot_files.find()
        had_disk = await asyncio.to_thread(self.disks.find, machine.id) is not None
        undo = CleanUp()
        undo.push("quarters", lambda: self.vacate(machine, keep_disk=had_disk))
        wires: list[Wire] = []
        groups: list[Cgroup] = []
        try:
            await asyncio.to_thread(self._make_directories, machine)
            self._fault.reached("quarters.directories")
            seconds: dict[str, float] = {}
            await run_all(
                _timed("disk", self._ensure_disk(machine), seconds),
                _timed("cgroup", self._ensure_cgroup(machine, groups), seconds),
                _timed("net", self._connect(machine, wires, is_visit=is_visit), seconds),
            )
            lodging = await self._lodging(machine, boot_files, image, wires[0], groups[0])
            return msgspec.structs.replace(lodging, seconds=seconds)
        except BaseException as e:
            for wire in wires:
                wire.close()
            await undo.run(blame=e)
            raise

    async def rejoin(self, machine: Machine) -> Lodging:
        """Serve a machine that runs; its groups and disk are there. A missing image costs it nothing but defaults."""
        image = await self._images.find(machine.image_digest)
        wire = await self._wiring.rejoin(machine)
        group = await self._cgroups.find(machine.id) if self._cgroups is not None else Cgroup()
        return await self._lodging(machine, self._boot_files.found or _NO_FILES, image, wire, group)

    async def grow(self, machine: Machine) -> None:
        """Enlarge the disk; a machine without one gets it at its next start, in its new size."""
        disk = await asyncio.to_thread(self.disks.find, machine.id)
        if disk is not None:
            await grow_overlay(*disk, machine.spec.disk_bytes)

    async def rewire(self, machine: Machine) -> None:
        """Change its slot's terms."""
        await self._wiring.rewire(machine)

    async def vacate(self, machine: Machine, *, keep_disk: bool) -> None:
        """End stray processes and remove everything; without `keep_disk` the disk and the console, too. Idempotent."""
        # First of all: nothing may use what is removed next.
        killed = await kill_strays(self._machines, machine.id)
        if killed:
            log.warning("strays_killed", machine=machine.id, count=killed)
        steps = CleanUp()
        if not keep_disk:
            steps.push("disk", lambda: asyncio.to_thread(remove_tree, self._machines / machine.id))
        else:
            steps.push("disk", lambda: self.disks.sync(machine.id))
            # A driver's; its VMM has ended.
            steps.push("jail", lambda: asyncio.to_thread(remove_tree, self._machines / machine.id / JAIL))
        steps.push("run directory", lambda: asyncio.to_thread(remove_tree, self._run_dir(machine.id)))
        steps.push("network", lambda: self._wiring.disconnect(machine))
        if self._cgroups is not None:
            cgroups = self._cgroups
            steps.push("cgroup", lambda: cgroups.remove(machine.id))
        problem = Internal(problem=f"machine {machine.id} could not be removed completely")
        await steps.run(blame=problem)
        if steps.problems:
            raise Internal(problem=f"machine {machine.id}: {'; '.join(steps.problems)}")

    async def remains(self, machine_id: str) -> Remains:
        """What a machine's last run has left to read: its console, its disk, its groups."""
        console = await asyncio.to_thread(_read_tail, self.console_log(machine_id))
        disk = await asyncio.to_thread(self.disks.find, machine_id)
        group = await self._cgroups.find(machine_id) if self._cgroups is not None else Cgroup()
        return Remains(
            console_tail=last_lines(console),
            console=console,
            is_out_of_memory=await asyncio.to_thread(has_run_out_of_memory, group.paths),
            is_disk_clean=await asyncio.to_thread(is_cleanly_left, *disk) if disk is not None else None,
        )

    def console_log(self, machine_id: str) -> Path:
        """Where a machine's console output is."""
        return self._machines / machine_id / "console.log"

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _ensure_disk(self, machine: Machine) -> None:
        if await self.disks.ensure(machine):
            self._fault.reached("quarters.disk")

    async def _ensure_cgroup(self, machine: Machine, made: list[Cgroup]) -> None:
        if self._cgroups is None:
            made.append(Cgroup())
            return
        spec = machine.spec
        limits = CgroupLimits(
            memory_bytes=(spec.memory_mib + self._overhead_mib) << 20, cpus=spec.cpus + _VMM_CPUS, pids=256
        )
        group = await self._cgroups.ensure(machine.id, limits)
        for problem in group.degraded:
            self._say_once("cgroup_degraded", problem.replace(machine.id, "<machine>"))
        made.append(group)
        self._fault.reached("quarters.cgroup")

    async def _connect(self, machine: Machine, made: list[Wire], *, is_visit: bool) -> None:
        made.append(Wire(nic=None) if is_visit else await self._wiring.connect(machine))
        self._fault.reached("quarters.network")

    async def _lodging(
        self, machine: Machine, boot_files: BootFiles, image: Image | None, wire: Wire, group: Cgroup
    ) -> Lodging:
        disk = await asyncio.to_thread(self.disks.find, machine.id)
        hostname = machine.spec.hostname or machine.id
        confined = Confinement(uid=machine.uid, gid=machine.uid, cgroups=group.paths)
        plan = BootPlan(
            machine_id=machine.id,
            cpus=machine.spec.cpus,
            memory_mib=machine.spec.memory_mib,
            kernel=boot_files.kernel,
            initramfs=boot_files.initramfs,
            command_line=f"fuse.nonce={machine.nonce} fuse.hostname={hostname} {wire.kernel_arguments}".strip(),
            image=image.rootfs if image is not None else None,
            overlay=disk[0] if disk else None,
            overlay_format=disk[1] if disk else "raw",
            disk_rate=Rate(bytes_per_s=self._config.disk_bytes_per_s, ops_per_s=self._config.disk_ops_per_s),
            run_dir=self._run_dir(machine.id),
            console_log=self.console_log(machine.id),
            console_bytes=self._config.console_bytes,
            nic=wire.nic,
            confinement=confined if self._is_confined else Confinement(),
        )
        return Lodging(
            plan=plan,
            address=wire.address,
            configure=_render_configure(machine, image, hostname, wire),
            release=wire.close,
        )

    def _run_dir(self, machine_id: str) -> Path:
        return self._config.runtime_directory / machine_id

    def _make_directories(self, machine: Machine) -> None:
        folder = self._machines / machine.id
        try:
            folder.mkdir(mode=0o710, exist_ok=True)
            if self._is_confined:
                # The VMM's user enters it for its disk, and cannot list it; the users of other VMMs stay outside.
                os.chown(folder, -1, machine.uid)
                folder.chmod(0o710)
            self._run_dir(machine.id).mkdir(mode=0o700, exist_ok=True)
        except OSError as e:
            raise NoSpace(path=str(self._machines), needed=4096, free=self._disk_free()) from e

    def _make_roots(self) -> None:
        mode = 0o711 if self._is_confined else 0o700
        for folder in (self._config.data_root, self._machines):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(mode)
        self._config.runtime_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._is_confined:
            for path in (self._machines, self._config.artefacts):
                check_reachable(path)

    def _observe_limits(self) -> Limits:
        config = self._config
        stats = os.statvfs(config.data_root)
        return Limits(
            max_machines=config.max_machines,
            cpus=max(1, len(os.sched_getaffinity(0)) - config.cpu_reserve),
            cpu_ratio=config.cpu_ratio,
            memory_mib=max(0, total_memory_mib() - config.ram_reserve_mib),
            overhead_mib=self._overhead_mib,
            disk_bytes=stats.f_blocks * stats.f_frsize,
            disk_ratio=config.disk_ratio,
            disk_free_bytes=stats.f_bavail * stats.f_frsize,
            disk_reserve_bytes=config.disk_reserve_bytes,
            places=observe_places(config),
        )

    def _disk_free(self) -> int:
        return shutil.disk_usage(self._config.data_root).free

    def _say_once(self, event: str, problem: str) -> None:
        if problem not in self._said:
            self._said.add(problem)
            log.warning(event, problem=problem)


def check_reachable(path: Path) -> None:
    """Raise BadSetting unless every user can enter a directory: VMMs run as users of their own."""
    for folder in (path, *path.parents):
        if not folder.stat().st_mode & 0o001:
            problem = f"the users that machines run as cannot enter {folder}; run `chmod o+x {folder}`"
            raise BadSetting(setting="data_root", problem=problem)


def total_memory_mib() -> int:
    """Memory of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def _render_configure(machine: Machine, image: Image | None, hostname: str, wire: Wire) -> Configure:
    config = image.config if image is not None else None
    return Configure(
        hostname=hostname,
        env=dict(machine.spec.env),
        image=_image_config(config) if config is not None else None,
        nameservers=list(wire.nameservers),
    )


async def _timed(name: str, work: Coroutine[Any, Any, None], seconds: dict[str, float]) -> None:
    began = time.monotonic()
    await work
    seconds[name] = time.monotonic() - began


def _image_config(config: StoredConfig) -> ImageConfig:
    command = [*config.entrypoint, *config.cmd]
    return ImageConfig(env=dict(config.env), workdir=config.workdir, user=config.user, command=command)


def _read_tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read(_TAIL_BYTES)
    except FileNotFoundError:
        return b""
