"""Pretended hosts take and refuse orders as a host daemon does: number, incarnation, tombstone, limit."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from msgspec.structs import replace

from fusevm.control.host_api import GuestRequest, HostApi
from fusevm.control.stub_host import StubHost
from fusevm.model.errors import Error, OrderExpired, StaleAction, StaleIncarnation
from fusevm.model.machine import Fence, MachineSpec
from fusevm.testing.fake_host import FakeHost
from fusevm.wire.host_api import CreateMachine
from fusevm.wire.host_snapshots import TakeSnapshot

EVERY_HOST = pytest.mark.parametrize("make", [lambda: StubHost("1"), FakeHost], ids=["stub", "fake"])
ORDER = CreateMachine(machine_id="m-1", spec=MachineSpec(image="debian-12"))


async def fence(host: HostApi, action_seq: int, limit_s: float | None = None) -> Fence:
    found = Fence(cluster="c1", uid="u1", incarnation=1, action_seq=action_seq)
    if limit_s is None:
        return found
    reading = await host.read_clock()
    return replace(found, valid_until=reading.at(asyncio.get_running_loop().time() + limit_s))


def orders(host: HostApi, order: Fence) -> list[Callable[[], Awaitable[object]]]:
    """Every order about a machine that is there, but for its destruction."""
    guest = GuestRequest(fence=order, machine_id="m-1", method="GET", target="guest/state")
    return [
        lambda: host.take_snapshot(order, "m-1", TakeSnapshot(snapshot_id="s-2")),
        lambda: host.restore_snapshot(order, "m-1", "s-1"),
        *([lambda: host.relay(guest)] if order.valid_until is not None else []),
    ]


async def refused(calls: list[Callable[[], Awaitable[object]]], kind: type[Error]) -> None:
    for call in calls:
        with pytest.raises(kind):
            await call()


@EVERY_HOST
async def test_a_late_order_is_refused_and_changes_nothing(make: Callable[[], HostApi]) -> None:
    host = make()
    late = await fence(host, 1, -1)
    await refused([lambda: host.create(late, ORDER)], OrderExpired)
    await host.create(await fence(host, 1, 60), ORDER)
    assert (await host.create(late, ORDER)).id == "m-1"  # it says what there is
    await host.take_snapshot(await fence(host, 2, 60), "m-1", TakeSnapshot(snapshot_id="s-1"))
    late = await fence(host, 3, -1)
    await refused([*orders(host, late), lambda: host.destroy(late, "m-1")], OrderExpired)
    assert [machine.id for machine in (await host.machines()).machines] == ["m-1"]
    for call in orders(host, await fence(host, 2, 60)):
        await call()  # the late ones have left no number


@EVERY_HOST
async def test_an_older_order_is_refused_and_the_same_one_repeated(make: Callable[[], HostApi]) -> None:
    host = make()
    await host.create(await fence(host, 1), ORDER)
    await host.take_snapshot(await fence(host, 5), "m-1", TakeSnapshot(snapshot_id="s-1"))
    await refused(orders(host, await fence(host, 4, 60)), StaleAction)
    for call in orders(host, await fence(host, 5, 60)):
        await call()
    await host.destroy(await fence(host, 0), "m-1")  # nothing takes that back, so it is never out of date
    await refused(
        [lambda: host.create(Fence(cluster="c1", uid="u1", incarnation=1, action_seq=9), ORDER)], StaleIncarnation
    )
