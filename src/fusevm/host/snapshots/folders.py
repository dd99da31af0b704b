"""The bytes of snapshots.

    <data_root>/snapshots/<id>/disk.new        being copied
    <data_root>/snapshots/<id>/disk.raw        the disk, sparse, never written again
    <data_root>/snapshots/<id>/layout.json     where on it the data is
    <data_root>/snapshots/<id>/manifest.json   the record

Machines that began with a snapshot hold links of their own to its disk (`disk.room`), so that removing the folder frees
exactly what nobody needs.

Owns: those folders. Must not: decide who may use or remove them.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from fusevm.host.disk.copy import CopyStopped, DiskImage, Stop, copy_disk, run_in_thread
from fusevm.host.disk.qcow2 import QcowDamaged
from fusevm.host.disk.room import disk_of_snapshot
from fusevm.host.images.workspace import sync_folder, write_durably
from fusevm.host.listing import names_in
from fusevm.host.removal import remove_tree
from fusevm.host.snapshots.packed import PackedDisk, find_runs
from fusevm.host.snapshots.record import DISK_ARTIFACT, Artifact, HostSnapshot
from fusevm.model.errors import NoSpace, SnapshotFailed, SnapshotNotFound

#: What the packed disk is called by whoever downloads it.
_DISK_NAME = "disk-system.qcow2"


class SnapshotFolders:
    """Writes, seals, reads and removes them."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def open(self) -> None:
        """Make the directory."""
        await asyncio.to_thread(self._root.mkdir, mode=0o700, exist_ok=True)

    async def copy(self, snapshot_id: str, disk: DiskImage, limit_s: float | None = None) -> bool:
        """Bring the snapshot's disk up to a machine's; True when they share their blocks.

        With a limit, the disk stands still meanwhile: what is wrong with it is wrong with the snapshot. Without one it
        may be written to, and the copy must be made once more. Raises SnapshotFailed, NoSpace.
        """
        folder = self._root / snapshot_id
        try:
            await asyncio.to_thread(folder.mkdir, mode=0o700, exist_ok=True)
            shares = await copy_disk(disk, folder / "disk.new", Stop(limit_s))
            if limit_s is None and not shares:
                # The bytes are many now and few later.
                await asyncio.to_thread(_sync_file, folder / "disk.new")
        except QcowDamaged as e:
            if limit_s is None:
                return False
            raise SnapshotFailed(id=snapshot_id, problem=f"the machine's disk is damaged: {e}") from e
        except CopyStopped as e:
            problem = (
                f"what changed on the disk could not be copied within {limit_s or 0:.0f} s; stop the machine first, or "
                "keep data_root on XFS or btrfs, where a snapshot copies nothing"
            )
            raise SnapshotFailed(id=snapshot_id, problem=problem) from e
        except OSError as e:
            raise self._explain(snapshot_id, e) from e
        return shares

    async def seal(self, snapshot: HostSnapshot) -> HostSnapshot:
        """Make the copied disk permanent and find its digest; the record with its artefact. Can be repeated.

        Reads what holds data, and no holes. Raises SnapshotFailed, NoSpace.
        """
        stop = Stop()
        try:
            return await run_in_thread(stop, self._seal, snapshot, stop)
        except OSError as e:
            raise self._explain(snapshot.id, e) from e

    async def remove(self, snapshot_id: str) -> None:
        """Remove everything of a snapshot. Idempotent."""
        await asyncio.to_thread(remove_tree, self._root / snapshot_id)

    async def names(self) -> set[str]:
        """Ids of all folders."""
        return await asyncio.to_thread(
            lambda: {entry.name for entry in os.scandir(self._root)} if self._root.is_dir() else set()
        )

    async def sizes(self) -> dict[str, int]:
        """Bytes of the disk of each snapshot that has all that reading it takes."""
        return await asyncio.to_thread(lambda: dict(self._sizes()))

    def staging(self, snapshot_id: str) -> tuple[Path, Path]:
        """Where what is fetched goes, and what is made of it until it is sealed; the folder is made by `prepare`."""
        folder = self._root / snapshot_id
        return folder / "fetched", folder / "disk.new"

    async def prepare(self, snapshot_id: str) -> None:
        """Make an empty folder, in place of what an earlier attempt has left."""
        await self.remove(snapshot_id)
        await asyncio.to_thread((self._root / snapshot_id).mkdir, mode=0o700)

    def open_packed(self, snapshot: HostSnapshot) -> PackedDisk:
        """Open the packed disk for reading; it stays readable when the snapshot is deleted meanwhile. Blocking.

        Raises SnapshotNotFound.
        """
        folder = self._root / snapshot.id
        try:
            return PackedDisk.open(folder / "disk.raw", (folder / "layout.json").read_bytes())
        except FileNotFoundError as e:
            raise SnapshotNotFound(id=snapshot.id) from e

    # -- inside -----------------------------------------------------------------------------------------------------

    def _sizes(self) -> Iterator[tuple[str, int]]:
        for name in names_in(self._root):
            folder = self._root / name
            try:
                disk, layout = disk_of_snapshot(self._root, name).lstat(), (folder / "layout.json").lstat()
            except OSError:
                continue
            if stat.S_ISREG(disk.st_mode) and stat.S_ISREG(layout.st_mode):
                yield name, disk.st_size

    def _seal(self, snapshot: HostSnapshot, stop: Stop) -> HostSnapshot:
        folder, disk = self._root / snapshot.id, disk_of_snapshot(self._root, snapshot.id)
        if not disk.exists():
            unfinished = folder / "disk.new"
            _sync_file(unfinished)
            unfinished.chmod(0o444)
            unfinished.replace(disk)
        layout = msgspec.json.encode(find_runs(disk))
        write_durably(folder / "layout.json", layout)
        packed = PackedDisk.open(disk, layout)
        try:
            state = hashlib.sha256()
            for chunk in packed.chunks(0, packed.size):
                stop.check()
                state.update(chunk)
        finally:
            packed.close()
        artifact = Artifact(
            id=DISK_ARTIFACT, kind="disk", name=_DISK_NAME, size_bytes=packed.size, sha256=state.hexdigest()
        )
        sealed = msgspec.structs.replace(
            snapshot,
            artifacts=(artifact,),
            disk_bytes=packed.disk_bytes,
        )
        write_durably(folder / "manifest.json", msgspec.json.format(msgspec.json.encode(sealed)))
        sync_folder(folder)
        sync_folder(self._root)
        return sealed

    def _explain(self, snapshot_id: str, error: OSError) -> NoSpace | SnapshotFailed:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            stats = os.statvfs(self._root)
            return NoSpace(path=str(self._root), needed=0, free=stats.f_bavail * stats.f_frsize)
        return SnapshotFailed(id=snapshot_id, problem=str(error))


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
