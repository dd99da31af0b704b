"""What the control plane relies on when it orders snapshots of a host, whichever host it is."""

import asyncio

import pytest
from host_makers import Hosted
from msgspec.structs import replace

from fusevm.control.host_api import HostApi
from fusevm.model.errors import MachineNotFound, OrderExpired, SnapshotNotFound, StaleAction, WrongCluster
from fusevm.model.machine import Fence, MachineSpec, Phase
from fusevm.model.snapshot import SnapshotKind
from fusevm.wire.host_api import CreateMachine
from fusevm.wire.host_snapshots import TakeSnapshot

SPEC = MachineSpec(image="debian-12", memory_mib=256, disk_bytes=1 << 30)


def fence(action_seq: int = 1, uid: str = "u1") -> Fence:
    return Fence(cluster="c1", uid=uid, incarnation=1, action_seq=action_seq)


def order(machine_id: str = "m-1", snapshot_id: str = "") -> CreateMachine:
    return CreateMachine(machine_id=machine_id, spec=SPEC, boot_timeout_ms=60_000, snapshot_id=snapshot_id)


async def machine_ids(host: HostApi) -> list[str]:
    return [machine.id for machine in (await host.machines()).machines]


async def test_a_snapshot_is_taken_once_under_its_id(hosted: Hosted) -> None:
    host = hosted.api
    await host.create(fence(), order())
    taken = await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="snap-1"))
    assert (taken.id, taken.machine_id, taken.kind) == ("snap-1", "m-1", SnapshotKind.DISK)
    assert len(taken.digest.removeprefix("sha256:")) == 64
    again = await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="snap-1"))
    assert again == taken
    assert await machine_ids(host) == ["m-1"]


async def test_orders_are_fenced(hosted: Hosted) -> None:
    host = hosted.api
    await host.create(fence(), order())
    await host.take_snapshot(fence(5), "m-1", TakeSnapshot(snapshot_id="snap-1"))
    with pytest.raises(StaleAction):
        await host.take_snapshot(fence(4), "m-1", TakeSnapshot(snapshot_id="snap-2"))
    with pytest.raises(StaleAction):
        await host.restore_snapshot(fence(4), "m-1", "snap-1")
    with pytest.raises(WrongCluster):
        await host.take_snapshot(replace(fence(6), cluster="c2"), "m-1", TakeSnapshot(snapshot_id="snap-2"))
    reading = await host.read_clock()
    late = replace(fence(7), valid_until=reading.at(asyncio.get_running_loop().time() - 1))
    with pytest.raises(OrderExpired):
        await host.take_snapshot(late, "m-1", TakeSnapshot(snapshot_id="snap-2"))
    with pytest.raises(MachineNotFound):
        await host.take_snapshot(fence(8), "m-2", TakeSnapshot(snapshot_id="snap-2"))


async def test_a_snapshot_is_put_back_in_place(hosted: Hosted) -> None:
    host = hosted.api
    await host.create(fence(), order())
    await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="snap-1"))
    await host.restore_snapshot(fence(3), "m-1", "snap-1")
    await host.restore_snapshot(fence(3), "m-1", "snap-1")  # whoever got no answer asks again
    (machine,) = (await host.machines()).machines
    assert (machine.id, machine.phase) == ("m-1", Phase.RUNNING)
    with pytest.raises(SnapshotNotFound):
        await host.restore_snapshot(fence(4), "m-1", "snap-none")
    assert [machine.phase for machine in (await host.machines()).machines] == [Phase.RUNNING]


async def test_a_new_machine_begins_with_a_snapshot_that_may_then_go(hosted: Hosted) -> None:
    host = hosted.api
    await host.create(fence(), order())
    await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="snap-1"))
    made = await host.create(fence(uid="u2"), order("m-2", "snap-1"))
    assert made.phase is Phase.RUNNING
    await host.delete_snapshot("c1", "snap-1")
    assert sorted(await machine_ids(host)) == ["m-1", "m-2"]
    with pytest.raises(SnapshotNotFound):
        await host.create(fence(uid="u3"), order("m-3", "snap-1"))
    assert sorted(await machine_ids(host)) == ["m-1", "m-2"]


async def test_a_deleted_id_is_never_taken_again(hosted: Hosted) -> None:
    host = hosted.api
    await host.create(fence(), order())
    await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="snap-1"))
    await host.delete_snapshot("c1", "snap-1")
    for snapshot_id in ("snap-1", "snap-2"):  # the second was never taken: its order is still on its way
        with pytest.raises(SnapshotNotFound):
            await host.delete_snapshot("c1", snapshot_id)
        with pytest.raises(SnapshotNotFound):
            await host.take_snapshot(fence(3), "m-1", TakeSnapshot(snapshot_id=snapshot_id))
        with pytest.raises(SnapshotNotFound):
            await host.restore_snapshot(fence(3), "m-1", snapshot_id)


async def test_a_snapshot_outlives_its_machine(hosted: Hosted) -> None:
    host = hosted.api
    await host.create(fence(), order())
    await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="snap-1"))
    await host.destroy(fence(3), "m-1")
    assert (await host.create(fence(uid="u2"), order("m-2", "snap-1"))).phase is Phase.RUNNING
