"""Which images may go, and their going: what a machine or a snapshot was made of stays.

`remove` is a person's wish, `collect` a person's broom, `relieve` the daemon's own when the disk fills up. An image
that was used or made a moment ago may be somebody's soon, and is left alone by both brooms.

Owns: those decisions. Must not: know how machines are kept; whoever keeps some says which images they need.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from fusevm.host.images.store import Image, ImageStore, Origin
from fusevm.host.journal import Journal
from fusevm.host.storage import allocated_tree
from fusevm.model.errors import ImageInUse

#: Digest of an image to the ids of what needs it.
Users: TypeAlias = Mapping[str, Sequence[str]]
UsersOf: TypeAlias = Callable[[], Awaitable[Users]]

#: A create that has looked an image up has this long to write down that it uses it.
_GRACE_S: Final = 600.0
_MOST_NAMED: Final = 5


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an image when it is judged."""

    digest: str
    is_named: bool
    origin: Origin
    is_used: bool
    #: Seconds since 1970: made, or looked up for a machine.
    last_used_s: float
    #: Allocated.
    bytes: int


class Watermarks(msgspec.Struct, frozen=True, kw_only=True):
    """Percent of the file system in use."""

    high: int
    low: int


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """How full a file system is, as df(1) counts."""

    used: int
    free: int

    @property
    def percent(self) -> float:
        return 100 * self.used / max(1, self.used + self.free)


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """An image that has gone."""

    digest: str
    names: tuple[str, ...]
    bytes: int


def plan_collection(candidates: Sequence[Candidate], now_s: float, *, is_all: bool) -> list[str]:
    """Digests that a person's broom takes: unused ones without a name, with `is_all` those with one, too. Pure."""
    return [one.digest for one in _free(candidates, now_s) if is_all or not one.is_named]


def plan_relief(candidates: Sequence[Candidate], room: Room, marks: Watermarks, now_s: float) -> list[str]:
    """Digests that go when the disk is fuller than the high watermark, until it is at the low one. Pure.

    Those that nobody names come first, then imported and pulled ones, the longest unused first. What was built here
    from a recipe cannot be had again by itself, and stays.
    """
    if room.percent < marks.high:
        return []
    wanted = room.used - (room.used + room.free) * marks.low // 100
    again = [one for one in _free(candidates, now_s) if not one.is_named or one.origin is not Origin.BUILT]
    chosen: list[str] = []
    for one in sorted(again, key=lambda one: (one.is_named, one.last_used_s)):
        if wanted <= 0:
            break
        chosen.append(one.digest)
        wanted -= one.bytes
    return chosen


def _free(candidates: Sequence[Candidate], now_s: float) -> list[Candidate]:
    return [one for one in candidates if not one.is_used and now_s - one.last_used_s >= _GRACE_S]


async def users_in_journal(journal: Journal) -> dict[str, list[str]]:
    """What the journal's machines, stopped and failed ones included, and snapshots need: digest to who needs it."""
    users: dict[str, list[str]] = {}
    for entry in await journal.entries():
        users.setdefault(entry.machine.image_digest, []).append(f"machine {entry.machine.id}")
    for digest, snapshot_id in await journal.snapshot_images():
        users.setdefault(digest, []).append(f"snapshot {snapshot_id}")
    return users


class Collector:
    """Removes images of one store."""

    def __init__(
        self, store: ImageStore, users_of: UsersOf, marks: Watermarks, now_s: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._users_of = users_of
        self._marks = marks
        self._now_s = now_s
        self._lock = asyncio.Lock()

    async def remove(self, name: str, *, is_forced: bool = False) -> Removed:
        """Remove an image by name or digest; one with other names only loses this one.

        Raises ImageNotFound, ImageInUse. `is_forced` takes all names at once.
        """
        async with self._lock:
            image = await self._store.resolve(name)
            others = [other for other in image.names if other != name]
            if name in image.names and others and not is_forced:
                await self._store.unname([name])
                return Removed(digest=image.digest, names=(name,), bytes=0)
            users = (await self._users_of()).get(image.digest, [])
            if users:
                more = f" and {len(users) - _MOST_NAMED} more" if len(users) > _MOST_NAMED else ""
                raise ImageInUse(image=image.label, users=", ".join(users[:_MOST_NAMED]) + more)
            return await self._discard(image)

    async def collect(self, *, is_all: bool) -> list[Removed]:
        """Remove what nobody uses and, unless `is_all`, nobody names."""
        async with self._lock:
            images, candidates = await self._survey()
            return await self._take(images, plan_collection(candidates, self._now_s(), is_all=is_all))

    async def relieve(self) -> list[Removed]:
        """Make room when the disk is too full; what was removed."""
        if not await asyncio.to_thread(self._store.root.is_dir):
            return []
        async with self._lock:
            room = await asyncio.to_thread(observe_room, self._store.root)
            if room.percent < self._marks.high:
                return []
            images, candidates = await self._survey()
            return await self._take(images, plan_relief(candidates, room, self._marks, self._now_s()))

    async def _survey(self) -> tuple[dict[str, Image], list[Candidate]]:
        images = {image.digest: image for image in await self._store.load_all()}
        users = await self._users_of()
        return images, await asyncio.to_thread(
            lambda: [_candidate(image, is_used=image.digest in users) for image in images.values()]
        )

    async def _take(self, images: Mapping[str, Image], digests: Sequence[str]) -> list[Removed]:
        removed = []
        for digest in digests:
            users = await self._users_of()
            if digest not in users:  # somebody may have begun to use it since
                removed.append(await self._discard(images[digest]))
        return removed

    async def _discard(self, image: Image) -> Removed:
        size = await asyncio.to_thread(allocated_tree, image.directory)
        await self._store.discard(image)
        return Removed(digest=image.digest, names=image.names, bytes=size)


def observe_room(path: Path) -> Room:
    """How full the file system of a path is."""
    stats = os.statvfs(path)
    return Room(used=(stats.f_blocks - stats.f_bfree) * stats.f_frsize, free=stats.f_bavail * stats.f_frsize)


def _candidate(image: Image, *, is_used: bool) -> Candidate:
    return Candidate(
        digest=image.digest,
        is_named=any(not name.startswith("artifact/") for name in image.names),
        origin=image.record.origin,
        is_used=is_used,
        last_used_s=(image.directory / "image.json").stat().st_mtime,
        bytes=allocated_tree(image.directory),
    )
