"""Fetch an image from a registry with skopeo(1), as a user without rights and in a mount namespace of its own.

The manifest comes first: what it says about sizes is checked before anything large is fetched. Then `skopeo copy`
brings manifest, configuration and layers as they are into a folder, one file per digest; every digest is checked again
by whoever reads them (`pull`).

Owns: what is said to skopeo, and the meaning of its complaints. Must not: read layers.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from fusevm.host.images.confine import make_workplace, without_rights
from fusevm.host.images.oci import MAX_DOCUMENT_BYTES, Manifest, choose, host_architecture, parse_manifest
from fusevm.host.images.progress import Progress, watched_bytes
from fusevm.host.images.reference import Reference
from fusevm.host.run import program_environment, run
from fusevm.model.errors import CommandFailed, DigestMismatch, FetchFailed, ImageRefused, ImageUnknown

_INSPECT_TIMEOUT_S: Final = 120.0
_COPY_TIMEOUT_S: Final = 3600.0
#: Where skopeo finds its workplace, wherever that is: its parents may be closed to the worker.
_MOUNT_POINT: Final = "/mnt"
_ENTER: Final = f'mount --bind . {_MOUNT_POINT} && cd {_MOUNT_POINT} && exec "$@"'
_POLICY: Final = Path("/etc/containers/policy.json")
_NO_PROXY: Final = "localhost,127.0.0.1,::1"
#: What skopeo says, and what it means.
_LOGIN: Final = ("unauthorized", "authentication required", "denied", "invalid username/password", "403 (forbidden)")
_MISSING: Final = ("manifest unknown", "name unknown", "repository name not known", "status 404", "404 (not found)")


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """How a registry is spoken to."""

    #: Content of a file of credentials, as `docker login` and `skopeo login` write it; empty: none.
    credentials: bytes = b""
    #: Without TLS, or with a certificate that nobody vouches for. Registries on this very host always may.
    plain_http: bool = False


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of a reference for this host."""

    manifest: Manifest
    raw: bytes
    #: `sha256:` and 64 hex digits: of `raw`.
    digest: str


class Skopeo:
    """skopeo in a workplace, for one reference."""

    def __init__(self, folder: Path, reference: Reference, access: Access) -> None:
        self._folder = folder
        self._reference = reference
        self._access = access

    async def prepare(self) -> None:
        """Make the workplace."""
        await asyncio.to_thread(self._prepare)

    async def find(self) -> Found:
        """Ask for the manifest. Raises ImageUnknown, ImageRefused, DigestMismatch, FetchFailed, ToolMissing."""
        reference = self._reference
        asked = reference.pinned(reference.digest) if reference.digest else reference.text
        raw = await self._inspect(asked)
        if reference.digest:
            check_sha256(raw, reference.digest, reference.text)
        parsed = parse_manifest(raw, reference.text)
        if not isinstance(parsed, Manifest):
            chosen = choose(parsed, reference.text)
            raw = await self._inspect(reference.pinned(chosen.digest))
            check_sha256(raw, chosen.digest, reference.text)
            parsed = parse_manifest(raw, reference.text)
            if not isinstance(parsed, Manifest):
                raise ImageRefused(image=reference.text, problem="its index leads to another index")
        return Found(manifest=parsed, raw=raw, digest=f"sha256:{hashlib.sha256(raw).hexdigest()}")

    async def fetch(self, found: Found, progress: Progress) -> Path:
        """Fetch configuration and layers; the folder with a file for each, named by the digest's 64 digits."""
        parts = [found.manifest.config, *found.manifest.layers]
        total = sum(part.size for part in parts)
        blobs = self._folder / "blobs"

        def done() -> int:
            return sum(entry.stat().st_size for entry in os.scandir(blobs)) if blobs.is_dir() else 0

        step = f"Pulling {self._reference.name}"
        source = f"docker://{self._reference.pinned(found.digest)}"
        words = ["copy", "--quiet", *self._options("src-"), source, "dir:blobs"]
        # A server that sends more than it has promised fills no disk.
        limit = max(MAX_DOCUMENT_BYTES, *(part.size + 1 for part in parts))
        async with watched_bytes(progress, step, done, total):
            await self._run(words, _COPY_TIMEOUT_S, limit)
        return blobs

    async def _inspect(self, source: str) -> bytes:
        words = ["inspect", "--raw", *self._options(), f"docker://{source}"]
        return await self._run(words, _INSPECT_TIMEOUT_S, MAX_DOCUMENT_BYTES)

    def _options(self, side: str = "") -> list[str]:
        options = [f"--{side}tls-verify=false"] if self._access.plain_http or self._reference.is_on_loopback else []
        return [*options, *(["--authfile=auth.json"] if self._access.credentials else [f"--{side}no-creds"])]

    def _prepare(self) -> None:
        make_workplace(self._folder)
        make_workplace(self._folder / "tmp")
        if self._access.credentials:
            path = self._folder / "auth.json"
            path.write_bytes(self._access.credentials)
            # It goes with the workplace; until then only root and the worker can read it.
            path.chmod(0o400)
            if os.geteuid() == 0:
                os.chown(path, (self._folder).stat().st_uid, -1)

    async def _run(self, words: list[str], timeout_s: float, max_file_bytes: int) -> bytes:
        policy = [] if await asyncio.to_thread(_POLICY.is_file) else ["--insecure-policy"]
        platform = [f"--override-arch={host_architecture()}", "--override-os=linux"]
        program: list[str | Path] = ["skopeo", *policy, *platform, "--tmpdir=tmp", *words]
        program = ["prlimit", f"--fsize={max_file_bytes}", "--core=0", "--", *program]
        if os.geteuid() == 0:
            program = [*_apart(), *without_rights(program, has_network=True)]
        try:
            done = await run(
                program,
                timeout_s=timeout_s,
                cwd=self._folder,
                env=skopeo_environment(program_environment()),
                max_output_bytes=MAX_DOCUMENT_BYTES,
            )
        except CommandFailed as e:
            raise explain(e, self._reference.text) from e
        return done.stdout


def _apart() -> list[str | Path]:
    """In a mount namespace where the current directory is at a place that everybody reaches."""
    return ["unshare", "--mount", "--propagation=private", "--", "sh", "-c", _ENTER, "sh"]


def skopeo_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables over the inherited ones: no home of the caller's, and no proxy for this very host. Pure."""
    env = {"HOME": "/nonexistent", "XDG_RUNTIME_DIR": "/nonexistent", "TMPDIR": "tmp"}
    for name in ("no_proxy", "NO_PROXY"):
        env[name] = ",".join(filter(None, [inherited.get(name, ""), _NO_PROXY]))
    return env


def explain(error: CommandFailed, reference: str) -> Exception:
    """The error that skopeo's complaint means. Pure."""
    said = error.stderr.strip().splitlines()[-1][-600:] if error.stderr.strip() else ""
    text = said.lower()
    if any(word in text for word in _MISSING):
        return ImageUnknown(reference=reference, problem="the registry has no such name or tag")
    if any(word in text for word in _LOGIN):
        problem = "the registry wants a login, or there is no such name; give --authfile after `skopeo login`"
        return ImageUnknown(reference=reference, problem=problem)
    if "policy" in text and "reject" in text:
        return ImageRefused(image=reference, problem=f"{_POLICY} does not allow it")
    if "digest did not match" in text or "does not match" in text:
        return ImageRefused(image=reference, problem="the registry sent other content than its manifest names")
    return FetchFailed(what=reference, problem=said or f"skopeo ended with status {error.exit_status}")


def check_sha256(data: bytes, digest: str, what: str) -> None:
    """Raise DigestMismatch unless the bytes have the digest."""
    found = hashlib.sha256(data).hexdigest()
    if f"sha256:{found}" != digest:
        raise DigestMismatch(what=f"the manifest of {what}", found=found, wanted=digest.removeprefix("sha256:"))
