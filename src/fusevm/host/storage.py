"""What takes how much of the disk: allocated blocks, as the file system counts them.

Sparse files count what they really take; blocks that files share by reflink count for each of them, and so does the
disk of a snapshot for each machine that holds a link to it.

Owns: nothing. Must not: remove anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fusevm.host.config import HostConfig
from fusevm.host.listing import names_in
from fusevm.host.vmm.driver import JAIL
from fusevm.wire.host_api import MachineStorage, SnapshotStorage, StoragePool, StorageReport

_BLOCK_BYTES = 512
_MAX_DEPTH = 32
_ARTEFACTS = ("images", "kernels", "initramfs", "blanks")
_STATE = ("journal.db", "journal.db-wal", "journal.db-shm", "ballast")


def observe_storage(config: HostConfig, generated_at: str) -> StorageReport:
    """Walk the data directory. Blocking: run it in a thread."""
    machines = [_machine(folder, config.runtime_directory) for folder in _folders(config.data_root / "machines")]
    snapshots = [
        SnapshotStorage(snapshot_id=folder.name, bytes=allocated_tree(folder))
        for folder in _folders(config.data_root / "snapshots")
    ]
    disks = sum(machine.system_bytes + machine.runtime_bytes for machine in machines)
    artefacts = sum(allocated_tree(config.artefacts / name) for name in _ARTEFACTS)
    state = sum(_allocated(config.data_root / name) for name in _STATE)
    pools = [
        StoragePool(pool="artifacts", bytes=artefacts),
        StoragePool(pool="machine-disks", bytes=disks),
        StoragePool(pool="published-ports"),
        StoragePool(pool="snapshots", bytes=sum(snapshot.bytes for snapshot in snapshots)),
        StoragePool(pool="state", bytes=state),
    ]
    total = sum(pool.bytes for pool in pools)
    return StorageReport(
        generated_at=generated_at, total_bytes=total, pools=pools, machines=machines, snapshots=snapshots
    )


def allocated_tree(root: Path) -> int:
    """Bytes that a directory takes with all below it; 0 when it does not exist. Links are not followed."""
    return _allocated(root) + sum(map(_allocated, _files(root)))


def _machine(folder: Path, run_dir: Path) -> MachineStorage:
    disk = sum(_allocated(folder / name) for name in names_in(folder) if name.startswith("overlay."))
    # A jail's files are links, to the disk above and to what all machines share.
    rest = allocated_tree(folder) - disk - _linked(folder / JAIL) + allocated_tree(run_dir / folder.name)
    return MachineStorage(machine_id=folder.name, system_bytes=disk, runtime_bytes=rest)


def _linked(root: Path) -> int:
    """Bytes of the files below a directory that have another name, too."""
    total = 0
    for path in _files(root):
        with contextlib.suppress(OSError):
            total += _allocated(path) if path.lstat().st_nlink > 1 else 0
    return total


def _files(root: Path) -> Iterator[Path]:
    """All files below a directory, down to a depth that nothing of ours has: a jail's may be its user's work."""
    least = len(root.parts)
    for folder, names, files in os.walk(root, onerror=lambda _error: None):
        if len(Path(folder).parts) - least >= _MAX_DEPTH:
            names.clear()
        yield from (Path(folder, name) for name in files)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []


def _allocated(path: Path) -> int:
    try:
        return path.lstat().st_blocks * _BLOCK_BYTES
    except OSError:
        return 0
