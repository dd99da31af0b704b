"""Which Firecracker this driver is for, and which it refuses, with the reason. Pure."""

import re
from typing import Final, NamedTuple

from fusevm.host.vmm.firecracker.pins import VERSION

PIN: Final = VERSION
_VERSION = re.compile(r"(?:Firecracker|Jailer) v(\d+)\.(\d+)\.(\d+)(\S*)")


class Version(NamedTuple):
    """A release."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


def parse_version(text: str) -> Version | None:
    """The release of `firecracker --version` or `jailer --version`; None for a development build."""
    found = _VERSION.search(text)
    if found is None or found[4]:
        return None
    return Version(*(int(part) for part in found.groups()[:3]))


def judge_version(version: Version | None) -> str:
    """Why this Firecracker is refused, or ""."""
    if version is None:
        return f"it is no release; install {_text(PIN)}"
    if version == PIN:
        return ""
    if version == (1, 16, 0):
        return f"1.16.0 loses connections to the guest after a restore; install {_text(PIN)}"
    if version < (1, 15, 0):
        return f"{version} writes wrong diff snapshots of machines over 3 GiB; install {_text(PIN)}"
    return f"this daemon was made and tested for {_text(PIN)}, not for {version}; install that"


def _text(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))
