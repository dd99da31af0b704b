"""Snapshots in the journal: the intent to take one, to put one back, to delete one, and what came of it.

Everything is decided inside a transaction of the journal, together with the operation of the machine concerned: at
every moment a snapshot that is being taken belongs to an open operation of its machine, or is a leftover.

Owns: the tables `snapshots` and `freed_snapshots`. Must not: touch the bytes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import msgspec

from fusevm.host.admission import Limits, check_admission, check_room
from fusevm.host.fencing import LOCAL
from fusevm.host.journal import Journal
from fusevm.host.rows import (
    FENCE_LIFETIME_MS,
    SQL,
    Numbers,
    expect_one,
    load_operation,
    load_usage,
    reserve_numbers,
    save_intent,
    save_machine,
)
from fusevm.host.snapshots.record import Consistency, HostSnapshot, SnapshotPhase, seed_of
from fusevm.model.errors import (
    SnapshotExists,
    SnapshotMismatch,
    SnapshotNotFound,
    SnapshotNotReady,
    WrongCluster,
    WrongState,
)
from fusevm.model.machine import Fence, Machine, Phase
from fusevm.wire.decode import UNREADABLE

_AT_REST = frozenset({Phase.STOPPED, Phase.FAILED})
_COPYABLE = frozenset({Phase.RUNNING, Phase.STOPPED})
_RESTORABLE = frozenset({Phase.RUNNING, Phase.PAUSED, *_AT_REST})


class Ledger:
    """The snapshots of the open journal."""

    def __init__(self, journal: Journal, now_ms: Callable[[], int]) -> None:
        self._journal = journal
        self._now_ms = now_ms

    # -- taking -----------------------------------------------------------------------------------------------------

    async def begin_take(
        self,
        machine_id: str,
        snapshot_id: str,
        fence: Fence | None,
        limits: Limits,
        needed_bytes: int,
        on_commit: Callable[[Machine], None],
    ) -> HostSnapshot:
        """Write the intent to copy a machine's disk, or return the snapshot when the order is a repetition.

        `needed_bytes`: what the copy may take of the disk. Raises MachineNotFound and what is wrong with the fence,
        SnapshotExists, SnapshotNotFound (its id was deleted), SnapshotNotReady, WrongState, HostFull, NoSpace.
        """

        def transact(db: sqlite3.Connection) -> tuple[Machine, HostSnapshot]:
            machine = self._journal.take_next(db, machine_id, fence)
            existing = _load(db, snapshot_id)
            if existing is not None:
                return machine, _check_repetition(existing, machine)
            if db.execute(SQL["is_freed"], {"id": snapshot_id, "now_ms": self._now_ms()}).fetchone():
                raise SnapshotNotFound(id=snapshot_id)
            _check_phase(machine, _COPYABLE, "a snapshot is taken of a running or a stopped machine")
            check_room(limits, needed_bytes)
            snapshot = _draft(machine, snapshot_id, self._now_ms())
            _insert(db, snapshot)
            save_intent(db, machine.id, "snapshot", self._now_ms())
            return machine, snapshot

        begun = await self._journal.write(
            transact, point="snapshot.intent", on_commit=lambda begun: on_commit(begun[0])
        )
        return begun[1]

    async def finish_take(self, snapshot: HostSnapshot) -> HostSnapshot:
        """The bytes are there: give the machine free. Raises SnapshotNotFound when it was deleted meanwhile.

        Superseded when the machine was.
        """

        def transact(db: sqlite3.Connection) -> HostSnapshot:
            expect_one(db.execute(SQL["clear_operation"], {"id": snapshot.machine_id, "kind": "snapshot"}))
            return _advance(db, snapshot, SnapshotPhase.TAKING, SnapshotPhase.SEALING)

        return await self._journal.write(transact, point="snapshot.copied")

    async def undo_takes(self, machine_id: str, *snapshot_ids: str) -> None:
        """Nothing is left of what was taken of a machine: take the intent back, also when no snapshot is left of it.

        Idempotent.
        """

        def transact(db: sqlite3.Connection) -> None:
            operation = load_operation(db, machine_id)
            if operation is not None and operation.kind == "snapshot":
                db.execute(SQL["clear_operation"], {"id": machine_id, "kind": "snapshot"})
            for snapshot_id in snapshot_ids:
                db.execute(SQL["delete_snapshot"], {"id": snapshot_id})

        await self._journal.write(transact, point="snapshot.undone", is_urgent=True)

    async def finish_seal(self, snapshot: HostSnapshot) -> HostSnapshot:
        """Digest and manifest are there: it can be used. Raises SnapshotNotFound when it was deleted meanwhile."""

        def transact(db: sqlite3.Connection) -> HostSnapshot:
            return _advance(db, snapshot, SnapshotPhase.SEALING, SnapshotPhase.READY)

        return await self._journal.write(transact, point="snapshot.ready")

    async def begin_import(self, snapshot: HostSnapshot, limits: Limits, needed_bytes: int) -> HostSnapshot:
        """Write the intent to fetch a snapshot, or return what there is: whole, or begun from the same source.

        Raises SnapshotNotReady while somebody else takes, fetches or deletes it, WrongCluster, HostFull, NoSpace.
        """

        def transact(db: sqlite3.Connection) -> HostSnapshot:
            existing = _load(db, snapshot.id)
            if existing is not None:
                return _check_begun(existing, snapshot)
            check_room(limits, needed_bytes)
            _insert(db, snapshot)
            return snapshot

        return await self._journal.write(transact, point="import.intent")

    async def finish_import(self, snapshot: HostSnapshot) -> HostSnapshot:
        """The bytes are there. Raises SnapshotNotFound when it was deleted meanwhile."""

        def transact(db: sqlite3.Connection) -> HostSnapshot:
            return _advance(db, snapshot, SnapshotPhase.TAKING, SnapshotPhase.SEALING)

        return await self._journal.write(transact, point="import.copied")

    # -- putting back -----------------------------------------------------------------------------------------------

    async def begin_restore(
        self,
        machine_id: str,
        snapshot_id: str,
        fence: Fence | None,
        limits: Limits,
        needed_bytes: int,
        deadline_ms: int,
        on_commit: Callable[[Machine], None],
    ) -> Machine:
        """Write the intent to put a snapshot back into a machine; `next_seed` says that there is something to do.

        A machine that runs since this very order did it is returned unchanged. `needed_bytes`: what the new disk takes
        beside the old one. Raises what `begin_take` raises, and SnapshotMismatch.
        """

        def transact(db: sqlite3.Connection) -> Machine:
            machine = self._journal.take_next(db, machine_id, fence)
            if fence is not None and _was_restored(machine, fence, snapshot_id):
                return machine
            snapshot = _owned(db, snapshot_id, machine.fence.cluster)
            seed = seed_of(snapshot)
            _check_fit(snapshot, machine)
            _check_phase(machine, _RESTORABLE, "wait until that is done")
            if machine.phase in _AT_REST:
                check_admission(load_usage(db, exclude=machine_id), limits, machine.spec, is_new=False)
            check_room(limits, needed_bytes)
            save_intent(db, machine.id, "restore", self._now_ms(), deadline_ms)
            return save_machine(db, msgspec.structs.replace(machine, next_seed=seed), self._now_ms())

        return await self._journal.write(transact, point="restore.intent", on_commit=on_commit)

    async def commit_restore(
        self, machine: Machine, nonce: str, numbers: Numbers, on_commit: Callable[[Machine], None]
    ) -> Machine:
        """The disk is staged: from here on the restore is finished, not undone. Raises Superseded, HostFull."""

        def transact(db: sqlite3.Connection) -> Machine:
            expect_one(db.execute(SQL["mark_operation"], {"id": machine.id, "kind": "restore", "step": "committed"}))
            changed = msgspec.structs.replace(
                machine,
                phase=Phase.CREATING,
                seed=machine.next_seed,
                next_seed=None,
                restored_seq=machine.fence.action_seq,
                nonce=nonce,
                generation=machine.generation + 1,
                error="",
            )
            return reserve_numbers(db, save_machine(db, changed, self._now_ms()), numbers)

        return await self._journal.write(transact, point="restore.committed", on_commit=on_commit)

    async def undo_restore(self, machine: Machine, on_commit: Callable[[Machine], None]) -> Machine:
        """Nothing was changed: take the intent back. Raises Superseded."""

        def transact(db: sqlite3.Connection) -> Machine:
            expect_one(db.execute(SQL["clear_operation"], {"id": machine.id, "kind": "restore"}))
            return save_machine(db, msgspec.structs.replace(machine, next_seed=None), self._now_ms())

        return await self._journal.write(transact, point="restore.undone", on_commit=on_commit)

    # -- deleting ---------------------------------------------------------------------------------------------------

    async def begin_delete(self, snapshot_id: str, cluster: str) -> HostSnapshot:
        """Write the intent to free a snapshot, and that its id is used up; from here on nobody begins to use it.

        Raises SnapshotNotFound (the id is used up all the same), WrongCluster, NoSpace.
        """

        def transact(db: sqlite3.Connection) -> HostSnapshot | None:
            snapshot = _load(db, snapshot_id)
            if snapshot is not None:
                _check_cluster(snapshot, cluster)
            expires = {"id": snapshot_id, "expires_at_ms": self._now_ms() + FENCE_LIFETIME_MS}
            db.execute(SQL["free_snapshot"], expires)
            if snapshot is None:
                return None
            _save(db, msgspec.structs.replace(snapshot, phase=SnapshotPhase.DELETING))
            return snapshot

        found = await self._journal.write(transact, point="unsnapshot.intent", is_urgent=True)
        if found is None:
            raise SnapshotNotFound(id=snapshot_id)
        return found

    async def forget(self, snapshot_id: str) -> None:
        """Its bytes are gone. Idempotent."""

        def transact(db: sqlite3.Connection) -> None:
            db.execute(SQL["delete_snapshot"], {"id": snapshot_id})

        await self._journal.write(transact, point="unsnapshot.gone", is_urgent=True)

    async def purge(self) -> None:
        """Forget ids that were freed long ago."""
        moment = {"now_ms": self._now_ms()}
        await self._journal.write(lambda db: db.execute(SQL["purge_freed"], moment).rowcount, point="purge")

    # -- reading ----------------------------------------------------------------------------------------------------

    async def get(self, snapshot_id: str) -> HostSnapshot:
        """One snapshot. Raises SnapshotNotFound."""
        found = await self._journal.read(lambda db: _load(db, snapshot_id))
        if found is None:
            raise SnapshotNotFound(id=snapshot_id)
        return found

    async def owned(self, snapshot_id: str, cluster: str) -> HostSnapshot:
        """One snapshot, for whoever may use it. Raises SnapshotNotFound, WrongCluster."""
        return await self._journal.read(lambda db: _owned(db, snapshot_id, cluster))

    async def load_all(self, machine_id: str = "") -> list[HostSnapshot]:
        """Every snapshot, or those of one machine, oldest first."""
        found = await self._journal.read(lambda db: _load_all(db, machine_id))
        return sorted(found, key=lambda snapshot: (snapshot.created_at_ms, snapshot.id))

    async def taking(self, machine_id: str) -> list[HostSnapshot]:
        """What is being taken of a machine, or was when a daemon died; also what was deleted meanwhile.

        Without what is fetched: that names the machine that it was taken of, elsewhere.
        """
        begun = (SnapshotPhase.TAKING, SnapshotPhase.DELETING)
        of_machine = await self.load_all(machine_id)
        return [snapshot for snapshot in of_machine if snapshot.phase in begun and not snapshot.source]

    async def is_stray(self, snapshot_id: str) -> bool:
        """Is it being taken, and no machine has an open operation that would finish that or take it back?"""
        return await self._journal.read(
            lambda db: db.execute(SQL["is_stray_snapshot"], {"id": snapshot_id}).fetchone() is not None
        )


def _draft(machine: Machine, snapshot_id: str, now_ms: int) -> HostSnapshot:
    return HostSnapshot(
        id=snapshot_id,
        cluster=machine.fence.cluster,
        machine_id=machine.id,
        uid=machine.fence.uid,
        phase=SnapshotPhase.TAKING,
        image_digest=machine.image_digest,
        disk_bytes=machine.spec.disk_bytes,
        cpus=machine.spec.cpus,
        memory_mib=machine.spec.memory_mib,
        consistency=Consistency.FROZEN if machine.phase is Phase.RUNNING else Consistency.STOPPED,
        kernel_digest=machine.kernel_digest,
        driver=machine.driver,
        isolation=machine.isolation,
        created_at_ms=now_ms,
    )


def _check_repetition(existing: HostSnapshot, machine: Machine) -> HostSnapshot:
    if existing.machine_id != machine.id or existing.cluster != machine.fence.cluster:
        raise SnapshotExists(id=existing.id)
    if existing.phase not in (SnapshotPhase.SEALING, SnapshotPhase.READY):
        raise SnapshotNotReady(id=existing.id, state=existing.phase.value)
    return existing


def _check_begun(existing: HostSnapshot, wanted: HostSnapshot) -> HostSnapshot:
    _check_cluster(existing, wanted.cluster)
    is_whole = existing.phase in (SnapshotPhase.SEALING, SnapshotPhase.READY)
    is_leftover = existing.phase is SnapshotPhase.TAKING and existing.source == wanted.source
    if not (is_whole or is_leftover):
        raise SnapshotNotReady(id=existing.id, state=existing.phase.value)
    return existing


def _check_phase(machine: Machine, wanted: frozenset[Phase], remedy: str) -> None:
    if machine.phase not in wanted:
        raise WrongState(id=machine.id, state=machine.phase.value, wanted=remedy)


def _check_fit(snapshot: HostSnapshot, machine: Machine) -> None:
    if snapshot.image_digest != machine.image_digest:
        problem = f"it lies above image {snapshot.image_digest[:19]}, the machine's is {machine.image_digest[:19]}"
        raise SnapshotMismatch(id=snapshot.id, problem=problem)
    if snapshot.disk_bytes > machine.spec.disk_bytes:
        problem = f"its disk has {snapshot.disk_bytes} bytes, the machine's {machine.spec.disk_bytes}; resize it first"
        raise SnapshotMismatch(id=snapshot.id, problem=problem)


def _was_restored(machine: Machine, fence: Fence, snapshot_id: str) -> bool:
    is_same = machine.restored_seq == fence.action_seq and machine.seed is not None
    return (
        is_same
        and machine.phase is Phase.RUNNING
        and machine.seed is not None
        and (machine.seed.snapshot_id == snapshot_id)
    )


def _check_cluster(snapshot: HostSnapshot, cluster: str) -> None:
    if snapshot.cluster != (cluster or LOCAL):
        raise WrongCluster(cluster=snapshot.cluster, asked=cluster or LOCAL)


def _owned(db: sqlite3.Connection, snapshot_id: str, cluster: str) -> HostSnapshot:
    snapshot = _load(db, snapshot_id)
    if snapshot is None:
        raise SnapshotNotFound(id=snapshot_id)
    _check_cluster(snapshot, cluster)
    return snapshot


def _advance(
    db: sqlite3.Connection, snapshot: HostSnapshot, before: SnapshotPhase, after: SnapshotPhase
) -> HostSnapshot:
    found = _load(db, snapshot.id)
    if found is None or found.phase is not before:
        raise SnapshotNotFound(id=snapshot.id)
    return _save(db, msgspec.structs.replace(snapshot, phase=after))


def _load(db: sqlite3.Connection, snapshot_id: str) -> HostSnapshot | None:
    row = db.execute(SQL["get_snapshot"], {"id": snapshot_id}).fetchone()
    return _decode(row) if row is not None else None


def _load_all(db: sqlite3.Connection, machine_id: str) -> list[HostSnapshot]:
    if machine_id:
        rows = db.execute(SQL["snapshots_of_machine"], {"machine_id": machine_id}).fetchall()
    else:
        rows = db.execute(SQL["list_snapshots"]).fetchall()
    return [_decode(row) for row in rows]


def _decode(row: tuple[str, str, str, str, str, bytes]) -> HostSnapshot:
    """A snapshot; one whose record is damaged is made up from the columns, and good for nothing but to be deleted."""
    snapshot_id, cluster, machine_id, phase, image_digest, record = row
    try:
        return msgspec.json.decode(record, type=HostSnapshot)
    except UNREADABLE:
        is_doomed = phase == SnapshotPhase.DELETING
        return HostSnapshot(
            id=snapshot_id,
            cluster=cluster,
            machine_id=machine_id,
            phase=SnapshotPhase.DELETING if is_doomed else SnapshotPhase.DAMAGED,
            image_digest=image_digest,
            disk_bytes=0,
            consistency=Consistency.UNKNOWN,
            created_at_ms=0,
        )


def _insert(db: sqlite3.Connection, snapshot: HostSnapshot) -> None:
    columns = {"cluster": snapshot.cluster, "machine_id": snapshot.machine_id, "image_digest": snapshot.image_digest}
    db.execute(SQL["insert_snapshot"], {**columns, **_changing(snapshot)})


def _save(db: sqlite3.Connection, snapshot: HostSnapshot) -> HostSnapshot:
    db.execute(SQL["update_snapshot"], _changing(snapshot))
    return snapshot


def _changing(snapshot: HostSnapshot) -> dict[str, str | bytes]:
    return {"id": snapshot.id, "phase": snapshot.phase.value, "record": msgspec.json.encode(snapshot)}
