"""Which accelerator runs our kernel on this host: KVM, or software emulation.

That /dev/kvm opens says little: nested and paravirtualised hosts offer a KVM that cannot run an ordinary Linux. So a
machine without disks is booted with it, up to the agent's first answer. The outcome is kept for as long as host, QEMU
and kernel stay what they are.
"""

import asyncio
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from fusevm.host.process import boot_id
from fusevm.host.vmm.driver import BootPlan, Confinement, Vmm
from fusevm.host.vmm.launch import find_program
from fusevm.host.vmm.qemu import PROGRAM, REMEDY, QemuDriver, QemuVmm
from fusevm.host.vmm.qemu_args import Accelerator
from fusevm.model.errors import BootFailed, Error
from fusevm.wire.decode import UNREADABLE

AnyVmm = TypeVar("AnyVmm", bound=Vmm)
TIMEOUT_S: Final = 8.0
KVM: Final = Path("/dev/kvm")
#: What was found out about QEMU's KVM, and about Firecracker; in the data directory.
ACCELERATOR_FILE, FIRECRACKER_FILE = "accelerator.json", "firecracker-probe.json"
_MEMORY_MIB: Final = 256
#: Part of the key: a probe that looks at other things is made anew.
_VERSION: Final = 2
_UNCONFINED: Final = Confinement()


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The accelerator, and why."""

    accelerator: Accelerator
    #: For people: doctor and `fuse up` show it.
    why: str


class _Cached(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    #: Why it does not work; empty when it does.
    problem: str


async def choose_accelerator(
    kernel: Path,
    initramfs: Path,
    cache_dir: Path,
    *,
    program: str = PROGRAM,
    confinement: Confinement = _UNCONFINED,
    kvm: Path = KVM,
    timeout_s: float = TIMEOUT_S,
) -> Choice:
    """Return KVM if it boots our kernel to the agent, else TCG. Takes `timeout_s` at most. Raises VmmMissing.

    `confinement` is that of machines: their user may not have the access to /dev/kvm that the daemon has.
    """
    qemu = find_program(program, REMEDY)
    problem = await asyncio.to_thread(open_problem, kvm)
    if problem:
        return Choice(accelerator="tcg", why=f"software emulation: {kvm} cannot be used ({problem})")
    found = await remembered(
        cache_dir / ACCELERATOR_FILE,
        (Path(qemu), kernel, initramfs),
        lambda: _try_kvm(kernel, initramfs, program, confinement, timeout_s),
        f"{confinement.uid} {confinement.gid}",
    )
    return _choose(found)


async def remembered(path: Path, files: Sequence[Path], ask: Callable[[], Awaitable[str]], *more: str) -> str:
    """Return what was found out for exactly these files on this boot of this host, or find it out and keep it."""
    key = await asyncio.to_thread(_key, files, more)
    cached = await asyncio.to_thread(_load, path)
    if cached is None or cached.key != key:
        cached = _Cached(key=key, problem=await ask())
        await asyncio.to_thread(_save, path, cached)
    return cached.problem


def last_choice(cache_dir: Path) -> Choice | None:
    """What the last trial of QEMU's KVM on this boot of the host has found; None without one. Blocking."""
    problem = last_problem(cache_dir / ACCELERATOR_FILE)
    return _choose(problem) if problem is not None else None


def last_problem(path: Path) -> str | None:
    """What the last trial of this boot of the host has found, whatever was tried; None without one. Blocking."""
    cached = _load(path)
    if cached is None or path.stat().st_mtime < time.time() - time.clock_gettime(time.CLOCK_BOOTTIME):
        return None
    return cached.problem


def _choose(problem: str) -> Choice:
    if problem:
        return Choice(accelerator="tcg", why=f"software emulation: KVM does not run our kernel here ({problem})")
    return Choice(accelerator="kvm", why="KVM: a machine booted to its agent with it")


async def _try_kvm(kernel: Path, initramfs: Path, program: str, confinement: Confinement, timeout_s: float) -> str:
    with tempfile.TemporaryDirectory(prefix="fuse-") as folder:
        plan = BootPlan(
            machine_id=f"probe-{secrets.token_hex(4)}",
            cpus=1,
            memory_mib=_MEMORY_MIB,
            kernel=kernel,
            initramfs=initramfs,
            command_line="",
            run_dir=Path(folder),
            console_log=Path(folder) / "console.log",
            confinement=confinement,
        )
        driver = QemuDriver(accelerator="kvm", program=program)
        return await find_boot_problem(driver.boot, plan, QemuVmm.wait_ready, timeout_s)


async def find_boot_problem(
    boot: Callable[[BootPlan], Awaitable[AnyVmm]],
    plan: BootPlan,
    meet: Callable[[AnyVmm], Awaitable[object]],
    timeout_s: float,
) -> str:
    """Boot up to the agent's answer, which `meet` waits for, and kill the machine; return what went wrong, or ""."""
    try:
        async with asyncio.timeout(timeout_s):
            vmm = await boot(plan)
            try:
                await meet(vmm)
            finally:
                await vmm.kill()
                await vmm.close()
    except TimeoutError:
        return f"no answer from the agent within {timeout_s:g} s"
    except BootFailed as e:
        return _one_line(e.problem)
    except (ConnectionError, Error) as e:
        return _one_line(str(e))
    return ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def open_problem(kvm: Path) -> str:
    """Why the device cannot be opened, or "". Blocking."""
    try:
        os.close(os.open(kvm, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        return e.strerror or str(e)
    return ""


def _key(files: Sequence[Path], more: Sequence[str]) -> str:
    """Return a digest of everything that the outcome depends on."""
    parts = [str(_VERSION), boot_id(), os.uname().release, _cpu_model(), *more]
    parts += [_digest(path) for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: Path) -> _Cached | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Cached)
    except (OSError, *UNREADABLE):
        return None


def _save(path: Path, cached: _Cached) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(msgspec.json.encode(cached))
    temporary.replace(path)
