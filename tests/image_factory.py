"""Makes layers and images, well-formed and otherwise, as a builder or an attacker would."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def entry(
    name: str,
    content: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    target: str = "",
    device: tuple[int, int] = (0, 0),
    xattrs: dict[str, bytes] | None = None,
    mtime: int = 1_600_000_000,
) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of a layer."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, uid, gid, mtime
    info.size, info.linkname = len(content), target
    info.devmajor, info.devminor = device
    for key, value in (xattrs or {}).items():
        info.pax_headers[f"SCHILY.xattr.{key}"] = value.decode("utf-8", "surrogateescape")
    return info, content


def folder(name: str, mode: int = 0o755, **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, kind=tarfile.DIRTYPE, mode=mode, **more)


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, kind=tarfile.SYMTYPE, target=target, mode=0o777)


def hard_link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, kind=tarfile.LNKTYPE, target=target)


def make_tar(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """The archive of a layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class ImageFiles:
    """The documents and blobs of one image."""

    def __init__(self, *tars: bytes, architecture: str = "amd64", packed: bool = True, **config: Any) -> None:
        self.layers = [gzip.compress(tar, 1, mtime=0) if packed else tar for tar in tars]
        self.media_type = LAYER if packed else "application/vnd.oci.image.layer.v1.tar"
        self.config: dict[str, Any] = {
            "architecture": architecture,
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(tar)}" for tar in tars]},
        }

    @property
    def config_bytes(self) -> bytes:
        return json.dumps(self.config).encode()

    @property
    def manifest(self) -> dict[str, Any]:
        return {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": describe(self.config_bytes, CONFIG),
            "layers": [describe(layer, self.media_type) for layer in self.layers],
        }

    def write_layout(self, path: Path, tag: str = "latest", manifest: dict[str, Any] | None = None) -> Path:
        """Write an OCI layout directory."""
        blobs = path / "blobs" / "sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        raw = json.dumps(manifest or self.manifest).encode()
        for data in (*self.layers, self.config_bytes, raw):
            (blobs / sha256(data)).write_bytes(data)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        described = {**describe(raw, MANIFEST), "annotations": {"org.opencontainers.image.ref.name": tag}}
        (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [described]}))
        return path

    def write_saved(self, path: Path, tags: list[str]) -> Path:
        """Write a tar as `docker save` does."""
        names = [f"{number}/layer.tar" for number in range(len(self.layers))]
        saved = [{"Config": "config.json", "RepoTags": tags, "Layers": names}]
        parts = [entry("config.json", self.config_bytes), entry("manifest.json", json.dumps(saved).encode())]
        plain = [gzip.decompress(layer) if layer[:2] == b"\x1f\x8b" else layer for layer in self.layers]
        parts += [entry(name, layer) for name, layer in zip(names, plain, strict=True)]
        path.write_bytes(make_tar(*parts))
        return path


def describe(data: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{sha256(data)}", "size": len(data)}
