"""Copies between this machine and an environment. Whatever interrupts a copy, no half file stands at its target.

Files go through a nameless temporary file (O_TMPFILE) in the target's folder, folders through a temporary folder beside
the target; both are renamed at the end.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import msgspec

from fusevm.cli.failures import CliError
from fusevm.cli.packing import pack, packed_size, unpack
from fusevm.cli.progress import Meter
from fusevm.model.errors import FileNotFound, IsADirectory
from fusevm.sdk.client import Fuse
from fusevm.sdk.failures import TransferCorrupt
from fusevm.wire.exit_status import CONFLICT, NOT_FOUND
from fusevm.wire.guest import FileEntry

CHUNK = 1 << 18
STDIO = "-"


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """A path in an environment."""

    env_id: str
    path: str

    def __str__(self) -> str:
        return f"{self.env_id}:{self.path}"


class Copied(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was copied."""

    path: str = msgspec.field()
    size_bytes: int
    #: Of a file; checked on both sides where the machine tells its own.
    sha256: str = ""
    entries: int = 1


# -- in ------------------------------------------------------------------------------------------------------------


def upload(fuse: Fuse, source: str, target: Remote, *, user: str, meter: Meter) -> Copied:
    """Copy a file, a folder or stdin into an environment."""
    if source == STDIO:
        return _upload_stream(fuse, sys.stdin.buffer, None, target, mode="", user=user, meter=meter)
    path = Path(source)
    if not path.exists():
        raise CliError(f"there is no {source!r} here", code=NOT_FOUND)
    wants_contents = source.endswith("/.") or source in (".", "..")
    place = target if wants_contents else _inside(fuse, target, path.name or path.resolve().name)
    if path.is_dir():
        return _upload_folder(fuse, path, place, user=user, meter=meter)
    with path.open("rb") as file:
        info = os.fstat(file.fileno())
        mode = format(info.st_mode & 0o777, "04o")
        return _upload_stream(fuse, file, info.st_size, place, mode=mode, user=user, meter=meter)


def _inside(fuse: Fuse, target: Remote, name: str) -> Remote:
    """Where a thing called `name` goes: below the target if that is a folder, else the target itself."""
    entry = _find(fuse, target)
    if target.path.endswith("/") or (entry is not None and entry.type == "directory"):
        return Remote(env_id=target.env_id, path=str(PurePosixPath(target.path) / name))
    return target


def _find(fuse: Fuse, place: Remote) -> FileEntry | None:
    files = fuse.environments.files(place.env_id)
    try:
        entry = files.stat(place.path.rstrip("/") or "/")
        if entry.type != "symlink":
            return entry
        with contextlib.suppress(Exception):  # a link to a folder behaves like one
            files.list(place.path)
            return msgspec.structs.replace(entry, type="directory")
    except FileNotFound:
        return None
    return msgspec.structs.replace(entry, type="file")


def _upload_stream(
    fuse: Fuse, file: BinaryIO, size: int | None, place: Remote, *, mode: str, user: str, meter: Meter
) -> Copied:
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        while piece := file.read(CHUNK):
            digest.update(piece)
            yield piece

    meter.begin(PurePosixPath(place.path).name, size)
    written = fuse.environments.files(place.env_id).write(place.path, meter.counted(pieces()), mode=mode, user=user)
    if written.sha256 != digest.hexdigest():
        raise TransferCorrupt(path=str(place), problem="its sha256 differs from what was sent")
    return Copied(path=str(place), size_bytes=written.size_bytes, sha256=written.sha256)


def _upload_folder(fuse: Fuse, folder: Path, place: Remote, *, user: str, meter: Meter) -> Copied:
    parent, name = PurePosixPath(place.path).parent, PurePosixPath(place.path).name
    entry = _find(fuse, place)
    if entry is not None and entry.type != "directory":
        raise CliError(f"{place} exists and is no folder", code=CONFLICT)
    fuse.environments.files(place.env_id).mkdir(str(parent if name else place.path))
    meter.begin(name or place.path, packed_size(folder))
    with pack(folder, name or ".") as tar:
        done = fuse.environments.archive(place.env_id).put(str(parent), meter.counted(tar), user=user)
    return Copied(path=str(place), size_bytes=done.bytes, entries=done.entries)


# -- out -----------------------------------------------------------------------------------------------------------


def download(fuse: Fuse, source: Remote, target: str, *, meter: Meter) -> Copied:
    """Copy a file or folder out of an environment, to a path or to stdout (a folder as tar)."""
    try:
        return _download_file(fuse, source, target, meter)
    except IsADirectory:
        return _download_folder(fuse, source, target, meter)


def _download_file(fuse: Fuse, source: Remote, target: str, meter: Meter) -> Copied:
    name = PurePosixPath(source.path).name
    with fuse.environments.files(source.env_id).open(source.path) as answer:
        meter.begin(name, answer.size_bytes)
        digest, size = hashlib.sha256(), 0
        with contextlib.ExitStack() as stack:
            if target == STDIO:
                file, path = sys.stdout.buffer, Path(STDIO)
            else:
                path = place_here(target, name)
                mode = int(answer.headers.get("x-fuse-mode", "644"), 8) & 0o777
                file = stack.enter_context(open_target(path, mode))
            for piece in meter.counted(answer.chunks()):
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.flush()
            expected = answer.headers.get("x-fuse-sha256", "")
            if expected and expected != digest.hexdigest():
                raise TransferCorrupt(path=str(source), problem="its sha256 differs from what was sent")
    return Copied(path=str(path), size_bytes=size, sha256=digest.hexdigest())


def _download_folder(fuse: Fuse, source: Remote, target: str, meter: Meter) -> Copied:
    wants_contents = source.path.endswith("/.")
    path = os.path.normpath(source.path)
    name = PurePosixPath(path).name
    meter.begin(name or "/", None)
    with fuse.environments.archive(source.env_id).get(path) as pieces:
        if target == STDIO:
            size = 0
            for piece in meter.counted(pieces):
                sys.stdout.buffer.write(piece)
                size += len(piece)
            sys.stdout.buffer.flush()
            return Copied(path=STDIO, size_bytes=size)
        place = Path(target) if wants_contents else place_here(target, name or "root")
        if place.exists() and not place.is_dir():
            raise CliError(f"{place} exists and is no folder", code=CONFLICT)
        with temporary_folder(place.absolute().parent) as folder:
            entries, size = unpack(meter.counted(pieces), folder)
            publish_folder(folder / name if name else folder, place)
    return Copied(path=str(place), size_bytes=size, entries=entries)


def place_here(target: str, name: str) -> Path:
    """The local path of a thing called `name`: below the target if that is a folder, else the target itself."""
    path = Path(target)
    if target.endswith("/") and not path.is_dir():
        raise CliError(f"there is no folder {target!r} here", hint=f"mkdir -p {target}", code=NOT_FOUND)
    if path.is_dir():
        return path / name
    if not path.absolute().parent.is_dir():
        raise CliError(f"there is no folder {str(path.parent)!r} here", hint=f"mkdir -p {path.parent}", code=NOT_FOUND)
    return path


def open_target(path: Path, mode: int) -> contextlib.AbstractContextManager[BinaryIO]:
    """Where a file's bytes go: devices and pipes are written to, links followed, anything else appears whole."""
    if path.exists() and not path.is_file() and not path.is_dir():
        return path.open("wb")
    return atomic_file(path.resolve(), mode)


@contextlib.contextmanager
def atomic_file(path: Path, mode: int) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends well, and leaves nothing otherwise, not even after kill -9."""
    if path.is_dir():
        raise CliError(f"{path} is a folder", code=CONFLICT)
    folder = path.absolute().parent
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # a file system without nameless files
        with _named_temporary(path, mode) as file:
            yield file
        return
    with os.fdopen(fd, "wb") as file:
        yield file
        file.flush()
        os.fchmod(fd, mode)
        os.fsync(fd)
        name = folder / f".fuse-cp-{secrets.token_hex(8)}"
        # With a descriptor Python calls linkat(2), which alone follows the link in /proc (open(2), O_TMPFILE).
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)
        try:
            name.replace(path)
        except BaseException:
            name.unlink()
            raise


@contextlib.contextmanager
def _named_temporary(path: Path, mode: int) -> Iterator[BinaryIO]:
    fd, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=".fuse-cp-")
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder that is gone after the block, with whatever was not moved out of it."""
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=".fuse-cp-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, place: Path) -> None:
    """Move a finished folder to its place; into a folder that is there already, entry by entry."""
    if not place.exists():
        folder.rename(place)
        return
    for child in folder.iterdir():
        target = place / child.name
        if child.is_dir() and not child.is_symlink() and target.is_dir() and not target.is_symlink():
            publish_folder(child, target)
        elif target.is_dir() and not target.is_symlink():
            raise CliError(f"{target} is a folder; it is not replaced by a file", code=CONFLICT)
        else:
            child.replace(target)
