"""Images and kernels by URL, which the machine API calls artifacts: downloaded once, checked, and kept like any other.

A root file system is one ext4 file; a kernel is an ELF or a bzImage. Both are known by URL (`artifacts.json` beside
the images), asked about again after a while by the validators that the server gave, and by then replaced if they have
changed. A server that is away costs nothing as long as a copy is here. An image gets the name `artifact/<16 hex
digits of the URL's sha256>`; the collector may remove it when no machine uses it (`collect`).

Owns: the index. Must not: connect (`fetch` does).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import structlog

from fusevm.host.config import HostConfig
from fusevm.host.images.addresses import parse_networks
from fusevm.host.images.fetch import Fetched, FetchPolicy, Validators, fetch, parse_url, shown
from fusevm.host.images.kernel import Kernel, KernelStore
from fusevm.host.images.progress import Progress, ProgressEvent, ignore_progress
from fusevm.host.images.store import Image, ImageConfig, ImageStore, Origin, make_record
from fusevm.host.images.workspace import brief_lock, exclusive, workspace, write_durably
from fusevm.model.errors import (
    ArtifactRefused,
    BadField,
    FetchFailed,
    ImageCorrupt,
    ImageNotFound,
    Internal,
    KernelCorrupt,
)
from fusevm.wire.decode import UNREADABLE

T = TypeVar("T")
log = structlog.get_logger()

#: Names of imported images begin with this.
PREFIX: Final = "artifact/"
_DIGEST = re.compile(r"[0-9a-f]{64}")
#: How long a copy is taken for current without asking.
_FRESH_MS: Final = 60_000
_MAX_KERNEL_BYTES: Final = 256 << 20
#: Of the superblock (kernel: ext4 disk layout), from its own beginning, little-endian: magic at 0x38, blocks at 0x4
#: and 0x150 (high half), block size at 0x18 (1024 << n), incompatible features at 0x60.
_SUPERBLOCK: Final = 1024
_INCOMPAT_RECOVER: Final = 0x4
_INCOMPAT_64BIT: Final = 0x80
#: Length of a disk is a multiple of this.
_SECTOR: Final = 512


class ArtifactEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about one URL."""

    #: Without query and password.
    url: str
    #: Of the file as it came.
    sha256: str
    #: Digest of the image, or of the kernel.
    digest: str
    validators: Validators = Validators()
    checked_at_ms: int


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    #: By kind and sha256 of the URL: `rootfs:<64 hex digits>`.
    entries: dict[str, ArtifactEntry] = {}


class ArtifactImporter:
    """Imports by URL into the stores of a host. Safe to use from several tasks."""

    def __init__(
        self,
        images: ImageStore,
        kernels: KernelStore,
        policy: FetchPolicy,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._images = images
        self._kernels = kernels
        self._policy = policy
        self._now_ms = now_ms
        self._path = images.root / "artifacts.json"

    async def import_artifact(
        self, rootfs_url: str, *, sha256: str | None = None, progress: Progress = ignore_progress
    ) -> Image:
        """Return the image of a root file system's URL, downloaded unless a current copy is here.

        With `sha256` (64 hex digits) exactly that content is demanded. Raises BadField, AddressRefused,
        ArtifactRefused, DigestMismatch, ImageTooLarge, FetchFailed, NoSpace; then nothing has changed.
        """
        wanted = parse_sha256(sha256)
        parse_url(rootfs_url)
        key = f"rootfs:{_url_sha256(rootfs_url)}"

        async def store(entry: ArtifactEntry | None) -> tuple[Image, ArtifactEntry]:
            return await self._import_rootfs(rootfs_url, wanted, entry, progress)

        return await self._current(key, wanted, self._find_image, store)

    async def import_kernel(
        self, kernel_image_url: str, *, sha256: str | None = None, progress: Progress = ignore_progress
    ) -> Kernel:
        """Return the kernel of a URL; as for `import_artifact`."""
        wanted = parse_sha256(sha256)
        parse_url(kernel_image_url)
        key = f"kernel:{_url_sha256(kernel_image_url)}"

        async def store(entry: ArtifactEntry | None) -> tuple[Kernel, ArtifactEntry]:
            return await self._import_kernel(kernel_image_url, wanted, entry, progress)

        return await self._current(key, wanted, self._find_kernel, store)

    async def entries(self) -> dict[str, ArtifactEntry]:
        """What is known, by kind and URL."""
        return await asyncio.to_thread(self._load)

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _current(
        self,
        key: str,
        wanted: str,
        find: Callable[[str], Awaitable[T | None]],
        store: Callable[[ArtifactEntry | None], Awaitable[tuple[T, ArtifactEntry]]],
    ) -> T:
        async with exclusive(self._images.root, f"url-{key.replace(':', '-')}"):
            entry = (await self.entries()).get(key)
            here = await find(entry.digest) if entry is not None else None
            if entry is not None and here is not None and self._needs_no_asking(entry, wanted):
                return here
            try:
                made, entry = await store(entry if here is not None else None)
            except FetchFailed as e:
                if here is None or entry is None or (wanted and entry.sha256 != wanted):
                    raise
                log.warning("artifact_not_asked_about", url=entry.url, problem=e.message)
                return here
            await asyncio.to_thread(self._save, key, entry)
            return made

    def _needs_no_asking(self, entry: ArtifactEntry, wanted: str) -> bool:
        if wanted:
            return entry.sha256 == wanted
        return 0 <= self._now_ms() - entry.checked_at_ms < _FRESH_MS

    async def _import_rootfs(
        self, url: str, wanted: str, entry: ArtifactEntry | None, progress: Progress
    ) -> tuple[Image, ArtifactEntry]:
        async with workspace(self._images.root) as folder:
            image_folder = folder / "image"
            await asyncio.to_thread(image_folder.mkdir)
            rootfs = image_folder / "rootfs.ext4"
            fetched = await self._fetch(url, rootfs, self._policy, wanted, entry, progress)
            if isinstance(fetched, ArtifactEntry):
                return await self._images.resolve(fetched.digest), fetched
            problem = await asyncio.to_thread(find_problem, rootfs)
            if problem:
                raise ArtifactRefused(url=shown(url), problem=problem)
            record = make_record(
                rootfs_sha256=fetched.sha256,
                size_bytes=fetched.size_bytes,
                config=ImageConfig(),
                inputs="",
                source=shown(url),
                origin=Origin.ARTIFACT,
                created_at_ms=self._now_ms(),
            )
            image = await self._images.publish(image_folder, f"{PREFIX}{_url_sha256(url)[:16]}", record)
        progress(ProgressEvent(step="Image ready", detail=image.digest))
        return image, self._entry(url, fetched, image.digest)

    async def _import_kernel(
        self, url: str, wanted: str, entry: ArtifactEntry | None, progress: Progress
    ) -> tuple[Kernel, ArtifactEntry]:
        policy = msgspec.structs.replace(self._policy, max_bytes=min(_MAX_KERNEL_BYTES, self._policy.max_bytes))
        async with workspace(self._images.root) as folder:
            file = folder / "kernel"
            fetched = await self._fetch(url, file, policy, wanted, entry, progress)
            if isinstance(fetched, ArtifactEntry):
                return await self._kernels.resolve(fetched.digest), fetched
            try:
                kernel = await self._kernels.ensure(file)
            except KernelCorrupt as e:
                raise ArtifactRefused(url=shown(url), problem=e.problem) from e
        return kernel, self._entry(url, fetched, kernel.digest)

    async def _fetch(
        self,
        url: str,
        target: Path,
        policy: FetchPolicy,
        wanted: str,
        entry: ArtifactEntry | None,
        progress: Progress,
    ) -> Fetched | ArtifactEntry:
        """Download, or find that the copy of `entry` is still current."""
        step = f"Downloading {shown(url)}"

        def hear(done: int, total: int | None) -> None:
            progress(ProgressEvent(step=step, done_bytes=done, total_bytes=total))

        # Other content than ours is demanded: that it is unchanged would not help.
        may_stay = entry is not None and bool(entry.validators.headers()) and wanted in ("", entry.sha256)
        known = entry.validators if entry is not None and may_stay else None
        fetched = await fetch(url, target, policy, sha256=wanted, known=known, on_bytes=hear)
        if fetched is not None:
            return fetched
        if entry is None:
            raise Internal(problem="a server said 'not modified' to nobody")
        return msgspec.structs.replace(entry, checked_at_ms=self._now_ms())

    async def _find_image(self, digest: str) -> Image | None:
        try:
            return await self._images.resolve(digest)
        except (ImageNotFound, ImageCorrupt):
            return None

    async def _find_kernel(self, digest: str) -> Kernel | None:
        try:
            return await self._kernels.resolve(digest)
        except KernelCorrupt:
            return None

    def _entry(self, url: str, fetched: Fetched, digest: str) -> ArtifactEntry:
        return ArtifactEntry(
            url=shown(url),
            sha256=fetched.sha256,
            digest=digest,
            validators=fetched.validators,
            checked_at_ms=self._now_ms(),
        )

    def _load(self) -> dict[str, ArtifactEntry]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Index).entries
        except FileNotFoundError:
            return {}
        except UNREADABLE as e:
            # It only saves downloads.
            log.warning("artifact_index_damaged", path=str(self._path), problem=str(e))
            return {}

    def _save(self, key: str, entry: ArtifactEntry) -> None:
        with brief_lock(self._images.root):
            entries = {**self._load(), key: entry}
            write_durably(self._path, msgspec.json.encode(_Index(entries=entries)), mode=0o600, is_alone=True)


def make_importer(config: HostConfig, images: ImageStore) -> ArtifactImporter:
    """The importer of a host daemon."""
    return ArtifactImporter(images, KernelStore(config.artefacts), make_policy(config))


def make_policy(config: HostConfig) -> FetchPolicy:
    """Where the daemon's downloads and uploads may lead, and how large they may be."""
    return FetchPolicy(
        allowed=parse_networks(config.artifact_networks),
        max_bytes=config.image_max_bytes,
        reserve_bytes=config.disk_reserve_bytes,
    )


def parse_sha256(text: str | None) -> str:
    """A demanded digest as 64 lower-case hex digits, with or without `sha256:`; empty for none. Raises BadField."""
    digest = (text or "").lower().removeprefix("sha256:")
    if text and not _DIGEST.fullmatch(digest):
        raise BadField(field="sha256", problem=f"{text[:80]!r} is not 64 hex digits")
    return digest


def find_problem(path: Path) -> str:
    """Say why a file is no root file system for machines; empty when it may be one. Reads the superblock."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(_SUPERBLOCK)
        block = file.read(1024)
    if len(block) < 1024 or block[0x38:0x3A] != b"\x53\xef":
        return "it is no ext4 file system"
    (low,), (log_size,) = struct.unpack_from("<I", block, 0x4), struct.unpack_from("<I", block, 0x18)
    (features,), (high,) = struct.unpack_from("<I", block, 0x60), struct.unpack_from("<I", block, 0x150)
    if log_size > 6:
        return "its superblock is damaged"
    needed = (low | (high << 32 if features & _INCOMPAT_64BIT else 0)) * (1024 << log_size)
    if needed == 0 or needed > size:
        return f"the file has {size} bytes of a file system of {needed}: it is cut off"
    if size % _SECTOR:
        return f"its length is no multiple of {_SECTOR} bytes"
    if features & _INCOMPAT_RECOVER:
        return "its journal must be replayed first, and machines share it read-only: run `e2fsck -f` on it"
    return ""


def _url_sha256(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()
