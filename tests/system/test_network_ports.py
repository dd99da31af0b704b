"""Published ports: who reaches a machine, by which way, and what is refused."""

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

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
    Internet,
    bound,
    internet,
    namespace_path,
    plugged_in,
    say,
    serve_echo,
    sh,
)

from fusevm.host.net.namespace import run_inside
from fusevm.host.net.network import HostNetwork
from fusevm.host.net.plan import plan_slot
from fusevm.host.net.tables import USE_MEMORY_S
from fusevm.host.net.terms import Forward, Terms
from fusevm.model.network import Network, Transport

TCP = Forward(protocol=Transport.TCP, host_port=20_000, port=ECHO_PORT)
UDP = Forward(protocol=Transport.UDP, host_port=20_001, port=ECHO_PORT)
BOTH = Terms(forwards=frozenset({TCP, UDP}))
OUTSIDE = "203.0.113.1"


@dataclass
class World:
    internet: Internet
    network: HostNetwork
    guest: Guest
    other: Guest
    heard: list[str]
    stack: contextlib.AsyncExitStack


@contextlib.asynccontextmanager
async def world(tmp_path: Path, terms: Terms = BOTH) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        far = await stack.enter_async_context(internet())
        network = HostNetwork(PLAN, warm=1, resolv_conf=tmp_path / "none")
        await network.open({})
        stack.push_async_callback(network.sweep, set())
        stack.push_async_callback(network.close)
        guests = []
        for index, wanted in ((0, terms), (1, Terms())):
            guests.append(await stack.enter_async_context(plugged_in(await network.acquire(index, wanted))))
        heard: list[str] = []
        await serve_echo(stack, namespace_path(guests[0].namespace), heard)
        yield World(far, network, *guests, heard, stack)


async def call(path: str | None, address: str, port: int, kind=socket.SOCK_STREAM, timeout_s=PATIENCE_S) -> str:
    """Exchange a word with a port, from a namespace or the host (None)."""
    make = functools.partial(socket.socket, socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    made = await run_inside(path, make) if path else make()
    with made:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(made, (address, port))
        return await say(made, b"hello", timeout_s=timeout_s)


OUT = namespace_path("internet")


@private_network
async def test_a_port_is_reached_from_outside_and_from_the_host_itself(tmp_path):
    async with world(tmp_path) as lab:
        assert await call(OUT, HOST_ADDRESS, 20_000) == f"{OUTSIDE} hello", "and the machine sees who calls"
        assert await call(OUT, HOST_ADDRESS, 20_001, socket.SOCK_DGRAM) == f"{OUTSIDE} hello"
        for address in (HOST_ADDRESS, "127.0.0.1"):
            assert (await call(None, address, 20_000)).endswith(" hello")
            assert (await call(None, address, 20_001, socket.SOCK_DGRAM)).endswith(" hello")
        for port, kind in ((20_001, socket.SOCK_STREAM), (20_000, socket.SOCK_DGRAM), (20_002, socket.SOCK_STREAM)):
            with pytest.raises(OSError, match=r".*"):
                await call(OUT, HOST_ADDRESS, port, kind, SILENCE_S)
        assert (await lab.network.traffic())[0].connections_accepted >= 6


@private_network
async def test_a_port_works_without_the_internet_and_only_for_answers(tmp_path):
    async with world(tmp_path, Terms(policy=Network(internet=False), forwards=frozenset({TCP}))) as lab:
        assert await call(OUT, HOST_ADDRESS, 20_000) == f"{OUTSIDE} hello"
        assert await lab.guest.is_refused(OUTSIDE), "it may answer, and not call"


@private_network
async def test_other_machines_do_not_reach_a_published_port_by_the_host(tmp_path):
    async with world(tmp_path) as lab:
        for address in (HOST_ADDRESS, lab.guest.slot.host_address, lab.other.slot.host_address, lab.guest.slot.address):
            for port in (20_000, 20_001, ECHO_PORT):
                assert await lab.other.is_refused(address, port)
        assert lab.heard == []
        with pytest.raises(OSError, match=r".*"):
            await call(OUT, lab.guest.slot.address, ECHO_PORT, timeout_s=SILENCE_S)


@private_network
async def test_unpublishing_ends_open_connections_and_a_switched_loopback(tmp_path):
    async with world(tmp_path) as lab:
        slot, loop = lab.guest.slot, asyncio.get_running_loop()
        switch = Path(f"/proc/sys/net/ipv4/conf/{slot.veth}/route_localnet")
        assert switch.read_text().strip() == "1"
        make = functools.partial(socket.socket, socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with await run_inside(OUT, make) as connection:
            await loop.sock_connect(connection, (HOST_ADDRESS, 20_000))
            assert await say(connection, b"one") == f"{OUTSIDE} one"
            await lab.network.set_terms(slot, Terms(forwards=frozenset({UDP})))
            with pytest.raises(OSError, match=r".*"):
                await say(connection, b"two", timeout_s=SILENCE_S)
        assert await call(OUT, HOST_ADDRESS, 20_001, socket.SOCK_DGRAM) == f"{OUTSIDE} hello"
        await lab.network.set_terms(slot, Terms())
        assert switch.read_text().strip() == "0"
        with pytest.raises(OSError, match=r".*"):
            await call(OUT, HOST_ADDRESS, 20_001, socket.SOCK_DGRAM, SILENCE_S)


@private_network
async def test_connections_to_a_port_survive_a_restart_of_the_daemon(tmp_path):
    async with world(tmp_path) as lab:
        loop = asyncio.get_running_loop()
        make = functools.partial(socket.socket, socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with await run_inside(OUT, make) as connection:
            await loop.sock_connect(connection, (HOST_ADDRESS, 20_000))
            assert await say(connection, b"one") == f"{OUTSIDE} one"
            await lab.network.close()
            assert await call(OUT, HOST_ADDRESS, 20_000) == f"{OUTSIDE} hello", "also while no daemon runs"
            second = HostNetwork(PLAN, warm=1)
            assert await second.open({0: BOTH, 1: Terms()}) == {}
            lab.stack.push_async_callback(second.sweep, set())
            lab.stack.push_async_callback(second.close)
            assert await say(connection, b"two") == f"{OUTSIDE} two"
            assert not await second.ensure()
            sh(f"nft flush map inet {PLAN.table} forward_port")
            assert await second.ensure(), "what others have changed is repaired"
            assert await call(OUT, HOST_ADDRESS, 20_000) == f"{OUTSIDE} hello"


@private_network
async def test_users_of_the_host_reach_only_what_is_published(tmp_path):
    async with world(tmp_path) as lab:
        address = lab.guest.slot.address

        async def reaches(user: str, target: str, port: int) -> bool:
            argv = ["setpriv", f"--reuid={user}", "timeout", "30", "bash", "-c", f"exec 3<>/dev/tcp/{target}/{port}"]
            process = await asyncio.create_subprocess_exec(*argv)
            return await process.wait() == 0

        assert await reaches("65534", "127.0.0.1", 20_000)
        assert not await reaches("65534", address, ECHO_PORT)
        assert await reaches("0", address, ECHO_PORT)


async def is_used(lab: World, index: int = 0) -> bool:
    """Has a client used a port of the machine since this was last asked?"""
    found = index in await lab.network.uses()
    if found:
        sh(f"nft delete element inet {PLAN.table} used {{ {plan_slot(PLAN, index).veth} }}")
    return found


@private_network
async def test_what_clients_send_to_a_port_is_use_and_what_the_machine_does_is_none(tmp_path):
    async with world(tmp_path) as lab:
        loop = asyncio.get_running_loop()
        assert await lab.guest.tcp(SERVER) == f"{HOST_ADDRESS} hello"
        assert await lab.guest.udp(SERVER) == f"{HOST_ADDRESS} hello".encode()
        assert await lab.guest.is_refused(HOST_ADDRESS, 20_000), "not even to its own port"
        assert await lab.network.uses() == {}, "what a machine sends, and the answers to it"
        for path, address in ((OUT, HOST_ADDRESS), (None, HOST_ADDRESS), (None, "127.0.0.1")):
            for kind, port in ((socket.SOCK_STREAM, 20_000), (socket.SOCK_DGRAM, 20_001)):
                await call(path, address, port, kind)
                assert await is_used(lab), (path, address, port)
        make = functools.partial(socket.socket, socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with await run_inside(OUT, make) as connection:
            await loop.sock_connect(connection, (HOST_ADDRESS, 20_000))
            assert await say(connection, b"one") == f"{OUTSIDE} one"
            assert await is_used(lab)
            assert await say(connection, b"two") == f"{OUTSIDE} two"
            assert await is_used(lab), "a connection that lasts"
            await lab.network.set_terms(lab.guest.slot, Terms(forwards=frozenset({TCP})))
            assert await say(connection, b"three") == f"{OUTSIDE} three"
            assert await is_used(lab), "also after a change of the ports"
        assert not await is_used(lab, 1)


#: linux/tcp.h: a socket that is closed in this mode says nothing to its peer.
TCP_REPAIR = 19


@private_network
async def test_a_machine_that_sends_to_clients_who_have_left_is_not_used(tmp_path):
    """Their resets and ICMP errors come by the connection that they had."""
    tcp = Forward(protocol=Transport.TCP, host_port=20_000, port=9)
    udp = Forward(protocol=Transport.UDP, host_port=20_001, port=9)
    async with world(tmp_path, Terms(forwards=frozenset({tcp, udp}))) as lab:
        loop, inside = asyncio.get_running_loop(), namespace_path(lab.guest.namespace)

        async def meet(kind: socket.SocketKind, port: int) -> tuple[socket.socket, socket.socket]:
            """A client and its connection in the machine, which have greeted each other."""
            server = await run_inside(inside, functools.partial(bound, kind, "0.0.0.0", 9))
            make = functools.partial(socket.socket, socket.AF_INET, kind | socket.SOCK_NONBLOCK)
            client = await run_inside(OUT, make)
            for made in (server, client):
                lab.stack.enter_context(made)
            await loop.sock_connect(client, (HOST_ADDRESS, port))
            await loop.sock_sendall(client, b"hello")
            if kind == socket.SOCK_STREAM:
                server = lab.stack.enter_context((await loop.sock_accept(server))[0])
                assert await loop.sock_recv(server, 100) == b"hello"
            else:
                server.connect((await loop.sock_recvfrom(server, 100))[1])
            await loop.sock_sendall(server, b"welcome")
            assert await loop.sock_recv(client, 100) == b"welcome"
            return client, server

        for kind, port in ((socket.SOCK_STREAM, 20_000), (socket.SOCK_DGRAM, 20_001)):
            client, server = await meet(kind, port)
            assert await is_used(lab)
            if kind == socket.SOCK_STREAM:
                client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            client.close()
            assert not await is_used(lab), "it left without a word"
            await loop.sock_sendall(server, b"still there?")
            with pytest.raises((ConnectionResetError, ConnectionRefusedError)):
                await asyncio.wait_for(loop.sock_recv(server, 100), PATIENCE_S)
            assert not await is_used(lab)


@private_network
async def test_uses_survive_another_table_and_another_daemon_but_not_the_machine(tmp_path):
    async with world(tmp_path) as lab:
        assert await call(OUT, HOST_ADDRESS, 20_000) == f"{OUTSIDE} hello"
        assert not await lab.network.ensure(), "who uses whom is no change of the rules"
        assert await is_used(lab)
        veth = lab.guest.slot.veth
        sh(f"nft add element inet {PLAN.table} used {{ {veth} timeout {USE_MEMORY_S - 1000}s }}")
        assert await lab.network.uses() == {}, "it was before the machine: another one's"
        sh(f"nft flush map inet {PLAN.table} forward_port")
        assert await lab.network.ensure()
        await lab.network.close()
        second = HostNetwork(PLAN, warm=0)
        assert await second.open({0: BOTH, 1: Terms()}) == {}
        lab.stack.push_async_callback(second.sweep, set())
        lab.stack.push_async_callback(second.close)
        assert 1000 <= (await second.uses())[0] < 2000, "its time is known as before"
