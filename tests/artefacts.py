"""Kernel and image of the tests: found in their data directory, else made there, from the Internet in minutes."""

import asyncio
import functools
from pathlib import Path

from fusevm.host.images.debian import build_debian
from fusevm.host.images.initramfs import ensure_initramfs
from fusevm.host.images.kernel import KernelStore
from fusevm.host.images.store import ImageStore
from own_world import DATA, machines_network

IMAGE = "debian-12"


@functools.cache
def ensure_artefacts() -> Path:
    """Return the data directory with everything in it. OSError when it cannot be made, VmmMissing without an agent."""
    DATA.mkdir(parents=True, exist_ok=True)
    with machines_network():
        asyncio.run(_ensure())
    return DATA


async def _ensure() -> None:
    kernel = await KernelStore(DATA).ensure()
    await ensure_initramfs(DATA, kernel)
    if await ImageStore(DATA).find(IMAGE) is None:
        await build_debian(ImageStore(DATA), IMAGE)
