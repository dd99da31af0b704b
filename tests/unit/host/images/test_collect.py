"""Which images may go."""

from pathlib import Path

import pytest

from fusevm.host.images.collect import (
    Candidate,
    Collector,
    Room,
    Watermarks,
    plan_collection,
    plan_relief,
)
from fusevm.host.images.store import Image, ImageConfig, ImageStore, Origin, file_sha256, make_record
from fusevm.model.errors import ImageInUse, ImageNotFound

NOW = 1_000_000.0
MARKS = Watermarks(high=85, low=75)


def candidate(
    digest: str,
    *,
    is_named: bool = True,
    origin: Origin = Origin.PULLED,
    is_used: bool = False,
    age_s: float = 86_400,
    size: int = 10,
) -> Candidate:
    return Candidate(
        digest=digest, is_named=is_named, origin=origin, is_used=is_used, last_used_s=NOW - age_s, bytes=size
    )


def test_the_broom_takes_what_nobody_uses_or_names():
    candidates = [
        candidate("named"),
        candidate("used", is_named=False, is_used=True),
        candidate("young", is_named=False, age_s=60),
        candidate("lost", is_named=False),
    ]
    assert plan_collection(candidates, NOW, is_all=False) == ["lost"]
    assert plan_collection(candidates, NOW, is_all=True) == ["named", "lost"]


def test_a_full_disk_takes_what_can_be_had_again_the_longest_unused_first():
    candidates = [
        candidate("built", origin=Origin.BUILT, age_s=9e6),
        candidate("used", is_used=True, age_s=9e6),
        candidate("new", age_s=1000),
        candidate("old", age_s=5000),
        candidate("url", origin=Origin.ARTIFACT, age_s=3000),
        candidate("lost", is_named=False, origin=Origin.BUILT, age_s=2000),
    ]
    full = Room(used=90, free=10)
    assert plan_relief(candidates, full, MARKS, NOW) == ["lost", "old"]
    assert plan_relief(candidates, Room(used=100, free=0), MARKS, NOW) == ["lost", "old", "url"]
    assert plan_relief(candidates, Room(used=84, free=16), MARKS, NOW) == []
    assert plan_relief([candidate("small", size=1)], full, MARKS, NOW) == ["small"]


async def put(store: ImageStore, folder: Path, name: str, content: bytes) -> Image:
    """An image whose file system is only a superblock's magic."""
    folder.mkdir(parents=True)
    rootfs = folder / "rootfs.ext4"
    rootfs.write_bytes((bytes(1080) + b"\x53\xef" + content).ljust(8192, b"\0"))
    record = make_record(
        rootfs_sha256=file_sha256(rootfs),
        size_bytes=8192,
        config=ImageConfig(),
        inputs="",
        source="",
        origin=Origin.PULLED,
        created_at_ms=1,
    )
    return await store.publish(folder, name, record)


async def test_what_is_in_use_stays_and_names_who_uses_it(tmp_path: Path):
    store = ImageStore(tmp_path)
    image = await put(store, tmp_path / "images" / "a", "tool:1", b"a")
    users: dict[str, list[str]] = {image.digest: [f"machine m-{number}" for number in range(7)]}

    async def users_of() -> dict[str, list[str]]:
        return users

    collector = Collector(store, users_of, MARKS, now_s=lambda: 1e12)
    with pytest.raises(ImageInUse, match=r"m-0, .*m-4 and 2 more"):
        await collector.remove("tool:1")
    assert await collector.collect(is_all=True) == []
    users.clear()
    with pytest.raises(ImageNotFound):
        await collector.remove("tool:2")
    removed = await collector.remove("tool:1")
    assert (removed.digest, removed.names) == (image.digest, ("tool:1",))
    assert removed.bytes > 0
    assert await store.load_all() == []
    assert list(store.root.glob(".build-*")) == []


async def test_one_of_several_names_goes_alone_unless_forced(tmp_path: Path):
    store = ImageStore(tmp_path)
    image = await put(store, tmp_path / "images" / "a", "tool:1", b"a")
    await store.name(image.digest, ["tool:latest"])

    async def nobody() -> dict[str, list[str]]:
        return {}

    collector = Collector(store, nobody, MARKS)
    assert (await collector.remove("tool:1")).bytes == 0
    assert (await store.resolve("tool:latest")).names == ("tool:latest",)
    await store.name(image.digest, ["tool:3"])
    await collector.remove("tool:3", is_forced=True)
    assert await store.load_all() == []


async def test_a_use_that_begins_meanwhile_is_respected(tmp_path: Path):
    """Between the survey and the removal a create may have written down that it needs an image."""
    store = ImageStore(tmp_path)
    image = await put(store, tmp_path / "images" / "a", "tool:1", b"a")
    answers = iter([{}, {image.digest: ["machine m-1"]}])

    async def users_of() -> dict[str, list[str]]:
        return next(answers)

    collector = Collector(store, users_of, MARKS, now_s=lambda: 1e12)
    assert await collector.collect(is_all=True) == []
    assert await store.resolve("tool:1")


async def test_the_disk_is_relieved_when_it_is_too_full(tmp_path: Path):
    store = ImageStore(tmp_path)
    image = await put(store, tmp_path / "images" / "a", "tool:1", b"a")

    async def nobody() -> dict[str, list[str]]:
        return {}

    for marks, expected in ((Watermarks(high=101, low=100), []), (Watermarks(high=0, low=0), [image.digest])):
        collector = Collector(store, nobody, marks, now_s=lambda: 1e12)
        assert [one.digest for one in await collector.relieve()] == expected
