"""Looks at what of an installation is there. Changes nothing."""

import asyncio
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Final

import fusevm
from fusevm.cli.failures import CliError
from fusevm.cli.install.answers import is_serving
from fusevm.cli.install.env_file import parse_env
from fusevm.cli.install.packages import find_half_installed, missing_packages
from fusevm.cli.install.plan import (
    CONTROL_UNIT,
    HOST_UNIT,
    UNITS,
    Facts,
    Places,
    UnitFacts,
    Wanted,
    control_url,
    expected,
)
from fusevm.cli.install.traces import doomed_name, find_beside, find_doomed, is_there
from fusevm.cli.local_host import is_healthy
from fusevm.host.images.kernel import DEFAULT, FOR_FIRECRACKER, KernelStore
from fusevm.host.images.store import ImageStore
from fusevm.host.images.workspace import find_abandoned
from fusevm.host.run import run
from fusevm.host.tls import identity_files
from fusevm.host.vmm.firecracker.pins import KERNELS, RELEASES, release_folder
from fusevm.host.vmm.firecracker.release import is_release_whole
from fusevm.model.errors import ImageNotFound, KernelCorrupt

#: Services with PrivateTmp= and ProtectHome= do not see what is below.
_HIDDEN: Final = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))  # noqa: S108 - compared only
_SYSTEMCTL_S: Final = 30.0


def check_machine() -> None:
    """Raise CliError unless this is a machine that can be made a host."""
    if os.geteuid() != 0:
        raise CliError("only root can install services", hint="repeat it with sudo")
    if platform.machine() not in RELEASES:
        raise CliError(f"there is no release for {platform.machine()}", hint=f"use one of {', '.join(RELEASES)}")
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise CliError("this machine has no apt: only Debian and Ubuntu can be installed on")
    if not Path("/run/systemd/system").is_dir():
        raise CliError("systemd does not run here", hint="without it, `fuse up` starts Fuse in the foreground")


def find_program() -> Path:
    """The `fuse` that runs now, as the services will start it. Raises CliError for one that they must not start."""
    program = Path(sys.executable).with_name("fuse")
    hint = "deploy/install.sh installs it into /opt/fuse"
    if not program.is_file():
        raise CliError(f"{program} does not exist: this Python has no installed `fuse`", hint=hint)
    hiding = next((folder for folder in _HIDDEN if folder in program.parents), None)
    if hiding is not None:
        raise CliError(f"services cannot run {program}: what is below {hiding} is hidden from them", hint=hint)
    writable = find_writable(program)
    if writable is not None:
        raise CliError(f"root must not run {program}: others than root can change {writable}", hint=hint)
    return program


def find_writable(path: Path) -> Path | None:
    """The first of a path and its parents that somebody but root could replace or change; None: none."""
    for one in (path, *path.parents):
        found = one.stat()
        is_sticky = bool(found.st_mode & 0o1000)
        if found.st_uid != 0 or (found.st_mode & 0o022 and not is_sticky):
            return one
    return None


def read_units() -> dict[str, str]:
    """The text of every unit that belongs to this program."""
    folder = resources.files("fusevm.cli.install") / "systemd"
    return {name: (folder / name).read_text() for name in UNITS}


async def observe(wanted: Wanted, places: Places) -> Facts:
    """Everything that a plan depends on."""
    architecture = platform.machine()
    release, kernel = RELEASES[architecture], KERNELS[architecture]
    kernels, images = KernelStore(places.data), ImageStore(places.data)
    noted = _read(places.packages)
    return Facts(
        architecture=architecture,
        missing_packages=tuple(sorted({*missing_packages(architecture), *await find_half_installed(noted.split())})),
        local=frozenset(path.name for path in wanted.source.iterdir()) if wanted.source else frozenset(),
        has_release=is_release_whole(release_folder(places.data), expected(wanted.digests, release).sha256),
        has_firecracker_kernel=await _has_kernel(kernels, expected(wanted.digests, kernel).key, FOR_FIRECRACKER),
        has_kernel=await _has_kernel(kernels, DEFAULT),
        has_image=bool(wanted.image) and await _has_image(images, wanted.image),
        has_token=all(path.is_file() for path in identity_files(places.data_root)),
        has_downloads=is_there(places.downloads),
        littered=tuple(root for root in _stores(places) if find_abandoned(root)),
        link_target=_read_link(places.link),
        # One whose program was removed by hand is nothing to go back to.
        previous=_read_link(places.previous) if places.previous.exists() else None,
        host_env=_read(places.host_env),
        control_env=_read(places.control_env),
        packages=noted,
        units={
            HOST_UNIT: await _observe_unit(HOST_UNIT, places, [places.host_env], lambda: is_healthy(places.socket)),
            CONTROL_UNIT: await _observe_unit(
                CONTROL_UNIT, places, [places.control_env, places.tls_drop_in], lambda: is_serving(_control_url(places))
            ),
        },
        programs=_find_programs(places),
        existing=_find_existing(places),
    )


async def _has_kernel(store: KernelStore, *names: str) -> bool:
    """Is there a whole kernel, the same one by each of these names?"""
    try:
        kernels = [await store.resolve(name) for name in names]
        await store.verify(kernels[0])
    except (KernelCorrupt, OSError):
        return False
    return len({kernel.digest for kernel in kernels}) == 1


async def _has_image(store: ImageStore, name: str) -> bool:
    try:
        return await store.find(name) is not None
    except ImageNotFound:
        return False


def _stores(places: Places) -> tuple[Path, ...]:
    return places.data / "images", places.data / "kernels", release_folder(places.data).parent


def _find_programs(places: Places) -> tuple[Path, ...]:
    whole = {path.parent for path in places.programs.glob("[!.]*/pyvenv.cfg")}
    return tuple(sorted({*whole, *find_doomed(places.programs)}))


def _find_existing(places: Places) -> frozenset[Path]:
    plain = [places.run, places.data_root, places.data, places.settings, places.downloads, places.control_data]
    plain += [places.units / unit for unit in UNITS]
    plain += [places.tls_drop_in.parent, places.control_data.parent.parent / "fuse-control", places.previous]
    plain += [] if places.link.exists() and not places.link.is_symlink() else [places.link]
    programs = _find_programs(places)
    ours = {*programs, *map(doomed_name, programs)}
    if find_beside(places.programs) or (places.programs.is_dir() and not _find_others(places.programs, ours)):
        plain.append(places.programs)
    return frozenset(path for path in plain if is_there(path))


def _find_others(folder: Path, ours: set[Path]) -> set[Path]:
    return {path for path in folder.iterdir() if path.suffix != ".build"} - ours


def _control_url(places: Places) -> str:
    return control_url(parse_env(_read(places.control_env)), has_tls=places.tls_drop_in.exists())


async def _observe_unit(unit: str, places: Places, files: list[Path], is_there: Callable[[], bool]) -> UnitFacts:
    names = ("NeedDaemonReload", "UnitFileState", "ActiveState", "ExecMainStartTimestampMonotonic")
    done = await run(["systemctl", "show", f"--property={','.join(names)}", unit], timeout_s=_SYSTEMCTL_S)
    found = dict(line.split("=", 1) for line in done.text.splitlines() if "=" in line)
    started_us = int(found.get("ExecMainStartTimestampMonotonic") or 0)
    started_at = time.time() - (time.clock_gettime(time.CLOCK_MONOTONIC) - started_us / 1e6)
    is_active = found.get("ActiveState") == "active"
    return UnitFacts(
        text=_read(places.units / unit),
        drop_in=_read(places.tls_drop_in) if unit == CONTROL_UNIT else "",
        needs_reload=found.get("NeedDaemonReload") == "yes",
        is_enabled=found.get("UnitFileState") == "enabled",
        is_active=is_active,
        is_stale=_last_change([places.units / unit, places.link, *files]) > started_at,
        is_serving=is_active and await asyncio.to_thread(is_there),
    )


def _last_change(files: list[Path]) -> float:
    """When any of these, or of the program itself, was last changed (seconds since the epoch)."""
    package = Path(fusevm.__file__).parent.rglob("*.py")
    return max((path.lstat().st_ctime for path in (*files, *package) if os.path.lexists(path)), default=0.0)


def _read_link(path: Path) -> Path | None:
    return path.readlink() if path.is_symlink() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
