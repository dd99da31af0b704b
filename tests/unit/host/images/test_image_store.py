"""The image store: names, digests, damage, and what a crash in the middle leaves."""

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusevm.host.images import workspace
from fusevm.host.images.names import Names
from fusevm.host.images.store import Image, ImageConfig, ImageStore, file_sha256, make_record, parse_name
from fusevm.model.errors import BadField, CommandFailed, ImageCorrupt, ImageNotFound, NoSpace

EXT4 = bytes(1024 + 0x38) + b"\x53\xef" + bytes(8192)


async def put(store: ImageStore, name: str, content: bytes = EXT4, workdir: str = "/") -> Image:
    """Publish an image whose root file system is just `content`."""
    async with workspace.workspace(store.root) as folder:
        rootfs = folder / "image" / "rootfs.ext4"
        rootfs.parent.mkdir()
        rootfs.write_bytes(content)
        record = make_record(
            rootfs_sha256=file_sha256(rootfs),
            size_bytes=len(content),
            config=ImageConfig(workdir=workdir),
            inputs="in",
            source="test",
            created_at_ms=1,
        )
        return await store.publish(rootfs.parent, name, record)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path)


async def test_an_image_is_found_by_name_and_by_digest(store):
    image = await put(store, "debian-12")
    assert (await store.resolve("debian-12")).digest == image.digest
    assert (await store.resolve(image.digest)).names == ("debian-12",)
    assert image.rootfs.parent.name == image.digest.replace(":", "-")
    assert image.rootfs.stat().st_mode & 0o777 == 0o444


async def test_the_digest_covers_the_config(store):
    one, two = await put(store, "one"), await put(store, "two", workdir="/root")
    assert one.record.rootfs_sha256 == two.record.rootfs_sha256
    assert one.digest != two.digest


async def test_equal_images_are_stored_once_under_both_names(store):
    await put(store, "one")
    image = await put(store, "two")
    assert image.names == ("one", "two")
    assert len(await store.load_all()) == 1


async def test_an_unknown_name_is_not_found(store):
    for name in ("nothing", "sha256:" + "0" * 64, "../../etc/passwd"):
        with pytest.raises(ImageNotFound, match="there are: "):
            await store.resolve(name)


@pytest.mark.parametrize("bad", ["", "-x", "A", "a b", "../a", "a/../b", "a:b:c", "0" * 64, "a" * 200])
def test_a_bad_name_is_refused(bad):
    with pytest.raises(BadField):
        parse_name(bad)


@pytest.mark.parametrize("good", ["debian-12", "team/tool:1.2", "a"])
def test_a_good_name_is_kept(good):
    assert parse_name(good) == good


async def test_a_cut_off_image_says_which_file_and_how_to_rebuild(store):
    image = await put(store, "debian-12")
    image.rootfs.chmod(0o644)
    os.truncate(image.rootfs, 5000)
    with pytest.raises(ImageCorrupt) as caught:
        await store.resolve("debian-12")
    assert str(image.rootfs) in caught.value.message
    assert "fuse image build --force debian-12" in caught.value.message
    assert "5000 bytes instead of" in caught.value.message


async def test_what_is_no_ext4_is_corrupt(store):
    image = await put(store, "debian-12")
    image.rootfs.chmod(0o644)
    image.rootfs.write_bytes(bytes(len(EXT4)))
    with pytest.raises(ImageCorrupt, match="no ext4"):
        await store.resolve("debian-12")


async def test_a_flipped_bit_is_found_by_reading_all(store):
    image = await put(store, "debian-12")
    await put(store, "whole", workdir="/other")
    assert await store.find_damage() == []
    image.rootfs.chmod(0o644)
    image.rootfs.write_bytes(EXT4[:-1] + b"\x01")
    await store.resolve("debian-12")
    (found,) = await store.find_damage()
    assert (found.image, found.path) == ("debian-12", str(image.rootfs))
    assert "its sha256 is not the recorded one" in found.message
    (image.directory / "image.json").unlink()
    (found,) = await store.find_damage()
    assert (found.image, found.path) == ("debian-12", str(image.directory / "image.json"))


async def test_a_name_whose_image_is_gone_is_corrupt_not_unknown(store):
    image = await put(store, "debian-12")
    (image.directory / "image.json").unlink()
    with pytest.raises(ImageCorrupt, match=r"image\.json"):
        await store.resolve("debian-12")
    assert await store.find("debian-12") is None


async def test_building_again_replaces_a_damaged_image_of_the_same_digest(store):
    image = await put(store, "debian-12")
    image.rootfs.chmod(0o644)
    image.rootfs.write_bytes(EXT4[:-1] + b"\x01")
    again = await put(store, "debian-12")
    assert again.digest == image.digest
    assert await store.find_damage() == []


def test_a_crash_before_the_rename_keeps_the_old_names(tmp_path, monkeypatch):
    names = Names(tmp_path)
    names.set("a", "1")

    def power_cut(*_args: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        names.set("b", "2")
    monkeypatch.undo()
    assert names.load() == {"a": "1"}
    assert [path.name for path in tmp_path.glob(".names*")] == []


def test_an_unreadable_index_is_an_error_not_an_empty_index(tmp_path):
    (tmp_path / "names.json").write_text("{")
    with pytest.raises(ValueError, match="truncated"):
        Names(tmp_path).load()


SET_NAMES = """
import sys
from pathlib import Path
from fusevm.host.images.store import Names
for number in range(20):
    Names(Path(sys.argv[1])).set(f"name-{sys.argv[2]}-{number}", "x")
"""


def test_no_update_of_concurrent_processes_is_lost(tmp_path):
    workers = [subprocess.Popen([sys.executable, "-c", SET_NAMES, tmp_path, str(worker)]) for worker in range(4)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0, 0]
    assert len(Names(tmp_path).load()) == 80


async def test_a_workspace_is_gone_after_success_and_after_failure(tmp_path):
    async with workspace.workspace(tmp_path) as folder:
        (folder / "x").write_text("x")
    assert not folder.exists()
    with pytest.raises(RuntimeError, match="no"):
        async with workspace.workspace(tmp_path) as folder:
            raise RuntimeError("no")
    assert not folder.exists()


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        CommandFailed(command="tar x", exit_status=2, stderr="tar: x: Cannot write: No space left on device"),
    ],
)
async def test_a_disk_that_fills_up_during_a_build_is_said_so_and_left_as_it_was(tmp_path, failure):
    with pytest.raises(NoSpace, match="No disk space left"):
        async with workspace.workspace(tmp_path):
            raise failure
    assert list(tmp_path.glob(".build-*")) == []


def test_a_build_that_cannot_fit_is_refused_beforehand(tmp_path):
    with pytest.raises(NoSpace):
        workspace.ensure_free(tmp_path, 1 << 60)


async def test_a_workspace_of_a_dead_build_is_swept_and_one_of_a_live_build_is_not(tmp_path):
    dead = tmp_path / ".build-dead"
    dead.mkdir()
    async with workspace.workspace(tmp_path) as live, workspace.workspace(tmp_path):
        assert live.exists()
        assert not dead.exists()


async def test_two_builds_of_one_name_wait_for_each_other(tmp_path):
    log = []

    async def build(number: int) -> None:
        async with workspace.exclusive(tmp_path, "debian-12"):
            log.append(number)
            await asyncio.sleep(0)
            log.append(number)

    await asyncio.gather(build(1), build(2))
    assert log in ([1, 1, 2, 2], [2, 2, 1, 1])
