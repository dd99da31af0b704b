"""A machine's life: create, stop, start, delete, exit, restart of the daemon; and the ways in which they collide."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from fusevm.host.agent import ask_health
from fusevm.host.surroundings import Remains
from fusevm.host.vmm.exit_reason import AWAY
from fusevm.model.errors import (
    BadField,
    BootFailed,
    CommandFailed,
    Error,
    HostFull,
    ImageNotFound,
    Internal,
    MachineExists,
    MachineNotFound,
    ShuttingDown,
    StaleIncarnation,
    WrongState,
)
from fusevm.model.machine import Phase
from fusevm.testing.host_world import NOTHING, SPEC, World, fence, order, until


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def phases(world: World) -> list[str]:
    return [event.phase if event.kind == "phase" else event.kind for event in world.events]


# -- create ----------------------------------------------------------------------------------------------------------


async def test_a_create_returns_when_the_agent_is_configured(world: World):
    async with world.daemon() as daemon:
        machine = await daemon.machines.create(order(), fence())
        agent = world.driver.processes["m-1"].agent
        (configure,) = agent.configured
    assert machine.phase is Phase.RUNNING
    assert machine.address == "10.0.0.2"
    assert machine.vmm == world.driver.processes["m-1"].identity
    assert machine.timings.host_ms >= machine.timings.boot_ms + machine.timings.agent_ms
    assert configure.hostname == "box"
    assert configure.generation == 1
    assert configure.time_unix_ns > 1_700_000_000 * 10**9
    assert len(configure.entropy_b64) >= 64
    assert phases(world) == ["creating", "running"]


async def test_a_repeated_create_returns_the_same_machine(world: World):
    async with world.daemon() as daemon:
        first = await daemon.machines.create(order(), fence())
        again = await daemon.machines.create(order(), fence())
    assert again == first
    assert world.driver.boots == 1


async def test_a_create_repeated_while_it_is_under_way_waits_for_it(world: World):
    gate = world.driver.holds.hold("agent")
    async with world.daemon() as daemon:
        both = [asyncio.create_task(daemon.machines.create(order(), fence())) for _ in range(2)]
        await world.driver.holds.reached("agent").wait()
        gate.set()
        first, second = await asyncio.gather(*both)
    assert first == second
    assert world.driver.boots == 1


async def test_a_repeated_create_does_not_need_its_image_any_more(world: World):
    async with world.daemon() as daemon:
        made = await daemon.machines.create(order(), fence())
        world.quarters.resolve = _no_image
        assert await daemon.machines.create(order(), fence()) == made


async def _no_image(_spec):
    raise ImageNotFound(image="gone", known="none")


async def test_a_create_with_other_settings_conflicts(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        with pytest.raises(MachineExists):
            await daemon.machines.create(order(spec=msgspec.structs.replace(SPEC, cpus=2)), fence())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cpus": 0}, "cpus"),
        ({"cpus": 33}, "cpus"),
        ({"memory_mib": 0}, "memory_mib"),
        ({"disk_bytes": 5}, "disk_bytes"),
        ({"image": ""}, "image"),
        ({"hostname": "a b"}, "hostname"),
        ({"hostname": "x fuse.nonce=1"}, "hostname"),
        ({"hostname": "-a"}, "hostname"),
        ({"env": {"A=B": "c"}}, "env"),
        ({"env": {"A": "c\0"}}, "env"),
    ],
)
async def test_a_machine_that_cannot_be_is_refused(world: World, change: dict, field: str):
    async with world.daemon() as daemon:
        with pytest.raises(BadField, match=field):
            await daemon.machines.create(order(spec=msgspec.structs.replace(SPEC, **change)), fence())
    assert world.events == []


@pytest.mark.parametrize("machine_id", ["..", ".", "a/b", "", "A", "m_1", "x" * 64, "-a"])
async def test_ids_are_checked_before_anything_else(world: World, machine_id: str):
    async with world.daemon() as daemon:
        for attempt in (
            daemon.machines.create(order(machine_id), fence()),
            daemon.machines.delete(machine_id, fence()),
            daemon.machines.stop(machine_id, fence()),
            daemon.machines.guest(machine_id, fence()),
        ):
            with pytest.raises(BadField, match="machine_id"):
                await attempt
    assert world.leftovers == NOTHING


async def test_a_refused_create_has_no_effects(world: World):
    world.quarters.limits_now = msgspec.structs.replace(world.quarters.limits_now, memory_mib=100)
    async with world.daemon() as daemon:
        with pytest.raises(HostFull):
            await daemon.machines.create(order(), fence())
        with pytest.raises(ImageNotFound):
            await daemon.machines.create(order(spec=msgspec.structs.replace(SPEC, image="missing")), fence())
        assert daemon.machines.records() == []
    assert world.leftovers == NOTHING
    assert world.driver.boots == 0


@pytest.mark.parametrize("failure", ["quarters", "driver", "exit", "nonce", "protocol", "silence"])
async def test_a_failed_create_leaves_nothing_and_can_be_repeated(world: World, failure: str):
    world.quarters.left = Remains(console_tail="fused: FATAL: no disk")
    match failure:
        case "quarters":
            world.quarters.prepare_error = CommandFailed(command="ip", exit_status=1, stderr="no")
        case "driver":
            world.driver.boot_error = BootFailed(id="m-1", problem="no such kernel")
        case "exit":
            world.driver.is_mute = True
        case "nonce":
            world.driver.is_impostor = True
        case "protocol":
            world.driver.protocol = "9.0"
        case "silence":
            world.driver.is_mute = True
    async with world.daemon() as daemon:
        timeout_ms = 1000 if failure == "silence" else 60_000
        creating = asyncio.create_task(daemon.machines.create(order(boot_timeout_ms=timeout_ms), fence()))
        if failure == "exit":
            await until(lambda: "m-1" in world.driver.processes)
            world.driver.processes["m-1"].end("the guest's kernel panicked")
        with pytest.raises(CommandFailed if failure == "quarters" else BootFailed) as caught:
            await creating
        words = {
            "quarters": "ip",
            "driver": "no such kernel",
            "exit": "panicked",
            "nonce": "another guest",
            "protocol": "protocol '9.0'",
            "silence": "did not answer within 1 s",
        }
        assert words[failure] in caught.value.message
        if failure in ("exit", "nonce", "protocol", "silence"):
            assert "FATAL: no disk" in caught.value.message
        assert world.leftovers == NOTHING
        assert daemon.machines.records() == []
        state = await daemon.journal.render_state()
        assert (state["entries"], state["reservations"]) == ([], [])

        world.quarters.prepare_error = world.driver.boot_error = None
        world.driver.is_mute = world.driver.is_impostor = False
        world.driver.protocol = "1.0"
        assert (await daemon.machines.create(order(), fence())).phase is Phase.RUNNING
    assert phases(world)[:2] == ["creating", "gone"]


async def test_an_agent_of_the_last_major_is_still_spoken_with(world: World):
    world.driver.protocol = "0.9"
    async with world.daemon() as daemon:
        assert (await daemon.machines.create(order(), fence())).phase is Phase.RUNNING


async def test_a_client_that_goes_away_does_not_cancel_a_create(world: World):
    gate = world.driver.holds.hold("agent")
    async with world.daemon() as daemon:
        creating = asyncio.create_task(daemon.machines.create(order(), fence()))
        await world.driver.holds.reached("agent").wait()
        creating.cancel()
        gate.set()
        await until(lambda: daemon.machines.record("m-1").phase is Phase.RUNNING)


async def test_many_creates_at_once(world: World):
    async with world.daemon() as daemon:
        made = await asyncio.gather(*(daemon.machines.create(order(f"m-{n}"), fence(uid=f"u{n}")) for n in range(30)))
        assert len({machine.slot for machine in made}) == 30
        await asyncio.gather(*(daemon.machines.delete(f"m-{n}", fence(uid=f"u{n}")) for n in range(30)))
        assert daemon.machines.records() == []
    assert world.leftovers == NOTHING


async def test_what_could_not_be_undone_stays_in_the_journal_and_is_undone_later(world: World, monkeypatch):
    monkeypatch.setattr("fusevm.host.quarantine.FIRST_S", 0.05)
    world.driver.boot_error = BootFailed(id="m-1", problem="no")
    world.quarters.vacate_errors = [Internal(problem="busy"), Internal(problem="still busy")]
    async with world.daemon() as daemon:
        with pytest.raises(BootFailed) as caught:
            await daemon.machines.create(order(), fence())
        assert any("busy" in note for note in caught.value.__notes__)
        state = await daemon.journal.render_state()
        assert state["entries"][0]["operation"]["kind"] == "create"
        assert len(state["reservations"]) == 2
        with pytest.raises(Error, match="cleaned up"):
            await daemon.machines.create(order(), fence())
        world.driver.boot_error = None
        await until(lambda: daemon.machines.records() == [])
        assert world.leftovers == NOTHING
        assert (await daemon.machines.create(order(), fence())).phase is Phase.RUNNING


# -- delete ----------------------------------------------------------------------------------------------------------


async def test_a_delete_leaves_nothing(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await daemon.machines.delete("m-1", fence(action_seq=2))
        await daemon.machines.delete("m-1", fence(action_seq=2))
        with pytest.raises(MachineNotFound):
            daemon.machines.record("m-1")
    assert world.leftovers == NOTHING
    assert phases(world) == ["creating", "running", "deleting", "gone"]


@pytest.mark.parametrize("step", ["prepare", "boot", "agent"])
async def test_a_delete_does_not_wait_for_a_boot(world: World, step: str):
    holds = world.quarters.holds if step == "prepare" else world.driver.holds
    holds.hold(step)
    async with world.daemon() as daemon:
        creating = asyncio.create_task(daemon.machines.create(order(), fence()))
        await holds.reached(step).wait()
        async with asyncio.timeout(60):
            await daemon.machines.delete("m-1", fence(action_seq=2))
        with pytest.raises(StaleIncarnation):
            await creating
        with pytest.raises(StaleIncarnation):
            await daemon.machines.create(order(), fence(action_seq=3))
        assert daemon.machines.records() == []
    assert world.leftovers == NOTHING


async def test_deletes_at_the_same_time_all_succeed(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await asyncio.gather(*(daemon.machines.delete("m-1", fence(action_seq=2)) for _ in range(5)))
    assert world.leftovers == NOTHING


async def test_a_delete_of_an_unknown_machine_keeps_its_late_create_dead(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.delete("m-1", fence(action_seq=2))
        with pytest.raises(StaleIncarnation):
            await daemon.machines.create(order(), fence())
    assert world.driver.boots == 0


async def test_a_delete_that_cannot_finish_is_told_and_finished_later(world: World, monkeypatch):
    monkeypatch.setattr("fusevm.host.quarantine.FIRST_S", 0.02)
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.quarters.vacate_errors = [Internal(problem="busy")]
        with pytest.raises(Internal, match="busy"):
            await daemon.machines.delete("m-1", fence(action_seq=2))
        assert daemon.machines.record("m-1").phase is Phase.DELETING
        await until(lambda: daemon.machines.records() == [])
    assert world.leftovers == NOTHING


async def test_a_machine_of_the_contract_can_be_made_again(world: World):
    async with world.daemon() as daemon:
        for generation in (1, 2):
            machine = await daemon.machines.create(order(), None)
            assert machine.fence.incarnation == generation
            await daemon.machines.delete("m-1", None)
    assert world.leftovers == NOTHING


# -- stop and start --------------------------------------------------------------------------------------------------


async def test_a_stopped_machine_keeps_its_disk_and_starts_again(world: World):
    async with world.daemon() as daemon:
        first = await daemon.machines.create(order(), fence())
        stopped = await daemon.machines.stop("m-1", fence(action_seq=2))
        assert (stopped.phase, stopped.slot, stopped.vmm) == (Phase.STOPPED, -1, None)
        assert world.leftovers == (set(), set(), {"m-1"})
        with pytest.raises(WrongState):
            await daemon.machines.guest("m-1", fence())
        assert (await daemon.machines.stop("m-1", fence(action_seq=3))).phase is Phase.STOPPED
        started = await daemon.machines.start("m-1", fence(action_seq=4))
        assert (started.phase, started.generation) == (Phase.RUNNING, 2)
        assert started.nonce != first.nonce
        assert (await daemon.machines.start("m-1", fence(action_seq=5))).generation == 2
    assert phases(world) == ["creating", "running", "stopped", "creating", "running"]


async def test_a_guest_that_does_not_end_is_killed(world: World, monkeypatch):
    monkeypatch.setattr("fusevm.host.held_vmm.SHUTDOWN_GRACE_S", 0.05)
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.driver.processes["m-1"].agent.ignores_shutdown = True
        stopped = await daemon.machines.stop("m-1", fence(action_seq=2))
    assert stopped.phase is Phase.STOPPED
    assert world.leftovers == (set(), set(), {"m-1"})


async def test_a_start_that_fails_keeps_the_disk(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await daemon.machines.stop("m-1", fence())
        world.driver.boot_error = BootFailed(id="m-1", problem="no")
        with pytest.raises(BootFailed):
            await daemon.machines.start("m-1", fence())
        failed = daemon.machines.record("m-1")
        assert (failed.phase, failed.slot) == (Phase.FAILED, -1)
        assert world.leftovers == (set(), set(), {"m-1"})
        with pytest.raises(WrongState, match="stop it first"):
            await daemon.machines.start("m-1", fence())
        world.driver.boot_error = None
        assert (await daemon.machines.stop("m-1", fence())).phase is Phase.STOPPED
        assert (await daemon.machines.start("m-1", fence())).phase is Phase.RUNNING


async def test_a_stop_waits_for_the_create_before_it(world: World):
    gate = world.driver.holds.hold("agent")
    async with world.daemon() as daemon:
        creating = asyncio.create_task(daemon.machines.create(order(), fence()))
        await world.driver.holds.reached("agent").wait()
        stopping = asyncio.create_task(daemon.machines.stop("m-1", fence(action_seq=2)))
        await asyncio.sleep(0)
        gate.set()
        assert (await creating).phase is Phase.RUNNING
        assert (await stopping).phase is Phase.STOPPED


async def test_a_delete_overtakes_a_stop(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.driver.processes["m-1"].agent.ignores_shutdown = True
        stopping = asyncio.create_task(daemon.machines.stop("m-1", fence(action_seq=2)))
        await until(lambda: "POST /shutdown" in world.driver.processes["m-1"].agent.requests)
        async with asyncio.timeout(60):
            await daemon.machines.delete("m-1", fence(action_seq=3))
        with pytest.raises(Error):
            await stopping
    assert world.leftovers == NOTHING


# -- exits -----------------------------------------------------------------------------------------------------------


async def test_a_vmm_that_dies_is_noticed_and_its_disk_kept(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.driver.processes["m-1"].end("the VMM was killed by SIGKILL")
        await until(lambda: daemon.machines.record("m-1").slot == -1)
        failed = daemon.machines.record("m-1")
        assert (failed.phase, failed.error) == (Phase.FAILED, "the VMM was killed by SIGKILL")
        assert world.leftovers == (set(), set(), {"m-1"})
        await daemon.machines.delete("m-1", fence(action_seq=2))
    assert world.leftovers == NOTHING
    assert [event.error for event in world.events if event.phase == "failed"] == ["the VMM was killed by SIGKILL"]


async def test_a_guest_that_shuts_itself_down_is_stopped_not_failed(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.driver.processes["m-1"].end("the guest shut down")
        await until(lambda: daemon.machines.record("m-1").phase is Phase.STOPPED)
        await until(lambda: daemon.machines.record("m-1").slot == -1)
        assert (await daemon.machines.start("m-1", fence())).generation == 2


async def test_what_an_exit_left_is_removed_until_it_is_gone(world: World, monkeypatch):
    monkeypatch.setattr("fusevm.host.quarantine.FIRST_S", 0.01)
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.quarters.vacate_errors = [Internal(problem="busy")] * 3
        world.driver.processes["m-1"].end("gone")
        await until(lambda: daemon.machines.record("m-1").slot == -1)
    assert world.leftovers == (set(), set(), {"m-1"})


# -- restarts --------------------------------------------------------------------------------------------------------


async def test_machines_outlive_the_daemon_and_are_adopted(world: World):
    async with world.daemon() as daemon:
        before = await daemon.machines.create(order(), fence())
    assert set(world.driver.processes) == {"m-1"}
    async with world.daemon() as daemon:
        vmm = await daemon.machines.guest("m-1", fence())
        assert (await ask_health(vmm)).nonce == before.nonce
        assert daemon.machines.record("m-1") == before
        world.driver.processes["m-1"].end("later")
        await until(lambda: daemon.machines.record("m-1").phase is Phase.FAILED)
    assert world.driver.boots == 1


@pytest.mark.parametrize(("boot_id", "words"), [("another", "host rebooted"), (None, f"unknown: {AWAY}")])
async def test_a_vmm_that_ended_meanwhile_is_a_failed_machine(world: World, boot_id: str | None, words: str):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
    world.driver.processes["m-1"].end("unseen")
    world.boot_id = boot_id or world.boot_id
    async with world.daemon() as daemon:
        await until(lambda: daemon.machines.record("m-1").slot == -1)
        failed = daemon.machines.record("m-1")
        assert (failed.phase, failed.error) == (Phase.FAILED, words)
        await daemon.machines.stop("m-1", fence())
        assert (await daemon.machines.start("m-1", fence())).phase is Phase.RUNNING


async def test_a_foreign_guest_on_the_channel_is_not_adopted(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
    world.driver.processes["m-1"].agent.nonce = "somebody else"
    async with world.daemon() as daemon:
        await until(lambda: daemon.machines.record("m-1").phase is Phase.FAILED)
        assert "another guest" in daemon.machines.record("m-1").error
    assert set(world.driver.processes) == set()


async def test_a_silent_guest_is_left_alone(world: World, monkeypatch):
    monkeypatch.setattr("fusevm.host.adoption.ADOPTION_TIMEOUT_S", 0.05)
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
    world.driver.is_mute = True
    async with world.daemon() as daemon:
        assert await daemon.machines.guest("m-1", fence())
        assert daemon.machines.record("m-1").phase is Phase.RUNNING


@pytest.mark.parametrize("step", ["prepare", "boot", "agent"])
async def test_a_stopping_daemon_undoes_creates_that_are_under_way(world: World, step: str):
    holds = world.quarters.holds if step == "prepare" else world.driver.holds
    holds.hold(step)
    async with world.daemon() as daemon:
        creating = asyncio.create_task(daemon.machines.create(order(), fence()))
        await holds.reached(step).wait()
    with pytest.raises(ShuttingDown):
        await creating
    assert world.leftovers == NOTHING
    holds.hold(step).set()
    async with world.daemon() as daemon:
        assert daemon.machines.records() == []
        assert (await daemon.machines.create(order(), fence())).phase is Phase.RUNNING


async def test_a_closed_daemon_takes_no_orders(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
    for attempt in (
        daemon.machines.create(order("m-2"), fence(uid="u2")),
        daemon.machines.delete("m-1", fence(action_seq=2)),
    ):
        with pytest.raises(ShuttingDown):
            await attempt


async def test_a_broken_machine_keeps_no_other_from_being_taken_up(world: World, monkeypatch):
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), fence(uid="u1"))
        await daemon.machines.create(order("m-2"), fence(uid="u2"))
    adopt = world.driver.adopt

    async def broken(plan, process):
        if plan.machine_id == "m-1":
            raise ZeroDivisionError("a bug")
        return await adopt(plan, process)

    monkeypatch.setattr(world.driver, "adopt", broken)
    monkeypatch.setattr("fusevm.host.quarantine.FIRST_S", 0.02)
    async with world.daemon() as daemon:
        assert await daemon.machines.guest("m-2", fence(uid="u2"))
        monkeypatch.setattr(world.driver, "adopt", adopt)
        assert await daemon.machines.guest("m-1", fence(uid="u1"))


async def test_a_task_with_a_bug_is_restarted(world: World, monkeypatch):
    monkeypatch.setattr("fusevm.host.quarantine.FIRST_S", 0.01)
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        task = daemon.machines._tasks["m-1"]
        take = task._mailbox.take
        failures = ["once"]

        async def broken():
            if failures:
                failures.clear()
                raise ZeroDivisionError("a bug")
            return await take()

        monkeypatch.setattr(task._mailbox, "take", broken)
        await daemon.machines.stop("m-1", fence(action_seq=2))  # wakes the real `take` one last time
        await until(lambda: not failures)
        assert (await daemon.machines.start("m-1", fence(action_seq=3))).phase is Phase.RUNNING
