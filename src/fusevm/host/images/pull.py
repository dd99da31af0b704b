"""Make an image of what a registry has, or of a layout or tar in local files.

1. The manifest, and from it what is to be fetched: checked against the limits before anything large comes.
2. Layers as files in a working folder, each with the size and sha256 that the manifest says.
3. `unpack`, a program without rights, turns them into content and a script; debugfs makes the file system of those.
4. The file system is published under its digest, with the image's configuration and its names.

Nothing is left behind on failure. Owns: the order. Must not: know formats.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

import fusevm
from fusevm.host.images.build import lock_name
from fusevm.host.images.bundle import Blob, Bundle, open_bundle
from fusevm.host.images.confine import make_workplace, without_rights
from fusevm.host.images.ext4 import Extent
from fusevm.host.images.file_system import take_file, write_file_system
from fusevm.host.images.oci import MAX_DOCUMENT_BYTES, parse_config
from fusevm.host.images.progress import Progress, ProgressEvent, ignore_progress, watched_bytes
from fusevm.host.images.reference import Reference, parse_reference
from fusevm.host.images.registry import Access, Skopeo
from fusevm.host.images.store import Image, ImageStore, Origin, file_sha256, make_record, parse_name
from fusevm.host.images.unpack import Job, LayerJob, Outcome
from fusevm.host.images.workspace import ensure_free, exclusive, workspace
from fusevm.host.run import run
from fusevm.model.errors import CommandFailed, DigestMismatch, ImageRefused, ImageTooLarge, NoSpace

_UNPACK_TIMEOUT_S: Final = 1800.0
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_CHUNK: Final = 1 << 20
_SPACE_INTERVAL_S: Final = 1.0
#: Room for the working folder of the smallest image.
_NEEDED_BYTES: Final = 64 << 20
#: What is packed unfolds to about three times as much, which is there twice: as content and in the file system.
_UNFOLDING: Final = 6


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What an image may take."""

    max_bytes: int = 16 << 30
    #: What must stay free on the file system.
    reserve_bytes: int = 0


async def pull_image(
    store: ImageStore,
    reference: str,
    *,
    name: str = "",
    access: Access = Access(),  # noqa: B008 - frozen
    limits: Limits = Limits(),  # noqa: B008 - frozen
    progress: Progress = ignore_progress,
    force: bool = False,
) -> Image:
    """Fetch an image from a registry, unless exactly that one is here; it gets `name`, or the reference's own.

    With `force` it is fetched all the same; a damaged copy is replaced. Raises BadReference, ImageUnknown,
    ImageRefused, ImageTooLarge, DigestMismatch, FetchFailed, NoSpace, ToolMissing.
    """
    wanted = parse_reference(reference)
    names = [parse_name(name)] if name else _names_of(wanted)
    lock = hashlib.sha256(wanted.text.encode()).hexdigest()[:32]
    async with (
        exclusive(store.root, f"pull-{lock}"),
        workspace(store.root, _NEEDED_BYTES + limits.reserve_bytes) as folder,
    ):
        progress(ProgressEvent(step=f"Asking {wanted.registry} for {wanted.name}"))
        skopeo = Skopeo(folder / "registry", wanted, access)
        await skopeo.prepare()
        found = await skopeo.find()
        here = None if force else await _find_pulled(store, found.digest)
        if here is not None:
            progress(ProgressEvent(step="Image ready", detail=f"{here.digest} is here already"))
            return await store.name(here.digest, names)
        parts = [found.manifest.config, *found.manifest.layers]
        declared = sum(part.size for part in parts)
        if declared > limits.max_bytes:
            raise ImageTooLarge(image=wanted.text, problem=f"{declared} bytes, of {limits.max_bytes}")
        needed = declared * (1 + _UNFOLDING) + limits.reserve_bytes
        await asyncio.to_thread(ensure_free, folder, needed)
        blobs = await skopeo.fetch(found, progress)
        files = {part.hex: _Fetched(blobs / part.hex) for part in parts}
        config = await asyncio.to_thread(files[found.manifest.config.hex].read, wanted.text)
        _check(hashlib.sha256(config).hexdigest(), found.manifest.config.hex, f"the configuration of {wanted.text}")
        bundle = Bundle(
            config=config,
            layers=[
                Blob(open=files[layer.hex].open, sha256=layer.hex, size=layer.size) for layer in found.manifest.layers
            ],
            manifest_digest=found.digest,
        )
        return await _make(store, folder, bundle, wanted.text, names, limits, progress)


async def load_image(
    store: ImageStore,
    path: Path,
    *,
    tag: str = "",
    name: str,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    progress: Progress = ignore_progress,
) -> Image:
    """Make an image of an OCI layout directory, or of a tar with one or from `docker save`. Raises as `pull_image`."""
    names = [parse_name(name)]
    shown = f"{path}:{tag}" if tag else str(path)
    async with (
        exclusive(store.root, lock_name(name)),
        workspace(store.root, _NEEDED_BYTES + limits.reserve_bytes) as folder,
    ):
        progress(ProgressEvent(step=f"Reading {shown}"))
        bundle = await asyncio.to_thread(open_bundle, path, tag, folder / "archive", shown, limits.max_bytes)
        return await _make(store, folder, bundle, shown, names, limits, progress)


class _Fetched:
    """A file that skopeo has written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> BinaryIO:
        """Open it, if it is a file."""
        return os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)

    def read(self, image: str) -> bytes:
        """All of a small one."""
        with self.open() as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise ImageRefused(image=image, problem=f"its configuration has more than {MAX_DOCUMENT_BYTES} bytes")
        return data


async def _make(
    store: ImageStore,
    folder: Path,
    bundle: Bundle,
    image: str,
    names: Sequence[str],
    limits: Limits,
    progress: Progress,
) -> Image:
    document = parse_config(bundle.config, len(bundle.layers), image)
    work = folder / "work"
    await asyncio.to_thread(make_workplace, work)
    await asyncio.to_thread((work / "layers").mkdir)
    staged = [await _stage(blob, work, index, image, limits, progress) for index, blob in enumerate(bundle.layers)]
    layers = [LayerJob(file=file, diff_id=diff_id) for file, diff_id in zip(staged, document.diff_ids, strict=True)]
    job = Job(layers=layers, workdir=document.config.workdir, max_bytes=limits.max_bytes)
    extent = await _unpack(work, job, image, limits, progress)
    progress(ProgressEvent(step="Writing the file system"))
    size = await write_file_system(work, extent)
    rootfs = folder / "image" / "rootfs.ext4"
    await asyncio.to_thread(rootfs.parent.mkdir)
    await asyncio.to_thread(take_file, work / "rootfs.ext4", rootfs)
    record = make_record(
        rootfs_sha256=await asyncio.to_thread(file_sha256, rootfs),
        size_bytes=size,
        config=document.config,
        inputs="",
        source=image,
        origin=Origin.PULLED,
        manifest_digest=bundle.manifest_digest,
        created_at_ms=time.time_ns() // 1_000_000,
    )
    made = await store.publish(rootfs.parent, names[0], record)
    progress(ProgressEvent(step="Image ready", done_bytes=size, total_bytes=size, detail=f"{names[0]} {made.digest}"))
    return await store.name(made.digest, names)


async def _stage(blob: Blob, work: Path, index: int, image: str, limits: Limits, progress: Progress) -> str:
    """Put a layer where `unpack` finds it, checked; the file, relative to the workplace."""
    file = f"layers/{index}"
    progress(ProgressEvent(step="Checking the layers", detail=f"layer {index + 1}"))
    magic = await asyncio.to_thread(_copy, blob, work / file, f"layer {index + 1} of {image}", limits)
    if magic != _ZSTD:
        return file
    words: list[str | Path] = ["prlimit", f"--fsize={limits.max_bytes}", "--core=0", "--"]
    words += ["zstd", "-d", "-q", "--memory=256MB", "-o", f"unpacked-{index}", file]
    try:
        await run(without_rights(words), timeout_s=_UNPACK_TIMEOUT_S, cwd=work)
    except CommandFailed as e:
        if e.exit_status < 0 or "too large" in e.stderr.lower():
            raise ImageTooLarge(image=image, problem=f"layer {index + 1} unfolds beyond it") from e
        raise ImageRefused(image=image, problem=f"layer {index + 1}: its compression is damaged ({e.stderr})") from e
    await asyncio.to_thread((work / file).unlink)
    return f"unpacked-{index}"


def _copy(blob: Blob, target: Path, what: str, limits: Limits) -> bytes:
    """Copy a part, sparsely enough, and check size and sha256; its first bytes."""
    state, size, magic = hashlib.sha256(), 0, b""
    most = blob.size if blob.size >= 0 else limits.max_bytes
    ensure_free(target.parent, (max(blob.size, 0)) + limits.reserve_bytes)
    with blob.open() as source, target.open("xb") as copy:
        while chunk := source.read(_CHUNK):
            magic = magic or chunk[:4]
            size += len(chunk)
            if size > most:
                raise ImageTooLarge(image=what, problem=f"more than {most} bytes")
            state.update(chunk)
            copy.write(chunk)
    target.chmod(0o444)
    if blob.size >= 0 and size != blob.size:
        raise ImageRefused(image=what, problem=f"it has {size} bytes, and its manifest says {blob.size}")
    if blob.sha256:
        _check(state.hexdigest(), blob.sha256, what)
    return magic


async def _unpack(work: Path, job: Job, image: str, limits: Limits, progress: Progress) -> Extent:
    """Run the program that unpacks; how much room the file system needs."""
    # Not from the current directory, which is not ours alone.
    words = [sys.executable, "-P", "-m", "fusevm.host.images.unpack"]
    env = {"PYTHONPATH": str(Path(fusevm.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}

    def done() -> int:
        content = work / "content"
        return sum(entry.stat().st_size for entry in os.scandir(content)) if content.is_dir() else 0

    step = "Unpacking the layers"
    async with watched_bytes(progress, step, done, None, interval_s=2.0), _watched_space(work, limits.reserve_bytes):
        ended = await run(words, timeout_s=_UNPACK_TIMEOUT_S, stdin=msgspec.json.encode(job), cwd=work, env=env)
    outcome = msgspec.json.decode(ended.stdout, type=Outcome)
    match outcome.kind:
        case "done":
            return Extent(inodes=outcome.inodes, bytes=outcome.bytes)
        case "refused":
            raise ImageRefused(image=image, problem=outcome.problem)
        case "too_large":
            raise ImageTooLarge(image=image, problem=outcome.problem)
        case "digest":
            raise DigestMismatch(what=f"{outcome.problem} of {image}", found=outcome.found, wanted=outcome.wanted)
        case "no_space":
            free = os.statvfs(work)
            raise NoSpace(path=str(work), needed=limits.reserve_bytes, free=free.f_bavail * free.f_frsize)


@asynccontextmanager
async def _watched_space(folder: Path, reserve_bytes: int) -> AsyncIterator[None]:
    """End the block with NoSpace when what must stay free is about to be used up."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(_SPACE_INTERVAL_S)
            await asyncio.to_thread(ensure_free, folder, reserve_bytes)

    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watch())
            yield
            watcher.cancel()
    except BaseExceptionGroup as e:
        raise e.exceptions[0] from None


async def _find_pulled(store: ImageStore, manifest_digest: str) -> Image | None:
    images = await store.load_all()
    return next((image for image in images if image.record.manifest_digest == manifest_digest), None)


def _names_of(reference: Reference) -> list[str]:
    """`debian:12`, or `debian:latest` and `debian`; by digest alone: the repository's name with its first digits."""
    if not reference.tag:
        return [f"{reference.name}:{reference.digest.removeprefix('sha256:')[:12]}"]
    short = reference.name.removesuffix(":latest")
    return list(dict.fromkeys([reference.name, short]))


def _check(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise DigestMismatch(what=what, found=found, wanted=wanted)
