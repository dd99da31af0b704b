"""Folders to tar and back. Unpacking trusts nothing: no entry leaves the folder, through names or through links."""

import contextlib
import io
import os
import tarfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from fusevm.cli.failures import CliError

CHUNK = 1 << 18


def packed_size(folder: Path) -> int:
    """About how many bytes the tar of a folder has."""
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += Path(where, name).lstat().st_size + 1024
    return total


@contextlib.contextmanager
def pack(folder: Path, name: str) -> Iterator[Iterator[bytes]]:
    """The pieces of a tar of a folder, which is called `name` inside. Links are kept as links."""
    read_fd, write_fd = os.pipe()
    failures: list[OSError] = []

    def write() -> None:
        try:
            with (
                os.fdopen(write_fd, "wb") as pipe,
                tarfile.open(fileobj=pipe, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                tar.add(folder, arcname=name, filter=_anonymous)
        except OSError as error:  # a file vanished or cannot be read, or the reader has gone
            failures.append(error)

    def read() -> Iterator[bytes]:
        while piece := os.read(read_fd, CHUNK):
            yield piece
        if failures:
            raise CliError(f"packing {folder} failed: {failures[0]}")

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield read()
    finally:
        os.close(read_fd)
        writer.join()


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Owners here mean nothing there; sockets and devices are left out."""
    if not (entry.isfile() or entry.isdir() or entry.issym() or entry.islnk()):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


class _Pieces(io.RawIOBase):
    """Pieces as a file to read."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._rest) < size:
            piece = next(self._pieces, b"")
            if not piece:
                break
            self._rest += piece
        if size < 0:
            size = len(self._rest)
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def unpack(pieces: Iterable[bytes], folder: Path) -> tuple[int, int]:
    """Extract a tar into an empty folder; return the number of entries and the bytes of files.

    Links are made last, so that no entry is written through one. Owners are not taken over; set-id bits are dropped.
    """
    entries, size = 0, 0
    links: list[tuple[Path, tarfile.TarInfo]] = []
    modes: list[tuple[Path, tarfile.TarInfo]] = []
    source = _Pieces(pieces)
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            for entry in tar:
                path = _checked(folder, entry.name)
                entries += 1
                if entry.issym():
                    links.append((path, entry))
                elif entry.isdir():
                    path.mkdir(parents=True, exist_ok=True)
                    modes.append((path, entry))
                elif entry.islnk():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    os.link(_checked(folder, entry.linkname), path, follow_symlinks=False)
                elif entry.isfile():
                    size += _write(tar, entry, path)
                    modes.append((path, entry))
    except tarfile.TarError as error:
        raise CliError(f"what came is no whole tar: {error}") from error
    while source.read(CHUNK):  # padding after the end mark; the answer must be read to its end
        pass
    for path, entry in links:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(entry.linkname)
    for path, entry in reversed(modes):  # folders after their contents
        # Their owner can always enter and clean up folders; without that they could not be moved to their place.
        path.chmod(entry.mode & 0o777 | (0o700 if entry.isdir() else 0))
        os.utime(path, (entry.mtime, entry.mtime))
    return entries, size


def _checked(folder: Path, name: str) -> Path:
    if name.startswith("/") or ".." in Path(name).parts:
        raise CliError(f"the archive has an entry outside of itself: {name!r}")
    return folder / name


def _write(tar: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(entry)
    if content is None:
        return 0
    with path.open("xb") as file:
        while piece := content.read(CHUNK):
            file.write(piece)
    return entry.size
