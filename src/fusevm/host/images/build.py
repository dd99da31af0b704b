"""Build an image from a tree: the part every builder shares. Content comes from a folder or a tar."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path

import msgspec

from fusevm.host.images.ext4 import make_ext4, tar_owners, unpack_tar
from fusevm.host.images.progress import Progress, ProgressEvent, ignore_progress
from fusevm.host.images.store import Image, ImageConfig, ImageStore, file_sha256, make_record, parse_name
from fusevm.host.images.workspace import exclusive, workspace

#: Part of every inputs hash: images of another way of building are built anew.
BUILDER_VERSION = 1


async def build_from_tree(
    store: ImageStore,
    name: str,
    content: Path,
    *,
    config: ImageConfig,
    source: str = "",
    inputs: str = "",
    progress: Progress = ignore_progress,
) -> Image:
    """Make an image of a folder or a tar file and give it a name. Always builds; content and config address it."""
    parse_name(name)
    async with exclusive(store.root, lock_name(name)), workspace(store.root) as folder:
        return await finish(store, name, content, folder, config, source or str(content), inputs, progress)


async def finish(
    store: ImageStore,
    name: str,
    content: Path,
    folder: Path,
    config: ImageConfig,
    source: str,
    inputs: str,
    progress: Progress,
) -> Image:
    """Turn content into a published image, within a workspace and a lock that the caller holds."""
    rootfs = folder / "image" / "rootfs.ext4"
    await asyncio.to_thread(rootfs.parent.mkdir, 0o755)
    if await asyncio.to_thread(content.is_dir):
        size = await make_ext4(content, rootfs, progress, owners={})
    else:
        owners = await asyncio.to_thread(tar_owners, content)
        await unpack_tar(content, folder / "tree", progress)
        size = await make_ext4(folder / "tree", rootfs, progress, owners)
    step = "Computing the digest"
    sha256 = await asyncio.to_thread(
        file_sha256, rootfs, lambda done: progress(ProgressEvent(step=step, done_bytes=done, total_bytes=size))
    )
    record = make_record(
        rootfs_sha256=sha256,
        size_bytes=size,
        config=config,
        inputs=inputs,
        source=source,
        created_at_ms=time.time_ns() // 1_000_000,
    )
    image = await store.publish(rootfs.parent, name, record)
    progress(ProgressEvent(step="Image ready", done_bytes=size, total_bytes=size, detail=f"{name} {image.digest}"))
    return image


def inputs_hash(*parts: object) -> str:
    """Return the hash of what an image is built from (any JSON), with the version of the builder."""
    return hashlib.sha256(msgspec.json.encode([BUILDER_VERSION, *parts], order="deterministic")).hexdigest()


def lock_name(name: str) -> str:
    """Return the lock of an image name, safe as a file name."""
    return name.replace("/", "__").replace(":", "--")
