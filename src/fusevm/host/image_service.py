"""What the daemon does with images: list, pull, import, remove, and keep the disk from filling up.

Owns: the parts that do it. Must not: know HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Sequence

import structlog

from fusevm.host.config import HostConfig
from fusevm.host.images.artifact import make_importer
from fusevm.host.images.collect import Collector, Removed, Watermarks, users_in_journal
from fusevm.host.images.progress import Progress, ProgressEvent
from fusevm.host.images.pull import Limits, pull_image
from fusevm.host.images.registry import Access
from fusevm.host.images.store import Image, ImageStore
from fusevm.host.journal import Journal
from fusevm.host.metrics import Metrics
from fusevm.host.render import render_image
from fusevm.model.errors import BadField, Error
from fusevm.wire.errors import FlatError
from fusevm.wire.host_api import CollectedImage, CollectedImages, CollectImages, ImageList, PullImage, PullLine

log = structlog.get_logger()

#: At most this often the same step is reported.
_INTERVAL_S = 0.2


class ImageService:
    """The images of one daemon."""

    def __init__(self, config: HostConfig, store: ImageStore, journal: Journal, metrics: Metrics) -> None:
        self._journal = journal
        self._metrics = metrics
        self._limits = Limits(max_bytes=config.image_max_bytes, reserve_bytes=config.disk_reserve_bytes)
        self.store = store
        #: Root file systems and kernels by URL.
        self.artifacts = make_importer(config, store)
        marks = Watermarks(high=config.image_high_percent, low=config.image_low_percent)
        self.collector = Collector(store, self._users, marks)

    async def list_images(self) -> ImageList:
        """Images on this host, newest first, and what uses them."""
        users = await self._users()
        return ImageList(
            images=[render_image(image, users.get(image.digest, [])) for image in await self.store.load_all()]
        )

    async def names(self) -> list[str]:
        """Every digest and name that a create may say."""
        return [name for image in await self.store.load_all() for name in (image.digest, *image.names)]

    async def pull(self, order: PullImage, progress: Progress) -> Image:
        """Fetch an image from a registry. Raises what `pull_image` raises."""
        access = Access(credentials=_credentials(order.credentials_b64), plain_http=order.plain_http)
        return await pull_image(
            self.store, order.reference, name=order.name, access=access, limits=self._limits, progress=progress
        )

    async def pull_lines(self, order: PullImage) -> AsyncIterator[PullLine]:
        """Pull, and tell how far it is; the last line has the image, or why there is none. Closed: it is given up."""
        heard: asyncio.Queue[ProgressEvent] = asyncio.Queue()
        pulling = asyncio.create_task(self.pull(order, heard.put_nowait), name=f"pull {order.reference[:80]}")
        try:
            async for event in _reports(heard, pulling):
                yield PullLine(
                    step=event.step, done_bytes=event.done_bytes, total_bytes=event.total_bytes, detail=event.detail
                )
            yield await self._last_line(pulling)
        finally:
            pulling.cancel()
            await asyncio.wait({pulling})

    async def remove(self, name: str, *, is_forced: bool) -> CollectedImage:
        """Remove an image, or one of its names. Raises ImageNotFound, ImageInUse."""
        removed = await self.collector.remove(name, is_forced=is_forced)
        self._note([removed], why="asked")
        return _render_removed(removed)

    async def collect(self, order: CollectImages) -> CollectedImages:
        """Remove what nobody uses."""
        removed = await self.collector.collect(is_all=order.all)
        self._note(removed, why="unused")
        return CollectedImages(removed=[_render_removed(one) for one in removed])

    async def relieve(self) -> None:
        """Remove images that can be had again when the disk is nearly full."""
        self._note(await self.collector.relieve(), why="disk_full")

    async def _last_line(self, pulling: asyncio.Task[Image]) -> PullLine:
        try:
            return PullLine(image=render_image(await pulling, []))
        except Error as e:
            return PullLine(failure=FlatError(e.message, e.code, e.details))

    def _note(self, removed: Sequence[Removed], *, why: str) -> None:
        for one in removed:
            log.info("image_removed", image=one.digest, names=one.names, bytes=one.bytes, why=why)
            self._metrics.images_removed.labels(why).inc()

    async def _users(self) -> dict[str, list[str]]:
        return await users_in_journal(self._journal)


async def _reports(heard: asyncio.Queue[ProgressEvent], pulling: asyncio.Task[Image]) -> AsyncIterator[ProgressEvent]:
    """Every new step at once, the same step now and then, until the work is over and all is told."""
    loop = asyncio.get_running_loop()
    step, told_at = "", 0.0
    while not pulling.done() or not heard.empty():
        hearing = asyncio.ensure_future(heard.get())
        try:
            await asyncio.wait({hearing, pulling}, return_when=asyncio.FIRST_COMPLETED)
            if not hearing.done():
                continue
            event = hearing.result()
        finally:
            hearing.cancel()
        if event.step != step or event.detail or loop.time() - told_at >= _INTERVAL_S:
            step, told_at = event.step, loop.time()
            yield event


def _credentials(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as e:
        raise BadField(field="credentials_b64", problem="is no base64") from e


def _render_removed(removed: Removed) -> CollectedImage:
    return CollectedImage(digest=removed.digest, names=list(removed.names), freed_bytes=removed.bytes)
