"""The journal's fences: whose order counts, and until when; tombstones; users without a fence."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from journal_orders import SPEC, Time, create, create_running, delete, fence, nothing, start

from fusevm.host.faults import NoFault
from fusevm.host.journal import Journal
from fusevm.host.rows import FENCE_LIFETIME_MS
from fusevm.model.errors import (
    HostFull,
    MachineExists,
    OrderExpired,
    StaleAction,
    StaleIncarnation,
    WrongCluster,
)
from fusevm.model.machine import Fence, Moment, Phase

# -- fences ----------------------------------------------------------------------------------------------------------


async def test_the_first_fenced_order_binds_the_host_to_its_cluster(journal: Journal):
    assert await journal.cluster() == ""
    await create(journal, fence())
    assert await journal.cluster() == "c1"
    with pytest.raises(WrongCluster):
        await create(journal, fence(uid="u2", cluster="c2"), "m-2")
    with pytest.raises(WrongCluster):
        await journal.begin_delete("m-1", fence(cluster="c2"), nothing)


async def test_a_refused_order_does_not_bind_the_host(journal: Journal):
    with pytest.raises(HostFull):
        await create(journal, fence(), spec=msgspec.structs.replace(SPEC, memory_mib=1 << 30))
    assert await journal.cluster() == ""


async def test_a_create_that_arrives_after_its_delete_stays_dead(journal: Journal):
    await delete(journal, fence(action_seq=2))
    with pytest.raises(StaleIncarnation):
        await create(journal, fence(action_seq=1))
    assert await journal.tombstones() == 1


async def test_a_create_repeated_after_its_machine_was_deleted_stays_dead(journal: Journal):
    await create_running(journal, fence())
    await delete(journal, fence(action_seq=2))
    with pytest.raises(StaleIncarnation):
        await create(journal, fence(action_seq=3))


async def test_a_lower_incarnation_is_refused(journal: Journal):
    await create_running(journal, fence(incarnation=3))
    with pytest.raises(StaleIncarnation):
        await create(journal, fence(incarnation=2), "m-2")


async def test_a_newer_incarnation_is_a_machine_of_its_own(journal: Journal):
    await create_running(journal, fence(incarnation=1))
    await create_running(journal, fence(incarnation=2, action_seq=2), "m-2")
    assert {entry.machine.id for entry in await journal.entries()} == {"m-1", "m-2"}


async def test_the_end_of_an_old_incarnation_does_not_end_the_new_one(journal: Journal):
    await create_running(journal, fence(incarnation=1))
    await create_running(journal, fence(incarnation=2, action_seq=2), "m-2")
    await delete(journal, fence(incarnation=2, action_seq=3), "m-1")
    again = await create(journal, fence(incarnation=2, action_seq=3), "m-2")
    assert again.phase is Phase.RUNNING


async def test_an_old_incarnation_cannot_delete_a_newer_machine(journal: Journal):
    await create_running(journal, fence(incarnation=2))
    with pytest.raises(StaleIncarnation):
        await journal.begin_delete("m-1", fence(incarnation=1, action_seq=9), nothing)


async def test_a_machine_belongs_to_its_environment(journal: Journal):
    await create_running(journal, fence())
    with pytest.raises(MachineExists):
        await journal.begin_delete("m-1", fence(uid="other"), nothing)
    with pytest.raises(MachineExists):
        await journal.begin_stop("m-1", fence(uid="other", action_seq=5), nothing)


async def test_an_older_action_neither_stops_nor_starts(journal: Journal):
    await create_running(journal, fence(action_seq=5))
    with pytest.raises(StaleAction):
        await journal.begin_stop("m-1", fence(action_seq=4), nothing)
    with pytest.raises(StaleAction):
        await start(journal, fence(action_seq=4))
    assert (await journal.begin_stop("m-1", fence(action_seq=6), nothing)).fence.action_seq == 6


async def test_a_delayed_create_with_an_older_action_is_refused(journal: Journal):
    machine = await create(journal, fence(action_seq=5))
    await journal.forget(machine.id, "create", "undone", nothing)
    with pytest.raises(StaleAction):
        await create(journal, fence(action_seq=4))
    assert (await create(journal, fence(action_seq=5))).phase is Phase.CREATING


class HostClock:
    """What limits of orders go by."""

    def __init__(self) -> None:
        self.now = Moment(clock="b1", ms=1_000)

    def __call__(self) -> Moment:
        return self.now

    def pass_by(self, ms: int) -> None:
        self.now = Moment(clock="b1", ms=self.now.ms + ms)

    def limited(self, ms: int, action_seq: int = 1) -> Fence:
        """The fence of an order that is valid for so long."""
        until = Moment(clock=self.now.clock, ms=self.now.ms + ms)
        return msgspec.structs.replace(fence(action_seq=action_seq), valid_until=until)


@pytest.fixture
def clock() -> HostClock:
    return HostClock()


@pytest.fixture
async def limiting(tmp_path: Path, time: Time, clock: HostClock) -> AsyncIterator[Journal]:
    """A journal whose clock stands still."""
    journal = await Journal.open(tmp_path / "limiting", NoFault(), time, clock)
    yield journal
    await journal.close()


async def test_an_order_that_comes_too_late_is_not_taken_up(limiting: Journal, clock: HostClock):
    order = clock.limited(50)
    clock.pass_by(51)
    with pytest.raises(OrderExpired):
        await create(limiting, order)
    assert await limiting.cluster() == ""
    await create_running(limiting, clock.limited(1))
    late = clock.limited(50, action_seq=2)
    clock.pass_by(51)
    with pytest.raises(OrderExpired):
        await limiting.begin_stop("m-1", late, nothing)
    with pytest.raises(OrderExpired):
        await start(limiting, late)
    with pytest.raises(OrderExpired):
        await limiting.note_order("m-1", late, nothing)
    with pytest.raises(OrderExpired):
        await delete(limiting, late)
    with pytest.raises(OrderExpired):
        await delete(limiting, late, "m-2")
    assert await limiting.tombstones() == 0
    (entry,) = await limiting.entries()
    assert (entry.machine.phase, entry.machine.fence, entry.operation) == (Phase.RUNNING, fence(), None)
    await delete(limiting, clock.limited(1, action_seq=3))
    assert await limiting.entries() == []


async def test_a_limit_by_the_clock_of_another_boot_is_past(limiting: Journal, clock: HostClock):
    order = clock.limited(1_000_000)
    clock.now = Moment(clock="b2", ms=5)
    with pytest.raises(OrderExpired):
        await create(limiting, order)


async def test_a_create_that_comes_again_too_late_still_says_what_there_is(limiting: Journal, clock: HostClock):
    order = clock.limited(50)
    made = await create(limiting, order)
    clock.pass_by(51)
    assert await create(limiting, order) == made


async def test_every_accepted_order_makes_older_ones_stale(journal: Journal):
    await create_running(journal, fence(action_seq=1))
    await create(journal, fence(action_seq=3))
    with pytest.raises(StaleAction):
        await journal.begin_stop("m-1", fence(action_seq=2), nothing)
    noted = await journal.note_order("m-1", fence(action_seq=5), nothing)
    assert noted.fence.action_seq == 5
    assert await journal.note_order("m-1", fence(action_seq=5), nothing) == noted
    for stale in (journal.note_order, journal.begin_stop):
        with pytest.raises(StaleAction):
            await stale("m-1", fence(action_seq=4), nothing)
    assert await create(journal, fence(action_seq=2)) == noted


async def test_fences_outlive_the_daemon_and_expire_after_a_day(tmp_path: Path, time: Time):
    journal = await Journal.open(tmp_path, NoFault(), time)
    await create_running(journal, fence())
    await delete(journal, fence(action_seq=2))
    await journal.close()
    journal = await Journal.open(tmp_path, NoFault(), time)
    try:
        time.now_ms += FENCE_LIFETIME_MS - 1
        assert await journal.purge() == 0
        with pytest.raises(StaleIncarnation):
            await create(journal, fence())
        time.now_ms += 1
        assert await journal.purge() == 1
        assert await journal.tombstones() == 0
    finally:
        await journal.close()


async def test_the_fence_of_a_live_machine_never_expires(journal: Journal, time: Time):
    await create_running(journal, fence(incarnation=4))
    time.now_ms += 10 * FENCE_LIFETIME_MS
    assert await journal.purge() == 0
    with pytest.raises(StaleIncarnation):
        await create(journal, fence(incarnation=3), "m-2")


# -- users of the contract -------------------------------------------------------------------------------------------


async def test_orders_without_a_fence_make_machines_of_their_own_and_do_not_bind_the_host(journal: Journal):
    machine = await create_running(journal, None)
    assert machine.fence == Fence(cluster="local", uid="m-1", incarnation=1, action_seq=0)
    assert await journal.cluster() == ""


async def test_an_id_of_the_contract_can_be_used_again(journal: Journal):
    await create_running(journal, None)
    await delete(journal, None)
    assert (await create(journal, None)).fence.incarnation == 2


async def test_orders_without_a_fence_touch_no_machine_of_a_cluster(journal: Journal):
    await create_running(journal, fence())
    for order in (journal.begin_delete, journal.begin_stop):
        with pytest.raises(WrongCluster):
            await order("m-1", None, nothing)
    with pytest.raises(MachineExists):
        await create(journal, None)


async def test_a_cluster_touches_no_machine_of_the_contract(journal: Journal):
    await create_running(journal, None)
    with pytest.raises(WrongCluster):
        await journal.begin_delete("m-1", fence(uid="m-1"), nothing)
    with pytest.raises(MachineExists):
        await create(journal, fence())
