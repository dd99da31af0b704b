"""Slots as kernel objects: made, handed out, destroyed, and found again after a crash."""

import asyncio
import contextlib
import itertools
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from namespaces import private_network
from network_lab import HOST_ADDRESS, PLAN, SERVER, internet, plugged_in, say, sh, snapshot_of_host

from fusevm.host.net import pool
from fusevm.host.net.links import ensure_links, observe_objects, render_creation, render_inside
from fusevm.host.net.network import HostNetwork
from fusevm.host.net.plan import NetworkPlan, Slot, plan_slot
from fusevm.host.net.terms import Terms
from fusevm.model.errors import NetworkRangeConflict, ShuttingDown, SlotFailed, SlotInUse
from fusevm.model.network import Network

OFFLINE = Terms(policy=Network(internet=False))


@contextlib.asynccontextmanager
async def opened(keep: dict[int, Network] | None = None, *, warm: int = 2) -> AsyncIterator[HostNetwork]:
    network = HostNetwork(PLAN, warm=warm)
    assert await network.open(keep or {}) == {}
    try:
        yield network
    finally:
        await network.close()


def identity(slot: Slot) -> int:
    return Path(slot.namespace_path).stat().st_ino


def assert_complete(slot: Slot) -> None:
    """Compare a slot with what is promised about every slot."""
    inside = f"ip -n {slot.namespace}"
    assert f"{slot.gateway}/30" in sh(f"{inside} addr show dev {slot.tap}")
    assert slot.gateway_mac in sh(f"{inside} link show dev {slot.tap}")
    assert f"{slot.guest_mac} PERMANENT" in sh(f"{inside} neigh show dev {slot.tap}")
    assert f"{slot.address}/30" in sh(f"{inside} addr show dev {slot.peer}")
    assert f"default via {slot.host_address}" in sh(f"{inside} route")
    assert f"{slot.host_address}/30" in sh(f"ip addr show dev {slot.veth}")
    rules = sh(f"nsenter --net={slot.namespace_path} nft list ruleset")
    assert f"snat to {slot.address}" in rules
    assert 'device "tap0"' in rules
    assert sh(f"nsenter --net={slot.namespace_path} cat /proc/sys/net/ipv4/ip_forward") == "1\n"


@private_network
async def test_fifty_slots_leave_no_trace_after_a_sweep():
    before = snapshot_of_host()
    async with opened(warm=4) as network:
        slots = await asyncio.gather(*(network.acquire(index) for index in range(50)))
        await network.settle()
        assert [slot.index for slot in slots] == list(range(50))
        for slot in (slots[0], slots[49]):
            assert_complete(slot)
        seen = await network.observe()
        assert seen.objects.namespaces == seen.objects.veths == frozenset(range(54))
        assert seen.rules.machines == dict.fromkeys(range(54), True)
    assert await network.sweep(set()) == frozenset(range(54))
    assert snapshot_of_host() == before
    assert await network.sweep(set()) == frozenset(), "a sweep may be repeated"


@private_network
async def test_a_warm_slot_is_there_before_it_is_asked_for():
    async with opened(warm=3) as network:
        await network.settle()
        assert list(itertools.islice(network.candidates(), 5)) == [0, 1, 2, 3, 4]
        assert observe_objects(PLAN).namespaces == {0, 1, 2}
        slot = await network.acquire(1)
        assert_complete(slot)
        await network.settle()
        assert list(itertools.islice(network.candidates(), 3)) == [0, 2, 3]
        with pytest.raises(SlotInUse):
            await network.acquire(1)


@private_network
async def test_slots_are_made_in_a_lull_unless_none_is_left(monkeypatch):
    async with opened(warm=2) as network:
        await network.settle()
        monkeypatch.setattr(pool, "_LULL_S", 3600)
        await network.acquire(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(network.settle(), 0.5)
        assert observe_objects(PLAN).namespaces == {0, 1}
        await network.acquire(1)
        await network.settle()
        assert observe_objects(PLAN).namespaces == {0, 1, 2, 3}


@private_network
async def test_a_released_slot_comes_back_as_another_namespace():
    async with internet(), opened(warm=0) as network:
        slot = await network.acquire(3)
        async with plugged_in(slot) as guest:
            await guest.tcp(SERVER)
            counted = sh(f"nsenter --net={slot.namespace_path} cat /proc/sys/net/netfilter/nf_conntrack_count")
            assert int(counted) > 0
        # Not its inode: the kernel gives the number of a namespace that is gone to the next.
        sh(f"ip -n {slot.namespace} link add dev old type veth peer name older")
        await network.release(3)
        await network.release(3)
        with pytest.raises(SlotFailed):
            await network.set_terms(slot, OFFLINE)
        slot = await network.acquire(3)
        assert " old@" not in sh(f"ip -n {slot.namespace} -o link")
        assert_complete(slot)
        counted = sh(f"nsenter --net={slot.namespace_path} cat /proc/sys/net/netfilter/nf_conntrack_count")
        assert int(counted) == 0


@private_network
async def test_a_slot_that_something_still_holds_is_cut_off_and_replaced():
    async with internet(), opened(warm=0) as network:
        slot = await network.acquire(0)
        holder = await asyncio.create_subprocess_exec("nsenter", f"--net={slot.namespace_path}", "sleep", "60")
        try:
            while Path(f"/proc/{holder.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
                await asyncio.sleep(0.01)
            await network.release(0)
            await network.settle()
            assert slot.peer not in sh(f"nsenter --net=/proc/{holder.pid}/ns/net ip link")
            assert_complete(await network.acquire(0))
        finally:
            holder.kill()
            await holder.wait()


@private_network
async def test_a_machine_keeps_its_connections_over_a_restart_of_the_daemon(tmp_path):
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 203.0.113.53\n")
    async with internet(), contextlib.AsyncExitStack() as stack:
        first = HostNetwork(PLAN, warm=2, resolv_conf=resolv_conf)
        await first.open({})
        slot, offline = await first.acquire(0), await first.acquire(1, OFFLINE)
        await first.serve_dns(slot)
        guest = await stack.enter_async_context(plugged_in(slot))
        other = await stack.enter_async_context(plugged_in(offline))
        connection = stack.enter_context(await guest.connect(SERVER))
        assert await say(connection, b"one") == f"{HOST_ADDRESS} one"
        inode = identity(slot)
        await first.close()
        second = HostNetwork(PLAN, warm=2, resolv_conf=resolv_conf)
        assert await second.open({0: Terms(), 1: OFFLINE}) == {}
        stack.push_async_callback(second.close)
        assert identity(slot) == inode
        assert await say(connection, b"two") == f"{HOST_ADDRESS} two"
        await second.serve_dns(slot)
        await second.serve_dns(slot)
        assert await other.is_refused(SERVER)
        await second.settle()
        with pytest.raises(SlotInUse):
            await second.acquire(0)


#: A crash after each step of making a slot.
STEPS = ("nothing", "stub", "namespace", "veth", "links", "tap", "inside")


async def make_half(slot: Slot, step: str) -> None:
    depth = STEPS.index(step)
    if depth == 1:
        Path(slot.namespace_path).touch()
    creation = render_creation([slot], observe_objects(PLAN)).splitlines()
    if depth >= 2:
        sh(f"ip {creation[0]}")
    if depth >= 3:
        sh(f"ip {creation[1]}")
    if depth >= 4:
        sh(f"ip {creation[2]} && ip {creation[3]}")
    if depth >= 5:
        sh(f"ip -n {slot.namespace} tuntap add tap0 mode tap vnet_hdr")
    if depth >= 6:
        for line in render_inside(slot).splitlines()[:4]:
            sh(f"ip -n {slot.namespace} {line}")


@private_network
async def test_half_made_slots_are_finished_or_swept():
    before = snapshot_of_host()
    half = [plan_slot(PLAN, index) for index in range(len(STEPS))]
    kept = [plan_slot(PLAN, 100 + index) for index in range(len(STEPS))]
    for slots in (half, kept):
        for slot, step in zip(slots, STEPS, strict=True):
            await make_half(slot, step)
    async with opened({slot.index: Terms() for slot in kept}, warm=0) as network:
        assert observe_objects(PLAN).slots == {slot.index for slot in kept}
        for slot in kept:
            assert_complete(slot)
    await network.sweep(set())
    assert snapshot_of_host() == before


@private_network
async def test_a_veth_whose_namespace_is_gone_is_made_anew():
    slot = plan_slot(PLAN, 5)
    sh("ip netns add elsewhere")
    sh(f"ip link add {slot.veth} type veth peer name {slot.peer} netns elsewhere")
    assert await ensure_links(PLAN, [slot]) == {}
    assert_complete(slot)


@private_network
async def test_a_daemon_that_is_killed_at_work_leaves_nothing_that_a_sweep_cannot_remove():
    before = snapshot_of_host()
    program = (
        "import asyncio\n"
        "from fusevm.host.net.network import HostNetwork\n"
        "from fusevm.host.net.plan import NetworkPlan\n"
        "async def main():\n"
        f"    network = HostNetwork(NetworkPlan(prefix={PLAN.prefix!r}, range={PLAN.range!r}), warm=3)\n"
        "    await network.open({})\n"
        "    for start in range(0, 10_000, 8):\n"
        "        slots = await asyncio.gather(*(network.acquire(index) for index in range(start, start + 8)))\n"
        "        for slot in slots[::2]:\n"
        "            await network.release(slot.index)\n"
        "asyncio.run(main())\n"
    )
    for delay_s in (0.6, 0.75, 0.9, 1.05, 1.2):
        daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
        await asyncio.sleep(delay_s)  # wherever that is: any point will do
        daemon.send_signal(signal.SIGKILL)
        await daemon.wait()
        async with asyncio.timeout(60):
            while running_tools():
                await asyncio.sleep(0.001)  # in the middle of a system call, which SIGKILL lets them finish
        network = HostNetwork(PLAN)
        await network.sweep(set())
        assert snapshot_of_host() == before


def running_tools() -> list[bytes]:
    # A process that has ended, but that nobody has waited for, has no command line.
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    return [line for line in lines if line.partition(b"\0")[0] in {b"ip", b"nft", b"nsenter", b"setpriv"}]


@private_network
async def test_a_sweep_touches_no_other_instance():
    other = NetworkPlan(prefix="ftx", range="10.212.0.0/16")
    foreign = HostNetwork(other, warm=1)
    async with opened(warm=1) as network:
        await foreign.open({})
        await foreign.acquire(7)
        await foreign.settle()
        await foreign.close()
        await network.settle()
    await network.sweep(set())
    assert observe_objects(PLAN).slots == frozenset()
    assert 7 in observe_objects(other).slots
    assert f"table inet {other.table}" in sh("nft list ruleset")
    assert 'iifname "ftx-v*"' in sh("nft list ruleset")


@private_network
async def test_a_sweep_at_work_leaves_the_pools_own_slots_alone():
    async with opened(warm=2) as network:
        slot = await network.acquire(0)
        await network.settle()
        sh(f"ip netns add {PLAN.prefix}-900")
        assert await network.sweep({0}) == {900}
        assert_complete(slot)
        assert await network.sweep(set()) == frozenset()
        assert_complete(slot)


@private_network
async def test_a_warm_slot_that_somebody_has_damaged_is_replaced():
    async with opened(warm=3) as network:
        await network.settle()
        sh(f"ip netns del {PLAN.prefix}-0 && ip link del {PLAN.prefix}-v1")
        assert await network.ensure() is True
        await network.settle()
        assert await network.ensure() is False
        for index in range(3):
            assert_complete(await network.acquire(index))


@private_network
async def test_a_kept_slot_beyond_a_smaller_range_does_not_keep_the_daemon_from_opening():
    network = HostNetwork(NetworkPlan(prefix=PLAN.prefix, range="10.211.0.0/29"), warm=0)
    failures = await network.open({1: Terms(), 2: Terms()})
    assert list(failures) == [2]
    assert list(network.candidates()) == [0]
    await network.close()


@private_network
async def test_one_slot_that_cannot_be_made_does_not_keep_the_others():
    async with opened(warm=0) as network:
        # Our name for the other end is taken inside by a directory that no namespace can be mounted on.
        Path(plan_slot(PLAN, 1).namespace_path).mkdir()
        outcomes = await asyncio.gather(*(network.acquire(index) for index in range(3)), return_exceptions=True)
        assert isinstance(outcomes[1], SlotFailed)
        for outcome in (outcomes[0], outcomes[2]):
            assert isinstance(outcome, Slot)
            assert_complete(outcome)
        Path(plan_slot(PLAN, 1).namespace_path).rmdir()


@private_network
async def test_a_cancelled_acquire_leaves_a_warm_slot():
    async with opened(warm=0) as network:
        task = asyncio.create_task(network.acquire(4))
        await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await network.settle()
        assert next(network.candidates()) in {0, 4}
        assert_complete(await network.acquire(4))
    with pytest.raises(ShuttingDown):
        await network.acquire(5)


@private_network
async def test_a_range_that_the_host_uses_is_refused_by_the_name_of_its_setting():
    before = snapshot_of_host()
    sh("ip link add dev x0 type veth peer name x1 && ip addr add 10.211.3.1/24 dev x0 && ip link set x0 up")
    with pytest.raises(NetworkRangeConflict, match=r"10\.211\.0\.0/16 overlaps .*10\.211\.3\..*network_range"):
        await HostNetwork(PLAN).open({})
    sh("ip link del x0")
    assert snapshot_of_host() == before


@private_network
async def test_forwarding_is_switched_on():
    Path("/proc/sys/net/ipv4/ip_forward").write_text("0\n")  # a new namespace has what the machine has
    async with opened(warm=0) as network:
        assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "1\n"
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0\n")
        assert await network.ensure() is True
        assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "1\n"


@private_network
async def test_a_change_of_uplink_is_followed():
    async with internet(), opened(warm=0) as network:
        slot = await network.acquire(0)
        async with plugged_in(slot) as guest:
            assert await guest.tcp(SERVER)
            sh("ip route del default")
            assert await network.ensure() is True
            assert await guest.is_refused(SERVER)
            sh("ip route add default via 203.0.113.1")
            assert await network.ensure() is True
            assert await guest.tcp(SERVER)
