"""Images and kernels by URL."""

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import test_bzimage as bzimages
from file_server import ok, serving

from fusevm.host.images.addresses import parse_networks
from fusevm.host.images.artifact import ArtifactImporter, find_problem
from fusevm.host.images.fetch import FetchPolicy
from fusevm.host.images.kernel import KernelStore
from fusevm.host.images.store import ImageStore, Origin
from fusevm.model.errors import (
    AddressRefused,
    ArtifactRefused,
    BadField,
    DigestMismatch,
    FetchFailed,
    ImageTooLarge,
)

POLICY = FetchPolicy(allowed=parse_networks(["127.0.0.0/8"]), max_bytes=16 << 20, silence_s=60)


class Clock:
    """Milliseconds that a test moves."""

    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def rootfs(tmp_path: Path) -> bytes:
    """A small ext4 file system."""
    path = tmp_path / "made.ext4"
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", path, "4M"], check=True)
    return path.read_bytes()


def importer(tmp_path: Path, clock: Clock, policy: FetchPolicy = POLICY) -> ArtifactImporter:
    return ArtifactImporter(ImageStore(tmp_path / "data"), KernelStore(tmp_path / "data"), policy, now_ms=clock)


class Shelf:
    """A server with one file that has a version."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.version = "1"
        self.is_away = False
        self.sent = 0

    def __call__(self, _target: str, headers: dict[str, str]) -> bytes:
        if self.is_away:
            return ok(b"", status="503 Away")
        if headers.get("if-none-match") == f'"{self.version}"':
            return ok(b"", status="304 Not Modified")
        self.sent += 1
        return ok(self.content, f'ETag: "{self.version}"')


async def test_a_url_is_downloaded_once_and_asked_about_again(tmp_path: Path, rootfs: bytes):
    shelf, clock = Shelf(rootfs), Clock()
    async with serving(shelf) as server:
        artifacts = importer(tmp_path, clock)
        url = server.url("/rootfs.ext4?token=secret")
        image = await artifacts.import_artifact(url)
        assert image.record.rootfs_sha256 == hashlib.sha256(rootfs).hexdigest()
        assert image.record.origin is Origin.ARTIFACT
        assert image.rootfs.read_bytes() == rootfs
        assert image.names[0].startswith("artifact/")
        assert "secret" not in image.record.source
        # Within a minute nobody is asked; later the server says that nothing has changed.
        assert (await artifacts.import_artifact(url)).digest == image.digest
        assert (len(server.requests), shelf.sent) == (1, 1)
        clock.ms += 61_000
        assert (await artifacts.import_artifact(url)).digest == image.digest
        assert (len(server.requests), shelf.sent) == (2, 1)
        # Another process, another version.
        clock.ms += 61_000
        shelf.content, shelf.version = rootfs[:-4096] + b"x" * 4096, "2"
        changed = await importer(tmp_path, clock).import_artifact(url)
        assert changed.digest != image.digest
        assert changed.names == image.names
        assert shelf.sent == 2
    index = (tmp_path / "data" / "images" / "artifacts.json").read_text()
    assert "secret" not in index
    assert list((tmp_path / "data" / "images").glob(".build-*")) == []


async def test_many_creates_of_one_url_download_it_once(tmp_path: Path, rootfs: bytes):
    shelf = Shelf(rootfs)
    async with serving(shelf) as server:
        artifacts = importer(tmp_path, Clock())
        found = await asyncio.gather(*(artifacts.import_artifact(server.url("/x")) for _ in range(5)))
    assert len({image.digest for image in found}) == 1
    assert shelf.sent == 1


async def test_a_server_that_is_away_costs_nothing_while_a_copy_is_here(tmp_path: Path, rootfs: bytes):
    shelf, clock = Shelf(rootfs), Clock()
    async with serving(shelf) as server:
        artifacts = importer(tmp_path, clock)
        image = await artifacts.import_artifact(server.url("/x"))
        shelf.is_away = True
        clock.ms += 3_600_000
        assert (await artifacts.import_artifact(server.url("/x"))).digest == image.digest
        with pytest.raises(FetchFailed, match="503"):
            await artifacts.import_artifact(server.url("/y"))
        # A copy that was damaged or removed is no copy.
        image.rootfs.chmod(0o600)
        image.rootfs.write_bytes(b"short")
        with pytest.raises(FetchFailed, match="503"):
            await artifacts.import_artifact(server.url("/x"))
        shelf.is_away = False
        assert (await artifacts.import_artifact(server.url("/x"))).rootfs.read_bytes() == rootfs


async def test_a_demanded_digest_is_held_to(tmp_path: Path, rootfs: bytes):
    shelf, clock = Shelf(rootfs), Clock()
    right = hashlib.sha256(rootfs).hexdigest()
    async with serving(shelf) as server:
        artifacts = importer(tmp_path, clock)
        with pytest.raises(DigestMismatch):
            await artifacts.import_artifact(server.url("/x"), sha256="0" * 64)
        assert await ImageStore(tmp_path / "data").load_all() == []
        image = await artifacts.import_artifact(server.url("/x"), sha256=f"sha256:{right.upper()}")
        sent = len(server.requests)
        clock.ms += 3_600_000
        assert (await artifacts.import_artifact(server.url("/x"), sha256=right)).digest == image.digest
        assert len(server.requests) == sent, "the very content is here: nobody needs to be asked"
        with pytest.raises(DigestMismatch):
            await artifacts.import_artifact(server.url("/x"), sha256="1" * 64)
        with pytest.raises(BadField, match="64 hex digits"):
            await artifacts.import_artifact(server.url("/x"), sha256="abc")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"#!/bin/sh\n" + bytes(8192), "no ext4"),
        (lambda data: b"", "no ext4"),
        (lambda data: data[: 1 << 20], "cut off"),
        (lambda data: data + b"x", "multiple of 512"),
        (lambda data: data[:1120] + bytes([data[1120] | 4]) + data[1121:], "journal"),
        (lambda data: data[:1048] + b"\xff" + data[1049:], "superblock"),
    ],
)
async def test_what_is_no_root_file_system_is_refused(tmp_path: Path, rootfs: bytes, damage, words: str):
    async with serving(Shelf(damage(rootfs))) as server:
        with pytest.raises(ArtifactRefused, match=words):
            await importer(tmp_path, Clock()).import_artifact(server.url("/x"))
    assert await ImageStore(tmp_path / "data").load_all() == []
    assert list((tmp_path / "data" / "images").glob(".build-*")) == []


def test_an_ordinary_file_system_has_no_problem(tmp_path: Path, rootfs: bytes):
    path = tmp_path / "fs"
    path.write_bytes(rootfs)
    assert find_problem(path) == ""


async def test_limits_and_addresses_are_the_policys(tmp_path: Path, rootfs: bytes):
    async with serving(Shelf(rootfs)) as server:
        small = FetchPolicy(allowed=POLICY.allowed, max_bytes=1 << 20)
        with pytest.raises(ImageTooLarge):
            await importer(tmp_path, Clock(), small).import_artifact(server.url("/x"))
        with pytest.raises(AddressRefused):
            await importer(tmp_path, Clock(), FetchPolicy()).import_artifact(server.url("/x"))


async def test_a_kernel_is_imported_and_checked(tmp_path: Path):
    elf = bzimages.make_elf()
    shelf = Shelf(elf)
    async with serving(shelf) as server:
        artifacts = importer(tmp_path, Clock())
        kernel = await artifacts.import_kernel(server.url("/vmlinux"), sha256=hashlib.sha256(elf).hexdigest())
        assert kernel.vmlinux.read_bytes() == elf
        assert (await artifacts.import_kernel(server.url("/vmlinux"))).digest == kernel.digest
        assert shelf.sent == 1
        shelf.content = b"no kernel" * 1000
        with pytest.raises(ArtifactRefused):
            await artifacts.import_kernel(server.url("/other"))
