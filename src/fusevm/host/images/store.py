"""The images of a host: read-only root file systems addressed by digest, with names.

`<data>/images/sha256-<digest>/{rootfs.ext4,image.json}` are never changed once they are there. Names live in
`names.json`. Builders add images by `publish`; who uses an image keeps it from being removed (the caller's business).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from fusevm.host.images.names import Names
from fusevm.host.images.workspace import brief_lock, discard_folder, publish_folder, write_durably
from fusevm.model.errors import BadField, ImageCorrupt, ImageNotFound
from fusevm.wire.decode import UNREADABLE

#: Offset and value of the ext4 superblock's magic number, little-endian (ext4(5); kernel, ext4 disk layout).
_EXT4_MAGIC_OFFSET = 1024 + 0x38
_EXT4_MAGIC = b"\x53\xef"
_HASH_CHUNK_BYTES = 4 << 20
#: Names in an error.
_MOST_KNOWN = 12
_DIGEST = re.compile(r"(?:sha256[:-])?([0-9a-f]{64})")
#: Shape of a name: `debian-12`, `team/tool:1.2`, `localhost:5000/tool`.
NAME = re.compile(
    r"(?:[a-z0-9.-]{1,253}:[0-9]{1,5}/)?"
    r"[a-z0-9][a-z0-9._-]{0,127}(?:/[a-z0-9][a-z0-9._-]{0,127}){0,7}(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?"
)


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How commands run in a machine of this image, unless the caller says otherwise."""

    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = "root"
    #: What the image would run by itself, in two parts (OCI image spec): `fuse run` without a command runs both, one
    #: after the other. Never started as init.
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()


class Origin(StrEnum):
    """Where an image came from, and so how it can be had again."""

    #: Made on this host, from a recipe or a folder: the builder keeps what it was made from.
    BUILT = "built"
    #: A registry, or a file in its formats.
    PULLED = "pulled"
    #: A URL that a create named.
    ARTIFACT = "artifact"


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What `image.json` says."""

    #: `sha256:` and 64 hex digits: of rootfs.ext4 and the config.
    digest: str
    #: sha256 of rootfs.ext4, 64 hex digits.
    rootfs_sha256: str
    size_bytes: int
    config: ImageConfig = ImageConfig()
    #: Hash of what it was built from; the same inputs are not built again.
    inputs: str = ""
    #: Where it came from, for people.
    source: str = ""
    origin: Origin = Origin.BUILT
    #: Of the manifest in the registry: `sha256:` and 64 hex digits; empty for others.
    manifest_digest: str = ""
    architecture: str = "amd64"
    created_at_ms: int


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image of the store."""

    record: ImageRecord
    names: tuple[str, ...]
    directory: Path

    @property
    def digest(self) -> str:
        """`sha256:` and 64 hex digits."""
        return self.record.digest

    @property
    def config(self) -> ImageConfig:
        """How commands run in it."""
        return self.record.config

    @property
    def rootfs(self) -> Path:
        """The read-only ext4 file."""
        return self.directory / "rootfs.ext4"

    @property
    def label(self) -> str:
        """A name if it has one, else the short digest."""
        return self.names[0] if self.names else self.digest[:19]


class ImageStore:
    """The images below a data directory. Safe to use from several processes."""

    def __init__(self, data: Path) -> None:
        self.root = data / "images"
        self._names = Names(self.root)

    async def resolve(self, name: str) -> Image:
        """Return the image of a name or a digest (all 64 digits). ImageNotFound; ImageCorrupt by a cheap check."""
        return await asyncio.to_thread(self._resolve, name)

    async def find(self, name: str) -> Image | None:
        """Return the image of a name or digest, or None when there is none or it is damaged."""
        try:
            return await self.resolve(name)
        except (ImageNotFound, ImageCorrupt):
            return None

    async def load_all(self) -> list[Image]:
        """Return all usable images, newest first."""
        return await asyncio.to_thread(self._list)

    async def find_damage(self) -> list[ImageCorrupt]:
        """Read every image whole and return what is wrong with them. Takes some seconds per GiB."""
        return await asyncio.to_thread(self._find_damage)

    async def publish(self, folder: Path, name: str, record: ImageRecord) -> Image:
        """Move a finished `rootfs.ext4` in `folder` (same file system) into the store under its digest and a name."""
        parse_name(name)
        return await asyncio.to_thread(self._publish, folder, name, record)

    async def name(self, digest: str, names: Sequence[str]) -> Image:
        """Give an image these names, which others may have had. Raises ImageNotFound, BadField."""
        for name in names:
            parse_name(name)
        image = await self.resolve(digest)
        for name in names:
            await asyncio.to_thread(self._names.set, name, image.digest)
        return await self.resolve(digest)

    async def touch(self, image: Image) -> None:
        """Note that an image is used now: the collector leaves alone what was used a moment ago."""
        await asyncio.to_thread(os.utime, image.directory / "image.json")

    async def unname(self, names: Sequence[str]) -> None:
        """Take names away; their image stays. Idempotent."""
        await asyncio.to_thread(self._names.remove, *names)

    async def discard(self, image: Image) -> None:
        """Remove an image with its names; machines that use it have it open and go on. The caller knows that none does.

        Idempotent.
        """
        await asyncio.to_thread(self._discard, image)

    def _discard(self, image: Image) -> None:
        self._names.remove(*self._own_names(image.digest))
        with brief_lock(self.root):
            if image.directory.is_dir():
                discard_folder(image.directory)

    def _own_names(self, digest: str) -> tuple[str, ...]:
        return tuple(sorted(name for name, other in self._names.load().items() if other == digest))

    def _resolve(self, name: str) -> Image:
        names = self._names.load()
        found = _DIGEST.fullmatch(names.get(name, name))
        if not found:
            raise ImageNotFound(image=name, known=_known(names))
        return self._load(found.group(1), names, asked=name)

    def _load(self, hex_digest: str, names: dict[str, str], asked: str) -> Image:
        folder = self.root / f"sha256-{hex_digest}"
        own = tuple(sorted(name for name, digest in names.items() if digest == f"sha256:{hex_digest}"))
        path = folder / "image.json"
        if not own and not folder.is_dir():
            raise ImageNotFound(image=asked, known=_known(names))
        try:
            record = msgspec.json.decode(path.read_bytes(), type=ImageRecord)
        except (OSError, *UNREADABLE) as e:
            raise ImageCorrupt(image=asked, path=str(path), problem=_reason(e)) from e
        image = Image(record=record, names=own, directory=folder)
        _check_rootfs(image.rootfs, record.size_bytes, label=own[0] if own else asked)
        return image

    def _list(self) -> list[Image]:
        names = self._names.load()
        images = []
        for folder in self.root.glob("sha256-*"):
            with contextlib.suppress(ImageCorrupt, ImageNotFound):
                images.append(self._load(folder.name.removeprefix("sha256-"), names, asked=folder.name))
        return sorted(images, key=lambda image: -image.record.created_at_ms)

    def _find_damage(self) -> list[ImageCorrupt]:
        names = self._names.load()
        damage = []
        for folder in sorted(self.root.glob("sha256-*")):
            hex_digest = folder.name.removeprefix("sha256-")
            known = [name for name, digest in names.items() if digest == f"sha256:{hex_digest}"]
            try:
                _check_content(self._load(hex_digest, names, asked=known[0] if known else folder.name))
            except ImageCorrupt as e:
                damage.append(e)
        return damage

    def _publish(self, folder: Path, name: str, record: ImageRecord) -> Image:
        write_durably(folder / "image.json", msgspec.json.format(msgspec.json.encode(record)))
        (folder / "rootfs.ext4").chmod(0o444)
        hex_digest = record.digest.removeprefix("sha256:")
        publish_folder(folder, self.root / f"sha256-{hex_digest}", lambda there: _is_whole(there, record))
        self._names.set(name, record.digest)
        return self._resolve(name)


def parse_name(text: str) -> str:
    """Return an image name unchanged, or raise BadField."""
    if not NAME.fullmatch(text) or _DIGEST.fullmatch(text):
        raise BadField(
            field="image", problem=f"{text[:80]!r} is no image name: use a-z, 0-9, '.', '_', '-', like debian-12"
        )
    return text


def make_record(
    *,
    rootfs_sha256: str,
    size_bytes: int,
    config: ImageConfig,
    inputs: str,
    source: str,
    created_at_ms: int,
    origin: Origin = Origin.BUILT,
    manifest_digest: str = "",
) -> ImageRecord:
    """Build the record of an image; its digest covers content and config."""
    canonical = msgspec.json.encode([rootfs_sha256, config], order="deterministic")
    return ImageRecord(
        digest=f"sha256:{hashlib.sha256(canonical).hexdigest()}",
        rootfs_sha256=rootfs_sha256,
        size_bytes=size_bytes,
        config=config,
        inputs=inputs,
        source=source,
        origin=origin,
        manifest_digest=manifest_digest,
        created_at_ms=created_at_ms,
    )


def file_sha256(path: Path, on_bytes: Callable[[int], None] = lambda _done: None) -> str:
    """Return the sha256 of a file as hex; `on_bytes` hears how many bytes are done."""
    state, done = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            state.update(chunk)
            done += len(chunk)
            on_bytes(done)
    return state.hexdigest()


def _known(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - _MOST_KNOWN} more" if len(found) > _MOST_KNOWN else ""
    return (", ".join(found[:_MOST_KNOWN]) or "none") + more


def _is_whole(folder: Path, record: ImageRecord) -> bool:
    try:
        found = msgspec.json.decode((folder / "image.json").read_bytes(), type=ImageRecord)
        return found.digest == record.digest and file_sha256(folder / "rootfs.ext4") == record.rootfs_sha256
    except (OSError, *UNREADABLE):
        return False


def _check_rootfs(path: Path, size_bytes: int, label: str) -> None:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(_EXT4_MAGIC_OFFSET)
            magic = file.read(2)
    except OSError as e:
        raise ImageCorrupt(image=label, path=str(path), problem=_reason(e)) from e
    if size != size_bytes:
        raise ImageCorrupt(image=label, path=str(path), problem=f"it has {size} bytes instead of {size_bytes}")
    if magic != _EXT4_MAGIC:
        raise ImageCorrupt(image=label, path=str(path), problem="it is no ext4 file system")


def _check_content(image: Image) -> None:
    if file_sha256(image.rootfs) != image.record.rootfs_sha256:
        raise ImageCorrupt(image=image.label, path=str(image.rootfs), problem="its sha256 is not the recorded one")


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
