"""What a machine's task does for snapshots: copy its disk at one moment, put another disk in its place.

The steps of a take:  intent, copied once while the machine runs, frozen, copied again, thawed, `copied` in the journal.
The steps of a restore:  intent, the new disk staged, `committed`; then the VMM is ended, the disks are swapped, and
the machine boots. Before the commit it is undone, after it finished, by whichever daemon.

Owns: the order of these steps. Must not: own a VMM, or decide what becomes of the machine's phase.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import structlog

from fusevm.host.agent import Guest, ask_health, quiesce, thaw
from fusevm.host.mailbox import RestoreDisk, TakeSnapshot
from fusevm.host.snapshots.ledger import Ledger
from fusevm.host.snapshots.record import Consistency, HostSnapshot, SnapshotPhase
from fusevm.host.surroundings import Surroundings
from fusevm.host.tasks import CLEAN_UP_TIMEOUT_S
from fusevm.host.writer import Superseded
from fusevm.model.errors import Error, GuestUnreachable, NotSupported, RouteNotFound, SnapshotFailed
from fusevm.model.machine import Machine

log = structlog.get_logger()

#: Longest that writes are held: what changed since the first pass is copied in this time. The agent lets go by itself.
FREEZE_LIMIT_S = 20.0
#: Of that, for the way there and back.
_MARGIN_S = 2.0
#: How long the agent may take to write back what is dirty, and to answer at all.
_QUIESCE_TIMEOUT_S = 120.0
_THAW_TIMEOUT_S = 10.0
#: A disk of many GiB, at the pace of a slow disk.
_COPY_TIMEOUT_S = 3600.0


class DiskWork:
    """The steps, for one daemon."""

    def __init__(self, parts: Surroundings) -> None:
        self._parts = parts

    @property
    def _ledger(self) -> Ledger:
        return self._parts.ledger

    # -- taking -----------------------------------------------------------------------------------------------------

    async def take(
        self, machine: Machine, guest: Guest | None, order: TakeSnapshot, on_commit: Callable[[Machine], None]
    ) -> HostSnapshot:
        """Copy a machine's disk; on failure nothing is left, and the machine writes as before. Idempotent by its id.

        `guest` is None for a machine that rests. Raises SnapshotFailed, NotSupported (its agent is too old),
        GuestUnreachable, NoSpace, Superseded, and what the ledger refuses.
        """
        parts = self._parts
        limits = await parts.quarters.limits()
        needed = await parts.disks.needed_bytes(machine)
        snapshot = await self._ledger.begin_take(machine.id, order.snapshot_id, order.fence, limits, needed, on_commit)
        if snapshot.phase is not SnapshotPhase.TAKING:
            return snapshot
        try:
            async with asyncio.timeout(_COPY_TIMEOUT_S):
                return await self._ledger.finish_take(await self._copy(machine, guest, snapshot))
        except TimeoutError as e:
            failure = SnapshotFailed(id=snapshot.id, problem=f"it took longer than {_COPY_TIMEOUT_S:.0f} s")
            await self._undo(machine, snapshot, blame=failure)
            raise failure from e
        except BaseException as e:
            await self._undo(machine, snapshot, blame=e)
            raise

    async def undo_takes(self, machine: Machine) -> None:
        """Take back what an earlier daemon was at when it died. The agent's own limit ends a freeze of that time."""
        begun = await self._ledger.taking(machine.id)
        for snapshot in begun:
            await self._parts.snapshot_folders.remove(snapshot.id)
        await self._ledger.undo_takes(machine.id, *(snapshot.id for snapshot in begun))

    async def let_write(self, machine: Machine, guest: Guest) -> None:
        """End a freeze that an earlier daemon may have left, before its limit does. Raises nothing."""
        await self._thaw(machine, guest)

    async def _copy(self, machine: Machine, guest: Guest | None, snapshot: HostSnapshot) -> HostSnapshot:
        parts = self._parts
        disk = await parts.disks.image(machine)
        folders = parts.snapshot_folders
        if snapshot.consistency is Consistency.STOPPED:
            shares = await folders.copy(snapshot.id, disk)
            parts.fault.reached("snapshot.stopped")
            return msgspec.structs.replace(snapshot, disk_bytes=disk.size_bytes, is_reflink=shares)
        if guest is None:
            raise GuestUnreachable(id=machine.id, problem="nothing is known of its VMM")
        version = (await ask_health(guest)).version
        await folders.copy(snapshot.id, disk)
        parts.fault.reached("freeze.before")
        began = time.perf_counter()
        async with self._frozen(machine, guest, snapshot.id):
            parts.fault.reached("freeze.held")
            shares = await folders.copy(snapshot.id, disk, FREEZE_LIMIT_S - _MARGIN_S)
            parts.fault.reached("freeze.copied")
        parts.fault.reached("freeze.thawed")
        return msgspec.structs.replace(
            snapshot,
            disk_bytes=disk.size_bytes,
            is_reflink=shares,
            agent_version=version,
            frozen_ms=round((time.perf_counter() - began) * 1000, 1),
        )

    @asynccontextmanager
    async def _frozen(self, machine: Machine, guest: Guest, snapshot_id: str) -> AsyncIterator[None]:
        """Hold the guest's writes. Raises SnapshotFailed at the end when they were not held all the time."""
        try:
            async with asyncio.timeout(_QUIESCE_TIMEOUT_S):
                await quiesce(guest, FREEZE_LIMIT_S)
        except RouteNotFound as e:
            await self._thaw(machine, guest)
            feature = f"a snapshot of machine {machine.id} while it runs (its agent is too old; stop it first)"
            raise NotSupported(feature=feature) from e
        except (TimeoutError, ConnectionError) as e:
            await self._thaw(machine, guest)
            raise GuestUnreachable(id=machine.id, problem="its agent could not write everything back in time") from e
        except BaseException:
            await self._thaw(machine, guest)
            raise
        try:
            yield
        except BaseException:
            await self._thaw(machine, guest)
            raise
        if not await self._thaw(machine, guest):
            problem = "the machine went on writing before the copy was complete"
            raise SnapshotFailed(id=snapshot_id, problem=problem)

    async def _thaw(self, machine: Machine, guest: Guest) -> bool:
        """Let the guest write; False when it wrote before, or does not say. Whatever fails, the agent's limit holds."""
        try:
            async with asyncio.timeout(_THAW_TIMEOUT_S):
                return await thaw(guest)
        except (Error, OSError, TimeoutError) as e:
            log.warning("not_thawed", machine=machine.id, problem=str(e) or "no answer in time")
            return False

    async def _undo(self, machine: Machine, snapshot: HostSnapshot, blame: BaseException) -> None:
        """Leave nothing; what cannot be removed now is found again by the sweep."""
        try:
            async with asyncio.timeout(CLEAN_UP_TIMEOUT_S):
                await self._parts.snapshot_folders.remove(snapshot.id)
                await self._ledger.undo_takes(machine.id, snapshot.id)
        except (Error, OSError, TimeoutError) as e:
            blame.add_note(f"while cleaning up: {e or 'it took too long'}")

    # -- putting back -----------------------------------------------------------------------------------------------

    async def begin_restore(
        self, machine: Machine, order: RestoreDisk, on_commit: Callable[[Machine], None]
    ) -> Machine | None:
        """Stage the snapshot's disk and commit to it; None when this very order was carried out before.

        On failure the machine is as it was. Raises what the ledger refuses, NoSpace, SnapshotNotFound, Superseded.
        """
        parts = self._parts
        limits = await parts.quarters.limits()
        deadline_ms = parts.clock.now_ms() + order.timeout_ms
        needed = await parts.disks.seed_bytes(order.snapshot_id)
        begun = await self._ledger.begin_restore(
            machine.id, order.snapshot_id, order.fence, limits, needed, deadline_ms, on_commit
        )
        if begun.next_seed is None:
            return None
        try:
            await parts.disks.stage(begun, begun.next_seed)
            parts.fault.reached("restore.staged")
            nonce, numbers = parts.clock.entropy(16).hex(), parts.quarters.numbers()
            return await self._ledger.commit_restore(begun, nonce, numbers, on_commit)
        except Superseded:
            raise
        except BaseException as e:
            await self._undo_restore(begun, on_commit, blame=e)
            raise

    async def undo_restore(self, machine: Machine, on_commit: Callable[[Machine], None]) -> None:
        """Take back a restore that was not committed. Idempotent but for Superseded."""
        await self._parts.disks.unstage(machine)
        await self._ledger.undo_restore(machine, on_commit)

    async def put_in_place(self, machine: Machine) -> None:
        """The VMM has ended: give up what its run occupied, and swap the disks. Can be repeated."""
        parts = self._parts
        await parts.quarters.vacate(machine, keep_disk=True)
        parts.fault.reached("restore.vacated")
        await parts.disks.swap(machine)
        parts.fault.reached("restore.swapped")

    async def _undo_restore(self, machine: Machine, on_commit: Callable[[Machine], None], blame: BaseException) -> None:
        try:
            async with asyncio.timeout(CLEAN_UP_TIMEOUT_S):
                await self.undo_restore(machine, on_commit)
        except Superseded:
            return
        except (Error, OSError, TimeoutError) as e:
            blame.add_note(f"while cleaning up: {e or 'it took too long'}")
