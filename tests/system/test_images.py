"""Real ext4 images, with and without root, and what a killed build leaves."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

from fusevm.host.images.blank import ensure_blank
from fusevm.host.images.build import build_from_tree
from fusevm.host.images.debian import build_debian
from fusevm.host.images.progress import ProgressEvent
from fusevm.host.images.store import ImageConfig, ImageStore
from fusevm.host.run import run
from fusevm.model.errors import BadField

pytestmark = pytest.mark.skipif(
    shutil.which("mke2fs", path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None, reason="e2fsprogs is not installed"
)
NOBODY = 65534
ROOTLESS = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
BUILD = """
import asyncio, sys
from pathlib import Path
from fusevm.host.images.build import build_from_tree
from fusevm.host.images.store import ImageConfig, ImageStore
image = asyncio.run(build_from_tree(ImageStore(Path(sys.argv[1])), "small", Path(sys.argv[2]), config=ImageConfig()))
print(image.rootfs)
"""


@pytest.fixture
def small_tar(tmp_path: Path) -> Path:
    """A root file system in a tar: several owners, a setuid program, a hard link, a symlink, a device."""
    path = tmp_path / "root.tar"

    def entry(
        name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, uid: int = 0, gid: int = 0
    ) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, uid, gid, 1_600_000_000
        return info

    with tarfile.open(path, "w") as tar:
        for folder in (".", "./bin", "./dev", "./etc", "./home"):
            tar.addfile(entry(folder, tarfile.DIRTYPE, 0o755))
        tar.addfile(entry("./home/user", tarfile.DIRTYPE, 0o700, 1000, 1000))
        program = entry("./bin/su", mode=0o4755)
        program.size = 100_000
        with Path("/dev/urandom").open("rb") as noise:
            tar.addfile(program, noise)
        link = entry("./bin/su2", tarfile.LNKTYPE)
        link.linkname = "./bin/su"
        tar.addfile(link)
        shadow = entry("./etc/shadow", mode=0o640, gid=42)
        tar.addfile(shadow)
        symlink = entry("./etc/mtab", tarfile.SYMTYPE, 0o777)
        symlink.linkname = "/proc/mounts"
        tar.addfile(symlink)
        device = entry("./dev/sda", tarfile.BLKTYPE)
        device.devmajor = 8
        tar.addfile(device)
    return path


def open_to_nobody(*paths: Path) -> bool:
    """Let the test's rootless half reach its files; pytest's folders are private."""
    for path in paths:
        for parent in [path, *path.parents]:
            if parent.stat().st_uid == os.geteuid() and parent.stat().st_mode & 0o005 != 0o005:
                parent.chmod(parent.stat().st_mode | 0o055)
    probe = ["test", "-r", sys.executable, "-a", "-r", str(Path(__file__).parents[2] / "src")]
    return subprocess.run([*ROOTLESS, *probe], check=False).returncode == 0


async def stat_of(rootfs: Path, path: str) -> dict[str, str]:
    """Ask debugfs for mode, owner, links and kind of a file in an image."""
    text = (await run(["debugfs", "-R", f'stat "{path}"', rootfs], timeout_s=30)).text
    words = text.replace(":", ": ").split()
    return {key: words[words.index(key) + 1] for key in ("Type:", "Mode:", "User:", "Group:", "Links:")}


async def check_small(rootfs: Path) -> None:
    assert (await run(["e2fsck", "-fn", rootfs], timeout_s=60)).returncode == 0
    su, shadow, home = [await stat_of(rootfs, path) for path in ("/bin/su", "/etc/shadow", "/home/user")]
    assert su == {"Type:": "regular", "Mode:": "04755", "User:": "0", "Group:": "0", "Links:": "2"}
    assert shadow == {"Type:": "regular", "Mode:": "0640", "User:": "0", "Group:": "42", "Links:": "1"}
    assert home == {"Type:": "directory", "Mode:": "0700", "User:": "1000", "Group:": "1000", "Links:": "2"}
    assert "/proc/mounts" in (await run(["debugfs", "-R", "stat /etc/mtab", rootfs], timeout_s=30)).text
    assert "not found" in (await run(["debugfs", "-R", "stat /dev/sda", rootfs], timeout_s=30)).stderr.decode()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to keep owners")
async def test_a_tar_becomes_an_image_as_root(tmp_path, small_tar):
    store = ImageStore(tmp_path / "data")
    image = await build_from_tree(store, "small", small_tar, config=ImageConfig(user="1000"))
    await check_small(image.rootfs)
    assert await store.find_damage() == []
    assert image.record.size_bytes < 4 << 20
    assert sorted(path.name for path in store.root.glob(".build-*")) == []


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
async def test_a_tar_becomes_the_same_image_without_root(tmp_path, small_tar):
    data = tmp_path / "data"
    data.mkdir()
    os.chown(data, NOBODY, NOBODY)
    if not open_to_nobody(data, small_tar):
        pytest.skip("the source folder or the interpreter cannot be read by other users")
    if (await run([*ROOTLESS, "unshare", "--map-root-user", "true"], timeout_s=30, check=False)).returncode:
        pytest.skip("ordinary users get no user namespaces here (a chroot, or the kernel's settings)")
    source = str(Path(__file__).parents[2] / "src")
    command = [*ROOTLESS, sys.executable, "-c", BUILD, str(data), str(small_tar)]
    done = await run(command, timeout_s=120, env={"PYTHONPATH": source, "HOME": str(data)})
    rootfs = Path(done.text.strip())
    await check_small(rootfs)
    as_root = await build_from_tree(ImageStore(tmp_path / "other"), "small", small_tar, config=ImageConfig())
    assert as_root.rootfs.parent.name == rootfs.parent.name


async def test_the_same_tree_gives_the_same_bytes(tmp_path, small_tar):
    stores = [ImageStore(tmp_path / name) for name in ("one", "two")]
    images = [await build_from_tree(store, "small", small_tar, config=ImageConfig()) for store in stores]
    assert images[0].digest == images[1].digest


async def test_a_folder_becomes_an_image_and_files_that_do_not_fit_the_estimate_make_it_grow(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(300):  # long names: more directory blocks than estimated
        (tree / f"{number:04}{'x' * 240}").write_text("x")
    image = await build_from_tree(ImageStore(tmp_path / "data"), "many", tree, config=ImageConfig())
    assert (await run(["e2fsck", "-fn", image.rootfs], timeout_s=60)).returncode == 0


async def test_a_build_tells_how_far_it_is_in_bytes(tmp_path, small_tar):
    events: list[ProgressEvent] = []
    store = ImageStore(tmp_path / "data")
    image = await build_from_tree(store, "small", small_tar, config=ImageConfig(), progress=events.append)
    size = image.record.size_bytes
    for step in ("Writing the ext4 image", "Computing the digest", "Image ready"):
        told = [(event.done_bytes, event.total_bytes) for event in events if event.step == step]
        assert told[-1] == (size, size), step
    for event in events:
        assert event.done_bytes is None or 0 <= event.done_bytes <= (event.total_bytes or event.done_bytes), event
    unpacked = next(event for event in events if event.step == "Unpacking the root file system")
    assert unpacked.total_bytes == small_tar.stat().st_size


async def test_the_same_inputs_are_not_built_again(tmp_path, monkeypatch):
    cached = Path(os.environ.get("FUSE_TEST_DATA", "/var/cache/fuse-test"))
    there = await ImageStore(cached).find("debian-12")
    if there is None:
        pytest.skip("no debian-12 in the test data directory; the real tests make it")
    # A store of our own, with the image of the cache: whatever a build does wrong, it does not do it there.
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / there.directory.name).symlink_to(there.directory)
    shutil.copy(cached / "images" / "names.json", tmp_path / "images" / "names.json")
    programs: list[object] = []

    def refuse(*words: object) -> None:
        programs.append(words)
        raise PermissionError("a program was to be started")

    with monkeypatch.context() as patch:
        # Below our own code, every way to start a program.
        for name in ("fork", "posix_spawn", "posix_spawnp", "execve"):
            patch.setattr(os, name, refuse)
        patch.setattr("_posixsubprocess.fork_exec", refuse)
        patch.setattr("subprocess._fork_exec", refuse)
        events: list[ProgressEvent] = []
        built = await build_debian(ImageStore(tmp_path), "debian-12", progress=events.append)
    assert programs == []
    assert (built.is_new, built.image.digest) == (False, there.digest)
    assert [event.step for event in events] == ["Image ready"]
    assert "up to date" in events[0].detail
    assert sorted(path.name for path in (tmp_path / "images").glob("sha256-*")) == [there.directory.name]
    assert list((tmp_path / "images").glob(".build-*")) == []


async def test_a_killed_build_leaves_nothing_behind_the_next_one(tmp_path):
    script = textwrap.dedent("""
        import asyncio, sys
        from pathlib import Path
        from fusevm.host.images.workspace import exclusive, workspace
        async def main():
            root = Path(sys.argv[1])
            async with exclusive(root, "small"), workspace(root) as folder:
                (folder / "half").write_bytes(bytes(1 << 20))
                print(folder, flush=True)
                await asyncio.sleep(600)
        asyncio.run(main())
    """)
    store = ImageStore(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(store.root)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    try:
        assert child.stdout is not None
        left = Path((await asyncio.to_thread(child.stdout.readline)).strip())
        assert left.is_dir()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    tree = tmp_path / "tree"
    tree.mkdir()
    await build_from_tree(store, "small", tree, config=ImageConfig())  # its lock is free, too
    assert not left.exists()


async def test_a_blank_overlay_is_made_once_and_takes_little_room(tmp_path):
    paths = await asyncio.gather(*(ensure_blank(tmp_path, 4 << 30) for _ in range(4)))
    assert len(set(paths)) == 1
    stats = paths[0].stat()
    assert stats.st_size == 4 << 30
    assert stats.st_blocks * 512 < 20 << 20
    assert stats.st_mode & 0o222 == 0
    assert (await run(["e2fsck", "-fn", paths[0]], timeout_s=60)).returncode == 0
    assert [path.name for path in paths[0].parent.glob("*.tmp")] == []


async def test_a_blank_overlay_without_room_for_itself_is_refused(tmp_path):
    with pytest.raises(BadField, match="disk_bytes"):
        await ensure_blank(tmp_path, 1 << 20)
