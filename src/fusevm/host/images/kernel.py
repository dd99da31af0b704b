"""Kernels of the host: fetched from the machine's Debian mirrors or given as a file, stored by digest.

`<data>/kernels/<first 12 hex digits>/{vmlinux,modules/*.ko,kernel.json}`, read-only. Holds just the modules that a
machine needs, unpacked, in load order. Does not boot anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fusevm.host.images.apt import Apt
from fusevm.host.images.bzimage import NotAKernel, check_elf, decompress_file, extract_elf, kernel_version
from fusevm.host.images.modules import (
    MissingModules,
    load_order,
    module_name,
    parse_builtin,
    parse_dependencies,
    without_signature,
)
from fusevm.host.images.names import Names
from fusevm.host.images.progress import Progress, ProgressEvent, ignore_progress
from fusevm.host.images.workspace import exclusive, publish_folder, workspace, write_durably
from fusevm.host.run import run
from fusevm.model.errors import CommandFailed, KernelCorrupt
from fusevm.wire.decode import UNREADABLE

#: Meta packages, best first: Debian 12 (backported 6.12) and 13, any Debian, Ubuntu.
META_PACKAGES = ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64", "linux-image-virtual")
#: Name of the fetched kernel in the index.
DEFAULT = "debian"
#: Name of the kernel that `fuse host install` has put there for Firecracker.
FOR_FIRECRACKER = "firecracker"
_NEEDED_BYTES = 400 << 20
_UNPACK_TIMEOUT_S = 120


class KernelModule(msgspec.Struct, frozen=True, kw_only=True):
    """One module file, unpacked."""

    #: File name below `modules/`: `virtio_mmio.ko`.
    file: str
    sha256: str
    size_bytes: int


class KernelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What `kernel.json` says."""

    #: sha256 over the digests of vmlinux and of the modules in order; 64 hex digits.
    digest: str
    #: Release: `6.12.117+deb12-cloud-amd64`.
    version: str
    architecture: str
    #: Where it came from: package and version, or a file.
    source: str
    vmlinux_sha256: str
    vmlinux_bytes: int
    #: In load order; empty for a kernel with everything built in.
    modules: tuple[KernelModule, ...] = ()
    created_at_ms: int


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel of the store."""

    record: KernelRecord
    directory: Path

    @property
    def digest(self) -> str:
        """64 hex digits."""
        return self.record.digest

    @property
    def vmlinux(self) -> Path:
        """The ELF kernel."""
        return self.directory / "vmlinux"

    @property
    def modules(self) -> tuple[Path, ...]:
        """Module files in load order."""
        return tuple(self.directory / "modules" / module.file for module in self.record.modules)


class _Parts(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel in memory, before it is stored."""

    elf: bytes
    #: File name and content, in load order.
    modules: tuple[tuple[str, bytes], ...] = ()
    source: str


class KernelStore:
    """The kernels below a data directory. Safe to use from several processes."""

    def __init__(self, data: Path) -> None:
        self._root = data / "kernels"
        self._names = Names(self._root)

    async def ensure(
        self, path: Path | None = None, *, packages: Sequence[Path] = (), progress: Progress = ignore_progress
    ) -> Kernel:
        """Return the kernel of a file, or without one Debian's cloud kernel, fetched when it is not there yet.

        A file is a bzImage or an ELF with the drivers built in. `packages`: the package files of the cloud kernel (with
        Ubuntu's separate one of modules), when they need not be fetched. Raises KernelCorrupt, CommandFailed (apt),
        NoSpace.
        """
        if path is not None:
            return await self._ensure_file(path)
        async with exclusive(self._root, DEFAULT):
            names = await asyncio.to_thread(self._names.load)
            if DEFAULT in names:
                with contextlib.suppress(KernelCorrupt):  # a damaged one is fetched again
                    return await self.resolve(DEFAULT)
            async with workspace(self._root, _NEEDED_BYTES) as folder:
                parts = await (unpack(packages, folder, progress) if packages else fetch_debian(folder, progress))
                kernel = await self._save(folder, parts)
            await asyncio.to_thread(self._names.set, DEFAULT, kernel.digest)
        progress(ProgressEvent(step="Kernel ready", detail=f"{kernel.record.version} in {kernel.directory}"))
        return kernel

    async def name(self, kernel: Kernel, name: str) -> None:
        """Let a name mean this kernel from now on."""
        await asyncio.to_thread(self._names.set, name, kernel.digest)

    async def resolve(self, name: str) -> Kernel:
        """Return the kernel of a name or digest. A cheap check of its files; KernelCorrupt says which is damaged."""
        names = await asyncio.to_thread(self._names.load)
        digest = names.get(name, name).removeprefix("sha256:")
        return await asyncio.to_thread(self._load, self._root / digest[:12])

    async def load_all(self) -> list[Kernel]:
        """Return all kernels, newest first; damaged ones are left out."""
        folders = [path.parent for path in await asyncio.to_thread(lambda: sorted(self._root.glob("*/kernel.json")))]
        kernels = []
        for folder in folders:
            try:
                kernels.append(await asyncio.to_thread(self._load, folder))
            except KernelCorrupt:
                continue
        return sorted(kernels, key=lambda kernel: -kernel.record.created_at_ms)

    async def verify(self, kernel: Kernel) -> None:
        """Read every file and compare its sha256; raise KernelCorrupt for the first that differs."""
        await asyncio.to_thread(_verify, kernel)

    def _is_whole(self, folder: Path) -> bool:
        try:
            _verify(self._load(folder))
        except (KernelCorrupt, OSError):
            return False
        return True

    def _load(self, folder: Path) -> Kernel:
        path = folder / "kernel.json"
        try:
            record = msgspec.json.decode(path.read_bytes(), type=KernelRecord)
        except FileNotFoundError as e:
            raise KernelCorrupt(path=str(path), problem="it does not exist") from e
        except UNREADABLE as e:
            raise KernelCorrupt(path=str(path), problem=str(e)) from e
        kernel = Kernel(record=record, directory=folder)
        _check_file(kernel.vmlinux, record.vmlinux_bytes)
        for file, module in zip(kernel.modules, record.modules, strict=True):
            _check_file(file, module.size_bytes)
        return kernel

    async def _ensure_file(self, path: Path) -> Kernel:
        try:
            data = await asyncio.to_thread(path.read_bytes)
        except OSError as e:
            raise KernelCorrupt(path=str(path), problem=e.strerror or str(e)) from e
        key = "sha256:" + await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        names = await asyncio.to_thread(self._names.load)
        if key in names:
            with contextlib.suppress(KernelCorrupt):  # a damaged one is stored again
                return await self.resolve(key)
        try:
            elf = await extract_elf(data)
        except NotAKernel as e:
            raise KernelCorrupt(path=str(path), problem=str(e)) from e
        async with workspace(self._root, 2 * len(elf)) as folder:
            kernel = await self._save(folder, _Parts(elf=elf, source=str(path)))
        await asyncio.to_thread(self._names.set, key, kernel.digest)
        return kernel

    async def _save(self, folder: Path, parts: _Parts) -> Kernel:
        record = await asyncio.to_thread(_write_parts, folder / "kernel", parts, time.time_ns() // 1_000_000)
        target = self._root / record.digest[:12]
        await asyncio.to_thread(publish_folder, folder / "kernel", target, self._is_whole)
        return await asyncio.to_thread(self._load, target)


async def fetch_debian(folder: Path, progress: Progress) -> _Parts:
    """Download the cloud kernel from the machine's mirrors into `folder` and take it apart."""
    apt = Apt(folder)
    files: list[Path] = []
    with contextlib.suppress(CommandFailed):
        # The machine's lists may be missing, or so old that what they name has left the mirror.
        files = await _download(apt, await _find_packages(apt), folder / "first", progress)
    if not files:
        await apt.update_privately(progress)
        files = await _download(apt, await _find_packages(apt), folder / "second", progress)
    if not files:
        said = f"no mirror of this machine has any of {', '.join(META_PACKAGES)}; name a kernel with --kernel"
        raise CommandFailed(command=f"apt-cache depends {META_PACKAGES[0]}", exit_status=0, stderr=said)
    return await unpack(files, folder, progress)


async def unpack(files: Sequence[Path], folder: Path, progress: Progress) -> _Parts:
    """Take the kernel out of its package files, within `folder`."""
    tree = folder / "tree"
    progress(ProgressEvent(step="Unpacking the kernel"))
    for file in files:
        await run(["dpkg-deb", "-x", file, tree], timeout_s=_UNPACK_TIMEOUT_S)
    return await take_apart(tree, source=files[0].name.removesuffix(".deb").replace("%3a", ":"))


async def take_apart(tree: Path, source: str) -> _Parts:
    """Take kernel and modules out of an unpacked kernel package."""
    images = sorted((tree / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise KernelCorrupt(path=str(tree / "boot"), problem=f"{len(images)} kernels in the package {source}")
    release = images[0].name.removeprefix("vmlinuz-")
    try:
        elf = await extract_elf(await asyncio.to_thread(images[0].read_bytes))
        modules = await _collect_modules(tree, release)
    except (NotAKernel, MissingModules) as e:
        what = "it lacks the modules " if isinstance(e, MissingModules) else ""
        raise KernelCorrupt(path=images[0].name, problem=f"{what}{e}") from e
    return _Parts(elf=elf, modules=tuple(modules), source=source)


async def _find_packages(apt: Apt) -> list[str]:
    """Return the kernel package, and Ubuntu's separate package of modules."""
    for meta in META_PACKAGES:
        for image in await apt.dependencies(meta):
            if image.startswith("linux-image-"):
                needed = await apt.dependencies(image)
                return [image, *(name for name in needed if name.startswith("linux-modules-"))]
    return []


async def _download(apt: Apt, packages: list[str], folder: Path, progress: Progress) -> list[Path]:
    files = []
    for index, package in enumerate(packages):
        into = folder / str(index)
        await asyncio.to_thread(into.mkdir, parents=True)
        files.append(await apt.download(package, into, progress, step=f"Downloading {package}"))
    return files


async def _collect_modules(tree: Path, release: str) -> list[tuple[str, bytes]]:
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")  # depmod looks below /lib only
    base = tree / "lib" / "modules" / release
    await run(["depmod", "-b", tree, release], timeout_s=_UNPACK_TIMEOUT_S)
    dependencies = parse_dependencies(await asyncio.to_thread((base / "modules.dep").read_text))
    builtin = parse_builtin(await asyncio.to_thread((base / "modules.builtin").read_text))
    collected = []
    for file in load_order(dependencies, builtin):
        data = await decompress_file(await asyncio.to_thread((base / file).read_bytes), Path(file).suffix)
        collected.append((f"{module_name(file)}.ko", without_signature(data)))
    return collected


def _write_parts(folder: Path, parts: _Parts, now_ms: int) -> KernelRecord:
    (folder / "modules").mkdir(parents=True)
    modules = []
    for name, data in parts.modules:
        write_durably(folder / "modules" / name, data)
        modules.append(KernelModule(file=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)))
    write_durably(folder / "vmlinux", parts.elf)
    vmlinux_sha256 = hashlib.sha256(parts.elf).hexdigest()
    listing = "\n".join([f"vmlinux {vmlinux_sha256}", *(f"{module.file} {module.sha256}" for module in modules)])
    record = KernelRecord(
        digest=hashlib.sha256(listing.encode()).hexdigest(),
        version=kernel_version(parts.elf),
        architecture=check_elf(parts.elf),
        source=parts.source,
        vmlinux_sha256=vmlinux_sha256,
        vmlinux_bytes=len(parts.elf),
        modules=tuple(modules),
        created_at_ms=now_ms,
    )
    write_durably(folder / "kernel.json", msgspec.json.format(msgspec.json.encode(record)))
    return record


def _check_file(path: Path, size_bytes: int) -> None:
    try:
        with path.open("rb") as file:
            magic, size = file.read(4), path.stat().st_size
    except OSError as e:
        raise KernelCorrupt(path=str(path), problem=e.strerror or str(e)) from e
    if size != size_bytes:
        raise KernelCorrupt(path=str(path), problem=f"it has {size} bytes instead of {size_bytes}")
    if magic != b"\x7fELF":
        raise KernelCorrupt(path=str(path), problem="it is no ELF file")


def _verify(kernel: Kernel) -> None:
    expected = [(kernel.vmlinux, kernel.record.vmlinux_sha256)]
    expected += zip(kernel.modules, (module.sha256 for module in kernel.record.modules), strict=True)
    for path, sha256 in expected:
        if _file_sha256(path) != sha256:
            raise KernelCorrupt(path=str(path), problem="its sha256 is not the recorded one")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
