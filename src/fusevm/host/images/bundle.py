"""Images in local files: an OCI layout directory, or a tar with one, or what `docker save` writes. Blocking.

A tar is taken apart into numbered files first, by the strict reader of layers; nothing in it is ever a path here.

Owns: finding manifest, configuration and layers. Must not: look into layers.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import msgspec

from fusevm.host.images.oci import MAX_DOCUMENT_BYTES, Manifest, choose, parse_manifest
from fusevm.host.images.tar_stream import BadTar, TarKind, TarStream
from fusevm.host.images.unpack import Allowance, LayerReader, TooLarge
from fusevm.model.errors import BadReference, DigestMismatch, ImageRefused, ImageTooLarge, ImageUnknown
from fusevm.wire.decode import UNREADABLE

_MAX_LINKS: Final = 10


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """One part of an image, to be read."""

    open: Callable[[], BinaryIO]
    #: 64 hex digits, or empty: nobody says it (`docker save`); then the configuration's `diff_ids` do.
    sha256: str = ""
    #: Bytes, as they say; -1: nobody says it.
    size: int = -1


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """One image: its configuration, and its layers from the lowest up."""

    config: bytes
    layers: list[Blob]
    #: `sha256:` and 64 hex digits; empty: there is no manifest.
    manifest_digest: str = ""


class Files(Protocol):
    """Named files of a bundle."""

    def open(self, name: str) -> BinaryIO:
        """Open one. Raises FileNotFoundError."""
        ...


class Folder:
    """The files of a layout directory; links are not followed, nor is anything opened that is no file."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, name: str) -> BinaryIO:
        """Open one below the directory."""
        *folders, base = name.split("/")
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for folder in folders:
            fd = _step(fd, folder, os.O_DIRECTORY)
        fd = _step(fd, base, os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return os.fdopen(fd, "rb", buffering=0)
        os.close(fd)
        raise FileNotFoundError(f"{name} is no file")


class Archive:
    """The files of a tar, kept as numbered files in a folder of ours."""

    def __init__(self, tar: Path, folder: Path, image: str, max_bytes: int) -> None:
        self._folder = folder
        self._numbers: dict[str, int] = {}
        self._links: dict[str, str] = {}
        folder.mkdir(mode=0o700)
        try:
            with tar.open("rb", buffering=0) as file:
                self._take_apart(TarStream(LayerReader(file, Allowance(max_bytes)).read))
        except BadTar as e:
            raise ImageRefused(image=image, problem=f"it is no tar of an image: {e}") from e
        except TooLarge as e:
            raise ImageTooLarge(image=image, problem=str(e)) from e

    def open(self, name: str) -> BinaryIO:
        """Open one by its name in the tar; `docker save` of old links layers to each other."""
        for _ in range(_MAX_LINKS):
            if name in self._numbers:
                return (self._folder / str(self._numbers[name])).open("rb", buffering=0)
            if name not in self._links:
                break
            name = self._links[name]
        raise FileNotFoundError(name)

    def _take_apart(self, stream: TarStream) -> None:
        for entry in stream:
            name = _normal(entry.name)
            if entry.kind is TarKind.FILE:
                number = len(self._numbers)
                with (self._folder / str(number)).open("xb") as file:
                    for piece in stream.content():
                        file.write(piece)
                self._numbers[name] = number
            elif entry.kind in (TarKind.SYMLINK, TarKind.HARD_LINK):
                above = name.rpartition("/")[0].encode() if entry.kind is TarKind.SYMLINK else b""
                self._links[name] = _normal(above + b"/" + entry.target)


class _Saved(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """One image in the `manifest.json` of `docker save`."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


def open_bundle(path: Path, tag: str, scratch: Path, image: str, max_bytes: int) -> Bundle:
    """Find the image in a directory or tar. Raises BadReference, ImageRefused, ImageUnknown, DigestMismatch."""
    if path.is_dir():
        files: Files = Folder(path)
    elif path.is_file():
        files = Archive(path, scratch, image, max_bytes)
    else:
        raise BadReference(reference=image, problem="there is no such directory or file")
    if _has(files, "index.json"):
        return _from_layout(files, tag, image)
    if _has(files, "manifest.json"):
        return _from_saved(files, tag, image)
    raise ImageRefused(image=image, problem="it is no OCI layout and not what `docker save` writes")


def _from_layout(files: Files, tag: str, image: str) -> Bundle:
    raw, digest = _document(files, "index.json", image), ""
    for _ in range(_MAX_LINKS):
        parsed = parse_manifest(raw, image)
        if isinstance(parsed, Manifest):
            break
        chosen = choose(parsed, image, tag=tag)
        tag, digest = "", chosen.digest
        raw = _document(files, f"blobs/sha256/{chosen.hex}", image)
        _check(raw, chosen.hex, f"the manifest of {image}")
    else:
        raise ImageRefused(image=image, problem="its indexes lead to each other")
    config = _document(files, f"blobs/sha256/{parsed.config.hex}", image)
    _check(config, parsed.config.hex, f"the configuration of {image}")
    layers = [
        Blob(open=_opener(files, f"blobs/sha256/{layer.hex}", image), sha256=layer.hex, size=layer.size)
        for layer in parsed.layers
    ]
    return Bundle(config=config, layers=layers, manifest_digest=digest)


def _from_saved(files: Files, tag: str, image: str) -> Bundle:
    try:
        saved = msgspec.json.decode(_document(files, "manifest.json", image), type=list[_Saved])
    except UNREADABLE as e:
        raise ImageRefused(image=image, problem=f"its manifest.json cannot be read ({e})") from e
    found = [one for one in saved if not tag or tag in (one.repo_tags or [])]
    if len(found) != 1:
        tags = ", ".join(sorted(name for one in saved for name in one.repo_tags or []))
        raise ImageUnknown(
            reference=image, problem=f"it holds {len(saved)} images: name one of the tags {tags or '(none)'}"
        )
    config = _document(files, found[0].config, image)
    return Bundle(config=config, layers=[Blob(open=_opener(files, name, image)) for name in found[0].layers])


def _document(files: Files, name: str, image: str) -> bytes:
    try:
        with files.open(name) as file:
            data = bytearray()
            while chunk := file.read(MAX_DOCUMENT_BYTES + 1 - len(data)):
                data += chunk
    except (OSError, ValueError) as e:
        raise ImageRefused(image=image, problem=f"it lacks its part {name[:200]!r} ({e})") from e
    return bytes(data)


def _opener(files: Files, name: str, image: str) -> Callable[[], BinaryIO]:
    def open_it() -> BinaryIO:
        try:
            return files.open(name)
        except (OSError, ValueError) as e:
            raise ImageRefused(image=image, problem=f"it lacks its part {name[:200]!r} ({e})") from e

    return open_it


def _check(data: bytes, wanted: str, what: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        raise DigestMismatch(what=what, found=found, wanted=wanted)


def _has(files: Files, name: str) -> bool:
    try:
        files.open(name).close()
    except OSError:
        return False
    return True


def _step(fd: int, name: str, flags: int) -> int:
    """Open a name in a directory, which is closed."""
    if name in ("", ".", ".."):
        raise FileNotFoundError(name)
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=fd)
    finally:
        os.close(fd)


def _normal(name: bytes) -> str:
    """A name in the tar in one spelling; what leads out of it leads nowhere."""
    parts: list[str] = []
    for part in os.fsdecode(name).split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
