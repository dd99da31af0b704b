"""How many connections a machine may have: counted where they weigh, however its guest tries to have more."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from namespaces import private_network
from network_lab import (
    ECHO_PORT,
    HOST_ADDRESS,
    PATIENCE_S,
    PLAN,
    SERVER,
    SILENCE_S,
    Guest,
    internet,
    namespace_path,
    plugged_in,
    say,
    serve_echo,
    sh,
)

from fusevm.host.net.namespace import run_inside
from fusevm.host.net.network import HostNetwork
from fusevm.host.net.plan import NetworkPlan, plan_slot
from fusevm.host.net.terms import Forward, Terms
from fusevm.model.network import Transport

LIMIT = 4
FEW: NetworkPlan = msgspec.structs.replace(PLAN, max_connections=LIMIT)
PORT = Terms(forwards=frozenset({Forward(protocol=Transport.TCP, host_port=20_000, port=ECHO_PORT)}))
SILENT_PORT = 9
#: linux/tcp.h.
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
TCP_SEND_QUEUE = 2


@dataclass
class World:
    network: HostNetwork
    guest: Guest


@contextlib.asynccontextmanager
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(internet())
        network = HostNetwork(FEW, warm=1, resolv_conf=tmp_path / "none")
        await network.open({})
        stack.push_async_callback(network.sweep, set())
        stack.push_async_callback(network.close)
        guest = await stack.enter_async_context(plugged_in(await network.acquire(0, PORT)))
        await serve_echo(stack, namespace_path(guest.namespace), [])
        yield World(network, guest)


async def reset_on_the_way(guest: Guest, connection: socket.socket) -> None:
    """Have the slot's namespace see a reset that reaches nobody else, and forget the connection without a word."""
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
    sequence = connection.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF
    ours, theirs = connection.getsockname(), connection.getpeername()
    ends = socket.inet_aton(ours[0]) + socket.inet_aton(theirs[0])
    head = struct.Struct("!HHIIBBHHH")
    ports = ours[1], theirs[1]
    unsigned = head.pack(*ports, sequence, 0, 0x50, 0x04, 0, 0, 0)
    total = sum(struct.unpack("!16H", ends + struct.pack("!BBH", 0, socket.IPPROTO_TCP, head.size) + unsigned))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            raw.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
            raw.sendto(head.pack(*ports, sequence, 0, 0x50, 0x04, 0, ~total & 0xFFFF, 0), (theirs[0], 0))

    await run_inside(namespace_path(guest.namespace), send)
    connection.close()


def dropped(rules: str) -> int:
    """Packets that rules with `ct count` have dropped."""
    counts = [line.split("counter packets ")[1] for line in rules.splitlines() if "ct count over" in line]
    assert counts
    return sum(int(count.split()[0]) for count in counts)


def dropped_by_host() -> int:
    return dropped(sh(f"nft list chain inet {FEW.limits_table} bound"))


def dropped_inside(guest: Guest) -> int:
    return dropped(sh(f"nsenter --net={guest.slot.namespace_path} nft list chain ip fuse forward"))


async def fool_the_namespace(guest: Guest) -> None:
    """Have as many connections as are allowed, of which the namespace knows that they are closed."""
    for connection in [await guest.connect(SERVER) for _ in range(LIMIT)]:
        await reset_on_the_way(guest, connection)


async def is_limited(guest: Guest) -> bool:
    """Is it the host that lets no further connection out?"""
    before = dropped_by_host()
    try:
        await guest.tcp(SERVER, timeout_s=SILENCE_S)
    except TimeoutError:
        return dropped_inside(guest) == 0 and dropped_by_host() > before
    return False


async def call() -> socket.socket:
    """Connect to the published port from outside."""
    made = await run_inside(
        namespace_path("internet"), lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    )
    try:
        async with asyncio.timeout(SILENCE_S):
            await asyncio.get_running_loop().sock_connect(made, (HOST_ADDRESS, 20_000))
    except BaseException:
        made.close()
        raise
    return made


@private_network
async def test_a_reset_that_the_host_never_sees_makes_no_room(tmp_path):
    async with world(tmp_path) as lab:
        await fool_the_namespace(lab.guest)
        assert await is_limited(lab.guest)
        assert int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text()) == LIMIT


@private_network
async def test_what_is_counted_outlives_repairs_and_the_daemon(tmp_path):
    async with world(tmp_path) as lab:
        await fool_the_namespace(lab.guest)
        await lab.network.settle()  # a slot that is being made would repair the table by itself
        sh(f"nft delete table inet {FEW.table}")
        assert await lab.network.ensure()
        assert await is_limited(lab.guest)
        successor = HostNetwork(FEW, warm=0, resolv_conf=tmp_path / "none")
        await successor.open({0: PORT})
        try:
            assert await is_limited(lab.guest)
            sh(f"nft delete table inet {FEW.limits_table}")
            assert await successor.ensure()
            assert not await successor.ensure()
            assert not await is_limited(lab.guest), "what was counted is gone with the set"
            assert dropped_by_host() == 0
        finally:
            await successor.close()


@private_network
async def test_connections_out_and_in_are_counted_together(tmp_path):
    async with world(tmp_path) as lab, contextlib.AsyncExitStack() as stack:
        for _ in range(LIMIT // 2):
            stack.enter_context(await lab.guest.connect(SERVER))
            last = stack.enter_context(await call())
        with pytest.raises(TimeoutError):
            await lab.guest.connect(SERVER, timeout_s=SILENCE_S)
        with pytest.raises(TimeoutError):
            await call()
        assert await say(last, b"open ones"), "stay open"
        last.close()
        assert await lab.guest.tcp(SERVER), "and one that has ended makes room"


@private_network
async def test_a_stream_without_an_answer_is_one_connection(tmp_path):
    async with world(tmp_path) as lab:
        listing = f"nft list set inet {FEW.limits_table} open"
        assert "elements" not in sh(listing), "who has no connection costs nothing"

        def send() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
                for _ in range(50 * LIMIT):
                    datagram.sendto(b"x", (SERVER, SILENT_PORT))

        await run_inside(namespace_path(lab.guest.namespace), send)
        assert await lab.guest.tcp(SERVER, timeout_s=PATIENCE_S)
        assert dropped_by_host() == dropped_inside(lab.guest) == 0
        assert plan_slot(FEW, 0).veth in sh(listing)
