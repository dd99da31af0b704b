"""A new machine of computer-host's API that begins with a snapshot: of this host, or fetched from where it was carried.

Owns: what the request means. Must not: make machines, or fetch bytes itself.
"""

from __future__ import annotations

import msgspec

from fusevm.host.contract.create import plan_create
from fusevm.host.contract.relays import first_relays
from fusevm.host.daemon import Daemon
from fusevm.host.snapshots.record import HostSnapshot, check_ready
from fusevm.model.errors import (
    BadField,
    BootFailed,
    ImageNotFound,
    LocalSnapshotMissing,
    MachineExists,
    SnapshotMismatch,
    SnapshotNotFound,
)
from fusevm.model.ids import parse_machine_id, parse_snapshot_id
from fusevm.model.machine import Artifact, Contract, Machine
from fusevm.wire.contract import CreateContractMachine
from fusevm.wire.host_snapshots import RestoreSnapshot


async def restore_by_contract(daemon: Daemon, snapshot_id: str, body: RestoreSnapshot) -> Machine:
    """Make the machine; one whose guest did not get ready is returned as well: failed, with the reason.

    Raises BadField, MachineExists, LocalSnapshotMissing, SnapshotNotReady, SnapshotMismatch, WrongCluster, what a
    download raises, and what a create raises.
    """
    parse_snapshot_id(snapshot_id)
    _check_ids(snapshot_id, body)
    if parse_machine_id(body.machine_id) in daemon.machines.ids():
        raise MachineExists(id=body.machine_id)
    snapshot = await _find(daemon, snapshot_id, body)
    storage = body.storage_bytes if body.storage_bytes > 0 else snapshot.disk_bytes
    if storage < snapshot.disk_bytes:
        problem = f"its disk has {snapshot.disk_bytes} bytes, the machine would have {storage}"
        raise SnapshotMismatch(id=snapshot.id, problem=problem)
    wanted = CreateContractMachine(
        machine_id=body.machine_id,
        image=snapshot.image_digest,
        memory_mib=body.memory_mib,
        storage_bytes=storage,
        guest_config=body.guest_config,
    )
    create, contract = await plan_create(
        wanted,
        None,
        importer=daemon.artifacts,
        login_ca=daemon.config.login_ca,
        relays=first_relays(daemon.isolation),
        entropy=daemon.entropy,
    )
    create = msgspec.structs.replace(create, snapshot_id=snapshot.id)
    try:
        return await daemon.machines.create(create, None, _shown(contract, body))
    except BootFailed:
        return daemon.machines.record(body.machine_id)


def _check_ids(snapshot_id: str, body: RestoreSnapshot) -> None:
    if body.local_snapshot is None and body.snapshot is None:
        raise BadField(field="snapshot", problem="give `local_snapshot` or `snapshot`")
    for field, inner in (("local_snapshot", body.local_snapshot), ("snapshot", body.snapshot)):
        if inner is not None and inner.snapshot_id not in ("", snapshot_id):
            raise BadField(field=f"{field}.snapshot_id", problem="must be that of the path")


async def _find(daemon: Daemon, snapshot_id: str, body: RestoreSnapshot) -> HostSnapshot:
    """The snapshot of this host; fetched when it has none and the request says where from."""
    try:
        found = await daemon.snapshots.owned(snapshot_id, "")
    except SnapshotNotFound:
        if body.snapshot is None:
            raise LocalSnapshotMissing(problem=f"this host has no snapshot {snapshot_id!r}") from None
        daemon.snapshots.check_durable(body.snapshot)
        image = await _find_image(daemon, body.snapshot.image_id, body)
        return await daemon.snapshots.fetch(snapshot_id, body.snapshot, image)
    check_ready(found)
    return found


async def _find_image(daemon: Daemon, image_id: str, body: RestoreSnapshot) -> str:
    """Digest of the image below the disk: named, or what the artifact's URL leads to. It must be what was meant."""
    if image_id:
        try:
            return await daemon.image_digest(image_id)
        except ImageNotFound:
            if body.artifact is None:
                raise
    if body.artifact is None:
        raise BadField(field="snapshot.image_id", problem="must name the image below the disk")
    imported = await daemon.artifacts.import_artifact(
        body.artifact.rootfs_url, sha256=body.artifact.rootfs_sha256 or None
    )
    if image_id and image_id != imported.digest:
        problem = f"it lies above image {image_id[:80]}, the artifact is {imported.digest[:19]}"
        raise SnapshotMismatch(id=body.snapshot.snapshot_id if body.snapshot else "", problem=problem)
    return imported.digest


def _shown(contract: Contract, body: RestoreSnapshot) -> Contract:
    """The contract's answer repeats what the request said of the artifact."""
    if body.artifact is None:
        return contract
    artifact = Artifact(kernel_image_url=body.artifact.kernel_image_url, rootfs_url=body.artifact.rootfs_url)
    return msgspec.structs.replace(contract, artifact=artifact)
