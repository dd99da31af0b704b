"""Which Firecracker and which kernel for it are installed: version, addresses, digests. Data.

The digests stand, identical, in several independent public repositories that verify them at install time. One that is
not listed here was never checked by anybody: whoever wants another file names its digest (`--sha256`).
"""

from pathlib import Path
from typing import Final

import msgspec

VERSION: Final = (1, 16, 1)
VERSION_TEXT: Final = ".".join(map(str, VERSION))
KERNEL_VERSION: Final = "6.1.176"
_RELEASES: Final = "https://github.com/firecracker-microvm/firecracker/releases/download"
_CI_BUCKET: Final = "https://s3.amazonaws.com/spec.ccfc.min/firecracker-ci/20260708-f11c230ed107-0"


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """One file of somebody else's, by content."""

    url: str
    #: 64 hex digits.
    sha256: str

    @property
    def name(self) -> str:
        """The file's name at its origin."""
        return self.url.rpartition("/")[2]

    @property
    def key(self) -> str:
        """What `KernelStore.resolve` finds a stored kernel by."""
        return f"sha256:{self.sha256}"


#: Architecture as `uname -m` says it -> release archive with `firecracker` and `jailer`.
RELEASES: Final = {
    "x86_64": Pin(
        url=f"{_RELEASES}/v{VERSION_TEXT}/firecracker-v{VERSION_TEXT}-x86_64.tgz",
        sha256="382a02a869e4d6d5cb14c40577f9545e8458021ea8b0b2d3fc10ec14d9c242e6",
    ),
    "aarch64": Pin(
        url=f"{_RELEASES}/v{VERSION_TEXT}/firecracker-v{VERSION_TEXT}-aarch64.tgz",
        sha256="8d0e69f6d6f9a1724551f607f18504052c16c1828ee3d4d7b6e6c73380871e0e",
    ),
}
#: Architecture -> the kernel that Firecracker's own tests boot (uncompressed, drivers built in).
KERNELS: Final = {
    "x86_64": Pin(
        url=f"{_CI_BUCKET}/x86_64/vmlinux-{KERNEL_VERSION}",
        sha256="489f209ae3542925043f09e75787cbffaf5a448fe211ae27b80faefd4a9cd38f",
    ),
    "aarch64": Pin(
        url=f"{_CI_BUCKET}/aarch64/vmlinux-{KERNEL_VERSION}",
        sha256="423d0bb6dae467445ea203c9ef74027bb49f5e71a1da658fab2a369b736b83e1",
    ),
}


def release_folder(data: Path, version: str = VERSION_TEXT) -> Path:
    """Where `fuse host install` puts the programs `firecracker` and `jailer` of a release, below the data folder.

    Each version has its own: a snapshot loads only in the version that took it.
    """
    return data / "firecracker" / version
