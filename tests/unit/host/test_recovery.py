"""What a daemon makes of the journal of one that died: every operation, at every step, with and without its VMM."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from fusevm.host.agent import ask_health
from fusevm.host.clock import SystemClock
from fusevm.host.daemon import Daemon
from fusevm.host.faults import NoFault
from fusevm.host.journal import Journal
from fusevm.host.rows import Draft
from fusevm.host.vmm.driver import Vmm
from fusevm.model.machine import Isolation, Machine, Phase
from fusevm.testing.host_world import NOTHING, SPEC, World, fence, order, until


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def nothing(_value: object) -> None:
    """No callback."""


@asynccontextmanager
async def dying(world: World) -> AsyncIterator[Journal]:
    """The journal of a daemon that will not get any further."""
    journal = await Journal.open(world.root / "data", NoFault(), SystemClock().now_ms)
    try:
        yield journal
    finally:
        await journal.close()


async def begin_create(world: World, journal: Journal) -> Machine:
    draft = Draft(
        id="m-1",
        spec=SPEC,
        image_digest="sha256:debian-12",
        kernel_digest="k",
        driver="fake",
        isolation=Isolation.NAMESPACE,
        nonce="ab" * 16,
        deadline_ms=SystemClock().now_ms() + 60_000,
    )
    limits, numbers = world.quarters.limits_now, world.quarters.numbers()
    return await journal.begin_create(draft, fence(), limits, numbers, nothing)


async def boot(world: World, machine: Machine) -> tuple[Machine, Vmm]:
    lodging = await world.quarters.prepare(machine)
    vmm = await world.driver.boot(lodging.plan)
    return msgspec.structs.replace(machine, vmm=vmm.process, address=lodging.address), vmm


async def settled(daemon: Daemon) -> list[Machine]:
    """The machines, once no operation is open and everybody has heard of it."""
    while True:
        entries = await daemon.journal.entries()
        records = daemon.machines.records()
        if all(entry.operation is None for entry in entries) and [entry.machine for entry in entries] == records:
            return records


async def die_creating(world: World, step: str) -> None:
    """A create gets this far, and no further."""
    async with dying(world) as journal:
        machine = await begin_create(world, journal)
        if step == "intent":
            return
        if step == "half prepared":
            world.quarters.occupied.add("m-1")
            return
        await world.quarters.prepare(machine)
        machine = await journal.mark(machine, "create", "prepared")
        if step == "prepared":
            return
        machine, _vmm = await boot(world, machine)
        if step == "unrecorded vmm":
            return
        machine = await journal.mark(machine, "create", "booted")
        if step == "booted":
            return
        world.driver.processes["m-1"].end("died meanwhile")


@pytest.mark.parametrize("step", ["intent", "half prepared", "prepared", "unrecorded vmm", "dead vmm"])
async def test_a_create_that_did_not_get_far_is_undone_and_can_be_repeated(world: World, step: str):
    await die_creating(world, step)
    async with world.daemon() as daemon:
        assert await settled(daemon) == []
        assert world.leftovers == NOTHING
        assert (await daemon.machines.create(order(), fence())).phase is Phase.RUNNING


async def test_a_create_whose_guest_boots_on_is_finished(world: World):
    await die_creating(world, "booted")
    async with world.daemon() as daemon:
        (machine,) = await settled(daemon)
        assert (machine.phase, machine.generation) == (Phase.RUNNING, 1)
        assert (await ask_health(await daemon.machines.guest("m-1", fence()))).nonce == machine.nonce
        assert [configure.hostname for configure in world.driver.processes["m-1"].agent.configured] == ["box"]
        assert await daemon.machines.create(order(), fence()) == machine
    assert world.driver.boots == 1


async def test_a_create_repeated_while_it_is_being_recovered_gets_its_machine(world: World):
    await die_creating(world, "booted")
    gate = world.driver.holds.hold("agent")
    async with world.daemon() as daemon:
        await world.driver.holds.reached("agent").wait()
        gate.set()
        assert (await daemon.machines.create(order(), fence())).phase is Phase.RUNNING
    assert world.driver.boots == 1


async def test_a_create_repeated_while_it_is_being_undone_is_made_anew(world: World):
    await die_creating(world, "prepared")
    async with world.daemon() as daemon:
        assert (await daemon.machines.create(order(), fence())).phase is Phase.RUNNING
    assert world.leftovers == ({"m-1"}, {"m-1"}, {"m-1"})


async def test_a_delete_overtakes_a_recovery(world: World):
    await die_creating(world, "booted")
    world.driver.holds.hold("agent")
    async with world.daemon() as daemon:
        await world.driver.holds.reached("agent").wait()
        await daemon.machines.delete("m-1", fence(action_seq=2))
        assert daemon.machines.records() == []
    assert world.leftovers == NOTHING


async def _running(world: World) -> None:
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())


@pytest.mark.parametrize("has_vmm", [True, False])
async def test_a_stop_is_finished(world: World, *, has_vmm: bool):
    await _running(world)
    async with dying(world) as journal:
        await journal.begin_stop("m-1", fence(action_seq=2), nothing)
    if not has_vmm:
        world.driver.processes["m-1"].end("killed")
    async with world.daemon() as daemon:
        (machine,) = await settled(daemon)
        assert (machine.phase, machine.slot, machine.error) == (Phase.STOPPED, -1, "")
    assert world.leftovers == (set(), set(), {"m-1"})


@pytest.mark.parametrize("has_vmm", [True, False])
async def test_a_delete_is_finished(world: World, *, has_vmm: bool):
    await _running(world)
    async with dying(world) as journal:
        await journal.begin_delete("m-1", fence(action_seq=2), nothing)
    if not has_vmm:
        world.driver.processes["m-1"].end("killed")
    async with world.daemon() as daemon:
        assert await settled(daemon) == []
    assert world.leftovers == NOTHING


@pytest.mark.parametrize("step", ["intent", "prepared", "booted"])
async def test_a_start_is_finished_or_failed_and_the_disk_is_kept(
    world: World, step: Literal["intent", "prepared", "booted"]
):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await daemon.machines.stop("m-1", fence())
    async with dying(world) as journal:
        deadline_ms = SystemClock().now_ms() + 60_000
        limits, numbers = world.quarters.limits_now, world.quarters.numbers()
        machine = await journal.begin_start("m-1", fence(), limits, numbers, "cd" * 16, deadline_ms, nothing)
        if step != "intent":
            await world.quarters.prepare(machine)
            machine = await journal.mark(machine, "start", "prepared")
        if step == "booted":
            machine, _vmm = await boot(world, machine)
            await journal.mark(machine, "start", "booted")
    async with world.daemon() as daemon:
        (machine,) = await settled(daemon)
        assert machine.generation == 2
        if step == "booted":
            assert machine.phase is Phase.RUNNING
            assert world.leftovers == ({"m-1"}, {"m-1"}, {"m-1"})
        else:
            assert (machine.phase, "the daemon ended" in machine.error) == (Phase.FAILED, True)
            assert world.leftovers == (set(), set(), {"m-1"})


async def test_an_exit_that_was_seen_but_not_cleaned_up_is(world: World):
    await _running(world)
    async with dying(world) as journal:
        (entry,) = await journal.entries()
        failed = msgspec.structs.replace(entry.machine, phase=Phase.FAILED, error="killed")
        await journal.observe(failed, "seen", nothing)
    world.driver.processes["m-1"].end("killed")
    async with world.daemon() as daemon:
        await until(lambda: daemon.machines.record("m-1").slot == -1)
    assert world.leftovers == (set(), set(), {"m-1"})


async def test_a_damaged_record_keeps_its_vmm_until_it_is_deleted(world: World):
    await _running(world)
    with sqlite3.connect(world.root / "data/journal.db") as db:
        db.execute("UPDATE machines SET record = x'00'")
    db.close()
    async with world.daemon() as daemon:
        (machine,) = daemon.machines.records()
        assert (machine.id, "damaged" in machine.error) == ("m-1", True)
        assert set(world.driver.processes) == {"m-1"}
        await daemon.machines.delete("m-1", fence(action_seq=2))
    assert world.leftovers == NOTHING
