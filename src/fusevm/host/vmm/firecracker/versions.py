"""Which Firecracker this driver is for, and which it refuses, with the reason. Pure."""

import re
from typing import Final, NamedTuple

from fusevm.host.vmm.firecracker.pins import VERSION, VERSION_TEXT

_VERSION = re.compile(r"(?:Firecracker|Jailer) v(\d+)\.(\d+)\.(\d+)(\S*)")


class Span(NamedTuple):
    """Releases from one on, up to and without another."""

    first: tuple[int, int, int]
    end: tuple[int, int, int]

    def __contains__(self, version: object) -> bool:
        return isinstance(version, tuple) and self.first <= version < self.end


class Version(NamedTuple):
    """A release."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


#: Releases with a fault that is known by name, and what it does.
KNOWN_BAD: Final = (
    (Span((0, 0, 0), (1, 14, 0)), "has no `/serial`, so that a console could not be bounded"),
    (Span((1, 14, 0), (1, 15, 0)), "writes wrong diff snapshots of machines over 3 GiB"),
    (Span((1, 16, 0), (1, 16, 1)), "loses connections from the guest after a restore"),
)


def parse_version(text: str) -> Version | None:
    """The release of `firecracker --version` or `jailer --version`; None for a development build."""
    found = _VERSION.search(text)
    if found is None or found[4]:
        return None
    return Version(*(int(part) for part in found.groups()[:3]))


def judge_versions(firecracker: Version | None, jailer: Version | None) -> str:
    """Why these two programs are refused together, or ""."""
    pin = VERSION_TEXT
    if firecracker is None or jailer is None:
        return f"it is no release; install {pin}"
    if firecracker != jailer:
        return f"Firecracker is {firecracker} and its jailer {jailer}; install both of {pin}"
    if firecracker == VERSION:
        return ""
    known = next((problem for versions, problem in KNOWN_BAD if firecracker in versions), "")
    if known:
        return f"{firecracker} {known}; install {pin}"
    return f"this daemon was made and tested for {pin}, not for {firecracker}; install that"
