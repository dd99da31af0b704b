"""Making what machines are made from, with progress for people: kernel, initramfs, images."""

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fusevm.cli.output import is_terminal, say
from fusevm.cli.progress import Meter
from fusevm.host.images.build import build_from_tree
from fusevm.host.images.debian import RECIPES, build_debian, check_rootless
from fusevm.host.images.initramfs import ensure_initramfs
from fusevm.host.images.kernel import Kernel, KernelStore
from fusevm.host.images.progress import ProgressEvent
from fusevm.host.images.recipe import build_recipe
from fusevm.host.images.store import Image, ImageConfig, ImageStore

T = TypeVar("T")


class Narrator:
    """Shows what builders tell: a bar with sizes on a terminal, a line per step elsewhere."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._step = ""
        self._is_terminal = is_terminal(sys.stderr)

    def hear(self, event: ProgressEvent) -> None:
        """Take one event; a Progress of the builders."""
        if event.step != self._step:
            self._step = event.step
            self._meter.begin(event.step, event.total_bytes)
            if not self._is_terminal or event.done_bytes is None:
                say(event.step + (f": {event.detail}" if event.detail else ""))
        if event.done_bytes is not None:
            self._meter.set(event.done_bytes, event.total_bytes)


def carry_out(work: Coroutine[Any, Any, T]) -> T:
    """Run a builder to its end. Ctrl-C cancels it, and it cleans up after itself."""
    return asyncio.run(work)


async def ensure_parts(data: Path, kernel: Path | None, image: str, narrator: Narrator) -> tuple[Kernel, Image | None]:
    """Make what is missing of kernel, initramfs and default image. An image that we cannot build must be there."""
    store = ImageStore(data)
    found = await store.find(image) if image else None
    if found is None and image in RECIPES:
        check_rootless()  # before a kernel is fetched for nothing
    made = await KernelStore(data).ensure(kernel, progress=narrator.hear)
    await ensure_initramfs(data, made)
    if not image:
        return made, None
    if found is None and image in RECIPES:
        found = (await build_debian(store, image, progress=narrator.hear)).image
    return made, found or await store.resolve(image)


async def build(
    data: Path, name: str, source: Path | None, recipe: Path | None, narrator: Narrator, *, force: bool
) -> Image:
    """Build an image by our recipe of that name or one's own, or from a folder or tar."""
    store = ImageStore(data)
    if recipe is not None:
        return (await build_recipe(store, recipe, name=name, progress=narrator.hear, force=force)).image
    if source is not None:
        return await build_from_tree(store, name, source, config=ImageConfig(), progress=narrator.hear)
    return (await build_debian(store, name, progress=narrator.hear, force=force)).image
