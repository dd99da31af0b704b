"""A release archive is what it was compared as, whatever happens to its name meanwhile."""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import IO, Any

import pytest

from fusevm.cli.install.perform import unpack_release
from fusevm.cli.install.steps import UnpackRelease
from fusevm.host.vmm.firecracker.pins import VERSION_TEXT
from fusevm.model.errors import DigestMismatch


def make_archive(path: Path, words: str) -> str:
    """A release whose programs say some words; its digest."""
    with tarfile.open(path, mode="w:gz") as archive:
        for name in ("firecracker", "jailer"):
            text = f"#!/bin/sh\n{words}\necho '{name.capitalize()} v{VERSION_TEXT}'\n".encode()
            member = tarfile.TarInfo(f"release-v{VERSION_TEXT}-x86_64/{name}-v{VERSION_TEXT}-x86_64")
            member.size, member.mode = len(text), 0o755
            archive.addfile(member, io.BytesIO(text))
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Exchanged(type(Path())):  # type: ignore[misc]  # PosixPath; Path itself cannot be subclassed before 3.12
    """A name that leads to another file as soon as it has been opened."""

    def open(self, *arguments: Any, **options: Any) -> IO[Any]:
        file = super().open(*arguments, **options)
        Path(f"{self}.next").replace(self)
        return file


async def test_what_was_not_compared_is_not_unpacked(tmp_path: Path):
    archive, folder = tmp_path / "release.tgz", tmp_path / "out" / "release"
    make_archive(archive, "echo evil")
    good = make_archive(tmp_path / "release.tgz.next", "")
    step = UnpackRelease(archive=Exchanged(archive), sha256=good, folder=folder, version=VERSION_TEXT)
    with pytest.raises(DigestMismatch):
        await unpack_release(step)
    assert not folder.exists()


async def test_what_was_compared_is_what_is_unpacked(tmp_path: Path):
    archive, folder = tmp_path / "release.tgz", tmp_path / "out" / "release"
    good = make_archive(archive, "")
    make_archive(tmp_path / "release.tgz.next", "echo evil")
    await unpack_release(UnpackRelease(archive=Exchanged(archive), sha256=good, folder=folder, version=VERSION_TEXT))
    assert "evil" not in (folder / "firecracker").read_text()
