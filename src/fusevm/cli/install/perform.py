"""Carries steps out. The only part of an installation that changes the machine.

Every step leaves either what was there or what it makes, never half of it, and raises when its result is not there.
"""

import asyncio
import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, assert_never

import msgspec

from fusevm.cli.building import Narrator
from fusevm.cli.failures import CliError
from fusevm.cli.install import steps as s
from fusevm.cli.install.fetch import download, is_whole, sha256_of, take_local
from fusevm.cli.install.packages import find_half_installed, missing_packages, wait_for_dpkg
from fusevm.cli.install.services import Services
from fusevm.cli.install.traces import clear_beside, remove, replace_link
from fusevm.cli.progress import Meter
from fusevm.cli.teardown import remove_traces
from fusevm.host.cgroup import Cgroups, observe_mounts
from fusevm.host.config import HostConfig
from fusevm.host.images.build import build_from_tree
from fusevm.host.images.debian import build_debian
from fusevm.host.images.kernel import FOR_FIRECRACKER, KernelStore
from fusevm.host.images.store import ImageConfig, ImageStore
from fusevm.host.images.workspace import publish_folder, sweep, workspace, write_durably
from fusevm.host.run import run, run_streaming
from fusevm.host.tls import ensure_identity, identity_files
from fusevm.host.vmm.firecracker.release import RECORD, ReleaseRecord, is_release_whole
from fusevm.host.vmm.firecracker.versions import Version, judge_versions, parse_version
from fusevm.model.errors import DigestMismatch

_APT_S: Final = 1800.0
_VERSION_S: Final = 30.0
_NEEDED_BYTES: Final = 64 << 20
#: Of an interrupted apt: wait for another one's lock instead of failing.
_APT: Final = ("apt-get", "-q", "-o", "DPkg::Lock::Timeout=300")
_PROGRAMS: Final = ("firecracker", "jailer")
_MEMBER: Final = re.compile(r"release-v[0-9.]+-\w+/(firecracker|jailer)-v[0-9.]+-\w+")


class Performer:
    """Carries out one step after the other; `say` tells people which."""

    def __init__(self, config: HostConfig, say: Callable[[str], None], meter: Meter) -> None:
        self._config = config
        self._say = say
        self._meter = meter
        self._narrator = Narrator(meter)
        self._services = Services()

    async def perform(self, step: s.Step) -> None:
        """Carry out one step. Idempotent. Raises Error or CliError."""
        self._say(step.describe())
        if isinstance(step, s.Part):
            await self._make(step)
        elif isinstance(step, s.Place):
            await self._place(step)
        else:
            await self._serve(step)

    async def _make(self, step: s.Part) -> None:
        match step:
            case s.GetFile():
                await asyncio.to_thread(self._get, step)
            case s.InstallPackages(names=names):
                await self._install_packages(names)
            case s.UnpackRelease():
                await unpack_release(step)
            case s.StoreKernel(file=file, data=data):
                kernels = KernelStore(data)
                await kernels.name(await kernels.ensure(file, progress=self._narrator.hear), FOR_FIRECRACKER)
            case s.FetchKernel(data=data, packages=packages):
                await KernelStore(data).ensure(packages=packages, progress=self._narrator.hear)
            case s.BuildImage(name=name, data=data, source=source):
                await self._build(ImageStore(data), name, source)
            case s.SweepBuilds(root=root):
                await sweep(root)
            case _:
                assert_never(step)

    async def _place(self, step: s.Place) -> None:
        match step:
            case s.MakeToken(data_root=data_root):
                data_root.mkdir(parents=True, exist_ok=True, mode=0o700)
                make_identity(data_root)
            case s.LinkProgram(link=link, target=target):
                point_link(link, target)
            case s.WriteFile(path=path, text=text, mode=mode):
                make_folder(path.parent)
                write_durably(path, text.encode(), mode=mode, is_alone=True)
            case s.EndMachines():
                await end_machines(self._config)
            case s.RemovePath(path=path):
                await asyncio.to_thread(remove, path)
            case _:
                assert_never(step)

    async def _serve(self, step: s.Service) -> None:
        match step:
            case s.ReloadSystemd():
                await self._services.reload()
            case s.Enable(unit=unit):
                await self._services.enable(unit)
            case s.Start(unit=unit):
                await self._services.restart(unit)
            case s.AwaitHost(socket=path):
                await self._services.wait_for_host(path)
            case s.AwaitControl(url=url):
                await self._services.wait_for_control(url)
            case s.Stop(unit=unit):
                await self._services.stop(unit)
            case _:
                assert_never(step)

    def _get(self, step: s.GetFile) -> None:
        if is_whole(step.target, step.pin.sha256):
            return
        if step.source is not None:
            take_local(step.source, step.pin.sha256, step.target)
            return
        self._meter.begin(step.pin.name, None)
        download(step.pin.url, step.pin.sha256, step.target, self._meter.set)

    async def _install_packages(self, names: tuple[str, ...]) -> None:
        env = {"DEBIAN_FRONTEND": "noninteractive"}
        # What a killed run has left: an apt that still works, then packages that are half configured.
        await wait_for_dpkg()
        await run(["dpkg", "--configure", "-a"], timeout_s=_APT_S, env=env)
        await run([*_APT, "update"], timeout_s=_APT_S, env=env)
        command = [*_APT, "install", "-y", "--no-install-recommends", *names]
        await run_streaming(command, on_line=lambda _line: None, timeout_s=_APT_S, env=env)
        still = {*missing_packages(platform.machine()), *await find_half_installed(names)}
        if still:
            raise CliError(f"apt has installed its packages, but these are missing: {' '.join(sorted(still))}")

    async def _build(self, store: ImageStore, name: str, source: Path | None) -> None:
        if source is not None:
            await build_from_tree(store, name, source, config=ImageConfig(), progress=self._narrator.hear)
        else:
            await build_debian(store, name, progress=self._narrator.hear)


async def unpack_release(step: s.UnpackRelease) -> None:
    """Take the two programs out of an archive whose digest was checked, and see that they are what they should be."""
    root = step.folder.parent
    make_folder(root)
    async with workspace(root, _NEEDED_BYTES) as folder:
        new = folder / "release"
        new.mkdir(mode=0o755)
        with step.archive.open("rb") as file:
            # The very file that is unpacked is the one that was compared, whatever its name leads to by now.
            found = (await asyncio.to_thread(hashlib.file_digest, file, "sha256")).hexdigest()
            if found != step.sha256:
                raise DigestMismatch(what=str(step.archive), wanted=step.sha256, found=found)
            file.seek(0)
            await asyncio.to_thread(_extract, file, new)
        firecracker, jailer = [await _version_of(new / name, step.archive) for name in _PROGRAMS]
        problem = judge_versions(firecracker, jailer)
        if problem:
            raise CliError(f"{step.archive} cannot be used: {problem}")
        digests = {name: sha256_of(new / name) for name in _PROGRAMS}
        record = ReleaseRecord(archive_sha256=step.sha256, files=digests)
        write_durably(new / RECORD, msgspec.json.format(msgspec.json.encode(record)))
        publish_folder(new, step.folder, lambda target: is_release_whole(target, step.sha256))


def _extract(file: IO[bytes], into: Path) -> None:
    with tarfile.open(fileobj=file, mode="r:gz") as archive:
        for member in archive:
            match = _MEMBER.fullmatch(member.name.removeprefix("./"))
            content = archive.extractfile(member) if match and member.isfile() else None
            if match is None or content is None:
                continue
            with (into / match[1]).open("wb") as target:
                shutil.copyfileobj(content, target)
            (into / match[1]).chmod(0o755)


async def _version_of(program: Path, archive: Path) -> Version | None:
    if not await asyncio.to_thread(program.is_file):
        raise CliError(f"{archive} holds no program {program.name}", hint="it is no release of Firecracker")
    return parse_version((await run([program, "--version"], timeout_s=_VERSION_S)).text)


def make_identity(data_root: Path) -> None:
    """Key and token of the host daemon; those that are there stay."""
    for path in identity_files(data_root):
        clear_beside(path)
    ensure_identity(data_root)


def make_folder(folder: Path) -> None:
    """A folder that every user may enter: what is secret in it is a closed file."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    if folder == Path("/etc/fuse"):
        folder.chmod(0o755)  # the control plane's own user looks for its settings file there


def point_link(link: Path, target: Path) -> None:
    """Let a link name a target, at once. Raises CliError when something else is in its place."""
    if link.exists() and not link.is_symlink():
        raise CliError(f"{link} is there already, and no link", hint="remove it, if it may go")
    make_folder(link.parent)
    replace_link(link, target)


async def end_machines(config: HostConfig) -> None:
    """End every process of a machine, and remove what the daemon keeps in the kernel. The daemon has ended."""
    groups = Cgroups(f"{config.instance}/machines", await asyncio.to_thread(observe_mounts))
    for _ in range(50):
        pids = {int(pid) for root in groups.roots() for pid in _members(root / config.instance)}
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)
    for root in groups.roots():
        for folder in sorted((root / config.instance).rglob("*/"), reverse=True):
            with contextlib.suppress(OSError):  # busy: the removal of its parent says so
                folder.rmdir()
    await asyncio.to_thread(remove_traces, config)


def _members(group: Path) -> list[str]:
    return [pid for file in group.rglob("cgroup.procs") for pid in file.read_text().split()]
