"""The store in one SQLite file (or in memory, for development): WAL, synchronous=FULL, one process per file."""

import asyncio
import contextlib
import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

from fusevm.control.store import transactions as tx
from fusevm.control.store.migrate import apply_migrations
from fusevm.control.store.protocol import (
    Claim,
    Committed,
    Due,
    Query,
    RequestKey,
    Reservation,
    StoredFact,
    StoredRequest,
)
from fusevm.control.store.world import read_world
from fusevm.control.store.writer import Writer, translate
from fusevm.core.invariants import World
from fusevm.core.lifecycle import Step
from fusevm.core.policy import Policy
from fusevm.model.environment import Environment
from fusevm.model.errors import BadSetting, DataRootInUse, StoreFull
from fusevm.model.host import Host

T = TypeVar("T")
MEMORY = ":memory:"
READERS = 2
_BUSY_MS = 5_000


class FileLock:
    """An advisory lock that says who holds it. Ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        """Raises DataRootInUse."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise DataRootInUse(path=str(path), pid=holder or "unknown") from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have it."""
        os.close(self._fd)


class SqliteStore:
    """Implements `protocol.Store`. Database time is `now_ms`: the database lives in this process."""

    def __init__(self, path: str, policy: Policy, now_ms: Callable[[], int]) -> None:
        self.cluster = ""
        self.listener: Callable[[Committed], None] = lambda _committed: None
        self._path = path
        self._policy = policy
        self._now_ms = now_ms
        self._lock: FileLock | None = None
        self._writer = Writer(self._connect_writer)
        self._readers: ThreadPoolExecutor | None = None
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []

    @classmethod
    async def open(cls, path: str, policy: Policy, now_ms: Callable[[], int]) -> Self:
        """Lock the file, update its schema, start the threads. Raises DataRootInUse, BadSetting, StoreFull."""
        store = cls(path, policy, now_ms)
        try:
            if path != MEMORY:
                store._lock = FileLock(Path(path + ".lock"))
                _make_private(path)
            await store._writer.open()
            if path != MEMORY:
                store._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
            store.cluster = await store._write(store._prepare)
        except (sqlite3.Error, OSError) as error:
            await store.close()
            full = translate(error) if isinstance(error, sqlite3.Error) else error
            raise (
                full if isinstance(full, StoreFull) else BadSetting(setting="database", problem=f"{path}: {error}")
            ) from error
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Finish what is queued and close. Idempotent."""
        await self._writer.close()
        if self._readers is not None:
            self._readers.shutdown()
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # -- environments ---------------------------------------------------------------------------------------------

    async def create(
        self, step: Step, reservation: Reservation, claim: Claim | None, key: RequestKey | None = None
    ) -> Environment:
        committed = await self._writer.run(
            lambda db: tx.create(db, step, reservation, claim, key, policy=self._policy, now_ms=self._now_ms()),
            after=self._tell,
        )
        return committed.record

    async def commit(self, uid: str, revision: int, step: Step, claim: Claim | None) -> Environment:
        committed = await self._writer.run(
            lambda db: tx.commit(db, uid, revision, step, claim, policy=self._policy, now_ms=self._now_ms()),
            after=self._tell,
        )
        return committed.record

    async def get(self, uid: str) -> Environment | None:
        return await self._read(lambda db: tx.get(db, uid))

    async def live(self, task_id: str) -> Environment | None:
        return await self._read(lambda db: tx.get_live(db, task_id))

    async def last_ended(self, task_id: str) -> Environment | None:
        return await self._read(lambda db: tx.get_last_ended(db, task_id))

    async def list_page(self, query: Query) -> list[Environment]:
        return await self._read(lambda db: tx.list_page(db, query))

    async def count_live(self) -> dict[str, int]:
        return await self._read(lambda db: dict(tx.run(db, "count_live").fetchall()))

    # -- leases ---------------------------------------------------------------------------------------------------

    async def due(self, limit: int) -> Due:
        now_ms = self._now_ms()

        def read(db: sqlite3.Connection) -> Due:
            actions = tuple((uid, seq) for uid, seq in tx.run(db, "due_actions", now_ms, limit))
            return Due(actions, tuple(row[0] for row in tx.run(db, "due_deadlines", now_ms, limit)))

        return await self._read(read)

    async def acquire(self, uid: str, seq: int, claim: Claim) -> Environment | None:
        now_ms = self._now_ms()
        until_ms = now_ms + claim.lease_ms
        return await self._write(
            lambda db: tx.decode_row(tx.one(db, "acquire_lease", uid, seq, claim.owner, until_ms, now_ms))
        )

    async def renew(self, held: Sequence[tuple[str, int]], claim: Claim) -> set[tuple[str, int]]:
        until_ms = self._now_ms() + claim.lease_ms

        def write(db: sqlite3.Connection) -> set[tuple[str, int]]:
            return {
                (uid, seq)
                for uid, seq in held
                if tx.one(db, "renew_lease", uid, seq, claim.owner, until_ms) is not None
            }

        return await self._write(write)

    async def release(self, owner: str, held: Sequence[tuple[str, int]] | None = None) -> None:
        def write(db: sqlite3.Connection) -> None:
            if held is None:
                tx.run(db, "release_leases", owner)
                tx.run(db, "release_hosts", owner)
            for uid, seq in held or ():
                tx.run(db, "release_lease", uid, seq, owner)

        await self._write(write)

    # -- facts ----------------------------------------------------------------------------------------------------

    async def facts_of(self, uid: str, after_seq: int, limit: int) -> list[StoredFact]:
        return await self._read(lambda db: tx.facts(db, "events_of", uid, after_seq, limit))

    async def facts_after(self, position: int, limit: int) -> list[StoredFact]:
        return await self._read(lambda db: tx.facts(db, "events_after", position, limit))

    async def position_of(self, uid: str, seq: int) -> int | None:
        row = await self._read(lambda db: tx.one(db, "event_position", uid, seq))
        return int(row[0]) if row is not None else None

    async def last_position(self) -> int:
        return int((await self._read(lambda db: tx.one(db, "last_position")))[0])

    # -- hosts ----------------------------------------------------------------------------------------------------

    async def hosts(self) -> list[Host]:
        return await self._read(tx.list_hosts)

    async def host(self, id: str) -> Host | None:  # noqa: A002 - the record's field
        return await self._read(lambda db: tx.get_host(db, id))

    async def save_host(self, host: Host) -> Host:
        return await self._write(lambda db: tx.save_host(db, host))

    async def touch_host(self, id: str, last_seen_ms: int) -> None:  # noqa: A002
        await self._write(lambda db: tx.run(db, "touch_host", id, last_seen_ms))

    async def on_host(self, host_id: str) -> list[Environment]:
        return await self._read(lambda db: tx.on_host(db, host_id))

    async def acquire_host(self, id: str, claim: Claim) -> bool:  # noqa: A002
        now_ms = self._now_ms()
        values = (id, claim.owner, now_ms + claim.lease_ms, now_ms)
        return await self._write(lambda db: tx.one(db, "acquire_host", *values) is not None)

    # -- requests, secrets, upkeep --------------------------------------------------------------------------------

    async def claim_request(self, key: RequestKey, keep_ms: int) -> StoredRequest | None:
        return await self._write(lambda db: tx.claim_request(db, key, self._now_ms(), keep_ms))

    async def finish_request(self, key: RequestKey, status: int, body: str) -> None:
        await self._write(lambda db: tx.run(db, "finish_request", key.tenant, key.route, key.key, status, body))

    async def forget_request(self, key: RequestKey) -> None:
        await self._write(lambda db: tx.run(db, "forget_request", key.tenant, key.route, key.key))

    async def put_secret(self, owner: str, name: str, sealed: str) -> None:
        await self._write(lambda db: tx.run(db, "put_secret", owner, name, sealed, self._now_ms()))

    async def get_secret(self, owner: str, name: str) -> str | None:
        row = await self._read(lambda db: tx.one(db, "get_secret", owner, name))
        return str(row[0]) if row is not None else None

    async def ping(self) -> None:
        await self._read(lambda db: tx.one(db, "last_position"))

    async def world(self) -> World:
        return await self._read(read_world)

    async def purge(self, keep_ms: int, limit: int) -> int:
        now_ms = self._now_ms()
        return await self._write(lambda db: tx.purge(db, now_ms - keep_ms, now_ms, limit))

    # -- connections ----------------------------------------------------------------------------------------------

    def _tell(self, committed: Committed) -> None:
        self.listener(committed)

    async def _write(self, job: Callable[[sqlite3.Connection], T]) -> T:
        return await self._writer.run(job)

    async def _read(self, job: Callable[[sqlite3.Connection], T]) -> T:
        if self._readers is None:
            return await self._writer.read(job)
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._on_reader, job)

    def _on_reader(self, job: Callable[[sqlite3.Connection], T]) -> T:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        try:
            if connection is None:
                connection = _connect(self._path)
                connection.execute("pragma query_only = on")
                self._local.connection = connection
                self._connections.append(connection)
            return job(connection)
        except sqlite3.Error as error:
            raise translate(error) from error

    def _connect_writer(self) -> sqlite3.Connection:
        connection = _connect(self._path)
        with contextlib.closing(connection.execute("pragma journal_mode = wal")) as cursor:
            cursor.fetchall()
        connection.execute("pragma synchronous = full")
        apply_migrations(connection, self._now_ms())
        return connection

    def _prepare(self, db: sqlite3.Connection) -> str:
        tx.run(db, "put_meta", "cluster", "c-" + secrets.token_hex(16))
        # One process per file: whoever held a lease is dead, and its work need not wait until that runs out.
        tx.run(db, "end_action_leases")
        tx.run(db, "end_host_leases")
        tx.refresh_deadlines(db, self._policy)
        return str(tx.one(db, "get_meta", "cluster")[0])


def _make_private(path: str) -> None:
    """Make the file, if it is new, for its owner alone; SQLite gives its companions (-wal, -shm) the same mode."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=_BUSY_MS / 1000, isolation_level=None, cached_statements=256, check_same_thread=False
    )
    connection.execute("pragma foreign_keys = on")
    return connection
