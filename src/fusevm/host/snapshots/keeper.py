"""The snapshots of one daemon: taken, listed, read, deleted, fetched; and put right after a crash.

The machine is needed only while its disk is copied (its task does that, `snapshots.work`); finding the digest comes
after it, in a task of the snapshot's own.

Owns: those tasks. Must not: touch machines, know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias

import msgspec
import structlog

from fusevm.host.drift import Kind
from fusevm.host.fencing import LOCAL, check_reserved
from fusevm.host.images.fetch import FetchPolicy, shown
from fusevm.host.machines import Machines
from fusevm.host.snapshots.folders import SnapshotFolders
from fusevm.host.snapshots.ledger import Ledger
from fusevm.host.snapshots.packed import PackedDisk
from fusevm.host.snapshots.record import (
    DISK_ARTIFACT,
    Consistency,
    HostSnapshot,
    SnapshotPhase,
    check_ready,
    disk_artifact,
)
from fusevm.host.snapshots.transfer import check_parts, fetch_disk, find_disk, unpack, upload
from fusevm.host.surroundings import Surroundings
from fusevm.host.tasks import gather_all
from fusevm.model.errors import (
    ArtifactNotFound,
    Error,
    MachineNotFound,
    NotSupported,
    ShuttingDown,
    SnapshotNotFound,
    SnapshotNotReady,
)
from fusevm.model.ids import parse_machine_id, parse_snapshot_id
from fusevm.model.machine import Fence
from fusevm.wire.host_snapshots import ArtifactUpload, DurableArtifact, DurableSnapshot, UploadedArtifact

log = structlog.get_logger()

_Kind: TypeAlias = Literal["seal", "fetch", "remove"]
_Task: TypeAlias = asyncio.Task[HostSnapshot]


class SnapshotKeeper:
    """Everything about snapshots that the API offers. Use within `running`."""

    def __init__(
        self,
        ledger: Ledger,
        folders: SnapshotFolders,
        machines: Machines,
        parts: Surroundings,
        policy: FetchPolicy,
    ) -> None:
        """`policy`: where uploads and downloads may lead, and how large they may be."""
        self._ledger = ledger
        self._policy = policy
        self._limits = parts.quarters.limits
        self._now_ms = parts.clock.now_ms
        self._folders = folders
        self._machines = machines
        self._fault = parts.fault
        self._metrics = parts.metrics
        #: What is under way. Of one snapshot, one thing at a time: what is begun later waits.
        self._work: dict[tuple[str, _Kind], _Task] = {}
        #: What is being fetched: place, digest and image.
        self._origins: dict[str, tuple[str, str, str]] = {}
        self._is_closing = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What is under way at the end is taken up by the next daemon's `tidy`."""
        await self._folders.open()
        try:
            yield
        finally:
            self._is_closing = True
            left = set(self._work.values())
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left)

    # -- reading ----------------------------------------------------------------------------------------------------

    async def get(self, snapshot_id: str) -> HostSnapshot:
        """One snapshot. Raises SnapshotNotFound."""
        return await self._ledger.get(parse_snapshot_id(snapshot_id))

    async def owned(self, snapshot_id: str, cluster: str) -> HostSnapshot:
        """One snapshot, for whoever may use it. Raises SnapshotNotFound, WrongCluster."""
        return await self._ledger.owned(parse_snapshot_id(snapshot_id), cluster)

    async def load_all(self) -> list[HostSnapshot]:
        """Every snapshot, oldest first."""
        return await self._ledger.load_all()

    async def of_machine(self, machine_id: str) -> list[HostSnapshot]:
        """Those of one machine, oldest first. Raises MachineNotFound when there is neither."""
        found = await self._ledger.load_all(parse_machine_id(machine_id))
        if not found and machine_id not in self._machines.ids():
            raise MachineNotFound(id=machine_id)
        return found

    def open_packed(self, snapshot: HostSnapshot) -> PackedDisk:
        """A ready snapshot's disk as it is carried away. Blocking. Raises SnapshotNotFound, SnapshotNotReady."""
        check_ready(snapshot)
        return self._folders.open_packed(snapshot)

    # -- orders -----------------------------------------------------------------------------------------------------

    async def take(self, machine_id: str, snapshot_id: str, fence: Fence | None, *, live: bool) -> HostSnapshot:
        """Take a snapshot of a machine's disk and return it when it can be used. Idempotent by its id.

        Carried out even if the caller goes away. Raises NotSupported, MachineNotFound, WrongState, SnapshotExists,
        SnapshotFailed, GuestUnreachable, HostFull, NoSpace, and what is wrong with the fence.
        """
        parse_machine_id(machine_id)
        parse_snapshot_id(snapshot_id)
        check_reserved(fence)
        if live:
            raise NotSupported(feature="a snapshot with memory on this host")
        taken = await self._machines.take_snapshot(machine_id, snapshot_id, fence)
        return taken if taken.phase is SnapshotPhase.READY else await self.seal(taken)

    async def seal(self, snapshot: HostSnapshot) -> HostSnapshot:
        """Make a snapshot whose bytes are there usable. Raises SnapshotFailed, NoSpace; then it is gone.

        SnapshotNotFound or SnapshotNotReady when somebody has deleted it meanwhile.
        """
        return await self._carry_out(snapshot.id, "seal", lambda: self._seal(snapshot))

    async def delete(self, snapshot_id: str, cluster: str) -> None:
        """Free a snapshot, whatever becomes of it; its id is used up. Raises SnapshotNotFound, WrongCluster, NoSpace.

        Machines that began with it go on; what is being made from it either has its disk already, or fails.
        """
        doomed = await self._ledger.begin_delete(parse_snapshot_id(snapshot_id), cluster)
        for (busy_id, kind), task in self._work.items():
            if busy_id == snapshot_id and kind != "remove":
                task.cancel()
        await self._carry_out(snapshot_id, "remove", lambda: self._remove(doomed))

    async def upload(self, snapshot: HostSnapshot, uploads: list[ArtifactUpload]) -> list[UploadedArtifact]:
        """Send a ready snapshot's artefacts to a store, all at the same time.

        Raises SnapshotNotReady, ArtifactNotFound, BadField, AddressRefused, ArtifactRefused, UploadFailed.
        """
        size = disk_artifact(snapshot).size_bytes
        for wanted in uploads:
            if wanted.artifact_id != DISK_ARTIFACT:
                raise ArtifactNotFound(snapshot=snapshot.id, id=wanted.artifact_id[:80])
            check_parts(wanted.parts, size)
        packed = await asyncio.to_thread(self.open_packed, snapshot)
        try:
            done = [upload(packed, wanted.parts, self._policy) for wanted in uploads]
            sent = await gather_all(*done)
        finally:
            packed.close()
        return [
            UploadedArtifact(artifact_id=wanted.artifact_id, completed_parts=parts)
            for wanted, parts in zip(uploads, sent, strict=True)
        ]

    def check_durable(self, durable: DurableSnapshot) -> None:
        """Raise BadField or ArtifactRefused for one that cannot be fetched."""
        find_disk(durable, self._policy)

    async def fetch(self, snapshot_id: str, durable: DurableSnapshot, image_digest: str) -> HostSnapshot:
        """Bring a snapshot that was carried away to this host, and return it when it can be used. Idempotent by its id.

        Raises BadField, HostFull, NoSpace, SnapshotFailed, and what a download raises; then nothing is left.
        SnapshotNotReady while somebody takes or deletes one of this id, or fetches it from elsewhere or with another
        digest, SnapshotNotFound when it was deleted meanwhile.
        """
        disk = find_disk(durable, self._policy)
        draft = HostSnapshot(
            id=parse_snapshot_id(snapshot_id),
            cluster=LOCAL,
            machine_id=parse_machine_id(durable.machine_id) if durable.machine_id else snapshot_id,
            phase=SnapshotPhase.TAKING,
            image_digest=image_digest,
            disk_bytes=0,
            consistency=Consistency.UNKNOWN,
            source=shown(disk.download_url),
            created_at_ms=self._now_ms(),
        )
        origin = (draft.source, disk.sha256_hex.lower(), image_digest)
        if self._origins.get(snapshot_id, origin) != origin:
            raise SnapshotNotReady(id=snapshot_id, state=SnapshotPhase.TAKING.value)
        task = self._begin(snapshot_id, "fetch", lambda: self._fetch(draft, disk))
        self._origins[snapshot_id] = origin
        return await self._outcome(snapshot_id, task)

    async def _fetch(self, draft: HostSnapshot, disk: DurableArtifact) -> HostSnapshot:
        limits = await self._limits()
        begun = await self._ledger.begin_import(draft, limits, 2 * disk.size_bytes)
        if begun.phase is not SnapshotPhase.TAKING:
            return await self._seal(begun)
        try:
            await self._folders.prepare(draft.id)
            packed, target = self._folders.staging(draft.id)
            await fetch_disk(draft.id, disk, packed, self._policy)
            size = await unpack(draft.id, packed, target, self._policy, limits.bookable_disk_bytes)
            await asyncio.to_thread(packed.unlink)
            taken = await self._ledger.finish_import(msgspec.structs.replace(draft, disk_bytes=size))
        except BaseException:
            # Cancelled, too: the daemon ends, or somebody has deleted it.
            with contextlib.suppress(Error, OSError):
                await self._folders.remove(draft.id)
                await self._ledger.forget(draft.id)
            raise
        return await self._seal(taken)

    async def tidy(self) -> None:
        """Take up what is open, and remove the folders of nobody.

        What fails with one is logged, keeps no other from its turn, and is tried again the next time.
        """
        for snapshot in await self._ledger.load_all():
            if snapshot.phase is SnapshotPhase.DAMAGED:
                log.error("record_damaged", snapshot=snapshot.id, machine=snapshot.machine_id)
            if not self._tasks_of(snapshot.id):
                await self._take_up(snapshot)
        for name in await self._folders.names() - {snapshot.id for snapshot in await self._ledger.load_all()}:
            await self._clear(name)
        await self._ledger.purge()

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _take_up(self, snapshot: HostSnapshot) -> None:
        if snapshot.phase is SnapshotPhase.SEALING:
            self._begin(snapshot.id, "seal", lambda: self._seal(snapshot))
            return
        is_doomed = snapshot.phase is SnapshotPhase.DELETING or await self._ledger.is_stray(snapshot.id)
        # Somebody may have come for it while we read.
        if is_doomed and not self._tasks_of(snapshot.id):
            self._begin(snapshot.id, "remove", lambda: self._remove(snapshot))

    async def _clear(self, name: str) -> None:
        try:
            await self._folders.remove(name)
        except OSError as e:
            log.warning("leftover_not_removed", kind=Kind.SNAPSHOT, name=name, problem=str(e))
        else:
            self._metrics.note_removed(Kind.SNAPSHOT)
            log.warning("leftover_removed", kind=Kind.SNAPSHOT, name=name)

    def _tasks_of(self, snapshot_id: str) -> set[_Task]:
        return {task for (busy_id, _kind), task in self._work.items() if busy_id == snapshot_id}

    async def _carry_out(
        self, snapshot_id: str, kind: _Kind, work: Callable[[], Awaitable[HostSnapshot]]
    ) -> HostSnapshot:
        """Do some work to its end, even if the caller goes away. SnapshotNotFound when a delete has cut it short."""
        return await self._outcome(snapshot_id, self._begin(snapshot_id, kind, work))

    async def _outcome(self, snapshot_id: str, task: _Task) -> HostSnapshot:
        await asyncio.wait({task})
        if task.cancelled():
            raise ShuttingDown if self._is_closing else SnapshotNotFound(id=snapshot_id)
        return task.result()

    def _begin(self, snapshot_id: str, kind: _Kind, work: Callable[[], Awaitable[HostSnapshot]]) -> _Task:
        """Begin work on a snapshot, after all other work on it, or join work of the same kind."""
        running = self._work.get((snapshot_id, kind))
        if running is not None:
            return running
        if self._is_closing:
            raise ShuttingDown
        after = _do_after(self._tasks_of(snapshot_id), work)
        task = self._work[snapshot_id, kind] = asyncio.create_task(after, name=f"{kind} snapshot {snapshot_id}")
        task.add_done_callback(lambda done: self._note_end(snapshot_id, kind, done))
        return task

    def _note_end(self, snapshot_id: str, kind: _Kind, task: _Task) -> None:
        del self._work[snapshot_id, kind]
        if kind == "fetch":
            del self._origins[snapshot_id]
        if not task.cancelled() and task.exception() is not None:
            log.warning("snapshot_work_failed", snapshot=snapshot_id, problem=str(task.exception()))

    async def _seal(self, snapshot: HostSnapshot) -> HostSnapshot:
        found = await self._ledger.get(snapshot.id)
        if found.phase is not SnapshotPhase.SEALING:
            # Deleted meanwhile; or somebody else has sealed it.
            check_ready(found)
            return found
        try:
            sealed = await self._ledger.finish_seal(await self._folders.seal(snapshot))
        except SnapshotNotFound:
            raise
        except Error as e:
            # Whoever asked hears of it and asks again, under the same id.
            try:
                await self._folders.remove(snapshot.id)
                await self._ledger.forget(snapshot.id)
            except (Error, OSError) as more:
                e.add_note(f"while cleaning up: {more}")
            raise
        log.info("snapshot_ready", snapshot=snapshot.id, machine=snapshot.machine_id, frozen_ms=snapshot.frozen_ms)
        return sealed

    async def _remove(self, snapshot: HostSnapshot) -> HostSnapshot:
        await self._folders.remove(snapshot.id)
        self._fault.reached("unsnapshot.removed")
        await self._ledger.forget(snapshot.id)
        log.info("snapshot_removed", snapshot=snapshot.id, machine=snapshot.machine_id)
        return snapshot


async def _do_after(earlier: Collection[_Task], work: Callable[[], Awaitable[HostSnapshot]]) -> HostSnapshot:
    """Do some work when earlier tasks have ended, however they did."""
    if earlier:
        await asyncio.wait(earlier)
    return await work()
