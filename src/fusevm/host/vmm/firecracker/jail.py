"""The jail of one machine: where its files are, inside and outside, and how the jailer is called. Pure.

`<base>/firecracker/<id>/root` is the root directory that Firecracker sees. The jailer makes it, with the program's copy
and the device nodes, and never removes it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

#: Name of the program in the jail; the jailer names the directory after it.
PROGRAM: Final = "firecracker"
#: More descriptors than a machine with few devices and a thousand streams needs; the table is sized by it at start.
_MAX_FILES: Final = 2048


class Inside(msgspec.Struct, frozen=True, kw_only=True):
    """Paths as Firecracker sees them."""

    api: str = "/run/api.sock"
    vsock: str = "/run/v.sock"
    log: str = "/run/log"
    metrics: str = "/run/metrics"
    console: str = "/run/console"
    kernel: str = "/kernel"
    initramfs: str = "/initramfs"
    image: str = "/image"
    overlay: str = "/overlay"


class Jail(msgspec.Struct, frozen=True, kw_only=True):
    """One machine's directories, as the daemon sees them."""

    base: Path
    machine_id: str

    @property
    def folder(self) -> Path:
        """Everything of this jail."""
        return self.base / PROGRAM / self.machine_id

    @property
    def root(self) -> Path:
        """What is `/` inside."""
        return self.folder / "root"

    @property
    def pid_file(self) -> Path:
        """Written by the jailer; one that is left over makes the next start fail."""
        return self.root / f"{PROGRAM}.pid"

    def outside(self, path: str) -> Path:
        """The same file for the daemon."""
        return self.root / path.removeprefix("/")


class JailOrder(msgspec.Struct, frozen=True, kw_only=True):
    """How the jailer is to be called."""

    jailer: Path
    firecracker: Path
    uid: int
    gid: int
    #: Handle of the network namespace (`/run/netns/...`); None: the daemon's.
    netns: Path | None = None
    #: Largest file that may be written, in bytes: the overlay's size, at least.
    max_file_bytes: int


def render_jailer(order: JailOrder, jail: Jail, inside: Inside) -> Sequence[str]:
    """The words of the jailer's command line.

    Its own cgroup options are not used: they cannot set `io.max`, and without one they leave the process silently
    where it is. The process that becomes the jailer has joined the machine's cgroups before (`launch`).
    """
    return [
        str(order.jailer),
        *("--id", jail.machine_id),
        *("--exec-file", str(order.firecracker)),
        *("--uid", str(order.uid)),
        *("--gid", str(order.gid)),
        *("--chroot-base-dir", str(jail.base)),
        *(("--netns", str(order.netns)) if order.netns is not None else ()),
        *("--resource-limit", f"no-file={_MAX_FILES}"),
        *("--resource-limit", f"fsize={order.max_file_bytes}"),
        "--",
        *("--api-sock", inside.api),
    ]
