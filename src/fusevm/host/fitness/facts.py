"""Looks at a machine once, for all checks. Changes nothing; what cannot be looked at is missing from the facts."""

import ctypes
import fcntl
import os
import platform
import pwd
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from fusevm.host.config import HostConfig
from fusevm.host.fitness.programs import ProgramFacts, observe_programs
from fusevm.host.net.tracking import machines_at_once
from fusevm.host.vmm.probe import FIRECRACKER_FILE, last_choice, last_problem

#: linux/kvm.h
_KVM_GET_API_VERSION: Final = 0xAE00
_KVM_CREATE_VM: Final = 0xAE01
#: linux/fs.h
_FICLONE: Final = 0x40049409
#: linux/timex.h: the clock is not in step with anything.
_TIME_ERROR: Final = 5
_TIMEX_BYTES: Final = 208
_PIT: Final = "kvm-pit/"
#: Read as they are. A pattern's matches come each under its own path.
_FILES: Final = (
    "/proc/cmdline",
    "/proc/cpuinfo",
    "/proc/misc",
    "/proc/self/mountinfo",
    "/proc/swaps",
    "/proc/sys/fs/inotify/max_user_instances",
    "/proc/sys/kernel/dmesg_restrict",
    "/proc/sys/kernel/io_uring_disabled",
    "/proc/sys/kernel/kptr_restrict",
    "/proc/sys/kernel/pid_max",
    "/proc/sys/kernel/printk",
    "/proc/sys/kernel/seccomp/actions_avail",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/net/ipv4/neigh/default/gc_thresh3",
    "/proc/sys/net/netfilter/nf_conntrack_max",
    "/proc/sys/vm/max_map_count",
    "/proc/sys/vm/unprivileged_userfaultfd",
    "/sys/fs/cgroup/cgroup.controllers",
    "/sys/devices/system/cpu/smt/control",
    "/sys/devices/system/cpu/vulnerabilities/*",
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
    "/sys/devices/system/edac/mc/mc*/mc_name",
    "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
    "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
    "/sys/kernel/mm/ksm/run",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "/sys/module/kvm/parameters/min_timer_period_us",
    "/sys/module/kvm/parameters/nx_huge_pages",
    "/sys/module/kvm_amd/parameters/nested",
    "/sys/module/kvm_intel/parameters/nested",
)


class Kvm(msgspec.Struct, frozen=True, kw_only=True):
    """What the virtualisation of this machine answers."""

    #: Why `/dev/kvm` does not open; empty: it does.
    problem: str = ""
    api_version: int = 0
    #: Whether a machine could be created.
    creates: bool = False
    #: What the host daemon has found by booting a machine; empty: not tried since the host has started.
    trial: str = ""
    #: That machine came up.
    boots: bool = True


class Pit(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel thread that runs a machine's timer."""

    pid: int
    vmm: int
    #: It is in the control groups of its machine.
    is_confined: bool


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """One machine, as it was seen."""

    #: Path to text; what is not there, or not ours to read, is missing.
    files: Mapping[str, str] = {}
    is_root: bool = True
    architecture: str = "x86_64"
    #: As `uname -r` and `uname -v`.
    kernel_release: str = ""
    kernel_build: str = ""
    driver: str = "auto"
    kvm: Kvm = Kvm()
    pits: tuple[Pit, ...] = ()
    #: FICLONE among the real folders; None: it could not be tried.
    has_reflink: bool | None = None
    #: Folder -> number of its file system.
    devices: Mapping[str, int] = {}
    data_root: str = ""
    #: First of the installed paths that somebody but root can change.
    writable: str = ""
    #: Users and subordinate ranges: name, first id, count.
    ids: tuple[tuple[str, int, int], ...] = ()
    uid_base: int = 0
    uid_count: int = 0
    programs: Mapping[str, ProgramFacts] = {}
    #: VMM pid -> seccomp mode of each thread.
    seccomp: Mapping[int, tuple[int, ...]] = {}
    has_tun: bool = True
    has_userfaultfd: bool = True
    #: `nft -y list ruleset`; None: it cannot be asked.
    ruleset: str | None = None
    instance: str = "fuse"
    #: The host daemon of this data root runs.
    is_serving: bool = False
    #: None: it could not be asked.
    is_clock_in_step: bool | None = None
    has_ptp_kvm: bool = False
    numa_nodes: int = 1
    #: Hard limit of descriptors.
    files_limit: int = 0
    max_machines: int = 0
    #: Those that can run at once, by the host's memory.
    machines_at_once: int = 0
    disk_free: int = 0
    disk_reserve: int = 0
    inodes_free: int = 0
    inodes: int = 0

    def text(self, path: str) -> str:
        """The content of a file, stripped; empty when it is not there."""
        return self.files.get(path, "").strip()

    def number(self, path: str) -> int | None:
        """The first number in a file, or None."""
        first = self.text(path).split()[:1]
        return int(first[0]) if first and first[0].lstrip("-").isdecimal() else None

    @property
    def version(self) -> tuple[int, int]:
        """Of the running kernel: major and minor."""
        parts = self.kernel_release.split("-")[0].split(".")
        return (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdecimal() else (0, 0)

    @property
    def has_kvm(self) -> bool:
        """Machines run on hardware virtualisation here."""
        return self.kvm.creates and self.kvm.api_version == 12 and self.kvm.boots


def gather(config: HostConfig, ruleset: str | None) -> Facts:
    """Look at everything. Takes milliseconds. Blocking."""
    folder = _nearest(config.data_root)
    stats = os.statvfs(folder)
    uname = os.uname()
    folders = [config.data_root, config.artefacts, config.data_root / "machines"]
    programs = observe_programs(config)
    return Facts(
        files=dict(_read_all(_FILES)),
        is_root=os.geteuid() == 0,
        architecture=platform.machine(),
        kernel_release=uname.release,
        kernel_build=uname.version,
        driver=config.driver,
        kvm=_observe_trial(_observe_kvm(), config.data_root),
        pits=tuple(_observe_pits()),
        has_reflink=_try_reflink(folder),
        devices={str(path): _nearest(path).stat().st_dev for path in folders},
        data_root=str(folder),
        writable=_find_writable([folder, *(Path(one.path) for one in programs.values())]),
        ids=tuple(_observe_ids()),
        uid_base=config.uid_base,
        uid_count=config.uid_count,
        programs=programs,
        seccomp=dict(_observe_seccomp()),
        has_tun=_opens("/dev/net/tun"),
        has_userfaultfd=Path("/dev/userfaultfd").exists(),
        ruleset=ruleset,
        instance=config.instance,
        is_serving=(config.data_root / "host.json").exists(),
        is_clock_in_step=_is_clock_in_step(),
        has_ptp_kvm=any("KVM" in text for _, text in _read_all(["/sys/class/ptp/*/clock_name"])),
        numa_nodes=max(len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))), 1),
        files_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        max_machines=config.max_machines,
        machines_at_once=machines_at_once(config.max_machines),
        disk_free=stats.f_bavail * stats.f_frsize,
        disk_reserve=config.disk_reserve_bytes,
        inodes_free=stats.f_favail,
        inodes=stats.f_files,
    )


def _nearest(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.exists())


def _read_all(patterns: Iterable[str]) -> Iterable[tuple[str, str]]:
    for pattern in patterns:
        paths = sorted(Path("/").glob(pattern[1:])) if "*" in pattern else [Path(pattern)]
        for path in paths:
            try:
                yield str(path), path.read_text(errors="replace")
            except OSError:
                continue


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _observe_kvm() -> Kvm:
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Kvm(problem=error.strerror or str(error))
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION, 0)
        try:
            os.close(fcntl.ioctl(fd, _KVM_CREATE_VM, 0))
        except OSError:
            return Kvm(api_version=version)
        return Kvm(api_version=version, creates=True)
    except OSError as error:
        return Kvm(problem=error.strerror or str(error))
    finally:
        os.close(fd)


def _observe_trial(kvm: Kvm, data_root: Path) -> Kvm:
    """What the daemon has found out by booting a machine, with QEMU and with Firecracker."""
    choice, firecracker = last_choice(data_root), last_problem(data_root / FIRECRACKER_FILE)
    words = [choice.why] if choice is not None else []
    if firecracker is not None:
        words.append(f"not Firecracker: {firecracker}" if firecracker else "Firecracker boots a machine to its agent")
    if not words:
        return kvm
    boots = firecracker == "" or (choice is not None and choice.accelerator == "kvm")
    return msgspec.structs.replace(kvm, trial="; ".join(words), boots=boots)


def _observe_pits() -> Iterable[Pit]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "comm").read_text().strip()
            if name.startswith(_PIT) and name[len(_PIT) :].isdecimal():
                vmm = name[len(_PIT) :]
                own = (folder / "cgroup").read_text()
                yield Pit(
                    pid=int(folder.name), vmm=int(vmm), is_confined=own == Path(f"/proc/{vmm}/cgroup").read_text()
                )
        except OSError:
            continue  # it has ended


def _observe_seccomp() -> Iterable[tuple[int, tuple[int, ...]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if not (folder / "comm").read_text().startswith("firecracker"):
                continue
            states = [(task / "status").read_text() for task in (folder / "task").iterdir()]
        except OSError:
            continue
        yield int(folder.name), tuple(_seccomp_mode(state) for state in states)


def _seccomp_mode(status: str) -> int:
    line = next((line for line in status.splitlines() if line.startswith("Seccomp:")), "Seccomp: 0")
    return int(line.split()[1])


def _try_reflink(folder: Path) -> bool | None:
    """Clone one nameless file into another: nothing is left, whatever happens."""
    flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
    try:
        source = os.open(folder, flags, 0o600)
    except OSError:
        return None
    try:
        os.write(source, bytes(4096))
        target = os.open(folder, flags, 0o600)
        try:
            fcntl.ioctl(target, _FICLONE, source)
        finally:
            os.close(target)
    except OSError:
        return False
    finally:
        os.close(source)
    return True


def _find_writable(paths: Iterable[Path]) -> str:
    for path in paths:
        for one in (path, *path.parents):
            try:
                found = one.stat()
            except OSError:
                continue
            if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & 0o1000):
                return str(one)
    return ""


def _observe_ids() -> Iterable[tuple[str, int, int]]:
    for user in pwd.getpwall():
        yield user.pw_name, user.pw_uid, 1
    for table in ("/etc/subuid", "/etc/subgid"):
        for _, text in _read_all([table]):
            for line in text.splitlines():
                name, _, rest = line.partition(":")
                first, _, count = rest.partition(":")
                if first.isdecimal() and count.isdecimal():
                    yield f"{name} in {table}", int(first), int(count)


def _is_clock_in_step() -> bool | None:
    """What adjtimex(2) says; it changes nothing when no mode is given."""
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)
    state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    return None if state < 0 else state != _TIME_ERROR
