"""What a machine reaches through its slot, and what it does not."""

import asyncio
import contextlib
import errno
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from namespaces import private_network
from network_lab import (
    HOST_ADDRESS,
    METADATA,
    NAME_SERVER,
    NEIGHBOUR,
    PLAN,
    SERVER,
    Guest,
    Internet,
    internet,
    plugged_in,
    question,
    say,
    serve_echo,
    sh,
)

from fusevm.host.net.network import HostNetwork
from fusevm.model.environment import Network

OFFLINE = Network(internet=False)


@dataclass
class World:
    internet: Internet
    network: HostNetwork
    guest: Guest
    other: Guest


@contextlib.asynccontextmanager
async def two_machines(tmp_path: Path) -> AsyncIterator[World]:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"nameserver {NAME_SERVER}\n")
    async with contextlib.AsyncExitStack() as stack:
        far = await stack.enter_async_context(internet())
        network = HostNetwork(PLAN, warm=2, resolv_conf=resolv_conf)
        await network.open({})
        stack.push_async_callback(network.sweep, set())
        stack.push_async_callback(network.close)
        guests = []
        for index in (0, 1):
            slot = await network.acquire(index)
            await network.serve_dns(slot)
            guests.append(await stack.enter_async_context(plugged_in(slot)))
        yield World(far, network, *guests)


@private_network
async def test_a_machine_reaches_the_internet_and_is_seen_as_the_host(tmp_path):
    async with two_machines(tmp_path) as world:
        for guest in (world.guest, world.other):
            assert await guest.tcp(SERVER) == f"{HOST_ADDRESS} hello"
            assert await guest.udp(SERVER) == f"{HOST_ADDRESS} hello".encode()


@private_network
async def test_a_machine_resolves_names_through_the_gateway_only(tmp_path):
    async with two_machines(tmp_path) as world:
        answer = await world.guest.udp(world.guest.slot.gateway, 53, question("example.org", 7))
        assert answer[:2] == b"\x00\x07"
        assert answer[-4:] == bytes([198, 51, 100, 10])
        with await world.guest.connect(world.guest.slot.gateway, 53) as stream:
            query = question("example.net", 8)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(stream, len(query).to_bytes(2, "big") + query)
            async with asyncio.timeout(2):
                reply = await loop.sock_recv(stream, 4096)
            assert reply[2:4] == b"\x00\x08"
        assert len(world.internet.asked) == 2
        # The forwarder asks under ids of its own.
        assert await world.guest.is_refused(NAME_SERVER, 53)
        assert len(world.internet.asked) == 2


@private_network
async def test_a_machine_reaches_no_other_machine_nor_the_host_nor_private_ranges(tmp_path):
    async with two_machines(tmp_path) as world, contextlib.AsyncExitStack() as stack:
        heard: list[str] = []
        await serve_echo(stack, None, heard)
        for slot in (world.guest.slot, world.other.slot):
            await serve_echo(stack, slot.namespace_path, heard)
        guest, mine, others = world.guest, world.guest.slot, world.other.slot
        await serve_echo(stack, f"/run/netns/{world.other.namespace}", heard)
        host = [HOST_ADDRESS, mine.host_address, others.host_address]
        machines = [others.address, mine.address, mine.gateway]
        private = [METADATA, NEIGHBOUR, "10.0.0.1", "100.64.0.1", "172.16.0.1", "168.63.129.16", "224.0.0.1"]
        addresses = [*host, *machines, *private]
        refused = await asyncio.gather(*(guest.is_refused(address) for address in addresses))
        assert dict(zip(addresses, refused, strict=True)) == dict.fromkeys(addresses, True)
        assert heard == []
        assert world.internet.senders == []
        # The services do answer, so the refusals mean something.
        assert await world.other.tcp(SERVER)


@private_network
async def test_a_refusal_is_an_answer_and_not_a_timeout(tmp_path):
    async with two_machines(tmp_path) as world:
        with pytest.raises(OSError) as refusal:
            await world.guest.tcp(METADATA)
        assert refusal.value.errno == errno.EHOSTUNREACH


@private_network
async def test_packets_with_a_foreign_source_are_dropped_at_the_tap(tmp_path):
    async with two_machines(tmp_path) as world:
        guest = world.guest
        guest.ip("addr add 198.51.100.77/32 dev lo")
        guest.ip(f"addr add {world.other.slot.address}/32 dev lo")
        for source in ("198.51.100.77", world.other.slot.address):
            with pytest.raises(TimeoutError):
                await guest.udp(SERVER, source=source)
        guest.ip("link set eth0 address 06:00:0a:d0:00:77")
        with pytest.raises((TimeoutError, OSError)):
            await guest.udp(SERVER)
        assert world.internet.senders == []
        guest.ip(f"link set eth0 address {guest.slot.guest_mac}")
        guest.ip("route replace default via 10.208.0.1")
        assert await guest.udp(SERVER)


@private_network
async def test_a_process_in_the_slots_namespace_cannot_use_another_address(tmp_path):
    """A VMM that was taken over sits behind the tap's rules; the host's must hold by themselves."""
    async with two_machines(tmp_path) as world:
        slot, foreign = world.guest.slot, world.other.slot.address
        sh(f"ip -n {slot.namespace} addr add {foreign}/32 dev lo")
        sh(f"nsenter --net={slot.namespace_path} nft flush ruleset")
        sender = tmp_path / "sender.py"
        sender.write_text(
            "import socket, sys\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "s.bind((sys.argv[1], 0))\n"
            f"s.sendto(b'x', ('{SERVER}', 7))\n"
        )
        for source in (foreign, slot.address):
            sh(f"nsenter --net={slot.namespace_path} {sys.executable} {sender} {source}")
        async with asyncio.timeout(2):
            while not world.internet.senders:
                await asyncio.sleep(0.01)
        assert len(world.internet.senders) == 1
        guard = sh(f"nft list chain inet {PLAN.table} guard")
        assert "packets 1" in guard


@private_network
async def test_switching_the_internet_off_cuts_open_connections_and_dns_at_once(tmp_path):
    async with two_machines(tmp_path) as world:
        guest, slot = world.guest, world.guest.slot
        with await guest.connect(SERVER) as connection:
            assert await say(connection, b"one") == f"{HOST_ADDRESS} one"
            await world.network.set_policy(slot, OFFLINE)
            assert await guest.is_refused(SERVER)
            with pytest.raises(OSError, match=r".*"):
                await say(connection, b"two")
            answer = await guest.udp(slot.gateway, 53, question("secret.example.org"))
            assert answer[3] & 0x0F == 5  # REFUSED
            assert world.internet.asked == []
            assert await world.other.tcp(SERVER), "the other machine is not concerned"
            await world.network.set_policy(slot, Network())
            assert await guest.tcp(SERVER) == f"{HOST_ADDRESS} hello"


@private_network
async def test_a_machine_may_start_without_the_internet(tmp_path):
    async with two_machines(tmp_path) as world:
        slot = await world.network.acquire(2, OFFLINE)
        async with plugged_in(slot) as guest:
            assert await guest.is_refused(SERVER)
        assert (await world.network.observe()).rules.machines[2] is False


@private_network
async def test_a_veth_that_is_not_in_the_table_reaches_nothing(tmp_path):
    async with two_machines(tmp_path) as world, contextlib.AsyncExitStack() as stack:
        await serve_echo(stack, None, [])
        await world.network.settle()
        slot = world.guest.slot
        sh(f"nft 'delete element inet {PLAN.table} sources {{ {slot.veth} . {slot.address} }}'")
        assert await world.guest.is_refused(SERVER)
        assert await world.guest.is_refused(HOST_ADDRESS)
        assert await world.network.ensure() is True
        assert await world.guest.tcp(SERVER)
        assert await world.network.ensure() is False


@private_network
async def test_a_flushed_rule_set_is_repaired(tmp_path):
    async with two_machines(tmp_path) as world:
        await world.network.set_policy(world.other.slot, OFFLINE)
        await world.network.settle()  # a slot that is being made would repair the table by itself
        sh("nft flush ruleset")
        assert await world.guest.is_refused(SERVER), "nobody translates the address"
        assert await world.network.ensure() is True
        assert await world.guest.tcp(SERVER)
        assert await world.other.is_refused(SERVER)


@private_network
async def test_ipv6_gets_nowhere(tmp_path):
    async with two_machines(tmp_path) as world:
        world.guest.ip("link set eth0 addrgenmode eui64")
        world.guest.ip("addr add fd00::2/64 dev eth0 nodad")
        inside = f"nsenter --net={world.guest.slot.namespace_path}"
        assert sh(f"{inside} sh -c 'cat /proc/sys/net/ipv6/conf/*/disable_ipv6 | sort -u'") == "1\n"
        assert "inet6" not in sh(f"ip -n {world.guest.slot.namespace} addr show")
        assert "inet6" not in sh(f"ip addr show dev {world.guest.slot.veth}")
