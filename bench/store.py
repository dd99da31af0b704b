"""What the store costs beside raw SQL: an environment created and brought to `running`, on SQLite and PostgreSQL.

    python bench/store.py [--count 1000] [--rounds 3] [--tasks 1 8 32] [--only sqlite|postgres] [--json FILE]

"Raw" is the same rows written by hand-made statements with the driver alone: two transactions, one insert or update per
row, the host's sum in the same transaction, nothing checked. SQLite: one connection in the main thread, one commit per
transaction, as durable as ours (WAL, synchronous=FULL). PostgreSQL: a pool of the same size, fsync on, over loopback.
Raw and store take turns, so that whatever else the machine does hits both.
"""

import argparse
import asyncio
import itertools
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import uvloop

from fusevm.control.store.opening import POOL_SIZE, open_store
from fusevm.control.store.protocol import Claim, Reservation, Store
from fusevm.core import lifecycle
from fusevm.core.lifecycle import Identity
from fusevm.core.placement import can_reserve
from fusevm.core.policy import Policy
from fusevm.core.spec import complete, resources_of
from fusevm.model.event import BootSucceeded
from fusevm.model.host import Host, Resources
from fusevm.testing.postgres import PostgresServer

POLICY = Policy()
SPEC = complete(POLICY)
#: As long as ours are.
DOC, EVENT = "x" * 1400, "x" * 140
_numbers = itertools.count(1)
Job = Callable[[int], Awaitable[None]]

RAW_SCHEMA = """
create table e (uid text primary key, task text not null, state text not null, live integer not null, doc text);
create unique index e_task on e (task) where live = 1;
create index e_live on e (live, uid);
create table h (id text primary key, n bigint not null);
create table p (uid text primary key, host text not null);
create table ev (uid text, seq bigint, doc text, primary key (uid, seq));
insert into h values ('h1', 0);
"""
RAW = (
    (
        ("insert into e values ($1, $2, 'provisioning', 1, $3)", lambda uid: (uid, uid, DOC)),
        ("insert into ev values ($1, 1, $2)", lambda uid: (uid, EVENT)),
        ("insert into p values ($1, 'h1')", lambda uid: (uid,)),
        ("update h set n = n + 1 where id = $1", lambda _uid: ("h1",)),
    ),
    (
        ("update e set state = 'running', doc = $2 where uid = $1", lambda uid: (uid, DOC)),
        ("insert into ev values ($1, 2, $2)", lambda uid: (uid, EVENT)),
    ),
)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def raw_sqlite(path: Path) -> Job:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("pragma journal_mode = wal")
    db.execute("pragma synchronous = full")
    db.executescript(RAW_SCHEMA)

    async def job(number: int) -> None:
        uid = f"r{number:09}"
        for statements in RAW:
            db.execute("begin immediate")
            for text, values in statements:
                db.execute(text, {str(n): value for n, value in enumerate(values(uid), 1)})
            db.execute("commit")

    return job


async def raw_postgres(url: str) -> tuple[Job, "asyncpg.Pool"]:
    async def leave(_connection: asyncpg.Connection) -> None:
        pass

    pool = await asyncpg.create_pool(url, min_size=POOL_SIZE, max_size=POOL_SIZE, reset=leave)
    await pool.execute(RAW_SCHEMA)

    async def job(number: int) -> None:
        uid = f"r{number:09}"
        for statements in RAW:
            async with pool.acquire() as connection, connection.transaction():
                for text, values in statements:
                    await connection.fetch(text, *values(uid))

    return job, pool


async def through_store(store: Store) -> Job:
    capacity = Resources(cpus=1 << 40, ram_mb=1 << 50, storage_gb=1 << 40, vm_count=1 << 40)
    await store.save_host(Host(id="h1", url="x", capacity=capacity, created_at_ms=1, updated_at_ms=1))
    claim = Claim("bench", 60_000)

    async def job(number: int) -> None:
        identity = Identity(uid=f"u{number:09}", task_id=f"t{number}", machine_id=f"m-{number}")
        step = lifecycle.begin(identity, SPEC, "h1", cause="bench", now_ms=now_ms(), policy=POLICY)
        room = Reservation("h1", resources_of(SPEC), lambda host: can_reserve(host, SPEC, POLICY))
        env = await store.create(step, room, claim)
        booted = lifecycle.step(env, BootSucceeded(cause="bench", seq=1), now_ms(), POLICY)
        await store.commit(env.uid, env.revision, booted, None)

    return job


async def run(job: Job, count: int, tasks: int) -> dict[str, object]:
    """Per second, single times, and processor time of this process."""
    numbers = iter([next(_numbers) for _ in range(count)])
    times: list[float] = []

    async def work() -> None:
        for number in numbers:
            began = time.perf_counter()
            await job(number)
            times.append(time.perf_counter() - began)

    began, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(work())
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    ordered = sorted(times)
    return {
        "per_s": count / seconds,
        "p50_ms": statistics.median(ordered) * 1000,
        "p99_ms": ordered[int(len(ordered) * 0.99)] * 1000,
        "cpu_ms": cpu / count * 1000,
        "samples_ms": [round(one * 1000, 3) for one in times],
    }


async def compare(name: str, raw: Job, ours: Job, asked: argparse.Namespace) -> list[dict[str, object]]:
    found = []
    for tasks in asked.tasks:
        for number in range(asked.rounds):
            for what, job in (("raw", raw), ("store", ours)):
                result = await run(job, asked.count, tasks)
                found.append({"database": name, "what": what, "tasks": tasks, "round": number, **result})
        for what in ("raw", "store"):
            show(name, what, tasks, [one for one in found if (one["what"], one["tasks"]) == (what, tasks)])
        ratio = best(found, "store", tasks) / best(found, "raw", tasks)
        print(f"{name:<10} {tasks:>3} tasks  store/raw {ratio:.2f} (best rounds, per second)")
    return found


def best(found: list[dict[str, object]], what: str, tasks: int) -> float:
    return max(float(one["per_s"]) for one in found if (one["what"], one["tasks"]) == (what, tasks))


def show(name: str, what: str, tasks: int, rounds: list[dict[str, object]]) -> None:
    fields = {
        key: statistics.median(float(one[key]) for one in rounds) for key in ("per_s", "p50_ms", "p99_ms", "cpu_ms")
    }
    print(
        f"{name:<10} {tasks:>3} tasks  {what:<6} {fields['per_s']:7.0f}/s   p50 {fields['p50_ms']:7.2f} ms   "
        f"p99 {fields['p99_ms']:7.2f} ms   CPU {fields['cpu_ms']:.2f} ms   (median of {len(rounds)})"
    )


async def bench_sqlite(asked: argparse.Namespace) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory(prefix="fuse-bench-") as folder:
        store = await open_store(str(Path(folder) / "fuse.db"), POLICY, now_ms)
        try:
            return await compare("sqlite", raw_sqlite(Path(folder) / "raw.db"), await through_store(store), asked)
        finally:
            await store.close()


async def bench_postgres(url: str, raw_url: str, asked: argparse.Namespace) -> list[dict[str, object]]:
    store = await open_store(url, POLICY, now_ms)
    raw, pool = await raw_postgres(raw_url)
    try:
        return await compare("postgres", raw, await through_store(store), asked)
    finally:
        await pool.close()
        await store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", choices=["sqlite", "postgres"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found: list[dict[str, object]] = []
    if asked.only != "postgres":
        found += uvloop.run(bench_sqlite(asked))
    if asked.only != "sqlite":
        with PostgresServer() as server, server.database() as url, server.database() as raw_url:
            found += uvloop.run(bench_postgres(url, raw_url, asked))
    if asked.json is not None:
        asked.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
