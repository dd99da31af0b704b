"""`fuse db`: check finds each damage that is planted, in both databases; backups are whole; migrations say what they
did."""

import asyncio
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest
from cli_outcome import Fuse, Outcome

from fusevm.cli import main
from fusevm.control.secrets import Sealer
from fusevm.control.store.opening import open_store
from fusevm.control.store.protocol import Claim, RequestKey, Reservation, SealedRow, Store
from fusevm.core import lifecycle
from fusevm.core.lifecycle import Identity
from fusevm.core.policy import Policy
from fusevm.core.spec import complete, resources_of
from fusevm.model.api_key import ApiKey
from fusevm.model.environment import Environment
from fusevm.model.event import (
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    Event,
    SnapshotRequested,
    SnapshotTaken,
)
from fusevm.model.host import Host, Resources
from fusevm.model.setup import Duties
from fusevm.model.snapshot import Snapshot, SnapshotState
from fusevm.testing.postgres import PostgresServer

POLICY = Policy()
KEY = "11" * 32
NOW_MS = 1_767_225_600_000


class Database(NamedTuple):
    """A database with a little of everything in it."""

    url: str
    #: Run SQL.
    execute: Callable[[str], object]


async def _fill(store: Store) -> None:
    sealer = Sealer(bytes.fromhex(KEY))
    capacity = Resources(cpus=100, ram_mb=10_240, storage_gb=1000, vm_count=10)
    await store.save_host(Host(id="h1", url="x", capacity=capacity, created_at_ms=1, updated_at_ms=1))
    await store.put_secret("host:h1", "token", sealer.seal("secret", row="host:h1/token"))
    await store.add_key(ApiKey(id="ak_1", prefix="p1", digest="d", created_at_ms=1))

    async def create(uid: str, host_id: str) -> Environment:
        identity = Identity(uid=uid, task_id=f"task-{uid}", machine_id=f"m-{uid}")
        spec = complete(POLICY, queue_seconds=1000)
        duties = Duties(setup=not host_id)
        step = lifecycle.begin(identity, spec, host_id, cause="c", now_ms=NOW_MS, policy=POLICY, duties=duties)
        room = Reservation(host_id, resources_of(spec), lambda _host: True) if host_id else None
        sealed = SealedRow(f"env:{uid}", "setup", sealer.seal("{}", row=f"env:{uid}/setup"))
        key = RequestKey("", "create", f"key-{uid}", "f", "c")
        await store.claim_request(key, 1 << 40)
        made = await store.create(step, room, Claim("w", 1000), key, sealed)
        answer = sealer.seal("{}", row=f"request::create/key-{uid}")
        await store.finish_request(key, 201, answer, is_sealed=True)
        return made

    async def feed(env: Environment, event: Event) -> Environment:
        return await store.commit(env.uid, env.revision, lifecycle.step(env, event, NOW_MS, POLICY), None)

    live, over, _waiting = [await create(uid, host_id) for uid, host_id in (("u1", "h1"), ("u2", "h1"), ("u3", ""))]
    live = await feed(live, BootSucceeded(cause="c", seq=1))
    snapshot = Snapshot(
        id="snap-1",
        uid="u1",
        task_id=live.task_id,
        host_id="h1",
        machine_id=live.machine_id,
        state=SnapshotState.CREATING,
        created_at_ms=NOW_MS,
        updated_at_ms=NOW_MS,
    )
    live = await feed(live, SnapshotRequested(cause="c", snapshot=snapshot))
    await feed(live, SnapshotTaken(cause="c", seq=live.action_seq, size_bytes=1, digest="d"))
    over = await feed(over, DestroyRequested(cause="c"))
    await feed(over, DestroyConfirmed(cause="c", seq=over.action_seq))


def _make(url: str) -> None:
    async def work() -> None:
        store = await open_store(url, POLICY, lambda: NOW_MS)
        await _fill(store)
        await store.close()

    asyncio.run(work())


@pytest.fixture
def environ(environ: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("DATABASE_URL", "TOKEN_ENCRYPTION_KEY", "TOKEN_ENCRYPTION_KEY_PREVIOUS"):
        environ.delenv(name, raising=False)
    return environ


@pytest.fixture
def fuse(environ: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fuse:
    def run(*arguments: str) -> Outcome:
        capfd.readouterr()
        code = main.run(arguments)
        return Outcome(code, *capfd.readouterr())

    return run


def _sqlite(path: Path) -> Database:
    def execute(statement: str) -> None:
        db = sqlite3.connect(path, isolation_level=None)
        db.execute(statement)
        db.close()

    return Database(str(path), execute)


@pytest.fixture(params=["sqlite", "postgres"])
def database(
    request: pytest.FixtureRequest, tmp_path: Path, environ: pytest.MonkeyPatch, postgres_server: PostgresServer
) -> Database:
    if request.param == "sqlite":
        found = _sqlite(tmp_path / "fuse.db")
    else:
        url = request.getfixturevalue("postgres_url")
        found = Database(url, lambda statement: postgres_server.execute(statement, url))
    _make(found.url)
    environ.setenv("DATABASE_URL", found.url)
    environ.setenv("TOKEN_ENCRYPTION_KEY", KEY)
    return found


# -- check ---------------------------------------------------------------------------------------------------------


def test_a_sound_database_is_sound(database: Database, fuse: Fuse) -> None:
    done = fuse("db", "check")
    assert (done.code, done.out, done.err) == (0, "The database is sound.\n", "")
    assert json.loads(fuse("db", "check", "-o", "json").out) == {
        "verdict": "sound",
        "secrets_tried": True,
        "findings": [],
    }


def test_old_events_that_were_pruned_are_no_damage_but_a_hole_behind_them_is(database: Database, fuse: Fuse) -> None:
    async def prune() -> None:
        store = await open_store(database.url, POLICY, lambda: NOW_MS)
        assert await store.prune_events(-(10**12), 1) == 1
        await store.close()

    asyncio.run(prune())
    assert fuse("db", "check").code == 0
    database.execute("delete from events where uid = 'u1' and seq = 3")
    (finding,) = json.loads(fuse("db", "check", "-o", "json").out)["findings"]
    assert (finding["kind"], "have a gap" in finding["problem"]) == ("invariant", True)


_ORPHAN = "insert into placements (uid, host_id, tenant, cpus, ram_mb, storage_gb, vm_count)"
DAMAGES = {
    "a placement of nobody": (f"{_ORPHAN} values ('u9', 'h1', '', 0, 0, 0, 0)", "invariant", "no such environment"),
    "a placement that is missing": ("delete from placements where uid = 'u1'", "invariant", "placed as None"),
    "a host's sum": ("update hosts set ram_mb = ram_mb + 1", "invariant", "its placements are"),
    "a host that is missing": ("delete from hosts", "invariant", "does not exist"),
    "an event of nobody": (
        """insert into events (uid, seq, task_id, tenant, at_ms, doc)
        select 'u9', 1, 't', '', at_ms, replace(doc, 'u1', 'u9') from events where uid = 'u1' and seq = 1""",
        "orphan",
        "no such environment",
    ),
    "an event that is missing": ("delete from events where uid = 'u1' and seq = 2", "invariant", "have a gap"),
    "an event's column": ("update events set at_ms = 0 where uid = 'u1' and seq = 1", "record", "the column at_ms"),
    "an event of another": ("update events set seq = 77 where uid = 'u1' and seq = 1", "record", "the column seq"),
    "an event that cannot be read": ("update events set doc = '{' where seq = 1", "record", "cannot be read"),
    "a snapshot of nobody": ("update snapshots set uid = 'u9', doc = replace(doc, 'u1', 'u9')", "orphan", "snap-1"),
    "a snapshot nobody works on": (
        "update snapshots set state = 'restoring', doc = replace(doc, 'ready', 'restoring')",
        "invariant",
        "snap-1",
    ),
    "a snapshot's column": ("update snapshots set state = 'error'", "record", "the column state"),
    "a snapshot that cannot be read": ("update snapshots set doc = '[]'", "record", "cannot be read"),
    "secrets of one that has ended": (
        "insert into secrets (owner, name, sealed, updated_at_ms) values ('env:u2', 'setup', 'x', 1)",
        "orphan",
        "secrets of env:u2",
    ),
    "secrets of a host that is gone": (
        "update secrets set owner = 'host:h9' where name = 'token'",
        "orphan",
        "host:h9",
    ),
    "a secret in another's row": (
        "update secrets set sealed = (select sealed from secrets where owner = 'env:u1') where owner = 'env:u3'",
        "secret",
        "env:u3/setup cannot be opened",
    ),
    "a secret that is damaged": ("update secrets set sealed = 'AQID' where owner = 'env:u1'", "secret", "env:u1/setup"),
    "a state's column": ("update environments set state = 'draining' where uid = 'u1'", "record", "the column state"),
    "a live one that counts as ended": ("update environments set is_live = 0 where uid = 'u1'", "record", "is_live"),
    "a revision": ("update environments set revision = 77 where uid = 'u1'", "record", "the column revision"),
    "a pending action": ("update environments set pending_seq = 77 where uid = 'u1'", "record", "pending_seq"),
    "a tenant": ("update environments set tenant = 'x' where uid = 'u3'", "record", "the column tenant"),
    "a record that cannot be read": ("update environments set doc = 'x' where uid = 'u3'", "record", "cannot be read"),
    "a state without its action": (
        """update environments set state = 'destroying',
        doc = replace(doc, '"state":"running"', '"state":"destroying"') where uid = 'u1'""",
        "invariant",
        "u1: destroying",
    ),
    "a host that cannot be read": ("update hosts set doc = 'x'", "record", "cannot be read"),
    "a host's revision": ("update hosts set revision = 77", "record", "the column revision"),
    "an API key": ("update api_keys set prefix = 'x'", "record", "the column prefix"),
    "an API key that cannot be read": ("update api_keys set doc = ''", "record", "cannot be read"),
    "an event of another tenant": ("update events set tenant = 'x' where seq = 1", "record", "the column tenant"),
    "an event of another task": ("update events set task_id = 'x' where seq = 1", "record", "the column task_id"),
    "a placement of another tenant": ("update placements set tenant = 'x'", "record", "the column tenant"),
    "a deadline that is missing": ("update environments set deadline_ms = null", "record", "the column deadline_ms"),
    "a deadline of one that is over": (
        "update environments set deadline_ms = 1 where uid = 'u2'",
        "record",
        "the column deadline_ms is 1",
    ),
    "a deadline that is too late": (
        "update environments set deadline_ms = deadline_ms + 1 where uid = 'u3'",
        "record",
        "u3: the column deadline_ms",
    ),
    "the time of an action": (
        "update environments set not_before_ms = 7 where uid = 'u3'",
        "record",
        "the column not_before_ms",
    ),
    "a lease without an end": (
        "update environments set lease_owner = 'w', lease_until_ms = null where uid = 'u3'",
        "record",
        "leased to 'w' until None",
    ),
    "a host's lease without an end": ("update hosts set lease_owner = 'w'", "record", "leased to 'w'"),
    "a snapshot's lease without an end": ("update snapshots set lease_owner = 'w'", "record", "leased to 'w'"),
    "a snapshot's end": ("update snapshots set due_ms = 1", "record", "the column due_ms"),
    "a snapshot's size": ("update snapshots set size_bytes = 7", "record", "the column size_bytes"),
    "a snapshot's name": ("update snapshots set name = 'x'", "record", "the column name"),
    "a setup that is missing": ("delete from secrets where owner = 'env:u3'", "record", "setup of u3 is missing"),
    "an answer without a status": ("update idempotency set status = null", "record", "beside an answer"),
    "a status without an answer": ("update idempotency set body = null", "record", "beside no answer"),
    "a key that expired before it was claimed": ("update idempotency set expires_at_ms = 1", "record", "expires at 1"),
    "a key bound to another tenant's": ("update idempotency set tenant = 'tenant:x'", "record", "is of tenant ''"),
    "an answer in another's row": (
        "update idempotency set key = 'x' where uid = 'u1'",
        "secret",
        "create x: the answer",
    ),
    "two machines of one id": (
        "update environments set doc = replace(doc, 'm-u3', 'm-u1') where uid = 'u3'",
        "invariant",
        "belongs to 2",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_check_finds_damage(database: Database, fuse: Fuse, name: str) -> None:
    statement, kind, words = DAMAGES[name]
    database.execute(statement)
    done = fuse("db", "check", "-o", "json")
    found = json.loads(done.out)
    assert (done.code, found["verdict"]) == (1, "damaged")
    matching = [one for one in found["findings"] if one["kind"] == kind and words in one["problem"]]
    assert matching, found
    assert all(one["remedy"] for one in found["findings"])
    shown = fuse("db", "check")
    assert shown.code == 1
    assert f"{kind}: {matching[0]['problem']}\n  -> {matching[0]['remedy']}\n" in shown.out


def test_a_host_whose_limits_have_shrunk_is_no_damage(database: Database, fuse: Fuse) -> None:
    """Its bookings were right when they were made."""
    database.execute("update hosts set doc = replace(doc, '10240', '128')")
    done = fuse("db", "check")
    assert (done.code, done.out) == (0, "The database is sound.\n")


def test_following_the_remedy_for_an_orphan_cures_it(database: Database, fuse: Fuse) -> None:
    database.execute(DAMAGES["an event of nobody"][0])
    (found,) = json.loads(fuse("db", "check", "-o", "json").out)["findings"]
    database.execute(found["remedy"].rpartition("run: ")[2])
    assert fuse("db", "check").code == 0


SCHEMAS = {
    "none": ("drop table schema_version", "no schema"),
    "newer": ("insert into schema_version values (99, 'x', 'x', 1)", "newer"),
    "of another build": ("update schema_version set checksum = 'x'", "another build"),
    "older": ("delete from schema_version", "lacks 0001_init.sql"),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_check_finds_a_schema_that_is_not_ours(database: Database, fuse: Fuse, name: str) -> None:
    statement, words = SCHEMAS[name]
    database.execute(statement)
    done = fuse("db", "check")
    assert done.code == 2
    assert done.out.startswith("schema: ")
    assert words in done.out
    assert "unusable" in done.out


def test_check_needs_the_right_key(database: Database, fuse: Fuse, environ: pytest.MonkeyPatch) -> None:
    environ.setenv("TOKEN_ENCRYPTION_KEY", "22" * 32)
    done = fuse("db", "check")
    assert done.code == 1
    assert done.out.count("sealed with another key") == 6
    environ.setenv("TOKEN_ENCRYPTION_KEY_PREVIOUS", KEY)
    assert fuse("db", "check").code == 0


def test_check_says_when_it_could_not_try_the_secrets(
    database: Database, fuse: Fuse, environ: pytest.MonkeyPatch
) -> None:
    environ.delenv("TOKEN_ENCRYPTION_KEY")
    done = fuse("db", "check")
    assert done.code == 0
    assert "not tried" in done.err


def test_check_finds_a_damaged_file(tmp_path: Path, fuse: Fuse) -> None:
    path = tmp_path / "fuse.db"
    _make(str(path))
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(8192)
        file.write(b"\xff" * (size - 8192))
    done = fuse("db", "check", "--database-url", str(path))
    assert done.code == 2
    assert done.out.startswith("file: ")


def test_check_finds_what_is_no_database(tmp_path: Path, fuse: Fuse) -> None:
    path = tmp_path / "fuse.db"
    done = fuse("db", "check", "--database-url", str(path))
    assert (done.code, "there is no file" in done.out) == (2, True)
    assert not path.exists()
    path.write_bytes(b"no database, however long " * 100)
    done = fuse("db", "check", "--database-url", str(path))
    assert (done.code, "cannot be read" in done.out) == (2, True)


def test_check_finds_a_server_that_is_away(fuse: Fuse) -> None:
    done = fuse("db", "check", "--database-url", "postgresql://fuse:secret@127.0.0.1:1/fuse")
    assert (done.code, "cannot be reached" in done.out) == (2, True)
    assert "secret" not in done.out + done.err


def test_check_changes_nothing_and_works_beside_a_running_control_plane(tmp_path: Path, fuse: Fuse) -> None:
    path = tmp_path / "fuse.db"
    _make(str(path))

    async def work() -> None:
        store = await open_store(str(path), POLICY, lambda: NOW_MS)
        await store.put_secret("other", "a", "b")
        before = path.read_bytes()
        done = await asyncio.to_thread(fuse, "db", "check", "--database-url", str(path))
        assert done.code == 0, done
        assert path.read_bytes() == before
        await store.put_secret("other", "a", "c")
        await store.close()

    asyncio.run(work())


def test_the_database_of_fuse_up_is_the_default(tmp_path: Path, fuse: Fuse, environ: pytest.MonkeyPatch) -> None:
    environ.setenv("FUSE_DATA_DIR", str(tmp_path / "data"))
    done = fuse("db", "check")
    assert (done.code, "in memory" in done.err) == (2, True)
    (tmp_path / "data" / "control").mkdir(parents=True)
    _make(str(tmp_path / "data" / "control" / "fuse.db"))
    (tmp_path / "data" / "control" / "fuse.db.key").write_text(KEY + "\n")
    done = fuse("db", "check")
    assert (done.code, done.err) == (0, "")


# -- migrate -------------------------------------------------------------------------------------------------------


def test_migrate_says_what_it_applied(tmp_path: Path, fuse: Fuse, postgres_url: str) -> None:
    for url in (str(tmp_path / "fuse.db"), postgres_url):
        assert (
            fuse("db", "migrate", "--database-url", url).out == "applied 0001_init.sql\napplied 0002_live_index.sql\n"
        )
        assert fuse("db", "migrate", "--database-url", url).out == "The schema is up to date.\n"
        assert json.loads(fuse("db", "migrate", "--database-url", url, "-o", "json").out) == {"applied": []}
        assert fuse("db", "check", "--database-url", url).code == 0


def test_migrate_leaves_deadlines_to_the_control_plane(tmp_path: Path, fuse: Fuse, postgres_url: str) -> None:
    """They follow its settings, which `fuse db` does not know."""
    lasting = Policy(linger_ms=9 * POLICY.linger_ms)

    async def fill(url: str) -> None:
        store = await open_store(url, lasting, lambda: NOW_MS)
        await _fill(store)
        live = await store.get("u1")
        assert live is not None
        step = lifecycle.step(live, DrainRequested(cause="c"), NOW_MS, lasting)
        await store.commit("u1", live.revision, step, None)
        await store.close()

    def deadlines(url: str) -> object:
        async def read() -> object:
            if "://" in url:
                raw = await asyncpg.connect(url)
                found = [tuple(row) for row in await raw.fetch("select uid, deadline_ms from environments")]
                await raw.close()
                return sorted(found)
            db = sqlite3.connect(url)
            found = db.execute("select uid, deadline_ms from environments").fetchall()
            db.close()
            return sorted(found)

        return asyncio.run(read())

    for url in (str(tmp_path / "fuse.db"), postgres_url):
        asyncio.run(fill(url))
        before = deadlines(url)
        assert fuse("db", "migrate", "--database-url", url).code == 0
        assert deadlines(url) == before
        assert fuse("db", "check", "--database-url", url, "--token-encryption-key", KEY).code == 0


def test_migrate_leaves_a_file_alone_that_is_in_use(tmp_path: Path, fuse: Fuse) -> None:
    path = tmp_path / "fuse.db"

    async def work() -> None:
        store = await open_store(str(path), POLICY, lambda: NOW_MS)
        done = await asyncio.to_thread(fuse, "db", "migrate", "--database-url", str(path))
        assert (done.code, "in use" in done.err) == (4, True)
        await store.close()

    asyncio.run(work())


# -- backup --------------------------------------------------------------------------------------------------------


def test_a_backup_of_sqlite_is_the_database_for_its_owner_alone(tmp_path: Path, fuse: Fuse) -> None:
    path, copy = tmp_path / "fuse.db", tmp_path / "copy.db"
    _make(str(path))
    done = fuse("db", "backup", str(copy), "--database-url", f"sqlite://{path}", "-o", "json")
    assert json.loads(done.out) == {"file": str(copy), "size_bytes": copy.stat().st_size}
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert fuse("db", "check", "--database-url", str(copy), "--token-encryption-key", KEY).code == 0
    assert sorted(found.name for found in tmp_path.glob("*copy*")) in (
        ["copy.db"],
        ["copy.db", "copy.db-shm", "copy.db-wal"],
    )


def test_a_backup_replaces_nothing_unasked(tmp_path: Path, fuse: Fuse) -> None:
    path, copy = tmp_path / "fuse.db", tmp_path / "copy.db"
    _make(str(path))
    copy.write_text("mine")
    done = fuse("db", "backup", str(copy), "--database-url", str(path))
    assert (done.code, "exists already" in done.err) == (1, True)
    assert copy.read_text() == "mine"
    assert fuse("db", "backup", str(copy), "--database-url", str(path), "--force").code == 0
    assert copy.read_bytes().startswith(b"SQLite format 3")


def test_a_backup_that_fails_leaves_nothing(tmp_path: Path, fuse: Fuse) -> None:
    path = tmp_path / "fuse.db"
    path.write_bytes(b"no database, however long " * 100)
    assert fuse("db", "backup", str(tmp_path / "copy.db"), "--database-url", str(path)).code == 2
    assert fuse("db", "backup", str(tmp_path / "no" / "copy.db"), "--database-url", str(path)).code == 2
    assert fuse("db", "backup", str(tmp_path / "copy.db"), "--database-url", str(tmp_path / "none.db")).code == 2
    assert [found.name for found in tmp_path.iterdir() if "copy" in found.name] == []


def test_a_backup_is_of_one_moment_while_the_control_plane_writes(tmp_path: Path, fuse: Fuse) -> None:
    path = tmp_path / "fuse.db"
    _make(str(path))
    stop = threading.Event()

    async def write() -> None:
        store = await open_store(str(path), POLICY, lambda: NOW_MS)
        number = 0
        try:
            while not stop.is_set():
                number += 1
                identity = Identity(uid=f"x{number:06}", task_id=f"x{number}", machine_id=f"m-x{number}")
                step = lifecycle.begin(
                    identity, complete(POLICY, queue_seconds=9), "", cause="c", now_ms=NOW_MS, policy=POLICY
                )
                await store.create(step, None, None)
        finally:
            await store.close()
        assert number > 1

    writing = threading.Thread(target=lambda: asyncio.run(write()))
    writing.start()
    try:
        for number in range(5):
            copy = str(tmp_path / f"copy{number}.db")
            done = fuse("db", "backup", copy, "--database-url", str(path))
            assert done.code == 0, done
            assert fuse("db", "check", "--database-url", copy, "--token-encryption-key", KEY).code == 0
    finally:
        stop.set()
        writing.join()


def test_a_backup_of_memory_is_refused(fuse: Fuse) -> None:
    done = fuse("db", "backup", "x.db", "--database-url", "sqlite://")
    assert (done.code, "in memory" in done.err) == (2, True)


def test_a_backup_of_postgres_can_be_restored(
    postgres_server: PostgresServer, postgres_url: str, tmp_path: Path, fuse: Fuse, environ: pytest.MonkeyPatch
) -> None:
    _make(postgres_url)
    path = f"{postgres_server.bin}{os.pathsep}{os.environ['PATH']}"
    environ.setenv("PATH", path)
    dump = tmp_path / "fuse.dump"
    done = fuse("db", "backup", str(dump), "--database-url", postgres_url)
    assert done.code == 0, done
    assert stat.S_IMODE(dump.stat().st_mode) == 0o600
    with postgres_server.database() as other:
        program = shutil.which("pg_restore", path=path)
        subprocess.run([program, "--no-owner", f"--dbname={other}", str(dump)], check=True)
        assert fuse("db", "check", "--database-url", other, "--token-encryption-key", KEY).code == 0
    assert fuse("db", "backup", str(dump), "--database-url", postgres_url).code == 1
    done = fuse("db", "backup", str(tmp_path / "b.dump"), "--database-url", postgres_url + "_missing")
    assert (done.code, "pg_dump failed" in done.err) == (1, True)
    assert [found.name for found in tmp_path.iterdir()] == ["fuse.dump"]


def test_without_pg_dump_the_command_is_shown(tmp_path: Path, fuse: Fuse, environ: pytest.MonkeyPatch) -> None:
    environ.setenv("PATH", str(tmp_path))
    done = fuse("db", "backup", "x.dump", "--database-url", "postgresql://fuse:secret@db:5432/fuse")
    assert done.code == 1
    assert "pg_dump --format=custom --no-owner --file=x.dump 'postgresql://fuse@db:5432/fuse'" in done.err
    assert "secret" not in done.err
