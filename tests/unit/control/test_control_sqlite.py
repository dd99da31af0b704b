"""What is particular to the SQLite store: one process per file, schema versions, full disks, group commit."""

import asyncio
import contextlib
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from control_harness import running

from fusevm.control.store import migrate, snapshot_rows, transactions
from fusevm.control.store.protocol import Query, SnapshotQuery
from fusevm.control.store.sql import Dialect, Migration, load_migrations, load_queries
from fusevm.control.store.sql_store import SqlStore
from fusevm.control.store.sqlite import drive_moment, open_sqlite
from fusevm.control.store.statements import Statement
from fusevm.control.store.world import read_world
from fusevm.control.store.writer import Writer
from fusevm.core.invariants import violations
from fusevm.core.policy import Policy
from fusevm.model.errors import BadSetting, DataRootInUse, ShuttingDown, StoreFull
from fusevm.testing.clock import FakeClock

POLICY = Policy()
SCHEMAS = load_migrations(Dialect.SQLITE)


async def _open(path: Path) -> SqlStore:
    return await open_sqlite(str(path), POLICY, FakeClock().now_ms)


async def _pragma(store: SqlStore, text: str) -> object:
    """On the writing connection."""
    (row,) = await store._engine._writer.read(lambda db: db.execute(text).fetchall())
    return row[0]


async def test_a_file_belongs_to_one_process(tmp_path: Path) -> None:
    path = tmp_path / "fuse.db"
    store = await _open(path)
    with pytest.raises(DataRootInUse) as caught:
        await _open(path)
    assert caught.value.pid == str(os.getpid())
    await store.close()
    await store.close()
    await (await _open(path)).close()


async def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "fuse.db"
    code = (
        "import asyncio, os\n"
        "from fusevm.control.store.sqlite import open_sqlite\n"
        "from fusevm.core.policy import Policy\n"
        f"asyncio.run(open_sqlite({str(path)!r}, Policy(), lambda: 1)); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    await (await _open(path)).close()


async def test_the_file_is_durable_by_settings(tmp_path: Path) -> None:
    store = await _open(tmp_path / "fuse.db")
    mode = await _pragma(store, "pragma journal_mode")
    synchronous = await _pragma(store, "pragma synchronous")
    assert (mode, synchronous) == ("wal", 2)
    await store.close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "fuse.db"
    await (await _open(path)).close()
    with sqlite3.connect(path) as db:
        db.execute("insert into schema_version values (99, '0099_later.sql', 'x', 1)")
    db.close()
    with pytest.raises(BadSetting, match="newer"):
        await _open(path)
    with sqlite3.connect(path) as db:
        assert db.execute("select count(*) from schema_version").fetchone() == (len(SCHEMAS) + 1,)
    db.close()


async def test_a_schema_of_another_build_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fuse.db"
    await (await _open(path)).close()
    with sqlite3.connect(path) as db:
        db.execute("update schema_version set checksum = 'x'")
    db.close()
    with pytest.raises(BadSetting, match="another build"):
        await _open(path)


async def test_a_migration_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fuse.db"
    await (await _open(path)).close()
    broken = Migration(len(SCHEMAS) + 1, "broken.sql", ("create table good (a text)", "create tabel bad (a text)"), "x")
    monkeypatch.setattr(migrate, "load_migrations", lambda dialect: [*SCHEMAS, broken])
    with pytest.raises(BadSetting):
        await _open(path)
    with sqlite3.connect(path) as db:
        assert db.execute("select count(*) from sqlite_master where name = 'good'").fetchone() == (0,)
        assert db.execute("select max(version) from schema_version").fetchone() == (len(SCHEMAS),)
    db.close()


@pytest.mark.parametrize("content", [b"this is not a database, however long it may be" * 50])
async def test_a_file_that_is_no_database_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fuse.db"
    path.write_bytes(content)
    with pytest.raises(BadSetting, match=r"fuse\.db"):
        await _open(path)
    assert path.read_bytes() == content


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="missing"):
        await _open(tmp_path / "missing" / "fuse.db")


async def test_a_full_disk_is_a_clean_error_and_nothing_is_lost(tmp_path: Path) -> None:
    store = await _open(tmp_path / "fuse.db")
    pages = await _pragma(store, "pragma page_count")
    await _pragma(store, f"pragma max_page_count = {pages + 2}")
    await store.put_secret("small", "a", "b")
    results = await asyncio.gather(
        *(store.put_secret("large", str(n), "x" * 3000) for n in range(20)), return_exceptions=True
    )
    assert any(isinstance(result, StoreFull) for result in results)
    assert all(result is None or isinstance(result, StoreFull) for result in results)
    await _pragma(store, "pragma max_page_count = 100000")
    assert await store.get_secret("small", "a") == "b"
    for number, result in enumerate(results):
        assert (await store.get_secret("large", str(number)) is None) is (result is not None)
    await store.put_secret("large", "again", "x" * 3000)
    await store.close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
async def test_a_really_full_disk(tmp_path: Path) -> None:
    code = f"""
import asyncio, ctypes, os, subprocess
from fusevm.control.store.sqlite import open_sqlite
from fusevm.core.policy import Policy
from fusevm.model.errors import StoreFull
if ctypes.CDLL(None, use_errno=True).unshare(0x20000): os._exit(77)
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", {str(tmp_path)!r}], check=True)
async def main():
    store = await open_sqlite({str(tmp_path / "fuse.db")!r}, Policy(), lambda: 1)
    full = 0
    for n in range(60):
        try:
            await store.put_secret("x", str(n), "x" * 50_000)
        except StoreFull:
            full += 1
    assert full > 10, full
    assert len(await store.get_secret("x", "0")) == 50_000
    await store.ping()
    await store.close()
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("mount namespaces are not allowed here")
    assert done.returncode == 0, done.stderr


async def test_jobs_that_arrive_together_share_a_commit() -> None:
    commits = 0

    def connect() -> sqlite3.Connection:
        nonlocal commits
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        connection.execute("create table t (a integer)")

        def count(statement: str) -> None:
            nonlocal commits
            commits += statement == "commit"

        connection.set_trace_callback(count)
        return connection

    writer = Writer(connect)
    await writer.open()

    def insert(value: int) -> int:
        return value

    async def one(value: int) -> int:
        return await writer.run(lambda db: db.execute("insert into t values (?)", (value,)).lastrowid or 0)

    assert sorted(await asyncio.gather(*(one(n) for n in range(200)))) == list(range(1, 201))
    assert commits < 100
    await writer.close()
    with pytest.raises(ShuttingDown):
        await one(1)


async def test_a_job_that_raises_takes_nothing_of_its_neighbours_with_it() -> None:
    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        connection.execute("create table t (a integer)")
        return connection

    def bad(db: sqlite3.Connection) -> None:
        db.execute("insert into t values (-1)")
        raise KeyError("bug")

    writer = Writer(connect)
    await writer.open()
    jobs = [writer.run(lambda db: db.execute("insert into t values (1)").rowcount), writer.run(bad)] * 1
    jobs += [writer.run(lambda db: db.execute("insert into t values (2)").rowcount)]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert [type(result) for result in results] == [int, KeyError, int]
    rows = await writer.read(lambda db: db.execute("select a from t order by a").fetchall())
    assert rows == [(1,), (2,)]
    await writer.close()
    await writer.close()


def test_every_query_is_used_and_every_used_query_exists() -> None:
    known = {name for dialect in Dialect for name in load_queries(dialect)}
    used: set[str] = set()
    for path in Path(migrate.__file__).parent.glob("*.py"):
        used |= {word for word in re.findall(r'"(\w+)"', path.read_text()) if word in known}
    assert used == known


def test_parameters_are_numbered_as_asyncpg_wants_them() -> None:
    for name, text in load_queries(Dialect.POSTGRES).items():
        numbers = {int(number) for number in re.findall(r"\$(\d+)", text)}
        assert numbers == set(range(1, len(numbers) + 1)), name
        assert "?" not in text


def test_both_databases_have_the_same_queries_but_for_what_only_one_needs() -> None:
    sqlite, postgres = (set(load_queries(dialect)) for dialect in (Dialect.SQLITE, Dialect.POSTGRES))
    assert sqlite - postgres == {"end_action_leases", "end_host_leases", "end_snapshot_leases"}
    assert postgres - sqlite == {"restored_events", "rebase_events", "transaction_bounds", "tell_commits"}


async def test_a_world_is_of_one_moment(tmp_path: Path) -> None:
    """Nothing seems broken because it changes while it is read."""
    path = str(tmp_path / "fuse.db")
    async with running(database=path, checked=False) as server:
        await server.create()
        with (
            contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader,
            contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other,
        ):
            changed: list[int] = []

            def meanwhile(statement: str) -> None:
                if "from events" in statement:
                    changed.append(other.execute("delete from placements").rowcount)

            reader.set_trace_callback(meanwhile)
            assert violations(drive_moment(reader, read_world()), server.plane.config.policy) == []
            assert changed == [1]
            reader.set_trace_callback(None)
            assert violations(drive_moment(reader, read_world()), server.plane.config.policy) != []


def _page(**filters: object) -> Statement:
    return next(transactions.list_page(Query(after="u", limit=50, **filters)))  # type: ignore[arg-type]


#: What is read often, and the index that it is read by.
HOT = {
    "live environments": (_page(), "environments_live"),
    "those of a tenant": (_page(tenant="acme"), "environments_tenant"),
    "those of a host": (_page(host_id="h1"), "environments_host"),
    "those in a state": (_page(state="running"), "environments_state"),
    "ended environments": (_page(ended=True), "environments_over"),
    "ended ones of a tenant": (_page(ended=True, tenant="acme"), "environments_tenant"),
    "ended ones of a task": (_page(ended=True, task_id="t1"), "environments_task"),
    "all on a host": (Statement("live_on_host", ("h1",)), "environments_host"),
    "the last one of a task": (Statement("get_last_ended", ("t1",)), "environments_task"),
    "the queue's length": (Statement("count_queued"), "environments_host"),
    "hosts": (Statement("page_hosts", ("h", 50)), "sqlite_autoindex_hosts_1"),
    "snapshots": (next(snapshot_rows.list_page(SnapshotQuery(after="s", limit=50))), "sqlite_autoindex_snapshots_1"),
    "snapshots of a tenant": (
        next(snapshot_rows.list_page(SnapshotQuery(after="s", tenant="acme", limit=50))),
        "snapshots_tenant",
    ),
}


@pytest.mark.parametrize("what", HOT)
def test_what_is_read_often_is_found_by_its_index(what: str) -> None:
    statement, index = HOT[what]
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        for migration in SCHEMAS:
            for text in migration.statements:
                db.execute(text)
        query = load_queries(Dialect.SQLITE)[statement.name] + statement.tail
        plan = [row[3] for row in db.execute(f"explain query plan {query}", statement.values)]
    assert len(plan) == 1, plan  # no sort either
    assert plan[0].startswith("SEARCH"), plan
    assert f" INDEX {index} " in plan[0], plan
