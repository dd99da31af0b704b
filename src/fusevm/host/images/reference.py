"""What people call an image: `debian:12`, `registry.example:5000/team/tool@sha256:...`. Pure.

The rules are those of container registries (OCI distribution spec, and the short forms of Docker Hub).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

import msgspec

from fusevm.model.errors import BadReference

_HUB: Final = "docker.io"
_HUB_FOLDER: Final = "library/"
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_PATH: Final = re.compile(rf"{_PART}(?:/{_PART})*")
_HOST: Final = re.compile(
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*"
    r"|\[[0-9a-fA-F:]{2,39}\])(?::[0-9]{1,5})?"
)
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_NAME: Final = 255


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """An image in a registry."""

    #: Host and port: `docker.io`, `localhost:5000`.
    registry: str
    #: `library/debian`
    repository: str
    #: Empty with a digest and without a tag.
    tag: str = ""
    #: `sha256:` and 64 hex digits, or empty.
    digest: str = ""

    @property
    def text(self) -> str:
        """In full: `docker.io/library/debian:12`."""
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.registry}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")

    @property
    def name(self) -> str:
        """As people say it: `debian:12`. The name that the image gets here."""
        registry, path = f"{self.registry}/", self.repository
        if self.registry == _HUB:
            registry, path = "", path.removeprefix(_HUB_FOLDER)
        return f"{registry}{path}" + (f":{self.tag}" if self.tag else "")

    def pinned(self, digest: str) -> str:
        """The manifest of a digest in the same repository."""
        return f"{self.registry}/{self.repository}@{digest}"

    @property
    def is_on_loopback(self) -> bool:
        """Is the registry on this very host? Then it may speak plain HTTP."""
        host = self.registry.rpartition(":")[0] if self.registry.rpartition(":")[2].isdecimal() else self.registry
        try:
            return ipaddress.ip_address(host.strip("[]")).is_loopback
        except ValueError:
            return host == "localhost"


def parse_reference(text: str) -> Reference:
    """Parse a reference; without tag and digest it means `latest`. Raises BadReference."""
    rest = text.removeprefix("docker://")
    rest, at, digest = rest.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise BadReference(reference=text[:300], problem="a digest is sha256: and 64 hex digits")
    registry, path = _split_registry(rest)
    path, colon, tag = path.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise BadReference(reference=text[:300], problem=f"{tag[:80]!r} is no tag")
    if not _HOST.fullmatch(registry):
        raise BadReference(reference=text[:300], problem=f"{registry[:80]!r} is no host")
    if registry == _HUB and "/" not in path:
        path = _HUB_FOLDER + path
    if not _PATH.fullmatch(path) or len(registry) + len(path) > _MAX_NAME:
        raise BadReference(reference=text[:300], problem="names are of a-z, 0-9, '.', '_', '-' and '/'")
    return Reference(registry=registry, repository=path, tag=tag or ("" if digest else "latest"), digest=digest)


def _split_registry(text: str) -> tuple[str, str]:
    """The first part is a host when it cannot be a folder: it holds a dot, a colon, or is localhost."""
    first, slash, path = text.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first.startswith("[")):
        return (_HUB if first == "index.docker.io" else first), path
    return _HUB, text
