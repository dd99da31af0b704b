"""What is open with a machine comes before whatever is ordered next; and nobody acts on what was open once."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fusevm.host.admission import Size
from fusevm.host.daemon import Daemon
from fusevm.host.quarantine import FIRST_S
from fusevm.model.errors import BootFailed, Internal, MachineNotFound, WrongState
from fusevm.model.machine import Phase
from fusevm.model.network import Network
from fusevm.testing.host_world import NOTHING, World, fence, order, until

GIB = 1 << 30
#: Longer than the pause before a first retry.
PAUSE_S = 1.5 * FIRST_S


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def busy(times: int = 1) -> list[Internal]:
    """A vacate that fails so often."""
    return [Internal(problem="its group does not go")] * times


async def fail_stop(world: World, daemon: Daemon, action_seq: int = 2) -> None:
    """A stop whose VMM ends, and whose quarters stay: its intent is open, its machine still `running`."""
    world.quarters.vacate_errors = busy()
    with pytest.raises(Internal, match="does not go"):
        await daemon.machines.stop("m-1", fence(action_seq=action_seq))
    assert daemon.machines.quarantined()["m-1"].problem.startswith("stop: ")


async def is_open(daemon: Daemon, kind: str) -> bool:
    operation = await daemon.journal.operation("m-1")
    return operation is not None and operation.kind == kind


async def test_a_retry_of_a_stop_leaves_the_machine_alone_that_was_started_since(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await fail_stop(world, daemon)
        assert (await daemon.machines.stop("m-1", fence(action_seq=2))).phase is Phase.STOPPED
        assert (await daemon.machines.start("m-1", fence(action_seq=3))).phase is Phase.RUNNING
        assert daemon.machines.quarantined() == {}
        process = world.driver.processes["m-1"]
        await asyncio.sleep(PAUSE_S)
        assert world.driver.processes["m-1"] is process
        assert daemon.machines.record("m-1").phase is Phase.RUNNING


async def test_a_retry_of_a_start_leaves_the_machine_alone_that_was_started_since(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await daemon.machines.stop("m-1", fence(action_seq=2))
        world.driver.boot_error = BootFailed(id="m-1", problem="its kernel panicked")
        world.quarters.vacate_errors = busy()
        with pytest.raises(BootFailed):
            await daemon.machines.start("m-1", fence(action_seq=3))
        assert await is_open(daemon, "start")
        world.driver.boot_error = None
        # What was open is undone, with the reason that it failed for.
        with pytest.raises(WrongState, match="stop it first"):
            await daemon.machines.start("m-1", fence(action_seq=3))
        assert "its kernel panicked" in daemon.machines.record("m-1").error
        await daemon.machines.stop("m-1", fence(action_seq=4))
        assert (await daemon.machines.start("m-1", fence(action_seq=5))).phase is Phase.RUNNING
        await asyncio.sleep(PAUSE_S)
        assert set(world.driver.processes) == {"m-1"}
        assert daemon.machines.record("m-1").phase is Phase.RUNNING


async def test_a_retry_that_comes_late_does_nothing(world: World):
    """It waits behind an order that finishes what it was to look at."""
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await fail_stop(world, daemon)
        gate = world.driver.holds.hold("boot")
        starting = asyncio.create_task(daemon.machines.start("m-1", fence(action_seq=3)))
        await world.driver.holds.reached("boot").wait()
        await asyncio.sleep(PAUSE_S)
        gate.set()
        assert (await starting).phase is Phase.RUNNING
        process = world.driver.processes["m-1"]
        await daemon.machines.tidy("m-1")
        assert world.driver.processes["m-1"] is process


async def test_a_start_after_a_failed_stop_starts_it(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await fail_stop(world, daemon)
        machine = await daemon.machines.start("m-1", fence(action_seq=3))
        assert (machine.phase, machine.generation) == (Phase.RUNNING, 2)
        assert set(world.driver.processes) == {"m-1"}


async def resize(world: World, daemon: Daemon) -> None:
    """A resize whose VMM ends, and whose disk is not grown."""
    world.quarters.grow_errors = busy()
    with pytest.raises(Internal, match="does not go"):
        await daemon.machines.resize("m-1", fence(action_seq=2), Size(memory_mib=0, disk_bytes=2 * GIB))
    assert world.quarters.sizes == {}


Next = Callable[[Daemon], Awaitable[object]]
FOLLOWERS: dict[str, Next] = {
    "stop": lambda daemon: daemon.machines.stop("m-1", fence(action_seq=3)),
    "start": lambda daemon: daemon.machines.start("m-1", fence(action_seq=3)),
    "resize": lambda daemon: daemon.machines.resize("m-1", fence(action_seq=3), Size(memory_mib=512, disk_bytes=0)),
    "network": lambda daemon: daemon.machines.set_network("m-1", fence(action_seq=3), Network(internet=False)),
    "snapshot": lambda daemon: daemon.snapshots.take("m-1", "s-1", fence(action_seq=3), live=False),
}


@pytest.mark.parametrize("follower", FOLLOWERS)
async def test_whatever_follows_a_failed_resize_finds_the_disk_grown(world: World, follower: str):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await resize(world, daemon)
        await FOLLOWERS[follower](daemon)
        assert world.quarters.sizes == {"m-1": 2 * GIB}
        assert await daemon.journal.operation("m-1") is None
        assert daemon.machines.quarantined() == {}


async def test_an_order_fails_with_what_keeps_the_last_one_open(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await resize(world, daemon)
        world.quarters.grow_errors = [Internal(problem="its disk cannot be grown")]
        with pytest.raises(Internal, match="cannot be grown"):
            await daemon.machines.start("m-1", fence(action_seq=3))
        assert await is_open(daemon, "resize")
        assert daemon.machines.quarantined()["m-1"].attempts == 2
        await until(lambda: daemon.machines.quarantined() == {})
        assert world.quarters.sizes == {"m-1": 2 * GIB}


async def test_an_order_to_a_machine_whose_create_cannot_be_undone_finds_it_gone_once_it_is(world: World):
    async with world.daemon() as daemon:
        world.driver.boot_error = BootFailed(id="m-1", problem="no")
        world.quarters.vacate_errors = busy()
        with pytest.raises(BootFailed):
            await daemon.machines.create(order(), fence())
        assert await is_open(daemon, "create")
        with pytest.raises(MachineNotFound):
            await daemon.machines.start("m-1", fence(action_seq=2))
        assert daemon.machines.records() == []
    assert world.leftovers == NOTHING


async def test_a_delete_does_not_wait_for_what_is_open(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await resize(world, daemon)
        await daemon.machines.delete("m-1", fence(action_seq=3))
        assert (daemon.machines.records(), world.quarters.sizes) == ([], {})
    assert world.leftovers == NOTHING


async def test_a_take_whose_snapshot_is_gone_is_taken_back_all_the_same(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await daemon.machines.stop("m-1", fence(action_seq=2))
    with contextlib.closing(sqlite3.connect(world.root / "data/journal.db", isolation_level=None)) as db:
        db.execute("INSERT INTO operations VALUES ('m-1', 'snapshot', 'intent', 0, 0)")
    async with world.daemon() as daemon:
        assert (await daemon.machines.start("m-1", fence(action_seq=3))).phase is Phase.RUNNING
        assert await daemon.journal.operation("m-1") is None


async def test_orders_to_a_machine_that_cannot_be_cleaned_up_are_answered(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.quarters.vacate_errors = busy(1_000)
        world.driver.processes["m-1"].end("gone")
        await until(lambda: "m-1" in daemon.machines.quarantined())
        assert (daemon.machines.record("m-1").phase, daemon.machines.record("m-1").error) == (Phase.FAILED, "gone")
        async with asyncio.timeout(30):
            with pytest.raises(Internal, match="does not go"):
                await daemon.machines.stop("m-1", fence(action_seq=2))
            with pytest.raises(Internal, match="does not go"):
                await daemon.machines.tidy("m-1")
        world.quarters.vacate_errors.clear()
        assert (await daemon.machines.stop("m-1", fence(action_seq=3))).phase is Phase.STOPPED
        assert (daemon.machines.quarantined(), world.leftovers) == ({}, (set(), set(), {"m-1"}))


async def test_an_end_that_cannot_be_written_down_is_told_later_with_its_reason(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        observe, failures = daemon.journal.observe, busy()

        async def failing(*args: object, **more: object) -> object:
            if failures:
                raise failures.pop()
            return await observe(*args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(daemon.journal, "observe", failing)
        world.driver.processes["m-1"].end("killed by the kernel")
        await until(lambda: daemon.machines.record("m-1").slot == -1)
        assert daemon.machines.record("m-1").error == "killed by the kernel"
        await until(lambda: daemon.machines.quarantined() == {})


async def test_a_machine_without_a_slot_is_cleaned_up_again_too(world: World, monkeypatch: pytest.MonkeyPatch):
    numbers = world.quarters.numbers()
    monkeypatch.setattr(world.quarters, "numbers", lambda: type(numbers)(uid_base=numbers.uid_base, uid_count=9))
    async with world.daemon() as daemon:
        assert (await daemon.machines.create(order(), fence())).slot == -1
        world.quarters.vacate_errors = busy()
        world.driver.processes["m-1"].end("gone")
        await until(lambda: "m-1" in daemon.machines.quarantined())
        await until(lambda: daemon.machines.quarantined() == {})
    assert world.leftovers == (set(), set(), {"m-1"})


async def test_a_journal_that_cannot_be_read_for_a_while_ends_no_other_machine(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), fence("u1"))
        await daemon.machines.create(order("m-2"), fence("u2"))
        operation, failures = daemon.journal.operation, [sqlite3.OperationalError("disk I/O error")] * 3

        async def failing(machine_id: str) -> object:
            if failures:
                raise failures.pop()
            return await operation(machine_id)

        monkeypatch.setattr(daemon.journal, "operation", failing)
        world.quarters.vacate_errors = busy()
        with pytest.raises(Internal, match="does not go"):
            await daemon.machines.stop("m-1", fence("u1", action_seq=2))
        assert daemon.machines.quarantined()["m-1"].problem.startswith("unknown: ")
        assert (await daemon.machines.stop("m-2", fence("u2", action_seq=2))).phase is Phase.STOPPED
        await until(lambda: daemon.machines.record("m-1").phase is Phase.STOPPED)
        assert failures == []
        await until(lambda: daemon.machines.quarantined() == {})


async def test_a_task_that_fails_where_nobody_thought_of_it_runs_again(world: World, monkeypatch: pytest.MonkeyPatch):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), fence("u1"))
        await daemon.machines.create(order("m-2"), fence("u2"))
        operation, failures = daemon.journal.operation, [KeyError("a bug")]

        async def failing(machine_id: str) -> object:
            if failures:
                raise failures.pop()
            return await operation(machine_id)

        monkeypatch.setattr(daemon.journal, "operation", failing)
        world.quarters.vacate_errors = busy()
        async with asyncio.timeout(30):
            with pytest.raises(Internal, match="does not go"):
                await daemon.machines.stop("m-1", fence("u1", action_seq=2))
        await until(lambda: daemon.machines.record("m-1").phase is Phase.STOPPED)
        assert daemon.machines.record("m-2").phase is Phase.RUNNING


async def test_a_network_that_cannot_be_changed_keeps_no_order_waiting(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.quarters.rewire_error = Internal(problem="nft says no")
        with pytest.raises(Internal, match="nft says no"):
            await daemon.machines.set_network("m-1", fence(action_seq=2), Network(internet=False))
        await daemon.snapshots.take("m-1", "s-1", fence(action_seq=3), live=False)
        # Nothing of it is forgotten, though an order has succeeded.
        await until(lambda: daemon.machines.quarantined()["m-1"].attempts == 2)
        assert (await daemon.machines.stop("m-1", fence(action_seq=4))).phase is Phase.STOPPED
        assert daemon.machines.quarantined() == {}
