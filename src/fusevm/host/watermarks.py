"""The file systems that machines grow on, and how much of each must stay free: a create is refused before a disk, an
image or a log meets ENOSPC.

Disks are sparse and grow after they were admitted, so what counts is what is free now. Each file system is looked at
once, whichever of our directories are on it; one that makes inodes as it needs them (btrfs, XFS on some mounts, tmpfs
without a limit) has no number of them to run out of.

Owns: looking. Must not: refuse (`admission` does).
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from fusevm.host.config import HostConfig

#: Below a machine's run directory are sockets and a pipe: no bytes to speak of.
_RUN_RESERVE_BYTES = 1 << 20
#: A machine is some ten files and folders; what is kept is for those that run, and for the host's own.
_RESERVE_INODES = 2_000


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One file system."""

    #: The first of our directories on it, and what we keep there, for people.
    path: str
    holds: str
    free_bytes: int
    reserve_bytes: int
    #: 0 of 0: it does not count them.
    free_inodes: int
    all_inodes: int
    reserve_inodes: int

    @property
    def shortage(self) -> tuple[str, str] | None:
        """What must be kept free, and what is; None above both watermarks."""
        if self.free_bytes <= self.reserve_bytes:
            return f"{self.reserve_bytes} bytes kept free below {self.path}", f"{self.free_bytes} bytes"
        if self.all_inodes and self.free_inodes <= self.reserve_inodes:
            return f"{self.reserve_inodes} inodes kept free below {self.path}", f"{self.free_inodes}"
        return None


def observe_places(config: HostConfig) -> tuple[Place, ...]:
    """Look at every file system that machines take from. Blocking: run it in a thread."""
    wanted = (
        (config.data_root, "disks and consoles of machines", config.disk_reserve_bytes),
        (config.artefacts, "images and kernels", config.disk_reserve_bytes),
        (config.runtime_directory, "sockets", _RUN_RESERVE_BYTES),
    )
    places: dict[int, Place] = {}
    for path, holds, reserve_bytes in wanted:
        try:
            device, found = path.stat().st_dev, os.statvfs(path)
        except FileNotFoundError:
            continue  # nothing has been put there yet
        if device not in places:
            places[device] = _place(path, holds, reserve_bytes, found)
    return tuple(places.values())


def _place(path: Path, holds: str, reserve_bytes: int, found: os.statvfs_result) -> Place:
    return Place(
        path=str(path),
        holds=holds,
        free_bytes=found.f_bavail * found.f_frsize,
        reserve_bytes=reserve_bytes,
        free_inodes=found.f_favail,
        all_inodes=found.f_files,
        # A small file system (a tmpfs of tests, /run) keeps a part instead.
        reserve_inodes=min(_RESERVE_INODES, found.f_files // 20),
    )
