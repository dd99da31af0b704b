"""The journal: fences, tombstones, numbers, intents; nothing half-written, whatever happens."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from journal_orders import (
    LIMITS,
    NUMBERS,
    SPEC,
    Time,
    create,
    create_running,
    delete,
    draft,
    fence,
    nothing,
    start,
)

from fusevm.host.admission import Size
from fusevm.host.faults import NoFault
from fusevm.host.journal import Journal
from fusevm.host.rows import Numbers, Operation
from fusevm.host.sql import load_migrations
from fusevm.host.writer import Superseded
from fusevm.model.errors import (
    DataRootInUse,
    Error,
    HostFull,
    Internal,
    MachineExists,
    MachineNotFound,
    NoSpace,
    SchemaTooNew,
    StaleIncarnation,
    WrongState,
)
from fusevm.model.machine import Machine, Phase

# -- creates ---------------------------------------------------------------------------------------------------------


async def test_a_repeated_create_returns_the_machine_and_another_one_conflicts(journal: Journal):
    machine = await create_running(journal, fence())
    assert await create(journal, fence()) == machine
    with pytest.raises(MachineExists):
        await create(journal, fence(), spec=msgspec.structs.replace(SPEC, cpus=2))
    with pytest.raises(MachineExists):
        await create(journal, fence(), "m-2")


async def test_concurrent_creates_get_different_numbers(journal: Journal):
    made = await asyncio.gather(*(create(journal, fence(uid=f"u{n}"), f"m-{n}") for n in range(40)))
    assert len({machine.slot for machine in made}) == 40
    assert len({machine.uid for machine in made}) == 40
    assert 7 in {machine.slot for machine in made}


async def test_numbers_are_the_lowest_free_ones_and_run_out(journal: Journal):
    numbers = Numbers(slot_count=2, uid_base=200_000, uid_count=3)
    for n in range(2):
        machine = await journal.begin_create(draft(f"m-{n}"), fence(uid=f"u{n}"), LIMITS, numbers, nothing)
        assert (machine.slot, machine.uid) == (n, 200_000 + n)
    with pytest.raises(HostFull, match="network slots"):
        await journal.begin_create(draft("m-9"), fence(uid="u9"), LIMITS, numbers, nothing)
    await journal.forget("m-0", "create", "undone", nothing)
    again = await journal.begin_create(draft("m-9"), fence(uid="u9"), LIMITS, numbers, nothing)
    assert (again.slot, again.uid) == (0, 200_000)


async def test_a_daemon_without_root_reserves_nothing(journal: Journal):
    machine = await journal.begin_create(draft(), fence(), LIMITS, Numbers(), nothing)
    assert (machine.slot, machine.uid) == (-1, -1)


async def test_admission_counts_creates_that_are_under_way(journal: Journal):
    small = msgspec.structs.replace(LIMITS, memory_mib=1000, overhead_mib=100)
    await journal.begin_create(draft("m-1"), fence(uid="u1"), small, NUMBERS, nothing)
    await journal.begin_create(draft("m-2"), fence(uid="u2"), small, NUMBERS, nothing)
    with pytest.raises(HostFull, match="memory"):
        await journal.begin_create(draft("m-3"), fence(uid="u3"), small, NUMBERS, nothing)


async def test_a_stopped_machine_gives_back_its_slot_and_keeps_its_uid(journal: Journal):
    machine = await create_running(journal, fence())
    await journal.begin_stop("m-1", fence(), nothing)
    stopped = msgspec.structs.replace(machine, phase=Phase.STOPPED)
    stopped = await journal.finish(stopped, "stop", "done", nothing)
    assert (stopped.slot, stopped.uid) == (-1, machine.uid)
    started = await start(journal, fence())
    assert (started.slot, started.uid, started.generation, started.nonce) == (7, machine.uid, 2, "cd")
    usage = await journal.usage()
    assert (usage.machines, usage.active, usage.memory_mib) == (1, 1, 256)


async def test_a_transition_that_does_not_exist_is_refused(journal: Journal):
    machine = await create_running(journal, fence())
    await journal.begin_stop("m-1", fence(), nothing)
    stopped = await journal.finish(msgspec.structs.replace(machine, phase=Phase.STOPPED), "stop", "done", nothing)
    with pytest.raises(Internal, match="cannot go from stopped to paused"):
        await journal.observe(msgspec.structs.replace(stopped, phase=Phase.PAUSED), "seen", nothing)


# -- intents ---------------------------------------------------------------------------------------------------------


async def test_a_delete_supersedes_what_a_create_still_wants_to_write(journal: Journal):
    machine = await create(journal, fence())
    await journal.begin_delete("m-1", fence(action_seq=2), nothing)
    running = msgspec.structs.replace(machine, phase=Phase.RUNNING)
    with pytest.raises(Superseded):
        await journal.mark(machine, "create", "booted")
    with pytest.raises(Superseded):
        await journal.finish(running, "create", "running", nothing)
    with pytest.raises(Superseded):
        await journal.forget("m-1", "create", "undone", nothing)
    with pytest.raises(Superseded):
        await journal.observe(running, "seen", nothing)
    entry = (await journal.entries())[0]
    assert (entry.machine.phase, entry.operation and entry.operation.kind) == (Phase.DELETING, "delete")


async def test_a_machine_being_deleted_takes_no_other_order(journal: Journal):
    await create_running(journal, fence())
    await journal.begin_delete("m-1", fence(action_seq=2), nothing)
    with pytest.raises(MachineNotFound):
        await journal.begin_stop("m-1", fence(action_seq=3), nothing)
    with pytest.raises(StaleIncarnation):
        await create(journal, fence())


async def test_deleting_what_does_not_exist_is_fine(journal: Journal):
    assert await journal.begin_delete("m-1", None, nothing) is None
    assert await journal.begin_delete("m-1", fence(), nothing) is None


async def test_a_forgotten_machine_leaves_no_row_but_its_fence(journal: Journal):
    await create_running(journal, fence())
    await delete(journal, fence(action_seq=2))
    state = await journal.render_state()
    assert (state["entries"], state["reservations"]) == ([], [])
    assert state["fences"][0]["ended"] == 1


async def test_a_commit_callback_runs_even_if_the_caller_was_cancelled(journal: Journal):
    seen: list[Machine] = []
    writing = asyncio.create_task(journal.begin_create(draft(), fence(), LIMITS, NUMBERS, seen.append))
    await asyncio.sleep(0)  # let it queue the write
    writing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await writing
    entries = await journal.entries()
    assert [entry.machine.id for entry in entries] == [machine.id for machine in seen]


async def test_the_state_shows_everything_but_secrets(journal: Journal):
    await create(journal, fence())
    state = await journal.render_state()
    assert state["entries"][0]["machine"]["id"] == "m-1"
    assert state["entries"][0]["operation"]["kind"] == "create"
    assert "nonce" not in state["entries"][0]["machine"]
    assert {row["kind"] for row in state["reservations"]} == {"slot", "uid"}


# -- damage, space, crashes ------------------------------------------------------------------------------------------


async def test_a_damaged_record_becomes_a_failed_machine_that_can_be_deleted(journal: Journal):
    await create_running(journal, fence())
    await create_running(journal, fence(uid="u2"), "m-2")
    with sqlite3.connect(journal.path) as db:
        db.execute("UPDATE machines SET record = x'00' WHERE id = 'm-1'")
    db.close()
    damaged, whole = await journal.entries()
    assert damaged.damage
    assert (damaged.machine.slot, damaged.machine.uid) == (7, 200_000)
    assert whole.damage == ""
    await delete(journal, fence(action_seq=2))
    assert [entry.machine.id for entry in await journal.entries()] == ["m-2"]


async def test_a_second_daemon_is_refused_with_the_pid_of_the_first(journal: Journal, tmp_path: Path, time: Time):
    with pytest.raises(DataRootInUse, match=str(os.getpid())):
        await Journal.open(tmp_path / "root", NoFault(), time)


async def test_a_newer_schema_is_refused(tmp_path: Path, time: Time):
    await (await Journal.open(tmp_path, NoFault(), time)).close()
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(SchemaTooNew, match="99"):
        await Journal.open(tmp_path, NoFault(), time)


async def test_what_an_older_program_left_open_survives_the_upgrade_of_the_schema(tmp_path: Path, time: Time):
    first = load_migrations()[0]
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        db.executescript(f"{first}; PRAGMA user_version = 1;")
        db.execute("INSERT INTO machines VALUES ('m-1', 'c1', 'u1', 1, 'creating', 1, 256, 1024, x'7b7d')")
        db.execute("INSERT INTO operations VALUES ('m-1', 'create', 'booted', 5, 6)")
        db.commit()
    journal = await Journal.open(tmp_path, NoFault(), time)
    try:
        operation = await journal.operation("m-1")
        assert operation == Operation(kind="create", step="booted", started_at_ms=5, deadline_ms=6)
    finally:
        await journal.close()


async def test_a_file_that_is_no_journal_is_named(tmp_path: Path, time: Time):
    (tmp_path / "journal.db").write_bytes(b"not a database" * 100)
    with pytest.raises(Internal, match=r"journal\.db"):
        await Journal.open(tmp_path, NoFault(), time)


async def test_a_full_disk_refuses_a_create_and_lives_on(journal: Journal):
    await create_running(journal, fence())
    await _limit_pages(journal, spare=0)
    with pytest.raises(NoSpace):
        await _create_many(journal)
    assert (await create(journal, fence())).phase is Phase.RUNNING
    await _limit_pages(journal, spare=1000)
    await create(journal, fence(uid="u9"), "m-9", msgspec.structs.replace(SPEC, cpus=0, memory_mib=1))


async def test_a_delete_on_a_full_disk_gives_up_the_ballast(tmp_path: Path, time: Time):
    journal = await Journal.open(tmp_path, NoFault(), time)
    try:
        await create_running(journal, fence())
        await journal.ensure_ballast()
        assert (tmp_path / "ballast").stat().st_size == 8 << 20
        failures = iter([True])

        def is_full(_db: sqlite3.Connection) -> None:
            if next(failures, False):
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error

        await journal.write(is_full, point="delete.intent", is_urgent=True)
        assert not (tmp_path / "ballast").exists()
    finally:
        await journal.close()


async def _create_many(journal: Journal) -> None:
    for n in range(200):
        await create(journal, fence(uid=f"v{n}"), f"n-{n}", msgspec.structs.replace(SPEC, memory_mib=1, cpus=0))


async def _limit_pages(journal: Journal, spare: int) -> None:
    """Make SQLite believe that the disk ends soon."""

    def limit(db: sqlite3.Connection) -> None:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + spare}")

    await journal._writer.write(limit)


CRASH = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from journal_orders import *
from fusevm.host.faults import KillAt

async def main():
    time = Time()
    journal = await Journal.open(Path({root!r}), KillAt({point!r}), time)
    machine = await create(journal, fence())
    machine = await journal.mark(machine, "create", "prepared")
    machine = await journal.mark(machine, "create", "booted")
    await journal.finish(msgspec.structs.replace(machine, phase=Phase.RUNNING), "create", "running", nothing)
    await journal.begin_delete("m-1", fence(action_seq=2), nothing)
    await journal.forget("m-1", "delete", "gone", nothing)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("point", "phase", "step"),
    [
        ("create.intent.writing", None, None),
        ("create.intent", Phase.CREATING, "intent"),
        ("create.prepared.writing", Phase.CREATING, "intent"),
        ("create.booted", Phase.CREATING, "booted"),
        ("create.running.writing", Phase.CREATING, "booted"),
        ("create.running", Phase.RUNNING, None),
        ("delete.intent.writing", Phase.RUNNING, None),
        ("delete.intent", Phase.DELETING, "intent"),
        ("delete.gone.writing", Phase.DELETING, "intent"),
        ("delete.gone", None, None),
    ],
)
async def test_a_crash_leaves_each_transaction_whole_or_absent(
    tmp_path: Path, time: Time, point: str, phase: Phase | None, step: str | None
):
    program = CRASH.format(here=str(Path(__file__).parent), root=str(tmp_path), point=point)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    journal = await Journal.open(tmp_path, NoFault(), time)
    try:
        entries = await journal.entries()
        assert [entry.machine.phase for entry in entries] == ([] if phase is None else [phase])
        operation = entries[0].operation if entries else None
        assert (operation.step if operation else None) == step
        state = await journal.render_state()
        assert len(state["reservations"]) == 2 * len(entries)
        is_deleted = point in ("delete.intent", "delete.gone.writing", "delete.gone")
        ended = [] if point == "create.intent.writing" else [int(is_deleted)]
        assert [row["ended"] for row in state["fences"]] == ended
    finally:
        await journal.close()


async def test_one_refused_transaction_of_a_batch_takes_nothing_from_the_others(journal: Journal):
    async def attempt(n: int) -> bool:
        try:
            await create(journal, fence(uid="same" if n % 2 else f"u{n}"), f"m-{n}")
        except Error:
            return False
        return True

    outcomes = await asyncio.gather(*(attempt(n) for n in range(20)))
    assert sum(outcomes) == 11
    assert len(await journal.entries()) == 11


async def test_nothing_is_begun_while_an_operation_is_open_but_a_delete(journal: Journal):
    await create_running(journal, fence())
    await journal.begin_stop("m-1", fence(action_seq=2), nothing)
    order = fence(action_seq=3)
    begin: list[Callable[[], Awaitable[object]]] = [
        lambda: journal.begin_start("m-1", order, LIMITS, NUMBERS, "cd" * 16, 0, nothing),
        lambda: journal.begin_stop("m-1", order, nothing),
        lambda: journal.begin_resize("m-1", order, LIMITS, Size(memory_mib=512, disk_bytes=0), nothing),
        lambda: journal.rewire("m-1", order, lambda _db, machine: machine, "network.changed", nothing),
    ]
    for one in begin:
        with pytest.raises(WrongState, match="its stop is not complete"):
            await one()
    (entry,) = await journal.entries()
    assert (entry.operation is not None, entry.machine.fence.action_seq) == (True, 2)
    await journal.begin_delete("m-1", order, nothing)
    operation = await journal.operation("m-1")
    assert operation is not None
    assert operation.kind == "delete"
