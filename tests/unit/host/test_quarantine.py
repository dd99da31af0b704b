"""A machine that cannot be helped now: tried again after longer and longer pauses, told, and in nobody's way."""

import contextlib
import sqlite3
from pathlib import Path

import pytest

from fusevm.host.daemon import Daemon
from fusevm.host.quarantine import FIRST_S, LONGEST_S, LONGEST_TEXT, BackOff
from fusevm.host.render import render_machine
from fusevm.model.errors import Internal
from fusevm.model.machine import Phase
from fusevm.testing.host_world import NOTHING, World, fence, order, until


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def quarantined(daemon: Daemon) -> str:
    """The gauge."""
    lines = daemon.metrics.render().decode().splitlines()
    return next(line for line in lines if line.startswith("fuse_host_machines_quarantined "))


class Clock:
    """A clock that stands where it was put."""

    def __init__(self) -> None:
        self.at_ms = 1_000

    def now_ms(self) -> int:
        return self.at_ms


def test_pauses_double_up_to_a_limit_and_begin_anew_after_a_success():
    back_off = BackOff(Clock())
    pauses = [back_off.fail("no") for _try in range(8)]
    assert pauses[:3] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert pauses[-1] == LONGEST_S
    back_off.succeed()
    assert (back_off.state, back_off.fail("no")) == (None, FIRST_S)


def test_it_says_since_when_how_often_why_and_until_when():
    clock = Clock()
    back_off = BackOff(clock)
    back_off.fail("first")
    clock.at_ms = 5_000
    back_off.fail("second" * LONGEST_TEXT)
    state = back_off.state
    assert state is not None
    assert (state.since_ms, state.attempts, state.retry_at_ms) == (1_000, 2, 7_000)
    assert (state.problem[:6], len(state.problem)) == ("second", LONGEST_TEXT)
    back_off.give_up("nothing helps")
    assert back_off.state is not None
    assert (back_off.state.attempts, back_off.state.retry_at_ms) == (3, None)


async def test_a_broken_machine_is_told_and_keeps_nobody_else_waiting(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), fence("u1"))
        world.quarters.vacate_errors = [Internal(problem="its group does not go")] * 2
        world.driver.processes["m-1"].end("gone")
        await until(lambda: "m-1" in daemon.machines.quarantined())
        body = render_machine(daemon.machines.record("m-1"), daemon.machines.quarantined()["m-1"])
        assert body.quarantine is not None
        assert "its group does not go" in body.quarantine.problem
        assert body.quarantine.retry_at > body.quarantine.since
        assert quarantined(daemon).endswith(" 1.0")
        # Sweeps leave it alone: its own task sees to it.
        assert daemon.machines.claims()["m-1"].must == frozenset()
        assert (await daemon.machines.create(order("m-2"), fence("u2"))).phase is Phase.RUNNING
        await until(lambda: daemon.machines.record("m-1").slot == -1)
        await until(lambda: daemon.machines.quarantined() == {})
        assert quarantined(daemon).endswith(" 0.0")
        assert render_machine(daemon.machines.record("m-1")).quarantine is None


async def test_a_delete_that_fails_is_in_quarantine_until_it_succeeds(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.quarters.vacate_errors = [Internal(problem="busy")]
        with pytest.raises(Internal, match="busy"):
            await daemon.machines.delete("m-1", fence(action_seq=2))
        assert daemon.machines.quarantined()["m-1"].problem.startswith("delete: ")
        # Whoever orders it does not have to wait for the pause.
        await daemon.machines.delete("m-1", fence(action_seq=2))
        assert (daemon.machines.quarantined(), world.leftovers) == ({}, NOTHING)


@pytest.mark.parametrize(
    "damage",
    [
        "record = x'00'",
        "record = x'7b7d'",
        "record = x'7b226964223a22ff227d'",
        "phase = 'of a newer daemon', record = x'00'",
    ],
    ids=["no JSON", "fields missing", "no UTF-8", "unknown phase"],
)
async def test_a_record_that_cannot_be_read_costs_the_start_nothing(world: World, damage: str):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), fence("u1"))
        await daemon.machines.create(order("m-2"), fence("u2"))
    with contextlib.closing(sqlite3.connect(world.root / "data/journal.db", isolation_level=None)) as db:
        db.execute(f"UPDATE machines SET {damage} WHERE id = 'm-1'")
    async with world.daemon() as daemon:
        assert (await daemon.machines.create(order("m-3"), fence("u3"))).phase is Phase.RUNNING
        await until(lambda: daemon.machines.record("m-2").phase is Phase.RUNNING)
        state = daemon.machines.quarantined()["m-1"]
        assert ("damaged" in state.problem, state.retry_at_ms) == (True, None)
        assert "m-1" in world.driver.processes
        await daemon.machines.delete("m-1", fence("u1", action_seq=2))
        assert "m-1" not in world.driver.processes
        assert daemon.machines.quarantined() == {}
