"""Layers become file systems, with the real tools; what is hostile is refused and leaves nothing."""

import asyncio
import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

import fusevm
from fusevm.host.images.build import build_from_tree
from fusevm.host.images.confine import WORKER_UID, make_workplace
from fusevm.host.images.ext4 import EPOCH_S, Extent, estimate_bytes
from fusevm.host.images.file_system import take_file, write_file_system
from fusevm.host.images.pull import Limits, load_image
from fusevm.host.images.store import Image, ImageConfig, ImageStore
from fusevm.host.run import run
from fusevm.model.errors import (
    BadReference,
    CommandFailed,
    DigestMismatch,
    ImageRefused,
    ImageTooLarge,
    ImageUnknown,
    NoSpace,
)
from image_factory import ImageFiles, entry, folder, hard_link, make_tar, sha256, symlink

pytestmark = pytest.mark.skipif(
    shutil.which("mke2fs", path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None, reason="e2fsprogs is not installed"
)
#: cap_net_bind_service=ep, as the kernel keeps it (linux/capability.h, VFS_CAP_REVISION_2).
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)

NOBODY = 65534


LOAD = """
import asyncio, sys
from pathlib import Path
from fusevm.host.images.pull import load_image
from fusevm.host.images.store import ImageStore
print(asyncio.run(load_image(ImageStore(Path(sys.argv[1])), Path(sys.argv[2]), name="made")).digest)
"""


async def load(tmp_path: Path, *tars: bytes, limits: Limits | None = None, **config: object) -> Image:
    """Make an image of layers."""
    layout = ImageFiles(*tars, **config).write_layout(tmp_path / "layout")
    return await load_image(ImageStore(tmp_path / "data"), layout, name="made", limits=limits or Limits())


async def listing(image: Image, path: str = "/") -> dict[str, tuple[str, str, str, int]]:
    """Names in a directory of the image: mode, owner, group, size."""
    text = (await run(["debugfs", "-R", f'ls -p "{path}"', image.rootfs], timeout_s=60)).stdout.decode(
        errors="surrogateescape"
    )
    rows = [line.split("/") for line in text.splitlines() if line.startswith("/")]
    return {
        row[5]: (row[2], row[3], row[4], int(row[6] or 0)) for row in rows if row[5] not in (".", "..", "lost+found")
    }


async def content(image: Image, path: str) -> bytes:
    return (await run(["debugfs", "-R", f'cat "{path}"', image.rootfs], timeout_s=60)).stdout


async def stat(image: Image, path: str) -> str:
    return (await run(["debugfs", "-R", f'stat "{path}"', image.rootfs], timeout_s=60)).text


def nothing_left(tmp_path: Path) -> bool:
    images = tmp_path / "data" / "images"
    return (
        not list(images.glob(".build-*")) and not list(images.glob("sha256-*")) and not (images / "names.json").exists()
    )


async def test_files_of_every_kind_keep_what_they_are(tmp_path: Path):
    big = os.urandom(70_000) + bytes(300_000) + os.urandom(3)
    tar = make_tar(
        folder("./", 0o755),
        folder("bin"),
        entry("bin/su", big, mode=0o4755),
        hard_link("bin/other", "bin/su"),
        entry("bin/ping", b"x", xattrs={"security.capability": CAPABILITY, "trusted.overlay.opaque": b"y"}),
        symlink("bin/sh", "/bin/su"),
        folder("home/user", 0o700, uid=1000, gid=1001),
        entry("home/user/q\"uo te'<3>#é", b"odd", uid=100_000, gid=70_000),
        entry("run/pipe", kind=tarfile.FIFOTYPE, mode=0o600),
        entry("tmp/" + "n" * 250, b"long"),
        entry("empty"),
        entry("dev/console", kind=tarfile.CHRTYPE, device=(5, 1)),
        folder("lost+found", 0o700),
    )
    image = await load(
        tmp_path, tar, Env=["A=1"], WorkingDir="/work/here", User="1000:5", Entrypoint=["/bin/su"], Cmd=["-l"]
    )
    root = await listing(image)
    assert set(root) == {"bin", "home", "run", "tmp", "empty", "dev", "work"}
    assert root["empty"] == ("100644", "0", "0", 0)
    assert (await listing(image, "/bin"))["su"] == ("104755", "0", "0", len(big))
    assert await content(image, "/bin/other") == big
    assert "Links: 2" in await stat(image, "/bin/su")
    assert "/bin/su" in await stat(image, "/bin/sh")
    assert (await listing(image, "/home"))["user"] == ("040700", "1000", "1001", 0)
    assert list((await listing(image, "/home/user")).values()) == [("100644", "100000", "70000", 3)]
    assert (await listing(image, "/run"))["pipe"][0] == "010600"
    assert (await listing(image, "/dev")) == {}
    assert (await listing(image, "/work"))["here"][0] == "040755"
    assert (await listing(image, "/tmp"))["n" * 250][3] == 4
    ping = await stat(image, "/bin/ping")
    assert "security.capability" in ping
    assert "trusted" not in ping
    assert image.config.env == {"A": "1"}
    assert (image.config.workdir, image.config.user) == ("/work/here", "1000:5")
    assert (image.config.entrypoint, image.config.cmd) == (("/bin/su",), ("-l",))
    done = await run(["e2fsck", "-fn", image.rootfs], timeout_s=60)
    assert done.returncode == 0
    # Sparse where the content is.
    assert image.rootfs.stat().st_blocks * 512 < 600_000
    assert await ImageStore(tmp_path / "data").find_damage() == []


async def test_a_size_that_leaves_a_tiny_last_group_is_recorded_as_it_is(tmp_path: Path):
    """mke2fs leaves out a last block group of a few blocks: the file is smaller than what was asked for."""
    group = 128 << 20
    # The content that is estimated at 64 KiB more than one group.
    blocks = next(
        number
        for number in range(group >> 12)
        if estimate_bytes(Extent(inodes=2, bytes=number << 12)) > group + (64 << 10)
    )
    zeros = bytes((blocks - 2) << 12)
    image = await load(tmp_path, make_tar(entry("zeros", zeros)))
    assert image.record.size_bytes == group
    assert image.rootfs.stat().st_size == group
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "zeros").write_bytes(zeros)
    built = await build_from_tree(ImageStore(tmp_path / "data"), "built", tree, config=ImageConfig())
    assert built.rootfs.stat().st_size == built.record.size_bytes == group


async def test_the_same_layers_give_the_same_image(tmp_path: Path):
    tar = make_tar(*[entry(f"d{n % 7}/f{n}", os.urandom(n * 10), mtime=EPOCH_S + n) for n in range(300)])
    first = await load(tmp_path / "a", tar)
    second = await load(tmp_path / "b", tar)
    assert first.digest == second.digest
    assert first.record.rootfs_sha256 == second.record.rootfs_sha256


async def test_later_layers_replace_hide_and_link(tmp_path: Path):
    lower = make_tar(
        folder("etc"),
        entry("etc/a", b"lower"),
        entry("etc/b", b"lower"),
        entry("opt/deep/one", b"1"),
        entry("opt/deep/two", b"2"),
        entry("gone/x", b"x"),
        folder("usr/lib"),
        symlink("lib", "usr/lib"),
        entry("kind", b"file"),
    )
    upper = make_tar(
        entry("etc/a", b"upper"),
        entry("etc/.wh.b"),
        # Before and after: an opaque directory hides what was there, not what this layer brings.
        entry("opt/deep/three", b"3"),
        entry("opt/deep/.wh..wh..opq"),
        entry("opt/deep/four", b"4"),
        entry(".wh.gone"),
        entry("gone", b"now a file"),
        entry("lib/module", b"through the link"),
        folder("kind"),
        entry("kind/inner", b"inner"),
        hard_link("etc/c", "etc/a"),
        entry("etc/.wh.never-was"),
    )
    image = await load(tmp_path, lower, upper)
    assert set(await listing(image, "/etc")) == {"a", "c"}
    assert await content(image, "/etc/c") == b"upper"
    assert set(await listing(image, "/opt/deep")) == {"three", "four"}
    assert await content(image, "/gone") == b"now a file"
    assert await content(image, "/usr/lib/module") == b"through the link"
    assert set(await listing(image, "/kind")) == {"inner"}


async def test_a_link_to_the_host_leads_into_the_image(tmp_path: Path):
    """What tricks an unpacker that looks names up on the host writes into the image, and nowhere else."""
    victim = tmp_path / "victim"
    victim.mkdir()
    tar = make_tar(
        symlink("out", str(victim)),
        entry("out/written", b"inside"),
        symlink("up", "../../../../../.." + str(victim)),
        entry("up/too", b"inside"),
        symlink("self", "self2"),
    )
    image = await load(tmp_path, tar)
    assert list(victim.iterdir()) == []
    assert await content(image, f"{victim}/written") == b"inside"
    assert await content(image, f"{victim}/too") == b"inside"


LOOP = [symlink("a", "b"), symlink("b", "a"), entry("a/x", b"")]
HOSTILE = {
    "a name with ..": ([entry("../../etc/passwd", b"x")], "leads out"),
    "a name with .. within": ([entry("a/../../x", b"x")], "leads out"),
    "a hard link out of the tree": ([hard_link("x", "../../etc/shadow")], "leads out"),
    "a hard link to the host": ([hard_link("x", "/etc/shadow")], "does not exist"),
    "a hard link behind a link to the host": ([symlink("e", "/etc"), hard_link("x", "e/shadow")], "does not exist"),
    "a hard link to a directory": ([folder("d"), hard_link("x", "d")], "to a directory"),
    "a disk": ([entry("x", kind=tarfile.BLKTYPE, device=(8, 0))], "block device"),
    "a disk behind a link from /dev": (
        [folder("y"), symlink("dev", "y"), entry("dev/sda", kind=tarfile.BLKTYPE, device=(8, 0))],
        "block device",
    ),
    "the kernel's memory": ([entry("etc/mem", kind=tarfile.CHRTYPE, device=(1, 1))], "character device"),
    "a whiteout of overlayfs": ([entry("x", kind=tarfile.CHRTYPE)], "character device"),
    "a loop of links": (LOOP, "too many symbolic links"),
    "a file below a file": ([entry("a", b"x"), entry("a/b", b"y")], "below what is no directory"),
    "a line break in a name": ([entry("a\nwrite /etc/shadow b", b"x")], "line break"),
    "a line break in a link": ([symlink("a", "x\nrm b")], "line break"),
    "a whiteout of its parent": ([entry("a/.wh...", b"")], "hides nothing"),
    "a whiteout without a name": ([entry(".wh.", b"")], "hides nothing"),
    "a file as the root": ([entry("./", b"")], "root directory"),
    "a very deep tree": ([entry("a/" * 300 + "x", b"")], "directories deep"),
    "a very long name": ([entry("n" * 256, b"")], "longer than 255"),
    "a very long path": ([entry("/".join(["n" * 200] * 25), b"")], "too long"),
    "an owner out of range": ([entry("x", b"", uid=1 << 40)], "belongs to"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_is_hostile_is_refused_and_leaves_nothing(tmp_path: Path, name: str):
    entries, words = HOSTILE[name]
    form = tarfile.GNU_FORMAT if name == "an owner out of range" else tarfile.PAX_FORMAT
    with pytest.raises(ImageRefused, match=words) as caught:
        await load(tmp_path, make_tar(entry("good", b"x"), *entries, form=form))
    assert str(tmp_path / "layout") in caught.value.message
    assert nothing_left(tmp_path)


def bomb(size: int) -> bytes:
    """A layer of one file of zeros, packed."""
    head = tarfile.TarInfo("zeros")
    head.size = size
    raw = head.tobuf(tarfile.GNU_FORMAT)
    return raw + bytes(size + -size % 512 + 1024)


DAMAGED = {
    "cut off": lambda packed: packed[: len(packed) // 2],
    "changed": lambda packed: packed[:200] + bytes([packed[200] ^ 0xFF]) + packed[201:],
    "not packed": lambda _packed: b"\x1f\x8b" + os.urandom(500),
    "no archive": lambda _packed: gzip.compress(os.urandom(5000)),
    "cut within a file": lambda _packed: gzip.compress(make_tar(entry("x", bytes(5000)))[:2000]),
    "empty file": lambda _packed: b"",
}


@pytest.mark.parametrize("name", DAMAGED)
async def test_a_corrupt_layer_is_refused(tmp_path: Path, name: str):
    """The digests fit: it was pushed like that."""
    files = ImageFiles(make_tar(entry("x", os.urandom(4000))))
    files.layers = [DAMAGED[name](files.layers[0])]
    with pytest.raises((ImageRefused, DigestMismatch)):
        await load_image(ImageStore(tmp_path / "data"), files.write_layout(tmp_path / "layout"), name="made")
    assert nothing_left(tmp_path)


async def test_wrong_digests_are_named(tmp_path: Path):
    tar = make_tar(entry("x", b"x"))
    store = ImageStore(tmp_path / "data")

    def layout(name: str) -> tuple[ImageFiles, Path]:
        files = ImageFiles(tar)
        return files, files.write_layout(tmp_path / name)

    for name, part in (("layer", 0), ("config", 1), ("manifest", 2)):
        files, path = layout(name)
        raw = json.dumps(files.manifest).encode()
        data = [files.layers[0], files.config_bytes, raw][part]
        changed = data[:-1] + bytes([data[-1] ^ 1]) if part == 0 else data + b" "
        (path / "blobs" / "sha256" / sha256(data)).write_bytes(changed)
        with pytest.raises(DigestMismatch, match=name) as caught:
            await load_image(store, path, name="made")
        assert caught.value.wanted == sha256(data)
    files = ImageFiles(tar)
    files.config["rootfs"]["diff_ids"] = [f"sha256:{'0' * 64}"]
    with pytest.raises(DigestMismatch, match="layer 1"):
        await load_image(store, files.write_layout(tmp_path / "diff"), name="made")
    assert nothing_left(tmp_path)


async def test_sizes_are_limited_declared_or_real(tmp_path: Path):
    limits = Limits(max_bytes=4 << 20)
    # 64 MiB in some 60 KiB.
    with pytest.raises(ImageTooLarge, match="unfold"):
        await load(tmp_path, bomb(64 << 20), limits=limits)
    # A header that promises what never comes.
    head = tarfile.TarInfo("huge")
    head.size = 1 << 50
    with pytest.raises(ImageRefused, match="ends within"):
        await load(tmp_path / "b", head.tobuf(tarfile.GNU_FORMAT), limits=limits)
    # Many small ones.
    with pytest.raises(ImageTooLarge):
        await load(tmp_path / "c", *[make_tar(entry("x", bytes(3 << 20))) for _ in range(3)], limits=limits)
    # A manifest that lies about a layer, in both directions.
    files = ImageFiles(make_tar(entry("x", b"x")))
    for size, kind in ((5, ImageTooLarge), (1 << 40, NoSpace), (len(files.layers[0]) + 1, ImageRefused)):
        manifest = files.manifest
        manifest["layers"][0]["size"] = size
        with pytest.raises(kind):
            await load_image(
                ImageStore(tmp_path / "data"), files.write_layout(tmp_path / f"l{size}", manifest=manifest), name="made"
            )
    assert nothing_left(tmp_path)


async def test_what_must_stay_free_stays_free(tmp_path: Path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(NoSpace):
        await load(tmp_path, make_tar(entry("x", b"x")), limits=Limits(reserve_bytes=free))
    assert nothing_left(tmp_path)


async def test_tars_of_both_kinds_are_read(tmp_path: Path):
    files = ImageFiles(make_tar(entry("x", b"one")), make_tar(entry("y", b"two")), Cmd=["/x"])
    store = ImageStore(tmp_path / "data")
    layout = files.write_layout(tmp_path / "layout", tag="v1")
    plain, packed = tmp_path / "oci.tar", tmp_path / "oci.tar.gz"
    parts = [path for path in sorted(layout.rglob("*")) if path.is_file()]
    plain.write_bytes(make_tar(*[entry(str(path.relative_to(layout)), path.read_bytes()) for path in parts]))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    saved = files.write_saved(tmp_path / "saved.tar", ["tool:1"])
    digests = {
        (await load_image(store, layout, tag="v1", name="a")).digest,
        (await load_image(store, plain, name="b")).digest,
        (await load_image(store, packed, tag="v1", name="c")).digest,
        (await load_image(store, saved, tag="tool:1", name="d")).digest,
    }
    assert len(digests) == 1
    image = await store.resolve("a")
    assert await content(image, "/y") == b"two"
    for path, tag in ((layout, "v2"), (saved, "tool:2")):
        with pytest.raises(ImageUnknown):
            await load_image(store, path, tag=tag, name="e")
    with pytest.raises(BadReference):
        await load_image(store, tmp_path / "nothing", name="e")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ImageRefused, match="no tar"):
        await load_image(store, tmp_path / "text", name="e")
    (tmp_path / "other.tar").write_bytes(make_tar(entry("x", b"")))
    with pytest.raises(ImageRefused, match="no OCI layout"):
        await load_image(store, tmp_path / "other.tar", name="e")


async def test_a_layout_that_points_out_of_itself_is_not_followed(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_bytes(gzip.compress(make_tar(entry("x", b"secret"))))
    files = ImageFiles(make_tar(entry("x", b"x")))
    layout = files.write_layout(tmp_path / "layout")
    blob = layout / "blobs" / "sha256" / sha256(files.layers[0])
    for replace in (lambda: blob.symlink_to(secret), lambda: os.mkfifo(blob), blob.mkdir):
        blob.rmdir() if blob.is_dir() else blob.unlink(missing_ok=True)
        replace()
        with pytest.raises(ImageRefused, match="lacks its part"):
            await load_image(ImageStore(tmp_path / "data"), layout, name="made")
    assert nothing_left(tmp_path)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
async def test_layers_packed_with_zstd_are_read(tmp_path: Path):
    body = os.urandom(9000)
    tar = make_tar(entry("x", body))
    files = ImageFiles(tar)
    packed = await run(["zstd", "-q", "-c"], stdin=tar, timeout_s=60)
    files.layers, files.media_type = [packed.stdout], "application/vnd.oci.image.layer.v1.tar+zstd"
    store = ImageStore(tmp_path / "data")
    image = await load_image(store, files.write_layout(tmp_path / "layout"), name="made")
    assert await content(image, "/x") == body
    many = await run(["zstd", "-q", "-c"], stdin=bomb(64 << 20), timeout_s=60)
    files = ImageFiles(bomb(64 << 20))
    files.layers, files.media_type = [many.stdout], "application/vnd.oci.image.layer.v1.tar+zstd"
    with pytest.raises(ImageTooLarge):
        await load_image(
            ImageStore(tmp_path / "other"),
            files.write_layout(tmp_path / "bomb"),
            name="made",
            limits=Limits(max_bytes=1 << 20),
        )
    files.layers = [packed.stdout[:1000]]
    with pytest.raises(ImageRefused, match="damaged"):
        await load_image(ImageStore(tmp_path / "other"), files.write_layout(tmp_path / "cut"), name="made")


async def test_an_image_for_other_machines_is_not_taken(tmp_path: Path):
    files = ImageFiles(make_tar(entry("x", b"x")), architecture="s390x")
    with pytest.raises(ImageRefused, match="s390x"):
        await load_image(ImageStore(tmp_path / "data"), files.write_layout(tmp_path / "layout"), name="made")


async def test_a_cancelled_load_leaves_nothing(tmp_path: Path):
    layout = ImageFiles(bomb(300 << 20)).write_layout(tmp_path / "layout")
    images = tmp_path / "data" / "images"
    for glob in ("*", ".build-*", ".build-*/work/layers", ".build-*/work/content/0"):
        work = asyncio.create_task(load_image(ImageStore(tmp_path / "data"), layout, name="made"))
        while not list(images.glob(glob)) and not work.done():
            await asyncio.sleep(0.005)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert nothing_left(tmp_path), glob
        for lock in images.glob(".lock*"):
            lock.unlink()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")
async def test_layers_are_read_by_a_program_without_rights(tmp_path: Path):
    layout = ImageFiles(bomb(300 << 20)).write_layout(tmp_path / "layout")
    images = tmp_path / "data" / "images"
    work = asyncio.create_task(load_image(ImageStore(tmp_path / "data"), layout, name="made"))
    try:
        while not (found := list(images.glob(".build-*/work/content/0"))):
            assert not work.done()
            await asyncio.sleep(0.005)
        assert found[0].stat().st_uid == WORKER_UID
        folder = found[0].parents[1]
        reader = next(path.parent for path in Path("/proc").glob("[0-9]*/cwd") if _leads_to(path, folder))
        status = dict(line.split(":\t", 1) for line in (reader / "status").read_text().splitlines())
        assert status["Uid"].split() == [str(WORKER_UID)] * 4
        assert status["Groups"].split() == []
        assert [status[name] for name in ("CapEff", "CapPrm", "CapInh")] == ["0" * 16] * 3
        assert status["NoNewPrivs"] == "1"
        assert (reader / "ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    finally:
        work.cancel()
        await asyncio.wait({work})
    assert nothing_left(tmp_path)


def _leads_to(link: Path, folder: Path) -> bool:
    try:
        return link.readlink() == folder
    except OSError:
        return False


async def test_a_killed_load_ends_with_its_daemon_and_is_swept(tmp_path: Path):
    layout = ImageFiles(bomb(600 << 20)).write_layout(tmp_path / "layout")
    images = tmp_path / "data" / "images"
    source = str(Path(fusevm.__file__).parents[1])
    words = [sys.executable, "-c", LOAD, tmp_path / "data", layout]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": source}) as loader:
        while not (found := list(images.glob(".build-*/work/content/0"))):
            assert loader.poll() is None
            await asyncio.sleep(0.005)
        folder = found[0].parents[1]
        loader.kill()
    async with asyncio.timeout(60):
        while any(_leads_to(path, folder) for path in Path("/proc").glob("[0-9]*/cwd")):
            await asyncio.sleep(0.01)
    assert folder.exists()
    small = ImageFiles(make_tar(entry("x", b"x"))).write_layout(tmp_path / "small")
    await load_image(ImageStore(tmp_path / "data"), small, name="small")
    assert list(images.glob(".build-*")) == []


async def test_what_debugfs_cannot_do_fails_the_image(tmp_path: Path):
    """It ends with status 0 all the same."""
    folder = tmp_path / "work"
    make_workplace(folder)
    for script in (b"write content/none ./x\n", b"sif ./x mode 0100644\n", b"nonsense\n", b"cd ./nowhere\n"):
        (folder / "script").write_bytes(script)
        with pytest.raises(CommandFailed, match="debugfs"):
            await write_file_system(folder, Extent(inodes=1, bytes=4096))


async def test_what_the_worker_leaves_is_taken_only_if_it_is_a_plain_file(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name, make in (
        ("link", lambda path: path.symlink_to(secret)),
        ("name", lambda path: path.hardlink_to(secret)),
        ("pipe", os.mkfifo),
        ("folder", os.mkdir),
    ):
        made = tmp_path / name
        make(made)
        with pytest.raises(OSError, match=r"plain file|symbolic links"):
            take_file(made, tmp_path / "taken")
    assert not (tmp_path / "taken").exists()
    assert secret.stat().st_mode & 0o777 == 0o644


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
async def test_an_ordinary_user_makes_the_same_image(tmp_path: Path):
    """Owners, modes and capabilities are words: nobody needs a right for them."""
    tar = make_tar(
        entry("bin/su", b"x", mode=0o4755),
        entry("home/file", b"y", uid=1000, gid=1001),
        entry("bin/ping", b"z", xattrs={"security.capability": CAPABILITY}),
        hard_link("bin/ping6", "bin/ping"),
    )
    here = await load(tmp_path, tar)
    data = Path(tempfile.mkdtemp(prefix="fuse-rootless-", dir="/var/tmp"))
    try:
        shutil.copytree(tmp_path / "layout", data / "layout")
        for path in (data, *data.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        source = str(Path(fusevm.__file__).parents[1])
        words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
        if (await run([*words, "test", "-r", f"{source}/fusevm"], timeout_s=30, check=False)).returncode:
            pytest.skip("the source folder cannot be read by other users")
        words += [sys.executable, "-c", LOAD, str(data / "data"), str(data / "layout")]
        done = await run(words, timeout_s=120, env={"PYTHONPATH": source, "HOME": str(data)})
        assert done.text.strip() == here.digest
    finally:
        shutil.rmtree(data)
