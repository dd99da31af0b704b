"""The jail of one machine: where its files are, inside and outside, and how the jailer is called.

`<base>/<program>/<id>/root` is the root directory that Firecracker sees; `<program>` is the file name of its program.
The jailer makes it, with the program's copy and the device nodes, and never removes it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from fusevm.host.listing import names_in

#: More descriptors than a machine with few devices and a thousand streams needs; the table is sized by it at start.
_MAX_FILES: Final = 2048


class Inside(msgspec.Struct, frozen=True, kw_only=True):
    """Paths as Firecracker sees them."""

    api: str = "/run/api.sock"
    #: What `--metadata` reads, before the guest can ask for it.
    metadata: str = "/metadata.json"
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

    #: All of it is this machine's.
    base: Path
    machine_id: str
    #: File name of Firecracker's program, links resolved: the jailer names the directory after it.
    program: str

    @property
    def root(self) -> Path:
        """What is `/` inside."""
        return self.base / self.program / self.machine_id / "root"

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


def find_jail(base: Path, machine_id: str) -> Jail | None:
    """The jail that is there, whatever its program is called; None without."""
    for program in names_in(base):
        if (base / program / machine_id / "root").is_dir():
            return Jail(base=base, machine_id=machine_id, program=program)
    return None


def render_jailer(order: JailOrder, jail: Jail, inside: Inside) -> Sequence[str]:
    """The words of the jailer's command line.

    Its own cgroup options are not used: they cannot set `io.max`, and without one they leave the process silently
    where it is. The process that becomes the jailer has joined the machine's cgroups before (`launch`). It stays in the
    daemon's process namespace and in no new session of the jailer's, so that its pid and its exit status are known.
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
        *("--metadata", inside.metadata),
    ]
