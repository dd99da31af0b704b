"""The documents of an image: index, manifest, configuration. Pure.

OCI image spec 1.1 and Docker's schema 2, which say the same with other media types. Everything is somebody else's:
sizes are only what they say they are, digests are checked by whoever reads the bytes.
"""

from __future__ import annotations

import platform
import re
from typing import Any, Final

import msgspec

from fusevm.host.images.store import ImageConfig
from fusevm.model.errors import ImageRefused, ImageUnknown
from fusevm.wire.decode import UNREADABLE

#: Of a document, as registries have it.
MAX_DOCUMENT_BYTES: Final = 4 << 20
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_INDEXES: Final = frozenset({
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
})  # fmt: skip
_LAYERS: Final = frozenset({
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
})  # fmt: skip
_MAX_LAYERS: Final = 500
_REF_NAME: Final = "org.opencontainers.image.ref.name"


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """What machines a manifest is for."""

    architecture: str = ""
    os: str = ""


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A thing by its digest."""

    media_type: str = ""
    #: `sha256:` and 64 hex digits.
    digest: str
    #: Bytes, as they say.
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def hex(self) -> str:
        """The digest's 64 digits."""
        return self.digest.removeprefix("sha256:")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What one image consists of."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


class _Document(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What every document begins with; which one it is."""

    schema_version: int = 0
    media_type: str = ""
    manifests: list[Descriptor] | None = None
    config: Descriptor | None = None
    layers: list[Descriptor] | None = None


class _Run(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    env: list[str] | None = None
    user: str | None = None
    working_dir: str | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None


class _RootFs(msgspec.Struct, frozen=True, kw_only=True):
    diff_ids: list[str] = []


class _Config(msgspec.Struct, frozen=True, kw_only=True):
    architecture: str = ""
    os: str = ""
    config: _Run | None = None
    rootfs: _RootFs = _RootFs()


class ImageDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What an image's configuration says."""

    config: ImageConfig
    #: sha256 of each layer's archive; 64 hex digits each.
    diff_ids: tuple[str, ...]


def parse_manifest(data: bytes, image: str) -> Manifest | list[Descriptor]:
    """Parse a manifest, or the descriptors of an index. Raises ImageRefused."""
    document = _decode(data, _Document, image, "manifest")
    if document.schema_version == 1:
        raise ImageRefused(image=image, problem="it is in Docker's schema 1, which nobody makes any more; push it anew")
    if document.manifests is not None or document.media_type in _INDEXES:
        for entry in document.manifests or []:
            _check_digest(entry, image)
        return document.manifests or []
    if document.config is None or document.layers is None:
        raise ImageRefused(image=image, problem="its manifest names no configuration or no layers")
    if len(document.layers) > _MAX_LAYERS:
        raise ImageRefused(image=image, problem=f"it has more than {_MAX_LAYERS} layers")
    for layer in document.layers:
        _check_digest(layer, image)
        if layer.media_type not in _LAYERS:
            raise ImageRefused(
                image=image, problem=f"a layer is of type {layer.media_type[:100]!r}, which is no layer of files"
            )
    _check_digest(document.config, image)
    return Manifest(config=document.config, layers=tuple(document.layers))


def choose(entries: list[Descriptor], image: str, *, tag: str = "") -> Descriptor:
    """The manifest of an index that fits this host; in a layout, of a tag. Raises ImageUnknown."""
    if tag:
        entries = [entry for entry in entries if (entry.annotations or {}).get(_REF_NAME) == tag]
    wanted = Platform(architecture=host_architecture(), os="linux")
    fitting = [entry for entry in entries if entry.platform in (None, wanted)]
    exact = [entry for entry in fitting if entry.platform == wanted] or fitting
    if len({entry.digest for entry in exact}) == 1:
        return exact[0]
    if len(exact) > 1:
        tags = sorted(filter(None, ((entry.annotations or {}).get(_REF_NAME, "") for entry in exact)))
        raise ImageUnknown(reference=image, problem=f"it holds several images: name one of the tags {', '.join(tags)}")
    others = sorted({f"{entry.platform.os}/{entry.platform.architecture}" for entry in entries if entry.platform})
    there = f"it is there for {', '.join(others)}" if others else "nothing has that tag" if tag else "it is empty"
    raise ImageUnknown(reference=image, problem=f"{there}; this host needs linux/{wanted.architecture}")


def parse_config(data: bytes, layers: int, image: str) -> ImageDocument:
    """Parse a configuration for an image with that many layers. Raises ImageRefused."""
    document = _decode(data, _Config, image, "configuration")
    here = host_architecture()
    if (document.os or "linux", document.architecture or here) != ("linux", here):
        problem = f"it is for {document.os}/{document.architecture}, and this host needs linux/{here}"
        raise ImageRefused(image=image, problem=problem)
    diff_ids = document.rootfs.diff_ids
    if len(diff_ids) != layers or not all(_DIGEST.fullmatch(diff_id) for diff_id in diff_ids):
        raise ImageRefused(image=image, problem=f"its configuration names {len(diff_ids)} digests of {layers} layers")
    run = document.config or _Run()
    config = ImageConfig(
        env=_environment(run.env or []),
        workdir=_workdir(run.working_dir or "/", image),
        user=_user(run.user or "root", image),
        entrypoint=_words(run.entrypoint, image),
        cmd=_words(run.cmd, image),
    )
    return ImageDocument(config=config, diff_ids=tuple(diff_id.removeprefix("sha256:") for diff_id in diff_ids))


def host_architecture() -> str:
    """This host's architecture as registries call it."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def _decode(data: bytes, kind: type[msgspec.Struct], image: str, what: str) -> Any:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ImageRefused(image=image, problem=f"its {what} has more than {MAX_DOCUMENT_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE as e:
        raise ImageRefused(image=image, problem=f"its {what} cannot be read ({e})") from e


def _check_digest(descriptor: Descriptor, image: str) -> None:
    if not _DIGEST.fullmatch(descriptor.digest):
        raise ImageRefused(image=image, problem=f"it names a part by {descriptor.digest[:80]!r}, which is no sha256")
    if descriptor.size < 0:
        raise ImageRefused(image=image, problem="it names a part of a negative size")


def _environment(lines: list[str]) -> dict[str, str]:
    """Variables; a line that is none is left out, as other programs do."""
    pairs = [line.partition("=") for line in lines if "\0" not in line]
    return {name: value for name, equals, value in pairs if name and equals}


def _workdir(text: str, image: str) -> str:
    path = text if text.startswith("/") else f"/{text}"
    if "\0" in path or ".." in path.split("/") or len(path) > 4000:
        raise ImageRefused(image=image, problem=f"its working directory is {text[:200]!r}")
    return path


def _user(text: str, image: str) -> str:
    if not text.isprintable() or " " in text or len(text) > 256:
        raise ImageRefused(image=image, problem=f"its user is {text[:200]!r}")
    return text


def _words(words: list[str] | None, image: str) -> tuple[str, ...]:
    if any("\0" in word for word in words or []):
        raise ImageRefused(image=image, problem="its command holds a NUL")
    return tuple(words or [])
