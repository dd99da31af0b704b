"""The host daemon's memory: machines, intents, reserved numbers and fences, in one SQLite file.

Everything is decided inside a transaction: whether an order is current, whether there is room, which numbers are
free; and the intent is on disk before the first side effect. `Journal` is the only writer (a lock file keeps a
second daemon away). Times come from the caller's clock.

Owns: `journal.db` and `lock` in the data directory. Must not: touch anything else in the world.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec

from fusevm.host.admission import Limits, Size, Usage, check_admission, check_room, resized
from fusevm.host.clock import read_moment
from fusevm.host.faults import Fault
from fusevm.host.fencing import LOCAL, check_cluster, check_order, check_owner
from fusevm.host.port_rows import publish_all
from fusevm.host.rows import (
    SQL,
    Draft,
    Entry,
    Kind,
    Numbers,
    Operation,
    check_complete,
    check_repetition,
    draft_machine,
    expect_one,
    insert_machine,
    load_entries,
    load_machine,
    load_meta,
    load_operation,
    load_seen,
    load_usage,
    release_slot,
    render_state,
    reserve_numbers,
    save_fence,
    save_intent,
    save_machine,
)
from fusevm.host.sql import load_migrations
from fusevm.host.writer import DiskFull, Superseded, Writer
from fusevm.model.errors import (
    DataRootInUse,
    Internal,
    MachineExists,
    MachineNotFound,
    NoSpace,
    SchemaTooNew,
    WrongState,
)
from fusevm.model.fencing import Seen, check_new, check_valid
from fusevm.model.machine import Fence, Machine, Moment, Phase

T = TypeVar("T")
Clock: TypeAlias = Callable[[], int]

#: Given up when a delete finds the disk full: deleting is what makes room.
_BALLAST_BYTES = 8 << 20
_BUSY_TIMEOUT_MS = 5_000


class Journal:
    """The open journal. All methods are safe to call at the same time; writes share commits."""

    def __init__(self, data_root: Path, lock_fd: int, fault: Fault, clock: Clock, moment: Callable[[], Moment]) -> None:
        self.path = data_root / "journal.db"
        self._ballast = data_root / "ballast"
        self._lock_fd = lock_fd
        self._clock = clock
        self._moment = moment
        connection = _connect(self.path)
        try:
            _migrate(connection, self.path, clock())
            self._writer = Writer(connection, fault)
        except BaseException:
            connection.close()
            raise
        self._reader = _connect(self.path)
        self._reader.execute("PRAGMA query_only = ON")
        self._reading = threading.Lock()

    @classmethod
    async def open(
        cls, data_root: Path, fault: Fault, clock: Clock, moment: Callable[[], Moment] = read_moment
    ) -> Journal:
        """Open, or make, the journal of a data directory; orders are valid or too late by `moment`.

        Raises DataRootInUse, SchemaTooNew, Internal (damaged).
        """
        lock_fd = await asyncio.to_thread(lock_directory, data_root)
        try:
            journal = await asyncio.to_thread(cls, data_root, lock_fd, fault, clock, moment)
        except sqlite3.DatabaseError as e:
            os.close(lock_fd)
            raise Internal(problem=f"the journal {data_root / 'journal.db'} cannot be read: {e}") from e
        except BaseException:
            os.close(lock_fd)
            raise
        await journal.ensure_ballast()
        return journal

    async def close(self) -> None:
        """Finish the queued writes and let go of the files."""
        await self._writer.close()
        self._reader.close()
        os.close(self._lock_fd)

    # -- orders: everything up to the intent, in one transaction ----------------------------------------------------

    async def begin_create(
        self, draft: Draft, fence: Fence | None, limits: Limits, numbers: Numbers, on_commit: Callable[[Machine], None]
    ) -> Machine:
        """Write the intent to make a machine, or return the machine when the order is a repetition.

        A repetition is answered even when it is too late: it does nothing. Raises WrongCluster, StaleIncarnation,
        StaleAction, OrderExpired, MachineExists, HostFull, NoSpace; then nothing has changed.
        """

        def transact(db: sqlite3.Connection) -> Machine:
            order = fence or Fence(cluster=LOCAL, uid=draft.id, incarnation=0, action_seq=0)
            self._bind(db, order)
            seen = load_seen(db, order)
            existing = load_machine(db, draft.id)
            if existing is not None:
                is_local = fence is None and existing.fence.cluster == LOCAL
                repeated = check_repetition(existing, draft, existing.fence if is_local else order)
                return repeated if is_local else self._note(db, repeated, seen, order)
            if fence is None:
                order = msgspec.structs.replace(order, incarnation=seen.next_local)
            check_new(seen, order)
            check_valid(order, self._moment())
            order = msgspec.structs.replace(order, valid_until=None)
            other = db.execute(SQL["get_incarnation"], msgspec.structs.asdict(order)).fetchone()
            if other is not None:
                raise MachineExists(id=other[0])
            check_admission(load_usage(db), limits, draft.spec, is_new=True)
            check_room(limits, draft.seed_bytes)
            machine = draft_machine(draft, order, self._clock())
            insert_machine(db, machine)
            machine = publish_all(db, reserve_numbers(db, machine, numbers), numbers, self._clock())
            machine = save_machine(db, machine, self._clock())
            save_intent(db, machine.id, "create", self._clock(), draft.deadline_ms)
            save_fence(db, order, seen.with_order(order), self._clock())
            return machine

        return await self.write(transact, point="create.intent", on_commit=on_commit)

    async def begin_start(
        self,
        machine_id: str,
        fence: Fence | None,
        limits: Limits,
        numbers: Numbers,
        nonce: str,
        deadline_ms: int,
        on_commit: Callable[[Machine], None],
    ) -> Machine:
        """Write the intent to start a stopped machine; one in another phase is returned unchanged.

        Raises MachineNotFound, WrongCluster, MachineExists, StaleIncarnation, StaleAction, OrderExpired, HostFull,
        NoSpace, WrongState while another operation of the machine is open.
        """

        def transact(db: sqlite3.Connection) -> Machine:
            machine = self.take_next(db, machine_id, fence)
            if machine.phase is not Phase.STOPPED:
                return machine
            check_admission(load_usage(db, exclude=machine_id), limits, machine.spec, is_new=False)
            changed = msgspec.structs.replace(
                machine, phase=Phase.CREATING, nonce=nonce, generation=machine.generation + 1, error="", vmm=None
            )
            machine = reserve_numbers(db, save_machine(db, changed, self._clock()), numbers)
            save_intent(db, machine.id, "start", self._clock(), deadline_ms)
            return machine

        return await self.write(transact, point="start.intent", on_commit=on_commit)

    async def begin_stop(self, machine_id: str, fence: Fence | None, on_commit: Callable[[Machine], None]) -> Machine:
        """Write the intent to stop a running machine; one in another phase is returned unchanged.

        Raises what begin_start raises, but for HostFull.
        """

        def transact(db: sqlite3.Connection) -> Machine:
            machine = self.take_next(db, machine_id, fence)
            if machine.phase in (Phase.RUNNING, Phase.PAUSED):
                save_intent(db, machine.id, "stop", self._clock())
            return machine

        return await self.write(transact, point="stop.intent", on_commit=on_commit)

    async def begin_resize(
        self,
        machine_id: str,
        fence: Fence | None,
        limits: Limits,
        size: Size,
        on_commit: Callable[[Machine], None],
    ) -> tuple[Machine, bool]:
        """Write the new size into the record, and the intent to stop the machine and make its disk so large.

        Returns the record, and whether there is anything to do. Everything is checked before: BadField for a disk that
        would shrink, HostFull, WrongState for one that neither runs nor is stopped; and what begin_start raises.
        """

        def transact(db: sqlite3.Connection) -> tuple[Machine, bool]:
            machine = self.take_next(db, machine_id, fence)
            if machine.phase not in (Phase.RUNNING, Phase.PAUSED, Phase.STOPPED):
                raise WrongState(id=machine.id, state=machine.phase.value, wanted="it must be running or stopped")
            spec = resized(machine.spec, size, load_usage(db, exclude=machine_id), limits)
            if spec == machine.spec:
                return machine, False
            machine = save_machine(db, msgspec.structs.replace(machine, spec=spec), self._clock())
            save_intent(db, machine.id, "resize", self._clock())
            return machine, True

        return await self.write(transact, point="resize.intent", on_commit=lambda done: on_commit(done[0]))

    async def begin_visit(
        self, machine_id: str, limits: Limits, nonce: str, on_commit: Callable[[Machine], None]
    ) -> Machine:
        """Write the intent to open the disk of a machine at rest, whose memory is booked for as long.

        Raises MachineNotFound, WrongState for one that does not rest or has an operation open, HostFull, NoSpace.
        """

        def transact(db: sqlite3.Connection) -> Machine:
            machine = load_machine(db, machine_id)
            if machine is None or machine.phase is Phase.DELETING:
                raise MachineNotFound(id=machine_id)
            if machine.phase not in (Phase.STOPPED, Phase.FAILED):
                raise WrongState(id=machine_id, state=machine.phase.value, wanted="it has changed; try again")
            check_complete(db, machine)
            check_admission(load_usage(db, exclude=machine_id), limits, machine.spec, is_new=False)
            machine = save_machine(db, msgspec.structs.replace(machine, nonce=nonce), self._clock())
            save_intent(db, machine.id, "visit", self._clock())
            return machine

        return await self.write(transact, point="visit.intent", on_commit=on_commit)

    async def begin_delete(
        self, machine_id: str, fence: Fence | None, on_commit: Callable[[Machine | None], None]
    ) -> Machine | None:
        """Write the tombstone, and the intent to delete if there is a machine; replaces any other intent.

        Idempotent. Raises WrongCluster, MachineExists, StaleIncarnation, OrderExpired, NoSpace.
        """

        def transact(db: sqlite3.Connection) -> Machine | None:
            if fence is not None:
                check_valid(fence, self._moment())
                self._bind(db, fence)
            machine = load_machine(db, machine_id)
            if machine is None:
                if fence is not None:
                    save_fence(db, fence, load_seen(db, fence).with_deletion(fence), self._clock())
                return None
            check_owner(machine, fence)
            order = fence or machine.fence
            # The tombstone is of the machine: a newer incarnation may order the end of an older one.
            seen = load_seen(db, order).with_order(order).with_deletion(machine.fence)
            save_fence(db, order, seen, self._clock())
            if machine.phase is not Phase.DELETING:
                machine = save_machine(db, msgspec.structs.replace(machine, phase=Phase.DELETING), self._clock())
            save_intent(db, machine.id, "delete", self._clock())
            return machine

        return await self.write(transact, point="delete.intent", on_commit=on_commit, is_urgent=True)

    async def note_order(self, machine_id: str, fence: Fence, on_commit: Callable[[Machine], None]) -> Machine:
        """Remember an order that is for the machine's guest: nothing older is taken up from then on.

        Raises MachineNotFound, MachineExists, WrongCluster, StaleIncarnation, StaleAction, OrderExpired, NoSpace.
        """

        def transact(db: sqlite3.Connection) -> Machine:
            return self.take_order(db, machine_id, fence)

        return await self.write(transact, point="guest.order", on_commit=on_commit)

    async def rewire(
        self,
        machine_id: str,
        fence: Fence | None,
        change: Callable[[sqlite3.Connection, Machine], Machine],
        point: str,
        on_commit: Callable[[Machine], None],
    ) -> Machine:
        """Change what a machine's record says about its network, and the rows that belong to it.

        Raises what begin_start raises, but for HostFull, and what the change raises.
        """

        def transact(db: sqlite3.Connection) -> Machine:
            machine = self.take_next(db, machine_id, fence)
            changed = change(db, machine)
            return machine if changed == machine else save_machine(db, changed, self._clock())

        return await self.write(transact, point=point, on_commit=on_commit)

    # -- progress ---------------------------------------------------------------------------------------------------

    async def mark(self, machine: Machine, kind: Kind, step: str) -> Machine:
        """Save the record and how far its operation came. Raises Superseded."""

        def transact(db: sqlite3.Connection) -> Machine:
            marked = db.execute(SQL["mark_operation"], {"id": machine.id, "kind": kind, "step": step})
            expect_one(marked)
            return save_machine(db, machine, self._clock())

        return await self.write(transact, point=f"{kind}.{step}")

    async def finish(self, machine: Machine, kind: Kind, step: str, on_commit: Callable[[Machine], None]) -> Machine:
        """Save the final record of an operation and clear the intent; a machine at rest gives back its slot.

        Raises Superseded.
        """

        def transact(db: sqlite3.Connection) -> Machine:
            expect_one(db.execute(SQL["clear_operation"], {"id": machine.id, "kind": kind}))
            return save_machine(db, release_slot(db, machine), self._clock())

        return await self.write(transact, point=f"{kind}.{step}", on_commit=on_commit)

    async def forget(self, machine_id: str, kind: Kind, step: str, on_commit: Callable[[None], None]) -> None:
        """Remove a machine whose create was undone, or whose delete is complete. Raises Superseded."""

        def transact(db: sqlite3.Connection) -> None:
            expect_one(db.execute(SQL["clear_operation"], {"id": machine_id, "kind": kind}))
            db.execute(SQL["delete_machine"], {"id": machine_id})

        await self.write(transact, point=f"{kind}.{step}", on_commit=on_commit, is_urgent=True)

    async def observe(self, machine: Machine, step: str, on_commit: Callable[[Machine], None]) -> Machine:
        """Save what became of a machine without an order: `seen` (its VMM has ended), `vacated` (its numbers are free).

        Raises Superseded when an operation is under way: that one will find out itself.
        """

        def transact(db: sqlite3.Connection) -> Machine:
            if load_operation(db, machine.id) is not None:
                raise Superseded
            return save_machine(db, machine if step == "seen" else release_slot(db, machine), self._clock())

        return await self.write(transact, point=f"exit.{step}", on_commit=on_commit)

    async def purge(self) -> int:
        """Remove expired fences; return how many."""
        moment = {"now_ms": self._clock()}
        return await self.write(lambda db: db.execute(SQL["purge_fences"], moment).rowcount, point="purge")

    # -- reading ----------------------------------------------------------------------------------------------------

    async def entries(self) -> list[Entry]:
        """Return every machine; one whose record is damaged comes as failed, with what the columns know."""
        return await self.read(load_entries)

    async def operation(self, machine_id: str) -> Operation | None:
        """Return what is not complete with a machine."""
        return await self.read(lambda db: load_operation(db, machine_id))

    async def snapshot_images(self) -> list[tuple[str, str]]:
        """Return the digest of the image that each snapshot needs, and the snapshot's id."""
        return await self.read(lambda db: db.execute(SQL["snapshot_images"]).fetchall())

    async def usage(self) -> Usage:
        """Return what is booked."""
        return await self.read(load_usage)

    async def cluster(self) -> str:
        """Return whose host this is; empty until the first fenced order."""
        return await self.read(lambda db: load_meta(db, "cluster"))

    async def tombstones(self) -> int:
        """Count the fences of deleted machines."""
        return await self.read(
            lambda db: int(db.execute(SQL["count_tombstones"], {"now_ms": self._clock()}).fetchone()[0])
        )

    async def render_state(self) -> dict[str, Any]:
        """Return the whole journal as JSON values, but for the machines' nonces."""
        return await self.read(render_state)

    # -- inside -----------------------------------------------------------------------------------------------------

    async def ensure_ballast(self) -> None:
        """Make the ballast (again), while there is plenty of room."""
        await asyncio.to_thread(_ensure_ballast, self._ballast)

    async def write(
        self,
        transact: Callable[[sqlite3.Connection], T],
        *,
        point: str,
        on_commit: Callable[[T], None] = lambda _value: None,
        is_urgent: bool = False,
    ) -> T:
        try:
            return await self._writer.write(transact, point=point, on_commit=on_commit)
        except DiskFull as e:
            if not is_urgent or not await asyncio.to_thread(_drop, self._ballast):
                raise self._no_space() from e
        try:
            return await self._writer.write(transact, point=point, on_commit=on_commit)
        except DiskFull as e:
            raise self._no_space() from e

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        def read() -> T:
            with self._reading:
                return query(self._reader)

        return await asyncio.to_thread(read)

    def _no_space(self) -> NoSpace:
        free = shutil.disk_usage(self.path.parent).free
        return NoSpace(path=str(self.path.parent), needed=_BALLAST_BYTES, free=free)

    def _bind(self, db: sqlite3.Connection, order: Fence) -> None:
        """The first fenced order decides whose host this is."""
        bound = load_meta(db, "cluster")
        check_cluster(bound, order)
        if not bound and order.cluster != LOCAL:
            db.execute(SQL["set_meta"], {"key": "cluster", "value": order.cluster})

    def take_order(self, db: sqlite3.Connection, machine_id: str, fence: Fence | None) -> Machine:
        """The machine that an order means, with the order noted."""
        machine = load_machine(db, machine_id)
        if machine is None or machine.phase is Phase.DELETING:
            raise MachineNotFound(id=machine_id)
        seen = load_seen(db, machine.fence)
        check_order(machine, seen, fence)
        if fence is None:
            return machine
        check_valid(fence, self._moment())
        return self._note(db, machine, seen, fence)

    def take_next(self, db: sqlite3.Connection, machine_id: str, fence: Fence | None) -> Machine:
        """The same for an order that changes the machine: what was begun before must be complete. Raises WrongState."""
        machine = self.take_order(db, machine_id, fence)
        check_complete(db, machine)
        return machine

    def _note(self, db: sqlite3.Connection, machine: Machine, seen: Seen, fence: Fence) -> Machine:
        """Remember an order's number; the record as it then is."""
        if fence.action_seq <= min(seen.action_seq, machine.fence.action_seq):
            return machine
        save_fence(db, fence, seen.with_order(fence), self._clock())
        newest = msgspec.structs.replace(machine.fence, action_seq=max(seen.action_seq, fence.action_seq))
        return save_machine(db, msgspec.structs.replace(machine, fence=newest), self._clock())


# -- files -----------------------------------------------------------------------------------------------------------


def lock_directory(directory: Path) -> int:
    """Make a private directory and lock it; return the descriptor that holds the lock. Raises DataRootInUse.

    The lock goes with the process, however it ends.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise DataRootInUse(path=str(directory), pid=holder) from e
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _connect(path: Path) -> sqlite3.Connection:
    umask = os.umask(0o077)
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    finally:
        os.umask(umask)
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _migrate(db: sqlite3.Connection, path: Path, now_ms: int) -> None:
    scripts = load_migrations()
    found = int(db.execute("PRAGMA user_version").fetchone()[0])
    if found > len(scripts):
        raise SchemaTooNew(path=str(path), found=found, known=len(scripts))
    for number, script in enumerate(scripts[found:], start=found + 1):
        # One script is one transaction: a crash leaves the old schema.
        db.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")
    if not load_meta(db, "created_at_ms"):
        db.execute(SQL["set_meta"], {"key": "created_at_ms", "value": str(now_ms)})


def _ensure_ballast(path: Path) -> None:
    if path.exists() or shutil.disk_usage(path.parent).free < 16 * _BALLAST_BYTES:
        return
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):
            os.posix_fallocate(fd, 0, _BALLAST_BYTES)
    finally:
        os.close(fd)


def _drop(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
