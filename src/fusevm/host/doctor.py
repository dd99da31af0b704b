"""Is this host fit to run machines? Every check looks at one thing, changes nothing, and names a remedy.

A check is data: what it is called, why it matters, and a function that observes. `examine` runs them; `judge` says
fit, degraded (machines run, but something is worse than it could be) or unfit.

Owns: the list. Must not: repair.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from fusevm.host.boot_files import has_agent
from fusevm.host.config import SOCKET_PATH_LIMIT, HostConfig
from fusevm.host.fitness.facts import Facts, gather
from fusevm.host.fitness.finding import Finding, Level, degraded, ok, unfit
from fusevm.host.fitness.table import FITNESS
from fusevm.host.images.kernel import KernelStore
from fusevm.host.images.store import ImageStore
from fusevm.host.images.subordinate import NEEDED, find_shortage
from fusevm.host.net.foreign import find_blocking_chains, parse_ruleset
from fusevm.host.net.plan import NetworkPlan, check_range
from fusevm.host.net.transaction import list_ruleset
from fusevm.host.net.uplink import observe_routes, observe_uplinks
from fusevm.host.quarters import check_reachable
from fusevm.host.run import PACKAGES, program_environment, run
from fusevm.host.vmm.firecracker.pins import RELEASES
from fusevm.model.errors import Error, KernelCorrupt

_MIN_PYTHON: Final = (3, 11)
_MIN_QEMU: Final = (7, 2)
_TIMEOUT_S: Final = 10.0
#: Of a check that reads gigabytes.
_LONG_TIMEOUT_S: Final = 180.0


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to look at."""

    name: str
    #: Why it matters.
    purpose: str
    observe: Callable[[HostConfig], Awaitable[Finding]]
    timeout_s: float = _TIMEOUT_S


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the outcome."""

    #: Number in `fitness.table`; 0: a check of ours that has none.
    number: int = 0
    name: str
    purpose: str
    level: Level
    found: str
    remedy: str = ""


async def examine(config: HostConfig) -> list[Report]:
    """Run every check. One that fails to look counts as degraded, and says so."""
    own = [await _examine(check, config) for check in CHECKS]
    facts = await asyncio.to_thread(gather, config, await _read_ruleset())
    return [*own, *report_fitness(facts)]


def report_fitness(facts: Facts) -> list[Report]:
    """What the numbered checks say of a machine. Pure."""
    return [
        Report(
            number=check.number,
            name=check.name,
            purpose=check.purpose,
            level=(finding := check.judge(facts)).level,
            found=finding.found,
            remedy=finding.remedy,
        )
        for check in FITNESS
    ]


async def _read_ruleset() -> str | None:
    try:
        return (await run(["nft", "-y", "list", "ruleset"], timeout_s=_TIMEOUT_S)).text
    except (Error, OSError):
        return None


def judge(reports: list[Report]) -> str:
    """The verdict: `fit`, `degraded` or `unfit`."""
    levels = {report.level for report in reports}
    if Level.UNFIT in levels:
        return "unfit"
    return "degraded" if Level.DEGRADED in levels else "fit"


def exit_status(reports: list[Report]) -> int:
    """0 fit, 1 degraded, 2 unfit."""
    return ("fit", "degraded", "unfit").index(judge(reports))


async def _examine(check: Check, config: HostConfig) -> Report:
    try:
        async with asyncio.timeout(check.timeout_s):
            finding = await check.observe(config)
    except TimeoutError:
        found = f"could not be looked at within {check.timeout_s:.0f} s"
        finding = Finding(level=Level.DEGRADED, found=found, remedy="find out what keeps this machine busy")
    except (Error, OSError, ValueError) as e:
        finding = Finding(level=Level.DEGRADED, found=f"could not be looked at: {e}", remedy="solve that first")
    return Report(
        name=check.name, purpose=check.purpose, level=finding.level, found=finding.found, remedy=finding.remedy
    )


# -- the checks -------------------------------------------------------------------------------------------------------


async def _python(_config: HostConfig) -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] < _MIN_PYTHON:
        return unfit(version, "install Python 3.11 or newer")
    return ok(version)


async def _root(_config: HostConfig) -> Finding:
    if os.geteuid() != 0:
        remedy = "run it as root: without, machines share your user, and have no network of their own"
        return degraded(f"user {os.geteuid()}", remedy)
    return ok("root")


async def _architecture(_config: HostConfig) -> Finding:
    machine = platform.machine()
    return ok(machine) if machine in RELEASES else unfit(machine, f"use a host of {' or '.join(RELEASES)}")


async def _qemu(_config: HostConfig) -> Finding:
    remedy = "apt-get install qemu-system-x86"
    if platform.machine() != "x86_64":
        return ok("not needed: machines run on Firecracker only")
    if shutil.which("qemu-system-x86_64") is None:
        return unfit("not installed", remedy)
    done = await run(["qemu-system-x86_64", "--version"], timeout_s=_TIMEOUT_S)
    text = done.text.partition("version ")[2].split()[0] if "version " in done.text else "unknown"
    numbers = tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
    if len(numbers) == len(_MIN_QEMU) and numbers < _MIN_QEMU:
        return unfit(text, f"{remedy} (7.2 or newer)")
    return ok(text)


async def _tools(_config: HostConfig) -> Finding:
    packages = {
        "ip": "iproute2",
        "nft": "nftables",
        "mke2fs": "e2fsprogs",
        "nsenter": "util-linux",
        "setpriv": "util-linux",
    }
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [name for name in packages if shutil.which(name, path=path) is None]
    if missing:
        return unfit(
            f"missing: {', '.join(missing)}", f"apt-get install {' '.join(sorted({packages[m] for m in missing}))}"
        )
    return ok(", ".join(packages))


async def _image_tools(_config: HostConfig) -> Finding:
    path = program_environment()["PATH"]
    wanted = ("mke2fs", "debugfs", "e2fsck", "setpriv", "prlimit", "mmdebstrap", "skopeo", "zstd")
    missing = [name for name in wanted if shutil.which(name, path=path) is None]
    if missing:
        packages = sorted({PACKAGES[name] for name in missing})
        return degraded(f"missing: {', '.join(missing)}", f"apt-get install {' '.join(packages)}")
    return ok(", ".join(wanted))


async def _data_root(config: HostConfig) -> Finding:
    folder = next(path for path in (config.data_root, *config.data_root.parents) if path.exists())
    if os.geteuid() == 0:
        # The last one is made by the daemon itself.
        await asyncio.to_thread(check_reachable, folder if folder != config.data_root else folder.parent)
    return ok(str(config.data_root))


async def _run_dir(config: HostConfig) -> Finding:
    try:
        config.check()
    except Error as e:
        return unfit(e.message, f"choose shorter directories: sockets have at most {SOCKET_PATH_LIMIT} bytes")
    return ok(str(config.runtime_directory))


async def _kernel(config: HostConfig) -> Finding:
    store = KernelStore(config.artefacts)
    kernels = await store.load_all()
    if config.kernel is not None:
        is_there = config.kernel.is_file()
        return ok(str(config.kernel)) if is_there else unfit(f"{config.kernel} does not exist", "name another --kernel")
    if not kernels:
        return degraded("none yet", "it is fetched at the first start; that needs the Internet")
    try:
        await store.verify(kernels[0])
    except KernelCorrupt as e:
        return unfit(f"{e.path}: {e.problem}", f"rm -r {kernels[0].directory}; it is fetched again at the next start")
    return ok(kernels[0].record.version)


async def _image(config: HostConfig) -> Finding:
    store = ImageStore(config.artefacts)
    damage = await store.find_damage()
    if damage:
        remedy = "; ".join(f"fuse image build --force {one.image}" for one in damage)
        return degraded("; ".join(f"{one.path} is damaged: {one.problem}" for one in damage), remedy)
    images = await store.load_all()
    if not images:
        return degraded("none yet", "fuse image build debian-12")
    return ok(", ".join(image.label for image in images))


async def _subordinate_ids(_config: HostConfig) -> Finding:
    if os.geteuid() == 0:
        return ok("not needed as root")
    if shutil.which("newuidmap", path=program_environment()["PATH"]) is None:
        return degraded("newuidmap is not installed: no image can be built", "apt-get install uidmap")
    short = await asyncio.to_thread(find_shortage)
    if short is not None:
        remedy = f"as root: {short.command}" if short.command else "build images as root"
        return degraded(f"{short.table}: {short.problem}", remedy)
    return ok(f"{NEEDED} of each kind")


async def _agent(_config: HostConfig) -> Finding:
    return ok("built in") if has_agent() else unfit("missing", "run `make agent` in the source folder")


async def _uplink(config: HostConfig) -> Finding:
    if os.geteuid() != 0:
        return ok("not needed without root")
    uplinks = await observe_uplinks(config.egress_interface)
    if not uplinks:
        return degraded("no default route", "machines cannot reach the Internet; set a default route")
    return ok(", ".join(uplinks))


async def _range(config: HostConfig) -> Finding:
    if os.geteuid() != 0:
        return ok("not needed without root")
    plan = NetworkPlan(prefix=config.instance, range=config.network_range, mtu=config.network_mtu)
    try:
        check_range(plan, await observe_routes())
    except Error as e:
        return unfit(e.message, "choose another --network-range")
    return ok(config.network_range)


async def _foreign_rules(_config: HostConfig) -> Finding:
    if os.geteuid() != 0:
        return ok("not needed without root")
    chains = find_blocking_chains(parse_ruleset(await list_ruleset()))
    if not chains:
        return ok("no other program drops forwarded packets")
    names = ", ".join(f"{chain.family} {chain.table} {chain.name}" for chain in chains)
    # Not a fault: the daemon adds one pair of tagged rules, and removes it.
    return ok(f"{names} drop forwarded packets; the daemon adds a tagged pair of rules there")


CHECKS: tuple[Check, ...] = (
    Check(name="python", purpose="The daemon runs on it", observe=_python),
    Check(name="root", purpose="Users, networks and limits of machines", observe=_root),
    Check(name="architecture", purpose="What the VMMs were built for", observe=_architecture),
    Check(name="qemu", purpose="Runs machines without KVM", observe=_qemu),
    Check(name="tools", purpose="Networks, disks and confinement", observe=_tools),
    Check(name="image_tools", purpose="Images are built, pulled and unpacked with them", observe=_image_tools),
    Check(name="data_root", purpose="VMMs run as users of their own and must reach their files", observe=_data_root),
    Check(name="run_dir", purpose="Paths of sockets are short", observe=_run_dir),
    Check(name="agent", purpose="Serves commands and files inside of machines", observe=_agent),
    Check(name="kernel", purpose="What machines boot", observe=_kernel, timeout_s=_LONG_TIMEOUT_S),
    Check(name="image", purpose="What machines see as their disk", observe=_image, timeout_s=_LONG_TIMEOUT_S),
    Check(name="subordinate_ids", purpose="Without root, images are built with them", observe=_subordinate_ids),
    Check(name="uplink", purpose="The machines' way to the Internet", observe=_uplink),
    Check(name="network_range", purpose="Addresses of the machines' networks", observe=_range),
    Check(name="foreign_rules", purpose="Other programs' firewalls", observe=_foreign_rules),
)
