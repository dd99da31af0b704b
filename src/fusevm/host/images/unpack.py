"""Turn layers into numbered files of content and a script that makes a file system of them (`file_system`).

A program of its own: it reads a job from standard input, gives up its rights (`confine`), and says on standard output
what came of it. It works in the current directory and opens nothing but the layers and what it makes itself.

Owns: decompression, limits, digests of what is inside. Must not: trust anything in a layer.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import zlib
from pathlib import Path
from typing import BinaryIO, Final, Literal

import msgspec

from fusevm.host.images.confine import drop_rights
from fusevm.host.images.file_system import CONTENT, measure_tree, render_script
from fusevm.host.images.tar_stream import BadTar, TarKind, TarStream
from fusevm.host.images.tree import BadTree, Tree

_CHUNK: Final = 256 << 10
_GZIP: Final = b"\x1f\x8b"
#: Of zlib: a gzip member with its header and checksum.
_GZIP_BITS: Final = 31
_HOLE: Final = 4096
_ZEROS: Final = bytes(_HOLE)
#: Files, directories and links of all layers together.
_MAX_ENTRIES: Final = 1_000_000


class LayerJob(msgspec.Struct, frozen=True, kw_only=True):
    """One layer: its file, and the sha256 of the archive in it (64 hex digits), or empty when nobody says it."""

    file: str
    diff_id: str = ""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be unpacked, from the lowest layer up."""

    layers: list[LayerJob]
    #: Made if it is missing, as commands begin there.
    workdir: str = "/"
    #: Of all files' content together, and of all archives together.
    max_bytes: int
    max_entries: int = _MAX_ENTRIES


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. On success `script` and `content/` are there."""

    kind: Literal["done", "refused", "too_large", "digest", "no_space"]
    #: In words; for `digest`: the digest that was found, and the one that was wanted.
    problem: str = ""
    found: str = ""
    wanted: str = ""
    #: Of the file system.
    inodes: int = 0
    bytes: int = 0


class TooLarge(Exception):
    """A layer holds more than is allowed."""


class WrongDigest(Exception):
    """A layer is not what the image's configuration says."""

    def __init__(self, layer: int, found: str, wanted: str) -> None:
        super().__init__(layer, found, wanted)
        self.layer, self.found, self.wanted = layer, found, wanted


class LayerReader:
    """The archive in a layer, whatever it is packed with: bounded, and hashed as it is read."""

    def __init__(self, file: BinaryIO, allowance: Allowance) -> None:
        self._file = file
        self._allowance = allowance
        self._state = hashlib.sha256()
        self._packed = file.read(2)
        self._unpacker = zlib.decompressobj(_GZIP_BITS) if self._packed == _GZIP else None
        #: Unfolded, and not yet read.
        self._piece = memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end. Raises BadTar, TooLarge."""
        if not self._piece:
            piece = self._plain() if self._unpacker is None else self._inflate(self._unpacker)
            self._state.update(piece)
            self._allowance.spend(len(piece))
            self._piece = memoryview(piece)
        data, self._piece = bytes(self._piece[:size]), self._piece[size:]
        return data

    def finish(self) -> str:
        """Read what follows the archive, and return the sha256 of it all."""
        while self.read(_CHUNK):
            pass
        return self._state.hexdigest()

    def _plain(self) -> bytes:
        head, self._packed = self._packed, b""
        return head or self._file.read(_CHUNK)

    def _inflate(self, unpacker: zlib._Decompress) -> bytes:
        """The next piece, of a length that is bounded however far the packed bytes would unfold."""
        while True:
            self._packed = self._packed or self._file.read(_CHUNK)
            if unpacker.eof:
                if not self._packed:
                    return b""
                self._unpacker = unpacker = zlib.decompressobj(_GZIP_BITS)  # another member follows
            is_last = not self._packed
            try:
                piece = unpacker.decompress(self._packed, _CHUNK)
            except zlib.error as e:
                raise BadTar(f"its compression is damaged ({e})") from e
            self._packed = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
            if piece:
                return piece
            if is_last and not unpacker.eof:
                raise BadTar("it is cut off")


class Allowance:
    """Bytes that may still be unpacked."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._spent = 0

    def spend(self, count: int) -> None:
        """Take bytes. Raises TooLarge."""
        self._spent += count
        if self._spent > self._max_bytes:
            raise TooLarge(f"its layers unfold to more than {self._max_bytes} bytes")


class Contents:
    """The numbered files."""

    def __init__(self) -> None:
        self._next = 0
        self._kept: set[int] = set()

    def save(self, stream: TarStream, size: int) -> int:
        """Keep the content of the entry that is being read; its number."""
        number, self._next = self._next, self._next + 1
        self._kept.add(number)
        fd = _open_new(f"{CONTENT}/{number}")
        try:
            for piece in stream.content():
                _write_sparsely(fd, piece)
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
        return number

    def drop_all_but(self, wanted: set[int]) -> None:
        """Remove what later layers have replaced or hidden."""
        for number in self._kept - wanted:
            Path(CONTENT, str(number)).unlink()
        self._kept &= wanted


def unpack(job: Job) -> Outcome:
    """Do the job in the current directory. Raises BadTar, BadTree, TooLarge, WrongDigest, OSError."""
    tree, contents, allowance = Tree(job.max_entries), Contents(), Allowance(job.max_bytes)
    Path(CONTENT).mkdir(mode=0o700)
    for index, layer in enumerate(job.layers):
        tree.begin_layer()
        with Path(layer.file).open("rb", buffering=0) as file:
            reader = LayerReader(file, allowance)
            read_layer(TarStream(reader.read), tree, contents)
            found = reader.finish()
        if layer.diff_id and found != layer.diff_id:
            raise WrongDigest(index, found, layer.diff_id)
        contents.drop_all_but({node.content for node in tree.nodes()})
    tree.ensure_directory(os.fsencode(job.workdir))
    script, extent = render_script(tree), measure_tree(tree)
    for index, value in enumerate(script.attributes):
        _write_new(f"{CONTENT}/x{index}", value)
    _write_new("script", script.commands)
    return Outcome(kind="done", inodes=extent.inodes, bytes=extent.bytes)


def read_layer(stream: TarStream, tree: Tree, contents: Contents) -> None:
    """Apply the entries of an archive."""
    for entry in stream:
        is_file = entry.kind is TarKind.FILE
        tree.apply(entry, contents.save(stream, entry.size) if is_file else -1)


def main() -> int:
    """Read the job, do it, say what came of it."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    drop_rights(max_file_bytes=job.max_bytes)
    sys.stdout.buffer.write(msgspec.json.encode(_outcome(job)))
    return 0


def _outcome(job: Job) -> Outcome:
    try:
        return unpack(job)
    except (BadTar, BadTree) as e:
        return Outcome(kind="refused", problem=str(e))
    except TooLarge as e:
        return Outcome(kind="too_large", problem=str(e))
    except MemoryError:
        return Outcome(kind="too_large", problem="it needs too much memory to be read")
    except WrongDigest as e:
        return Outcome(kind="digest", problem=f"layer {e.layer + 1}", found=e.found, wanted=e.wanted)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return Outcome(kind="no_space", problem=str(e))
        if e.errno == errno.EFBIG:
            return Outcome(kind="too_large", problem="one of its files is too large")
        raise


def _write_sparsely(fd: int, piece: bytes) -> None:
    """Append bytes; blocks of zeros at the beginning or end of a piece become holes."""
    start, stop = 0, len(piece)
    while stop - start >= _HOLE and piece[start : start + _HOLE] == _ZEROS:
        start += _HOLE
    while stop - start >= _HOLE and piece[stop - _HOLE : stop] == _ZEROS:
        stop -= _HOLE
    os.lseek(fd, start, os.SEEK_CUR)
    done = start
    while done < stop:
        done += os.write(fd, piece[done:stop])
    os.lseek(fd, len(piece) - stop, os.SEEK_CUR)


def _open_new(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _write_new(path: str, data: bytes) -> None:
    fd = _open_new(path)
    with os.fdopen(fd, "wb") as file:
        file.write(data)


if __name__ == "__main__":
    sys.exit(main())
