"""Single faults, one after the other: what simulations found, as small as it can be told."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fusevm.control.store import host_rows
from fusevm.control.store.sqlite import drive
from fusevm.model.errors import MachineNotFound, SnapshotNotFound, StaleAction, StaleIncarnation
from fusevm.model.host import Host, HostHealth
from fusevm.model.machine import Fence, MachineSpec
from fusevm.testing.simulation import Safeguards, Scale
from fusevm.testing.simulation.cluster import Cluster
from fusevm.testing.simulation.loop import run
from fusevm.testing.simulation.scale import POLICY
from fusevm.wire.host_api import CreateMachine, TakeSnapshot

LOST_S = POLICY.host_lost_ms / 1000
Scenario = Callable[[Cluster], Awaitable[None]]


def play(scenario: Scenario, *, hosts: int = 1, replicas: int = 2) -> None:
    """Run one scenario in a cluster without users."""

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            scale = Scale(hosts=hosts, environments=0, replicas=replicas)
            cluster = Cluster(group, 1, scale, Safeguards())
            for replica in cluster.replicas:
                replica.start()
            await asyncio.sleep(20)
            await scenario(cluster)
            cluster.end()
        cluster.database.inline.close()
        assert cluster.checker.violations == []

    run(main())


def record_of(cluster: Cluster, host_id: str = "h00") -> Host:
    found = drive(cluster.database.inline.connection, host_rows.get(host_id))
    assert found is not None
    return found


async def create(cluster: Cluster, task_id: str = "t1") -> str:
    answer = await cluster.replicas[0].ask("POST", "/v1/environments", body={"task_id": task_id})
    assert answer.status == 201, answer
    return str(answer.body["uid"])


def test_a_silent_host_is_lost_in_time_however_many_replicas_could_watch_it():
    """A heartbeat to it takes longer than half a lease: the lease must be prolonged meanwhile, or replicas take the
    watch from each other, and each begins to count the silence anew."""

    async def scenario(cluster: Cluster) -> None:
        uid = await create(cluster)
        cluster.hosts[0].is_gone = True
        await asyncio.sleep(2 * LOST_S)
        assert record_of(cluster).health is HostHealth.LOST
        ending = cluster.checker.records[uid].ending
        assert ending is not None
        assert ending.reason == "host_lost"

    play(scenario, replicas=3)


def test_a_clock_that_jumps_makes_no_host_lost():
    async def scenario(cluster: Cluster) -> None:
        uid = await create(cluster)
        for replica in cluster.replicas:
            cluster.network.cuts[replica.name, "h00"] = None
        await asyncio.sleep(LOST_S / 3)
        for replica in cluster.replicas:
            replica.clock.offset_ms += 3_600_000
        await asyncio.sleep(LOST_S / 3)
        assert record_of(cluster).health is HostHealth.UNREACHABLE
        cluster.network.cuts.clear()
        await asyncio.sleep(30)
        assert record_of(cluster).health is HostHealth.OK
        assert not cluster.checker.records[uid].is_terminal

    play(scenario)


def test_a_replica_whose_clock_is_an_hour_ahead_hides_no_crash_from_the_others():
    async def scenario(cluster: Cluster) -> None:
        cluster.replicas[0].clock.offset_ms = 3_600_000
        uid = await create(cluster)
        cluster.replicas[0].kill()
        await asyncio.sleep(30)
        cluster.hosts[0].break_machine()
        await asyncio.sleep(30)
        assert cluster.checker.records[uid].is_terminal

    play(scenario)


def test_a_create_survives_the_replica_that_began_it():
    async def scenario(cluster: Cluster) -> None:
        asking = asyncio.ensure_future(create(cluster))
        await asyncio.sleep(0.5)
        (record,) = cluster.checker.records.values()
        cluster.replicas[0].kill()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(60)
        assert cluster.checker.records[record.uid].state == "running"
        assert len(cluster.hosts[0].table) == 1

    play(scenario)


def fence(action_seq: int) -> Fence:
    return Fence(cluster="c1", uid="u1", incarnation=1, action_seq=action_seq)


def order(machine_id: str = "m-1") -> CreateMachine:
    return CreateMachine(machine_id=machine_id, spec=MachineSpec(image="debian-12"))


def test_a_host_takes_no_order_that_is_older_than_one_before():
    async def scenario(cluster: Cluster) -> None:
        host = cluster.hosts[0]
        host.cluster = "c1"
        await host.create(fence(1), order())
        await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="s-1"))
        await host.restore_snapshot(fence(4), "m-1", "s-1")
        with pytest.raises(StaleAction):
            await host.restore_snapshot(fence(3), "m-1", "s-1")
        await host.destroy(fence(5), "m-1")
        with pytest.raises(StaleIncarnation):
            await host.create(fence(1), order())
        with pytest.raises(MachineNotFound):
            await host.destroy(fence(5), "m-1")

    play(scenario, replicas=0)


def test_a_snapshot_that_was_freed_is_not_taken_by_an_order_that_comes_late():
    async def scenario(cluster: Cluster) -> None:
        host = cluster.hosts[0]
        host.cluster = "c1"
        await host.create(fence(1), order())
        await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="s-1"))
        await host.delete_snapshot("c1", "s-1")
        with pytest.raises(SnapshotNotFound):
            await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="s-1"))
        assert host.snapshots == {}

    play(scenario, replicas=0)
