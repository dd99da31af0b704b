"""Disks of fake machines: small real files, so that real snapshots can be taken of them and put back."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fusevm.host.disk.copy import DiskImage
from fusevm.host.disk.room import disk_of_snapshot
from fusevm.model.errors import Error, SnapshotNotFound
from fusevm.model.machine import DiskSeed, Machine

SIZE = 1 << 20


class FakeDisks:
    """`<root>/disks/<machine>` and, staged, `<machine>.next`. A test writes and reads them as the guest would."""

    def __init__(self, root: Path, snapshots: Path) -> None:
        self._folder = root / "disks"
        self._snapshots = snapshots
        #: Raised by the next `stage`.
        self.stage_error: Error | None = None

    def write(self, machine_id: str, content: bytes) -> None:
        """Let a machine's disk begin with some bytes."""
        with self._ensure(machine_id).open("r+b") as file:
            file.write(content.ljust(64, b"\0"))

    def read(self, machine_id: str) -> bytes:
        """What a machine's disk begins with."""
        with self._ensure(machine_id).open("rb") as file:
            return file.read(64).rstrip(b"\0")

    def make(self, machine: Machine) -> None:
        """Make a machine's disk unless it is there. Raises SnapshotNotFound."""
        path = self._path(machine.id)
        if path.exists():
            return
        if machine.seed is None:
            self._ensure(machine.id)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._content_of(machine.seed))

    def remove(self, machine_id: str) -> None:
        """The machine is gone."""
        for path in (self._path(machine_id), self._next(machine_id)):
            path.unlink(missing_ok=True)

    def is_staged(self, machine_id: str) -> bool:
        """Is there a disk that waits to be put in place?"""
        return self._next(machine_id).exists()

    # -- Disks ------------------------------------------------------------------------------------------------------

    async def image(self, machine: Machine) -> DiskImage:
        """The file."""
        return DiskImage(path=self._ensure(machine.id), format="raw", size_bytes=SIZE)

    async def needed_bytes(self, machine: Machine) -> int:
        """Little."""
        del machine
        return SIZE

    async def seed_bytes(self, snapshot_id: str) -> int:
        """The same."""
        del snapshot_id
        return SIZE

    async def stage(self, machine: Machine, seed: DiskSeed) -> None:
        """Copy the snapshot's disk."""
        if self.stage_error is not None:
            raise self.stage_error
        content = await asyncio.to_thread(self._content_of, seed)
        await asyncio.to_thread(self._next(machine.id).write_bytes, content)

    async def swap(self, machine: Machine) -> None:
        """Rename."""
        if self._next(machine.id).exists():
            self._next(machine.id).replace(self._path(machine.id))

    async def unstage(self, machine: Machine) -> None:
        """Remove."""
        self._next(machine.id).unlink(missing_ok=True)

    def _content_of(self, seed: DiskSeed) -> bytes:
        try:
            return disk_of_snapshot(self._snapshots, seed.snapshot_id).read_bytes()
        except FileNotFoundError as e:
            raise SnapshotNotFound(id=seed.snapshot_id) from e

    def _ensure(self, machine_id: str) -> Path:
        path = self._path(machine_id)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(SIZE)
        return path

    def _path(self, machine_id: str) -> Path:
        return self._folder / machine_id

    def _next(self, machine_id: str) -> Path:
        return self._folder / f"{machine_id}.next"
