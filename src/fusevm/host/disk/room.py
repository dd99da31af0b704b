"""The disks of machines, each in its machine's directory.

    overlay.{raw,qcow2}        the disk; the name, not the content, tells the format
    base-<16 hex digits>.raw   the disk of the snapshot that a qcow2 overlay began with: a hard link, so that the blocks
                               stay as long as anybody needs them, whatever becomes of the snapshot
    next.{raw,qcow2}           the disk that a restore is about to put in place

Owns: those files. Must not: start VMMs, or change records.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from fusevm.host.disk.copy import DiskImage, share_blocks
from fusevm.host.disk.overlay import Method, WithoutReflink, allocated_bytes, create_overlay, sync_overlay
from fusevm.host.disk.qcow2 import QcowDamaged, read_backing, read_size
from fusevm.host.images.blank import ensure_blank
from fusevm.host.images.workspace import sync_folder
from fusevm.model.errors import Internal, SnapshotNotFound
from fusevm.model.machine import DiskSeed, Machine

Format = Literal["raw", "qcow2"]
_FORMATS: tuple[Format, ...] = ("raw", "qcow2")
_PROBE_BYTES = 1 << 16


class DiskRoom:
    """Makes, finds, replaces disks."""

    def __init__(
        self,
        machines: Path,
        artefacts: Path,
        snapshots: Path,
        *,
        is_confined: bool,
        without_reflink: WithoutReflink = Method.QCOW2,
    ) -> None:
        self._machines = machines
        self._artefacts = artefacts
        self._snapshots = snapshots
        self._is_confined = is_confined
        self._without_reflink = without_reflink
        self._has_reflink: bool | None = None

    def find(self, machine_id: str) -> tuple[Path, Format] | None:
        """Where a machine's disk is. Blocking, as every method that is no coroutine."""
        return self._find(machine_id, "overlay")

    async def image(self, machine: Machine) -> DiskImage:
        """A machine's disk, for whoever copies it. Raises Internal when it has none, or one that lies."""
        return await asyncio.to_thread(self._image, machine)

    async def needed_bytes(self, machine: Machine) -> int:
        """What a copy of the disk may take of the host's; nothing where blocks can be shared."""
        return await asyncio.to_thread(self._needed_bytes, machine)

    async def seed_bytes(self, snapshot_id: str) -> int:
        """What a disk that begins with a snapshot takes of the host's at once: nothing, unless it is a copy."""
        return await asyncio.to_thread(self._seed_bytes, snapshot_id)

    async def ensure(self, machine: Machine) -> bool:
        """Make a machine's disk unless it is there; False when it was. Raises NoSpace, SnapshotNotFound."""
        if await asyncio.to_thread(self.find, machine.id) is not None:
            return False
        await self._make(machine, machine.seed, "overlay")
        return True

    async def stage(self, machine: Machine, seed: DiskSeed) -> None:
        """Make the disk that `swap` will put in place of the machine's. Raises NoSpace, SnapshotNotFound."""
        await self.unstage(machine)
        await self._make(machine, seed, "next")
        staged = await asyncio.to_thread(self._find, machine.id, "next")
        if staged is not None:
            await sync_overlay(staged[0])

    async def swap(self, machine: Machine) -> None:
        """Put the staged disk in place; nobody uses the old one any more. Idempotent: can be begun again anywhere."""
        await asyncio.to_thread(self._swap, machine)

    async def unstage(self, machine: Machine) -> None:
        """Remove a staged disk that will not be used. Idempotent."""
        await asyncio.to_thread(self._unstage, machine)

    async def sync(self, machine_id: str) -> None:
        """Make what a stopped machine has written survive a crash of the host."""
        disk = await asyncio.to_thread(self.find, machine_id)
        if disk is not None:
            await sync_overlay(disk[0])

    # -- inside -----------------------------------------------------------------------------------------------------

    def _image(self, machine: Machine) -> DiskImage:
        found = self.find(machine.id)
        if found is None:
            raise Internal(problem=f"machine {machine.id} has no disk")
        path, kind = found
        # The file is the machine's to write: neither its size nor what it names is believed.
        limit = blank_size(machine.spec.disk_bytes)
        if kind == "raw":
            return DiskImage(path=path, format=kind, size_bytes=min(path.stat().st_size, limit))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size, backing = read_size(fd), Path(read_backing(fd))
        except QcowDamaged as e:
            raise Internal(problem=f"the disk of {machine.id} is damaged: {e}") from e
        finally:
            os.close(fd)
        if size > limit:
            raise Internal(problem=f"the disk of {machine.id} claims {size} bytes instead of {limit}")
        if not self._is_base(machine.id, backing):
            raise Internal(problem=f"the disk of {machine.id} names a base that is not its own")
        return DiskImage(path=path, format=kind, size_bytes=size, backing=backing)

    def _needed_bytes(self, machine: Machine) -> int:
        image = self._image(machine)
        if image.format == "raw" and self._shares_blocks():
            return 0
        return allocated_bytes(image.path) + (allocated_bytes(image.backing) if image.backing is not None else 0)

    def _seed_bytes(self, snapshot_id: str) -> int:
        if self._without_reflink is Method.QCOW2 or self._shares_blocks():
            return 0
        return allocated_bytes(disk_of_snapshot(self._snapshots, snapshot_id))

    def _shares_blocks(self) -> bool:
        """Can the file system share blocks between files? Asked once."""
        if self._has_reflink is None:
            with TemporaryFile(dir=self._machines) as one, TemporaryFile(dir=self._machines) as other:
                one.write(bytes(_PROBE_BYTES))
                one.flush()
                self._has_reflink = share_blocks(one.fileno(), other.fileno())
        return self._has_reflink

    async def _make(self, machine: Machine, seed: DiskSeed | None, name: str) -> None:
        folder = self._machines / machine.id
        if seed is None:
            base = await ensure_blank(self._artefacts, machine.spec.disk_bytes)
        else:
            base = await asyncio.to_thread(self._link_base, machine.id, seed)
        # Only a whole disk has a name that tells its format. The content does not: the guest writes it.
        unfinished = folder / f"{name}.new"
        await asyncio.to_thread(unfinished.unlink, missing_ok=True)
        uid = machine.uid if self._is_confined else None
        size = blank_size(machine.spec.disk_bytes)
        overlay = await create_overlay(
            base, unfinished, size_bytes=size, without_reflink=self._without_reflink, uid=uid, gid=uid
        )
        await asyncio.to_thread(unfinished.replace, folder / f"{name}.{overlay.format}")
        await asyncio.to_thread(self._drop_bases, machine.id)

    def _link_base(self, machine_id: str, seed: DiskSeed) -> Path:
        """The snapshot's disk under a name of the machine's own."""
        source, target = disk_of_snapshot(self._snapshots, seed.snapshot_id), self._base(machine_id, seed)
        try:
            os.link(source, target, follow_symlinks=False)
        except FileExistsError:
            pass  # named by its content
        except FileNotFoundError as e:
            raise SnapshotNotFound(id=seed.snapshot_id) from e
        except OSError as e:
            if e.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
                raise
            # Snapshots are elsewhere: the machine gets a path instead, and the snapshot's end would be its own.
            raise Internal(problem=f"{source} cannot be linked to {target}: {e.strerror}") from e
        return target

    def _base(self, machine_id: str, seed: DiskSeed) -> Path:
        return self._machines / machine_id / f"base-{seed.base}.raw"

    def _find(self, machine_id: str, name: str) -> tuple[Path, Format] | None:
        for kind in _FORMATS:
            path = self._machines / machine_id / f"{name}.{kind}"
            if path.is_file():
                return path, kind
        return None

    def _swap(self, machine: Machine) -> None:
        folder = self._machines / machine.id
        staged = self._find(machine.id, "next")
        if staged is not None:
            for kind in _FORMATS:
                if kind != staged[1]:
                    (folder / f"overlay.{kind}").unlink(missing_ok=True)
            staged[0].replace(folder / f"overlay.{staged[1]}")
            sync_folder(folder)
        self._drop_bases(machine.id)

    def _unstage(self, machine: Machine) -> None:
        folder = self._machines / machine.id
        for name in ("next.new", *(f"next.{kind}" for kind in _FORMATS)):
            (folder / name).unlink(missing_ok=True)
        self._drop_bases(machine.id)

    def _is_base(self, machine_id: str, path: Path) -> bool:
        """Is it a blank, which holds nothing of anybody, or a link of the machine's own?"""
        if path.parent == self._artefacts / "blanks":
            return path.suffix == ".ext4"
        return path.parent == self._machines / machine_id and path.match("base-*.raw")

    def _drop_bases(self, machine_id: str) -> None:
        """Remove the links that no disk of the machine needs."""
        folder = self._machines / machine_id
        needed = set()
        for name in ("overlay.qcow2", "next.qcow2"):
            with contextlib.suppress(FileNotFoundError, QcowDamaged):
                needed.add(_backing_of(folder / name))
        for path in folder.glob("base-*.raw"):
            if str(path) not in needed:
                path.unlink(missing_ok=True)


def _backing_of(overlay: Path) -> str:
    with overlay.open("rb") as file:
        return read_backing(file.fileno())


def disk_of_snapshot(snapshots: Path, snapshot_id: str) -> Path:
    """The raw disk of a snapshot that is complete."""
    return snapshots / snapshot_id / "disk.raw"


def blank_size(disk_bytes: int) -> int:
    """What the guest sees of a disk of that size: whole MiB."""
    return -(-disk_bytes >> 20) << 20
