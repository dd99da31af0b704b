"""Snapshots of a daemon with a fake VMM: real journal, real bytes, small disks."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from snapshot_daemon import bytes_of, hold_agent, make, serving_daemon

from fusevm.host.images.collect import users_in_journal
from fusevm.model.errors import (
    GuestUnreachable,
    HostFull,
    MachineNotFound,
    NotSupported,
    SnapshotFailed,
    SnapshotNotFound,
    StaleIncarnation,
    WrongCluster,
    WrongState,
)
from fusevm.model.machine import DiskSeed, Machine, Phase
from fusevm.testing.fake_disks import SIZE
from fusevm.testing.host_world import SPEC, World, fence, order, until
from fusevm.wire.host_api import CLUSTER_HEADER


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# -- taking ----------------------------------------------------------------------------------------------------------


async def test_the_answer_is_the_contracts(world: World) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        world.disks.write("m-1", b"content")
        answer = await http.post("/machines/m-1/snapshots", json={"snapshot_id": "s-1"})
        assert answer.status_code == 201
        body = answer.json()
        (artifact,) = body["artifacts"]
        assert (artifact["id"], artifact["kind"]) == ("disk-system", "disk")
        assert {"id", "machine_id", "created_at"} <= body["snapshot"].keys()
        assert body["snapshot"]["consistency"] == "frozen"
        shown = (await http.get("/snapshots/s-1")).json()
        assert shown["snapshot"] == body["snapshot"]
        for url in ("/machines/m-1/snapshots", "/snapshots"):
            assert (await http.get(url)).json() == {"snapshots": [body["snapshot"]]}
        assert (await http.get("/machines/m-2/snapshots")).status_code == 404
        assert (await http.delete("/snapshots/s-1")).status_code == 204
        assert (await http.get("/snapshots/s-1")).status_code == 404
        assert bytes_of(world) == set()


@pytest.mark.parametrize("bad", ["..", ".", "", "a/b", "../m-1", "A", "a_b", "x" * 64, "%2e%2e"])
async def test_an_id_that_could_be_a_path_is_refused(world: World, bad: str) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        answers = [
            await http.post("/machines/m-1/snapshots", json={"snapshot_id": bad}),
            await http.post("/machines/m-1/restore", json={"snapshot_id": bad}),
            await http.delete(f"/snapshots/{bad}"),
            await http.get(f"/snapshots/{bad}/artifacts/disk-system"),
            await http.post(f"/snapshots/{bad}/restore", json={"machine_id": "m-2", "local_snapshot": {}}),
        ]
        assert all(answer.status_code in (307, 400, 404, 405) for answer in answers)
        assert answers[0].json()["details"]["reason"] == "bad_field"
        assert bytes_of(world) == set()


async def test_an_id_of_another_machine_is_a_conflict(world: World) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        await make(daemon, "m-2")
        body = {"snapshot_id": "s-1"}
        assert (await http.post("/machines/m-1/snapshots", json=body)).status_code == 201
        assert (await http.post("/machines/m-1/snapshots", json=body)).status_code == 201
        again = await http.post("/machines/m-2/snapshots", json=body)
        assert (again.status_code, again.json()["details"]["reason"]) == (409, "snapshot_exists")


async def test_a_running_guest_is_held_still_only_for_the_copy(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        agent = world.driver.processes["m-1"].agent
        taken = await daemon.snapshots.take("m-1", "s-1", None, live=False)
        said = [line for line in agent.requests if line in ("POST /quiesce", "POST /thaw")]
        assert said == ["POST /quiesce", "POST /thaw"]
        assert (taken.consistency.value, taken.agent_version, agent.is_frozen) == ("frozen", "fake", False)


async def test_a_stopped_machine_needs_no_guest(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.machines.stop("m-1", None)
        assert (await daemon.snapshots.take("m-1", "s-1", None, live=False)).consistency.value == "stopped"


async def test_a_guest_that_went_on_writing_gives_no_snapshot(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        world.driver.processes["m-1"].agent.freeze_expires = True
        with pytest.raises(SnapshotFailed, match="went on writing"):
            await daemon.snapshots.take("m-1", "s-1", None, live=False)
        assert (await daemon.snapshots.load_all(), bytes_of(world)) == ([], set())
        world.driver.processes["m-1"].agent.freeze_expires = False
        await daemon.snapshots.take("m-1", "s-1", None, live=False)


async def test_an_order_that_comes_as_the_machine_goes_is_answered(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        deleting = asyncio.create_task(daemon.machines.delete("m-1", None))
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))
        await deleting
        with pytest.raises((MachineNotFound, StaleIncarnation)):
            await taking


async def test_what_cannot_be_taken_is_said(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        agent = world.driver.processes["m-1"].agent
        agent.cannot_freeze = True
        with pytest.raises(NotSupported, match="stop it first"):
            await daemon.snapshots.take("m-1", "s-1", None, live=False)
        agent.cannot_freeze = False
        with pytest.raises(NotSupported, match="memory"):
            await daemon.snapshots.take("m-1", "s-1", None, live=True)
        world.quarters.limits_now = msgspec.structs.replace(world.quarters.limits_now, disk_free_bytes=1 << 30)
        with pytest.raises(HostFull, match="disk"):
            await daemon.snapshots.take("m-1", "s-1", None, live=False)
        world.driver.processes["m-1"].end("killed by signal 9")
        await until(lambda: daemon.machines.record("m-1").phase is Phase.FAILED)
        with pytest.raises(WrongState):
            await daemon.snapshots.take("m-1", "s-1", None, live=False)
        assert bytes_of(world) == set()


async def test_a_machine_that_ends_meanwhile_gives_no_snapshot(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        held = hold_agent(world)
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))
        await world.driver.holds.reached("agent").wait()
        world.driver.processes["m-1"].end("killed by signal 9")
        held.set()
        with pytest.raises((GuestUnreachable, SnapshotFailed, ConnectionError, Exception)):
            await taking
        await until(lambda: daemon.machines.record("m-1").phase is Phase.FAILED)
        assert bytes_of(world) == set()


async def test_a_client_that_leaves_changes_nothing(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        held = hold_agent(world)
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))
        await until(lambda: world.driver.holds.reached("agent").is_set())
        taking.cancel()
        held.set()
        assert (await daemon.snapshots.take("m-1", "s-1", None, live=False)).phase.value == "ready"
        assert not world.driver.processes["m-1"].agent.is_frozen


async def test_a_delete_of_the_machine_overtakes(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        hold_agent(world)
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))
        await until(lambda: world.driver.holds.reached("agent").is_set())
        await daemon.machines.delete("m-1", None)
        with pytest.raises(StaleIncarnation):
            await taking
        assert (await daemon.snapshots.load_all(), bytes_of(world)) == ([], set())


# -- using -----------------------------------------------------------------------------------------------------------


async def test_the_disk_is_that_of_the_moment(world: World) -> None:
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        world.disks.write("m-1", b"before")
        await daemon.snapshots.take("m-1", "s-1", fence(), live=False)
        world.disks.write("m-1", b"after")
        await daemon.machines.create(order("m-2", snapshot_id="s-1"), fence("u2"))
        assert world.disks.read("m-2") == b"before"
        await daemon.machines.restore("m-1", "s-1", fence(action_seq=2))
        assert world.disks.read("m-1") == b"before"
        world.disks.write("m-1", b"later")
        await daemon.machines.restore("m-1", "s-1", fence(action_seq=2))  # the same order, asked again
        assert world.disks.read("m-1") == b"later"


async def test_a_disk_that_would_take_what_must_stay_free_is_not_begun(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        before = daemon.machines.record("m-1")
        limits = world.quarters.limits_now
        # Enough for a machine that begins with nothing, and for one that runs.
        free = limits.disk_reserve_bytes + SIZE // 2
        world.quarters.limits_now = msgspec.structs.replace(limits, disk_free_bytes=free)
        with pytest.raises(HostFull, match="disk"):
            await daemon.machines.create(order("m-2", snapshot_id="s-1"), None)
        with pytest.raises(HostFull, match="disk"):
            await daemon.machines.restore("m-1", "s-1", None)
        assert daemon.machines.ids() == {"m-1"}
        assert daemon.machines.record("m-1") == before
        assert not world.disks.is_staged("m-1")
        await make(daemon, "m-3")


async def test_a_snapshot_that_does_not_fit_is_a_conflict(world: World) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        spec = SPEC.__class__(image="other", memory_mib=256, disk_bytes=1 << 30)
        await daemon.machines.create(order("m-2", spec), None)
        answer = await http.post("/machines/m-2/restore", json={"snapshot_id": "s-1"})
        assert (answer.status_code, answer.json()["details"]["reason"]) == (409, "snapshot_mismatch")
        body = {"machine_id": "m-3", "local_snapshot": {"snapshot_id": "s-1"}, "storage_bytes": 4096}
        answer = await http.post("/snapshots/s-1/restore", json=body)
        assert (answer.status_code, answer.json()["details"]["reason"]) == (409, "snapshot_mismatch")


async def test_snapshots_belong_to_a_cluster(world: World) -> None:
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), fence())
        await daemon.snapshots.take("m-1", "s-1", fence(), live=False)
        with pytest.raises(WrongCluster):
            await daemon.machines.create(order("m-2", snapshot_id="s-1"), None)
        with pytest.raises(WrongCluster):
            await daemon.snapshots.delete("s-1", "")
        assert bytes_of(world) == {"s-1"}


async def test_the_bytes_of_a_snapshot_are_for_its_cluster(world: World) -> None:
    url = "/snapshots/s-1/artifacts/disk-system"
    async with serving_daemon(world) as (daemon, http):
        await daemon.machines.create(order(), fence())
        await daemon.snapshots.take("m-1", "s-1", fence(), live=False)
        for headers in ({}, {CLUSTER_HEADER: "another"}):
            refused = await http.get(url, headers=headers)
            assert (refused.status_code, refused.json()["details"]["reason"]) == (409, "wrong_cluster")
        assert (await http.get(url, headers={CLUSTER_HEADER: fence().cluster})).status_code == 200


async def test_a_snapshot_keeps_its_image(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        await daemon.machines.delete("m-1", None)
        assert await users_in_journal(daemon.journal) == {"sha256:debian-12": ["snapshot s-1"]}


async def test_a_delete_while_it_is_made_usable_wins(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        taking = asyncio.create_task(daemon.snapshots.take("m-1", "s-1", None, live=False))

        async def is_begun() -> bool:
            return bool(await daemon.snapshots.load_all())

        while not await is_begun():
            await asyncio.sleep(0)
        await daemon.snapshots.delete("s-1", "")
        await asyncio.wait({taking})
        assert not taking.cancelled()
        assert taking.exception() is not None
        assert (await daemon.snapshots.load_all(), bytes_of(world)) == ([], set())
        assert daemon.machines.record("m-1").phase is Phase.RUNNING


@pytest.mark.parametrize("has_its_disk", [False, True])
async def test_a_delete_while_a_machine_is_made_from_it(world: World, has_its_disk: bool) -> None:
    """The machine has all of it, or there is none: held before its disk is made, or after."""
    holds, point = (world.driver.holds, "boot") if has_its_disk else (world.quarters.holds, "prepare")
    async with world.daemon() as daemon:
        await make(daemon)
        world.disks.write("m-1", b"content")
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        holds.reached(point).clear()
        gate = holds.hold(point)
        creating = asyncio.create_task(daemon.machines.create(order("m-2", snapshot_id="s-1"), None))
        await holds.reached(point).wait()
        await daemon.snapshots.delete("s-1", "")
        assert bytes_of(world) == set()
        gate.set()
        if has_its_disk:
            assert (await creating).phase is Phase.RUNNING
            assert world.disks.read("m-2") == b"content"
        else:
            with pytest.raises(SnapshotNotFound):
                await creating
            assert world.leftovers == ({"m-1"}, {"m-1"}, {"m-1"})
            assert [machine.id for machine in daemon.machines.records()] == ["m-1"]
        assert daemon.machines.record("m-1").phase is Phase.RUNNING


@pytest.mark.parametrize("has_its_disk", [False, True])
async def test_a_delete_while_it_is_put_back(world: World, has_its_disk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has all of it, or goes on with the disk that it had: held before the copy is made, or after."""
    reached, gate, stage = asyncio.Event(), asyncio.Event(), world.disks.stage

    async def hold(machine: Machine, seed: DiskSeed) -> None:
        if has_its_disk:
            await stage(machine, seed)
        reached.set()
        await gate.wait()
        if not has_its_disk:
            await stage(machine, seed)

    monkeypatch.setattr(world.disks, "stage", hold)
    async with world.daemon() as daemon:
        await make(daemon)
        world.disks.write("m-1", b"before")
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        world.disks.write("m-1", b"after")
        restoring = asyncio.create_task(daemon.machines.restore("m-1", "s-1", None))
        await reached.wait()
        await daemon.snapshots.delete("s-1", "")
        assert bytes_of(world) == set()
        gate.set()
        if has_its_disk:
            assert (await restoring).phase is Phase.RUNNING
        else:
            with pytest.raises(SnapshotNotFound):
                await restoring
        assert world.disks.read("m-1") == (b"before" if has_its_disk else b"after")
        assert not world.disks.is_staged("m-1")
        assert daemon.machines.record("m-1").phase is Phase.RUNNING
        await daemon.machines.stop("m-1", None)
        assert (await daemon.machines.start("m-1", None)).phase is Phase.RUNNING


async def test_the_machine_is_free_before_the_digest_is_known(world: World) -> None:
    async with world.daemon() as daemon:
        await make(daemon)
        taken = await daemon.machines.take_snapshot("m-1", "s-1", None)
        assert (taken.phase.value, taken.artifacts) == ("sealing", ())
        assert await daemon.journal.operation("m-1") is None
        await daemon.machines.stop("m-1", None)
        sealed = await daemon.snapshots.seal(taken)
        assert sealed.phase.value == "ready"
        assert await daemon.snapshots.seal(taken) == sealed, "whoever comes second gets the same"


async def test_a_local_restore_is_the_contracts(world: World) -> None:
    async with serving_daemon(world) as (daemon, http):
        await make(daemon)
        world.disks.write("m-1", b"content")
        await daemon.snapshots.take("m-1", "s-1", None, live=False)
        body = {"machine_id": "m-2", "local_snapshot": {"snapshot_id": "s-1"}, "storage_bytes": 1 << 30}
        answer = await http.post("/snapshots/s-1/restore", json=body)
        assert answer.status_code == 201, answer.text
        machine = answer.json()["machine"]
        assert (machine["id"], machine["phase"]) == ("m-2", "running")
        assert world.disks.read("m-2") == b"content"
        assert (await http.post("/snapshots/s-1/restore", json=body)).status_code == 409
        other = {**body, "machine_id": "m-3", "local_snapshot": {"snapshot_id": "s-9"}}
        assert (await http.post("/snapshots/s-1/restore", json=other)).status_code == 400
        assert (await http.post("/snapshots/s-1/restore", json={"machine_id": "m-3"})).status_code == 400


async def test_a_missing_local_snapshot_is_told_by_its_first_words(world: World) -> None:
    async with serving_daemon(world) as (_, http):
        answer = await http.post("/snapshots/s-1/restore", json={"machine_id": "m-1", "local_snapshot": {}})
        assert (answer.status_code, answer.json()["details"]["reason"]) == (404, "local_snapshot_missing")
        assert answer.json()["error"].startswith("local snapshot restore unavailable")
