"""What a machine reaches through its slot, and what it does not."""

import asyncio
import contextlib
import errno
import functools
import re
import socket
import struct
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
    PATIENCE_S,
    PLAN,
    SERVER,
    SILENCE_S,
    Guest,
    Internet,
    internet,
    plugged_in,
    question,
    say,
    serve_echo,
    sh,
)

from fusevm.host.net.namespace import run_inside
from fusevm.host.net.network import HostNetwork
from fusevm.host.net.terms import Terms
from fusevm.host.net.tracking import MAX_CONNECTIONS
from fusevm.model.network import Network

OFFLINE = Terms(policy=Network(internet=False))


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
            async with asyncio.timeout(60):
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
                await guest.udp(SERVER, source=source, timeout_s=SILENCE_S)
        guest.ip("link set eth0 address 06:00:0a:d0:00:77")
        guest.ip(f"neigh replace {guest.slot.gateway} lladdr {guest.slot.gateway_mac} dev eth0 nud permanent")
        with pytest.raises((TimeoutError, OSError)):
            await guest.udp(SERVER, timeout_s=SILENCE_S)
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
        async with asyncio.timeout(60):
            while not world.internet.senders:
                await asyncio.sleep(0.01)
        assert len(world.internet.senders) == 1
        async with asyncio.timeout(PATIENCE_S):
            while "packets 1" not in sh(f"nft list chain inet {PLAN.table} guard"):
                await asyncio.sleep(0.01)


@private_network
async def test_switching_the_internet_off_cuts_open_connections_and_dns_at_once(tmp_path):
    async with two_machines(tmp_path) as world:
        guest, slot = world.guest, world.guest.slot
        with await guest.connect(SERVER) as connection:
            assert await say(connection, b"one") == f"{HOST_ADDRESS} one"
            await world.network.set_terms(slot, OFFLINE)
            assert await guest.is_refused(SERVER)
            with pytest.raises(OSError, match=r".*"):
                await say(connection, b"two", timeout_s=SILENCE_S)
            answer = await guest.udp(slot.gateway, 53, question("secret.example.org"))
            assert answer[3] & 0x0F == 5  # REFUSED
            assert world.internet.asked == []
            assert await world.other.tcp(SERVER), "the other machine is not concerned"
            await world.network.set_terms(slot, Terms())
            assert await guest.tcp(SERVER) == f"{HOST_ADDRESS} hello"


@private_network
async def test_without_the_internet_not_even_one_packet_passes_in_either_direction(tmp_path):
    async with two_machines(tmp_path) as world:
        loop = asyncio.get_running_loop()
        with await world.guest.open_socket(socket.SOCK_DGRAM) as datagram:
            await loop.sock_connect(datagram, (SERVER, 7))
            await loop.sock_sendall(datagram, b"one")
            async with asyncio.timeout(60):
                await loop.sock_recv(datagram, 100)
            await world.network.set_terms(world.guest.slot, OFFLINE)
            arrived = len(world.internet.senders)
            for _ in range(3):
                with contextlib.suppress(OSError):
                    await loop.sock_sendall(datagram, b"two")
                await asyncio.sleep(0.05)
            assert len(world.internet.senders) == arrived
            world.internet.send_again(b"three")
            # Errors that the refusals have left on the socket are not what is looked for.
            assert await nothing_comes(datagram)
            await world.network.set_terms(world.guest.slot, Terms())
            world.internet.send_again(b"four")
            assert await nothing_comes(datagram), "the connection is forgotten, not only interrupted"
            await loop.sock_sendall(datagram, b"four")
            async with asyncio.timeout(60):
                assert (await loop.sock_recv(datagram, 100)).endswith(b"four")


async def nothing_comes(datagram: socket.socket) -> bool:
    deadline = asyncio.get_running_loop().time() + 0.5
    while asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.02)
        try:
            datagram.recv(100)
        except BlockingIOError:
            continue
        except OSError:
            continue
        return False
    return True


@private_network
async def test_nobody_outside_opens_a_connection_to_a_machine(tmp_path):
    async with two_machines(tmp_path) as world, contextlib.AsyncExitStack() as stack:
        heard: list[str] = []
        slot = world.guest.slot
        # Only the host's rules are looked at: a process in the namespace, without the namespace's own rules.
        sh(f"nsenter --net={slot.namespace_path} nft flush ruleset")
        await serve_echo(stack, slot.namespace_path, heard)
        sh(f"ip -n internet route add {PLAN.range} via {HOST_ADDRESS}")
        stranger = Guest(slot)
        stranger.namespace = "internet"
        assert await stranger.is_refused(slot.address)
        assert heard == []
        with socket.socket() as connection:  # the host itself may
            connection.setblocking(False)
            async with asyncio.timeout(60):
                await asyncio.get_running_loop().sock_connect(connection, (slot.address, 7))
            assert await say(connection, b"hi") == f"{slot.host_address} hi"


@private_network
async def test_a_machine_reaches_no_other_network_of_the_host(tmp_path):
    async with two_machines(tmp_path) as world, contextlib.AsyncExitStack() as stack:
        heard: list[str] = []
        sh("ip netns add side && ip link add side0 type veth peer name side1 netns side")
        sh("ip addr add 192.0.2.1/24 dev side0 && ip link set side0 up")
        sh("ip -n side addr add 192.0.2.2/24 dev side1 && ip -n side link set side1 up")
        sh(f"ip -n side route add {PLAN.range} via 192.0.2.1")
        await serve_echo(stack, "/run/netns/side", heard)
        assert await world.guest.is_refused("192.0.2.2"), "a public address, but not behind the uplink"
        assert heard == []


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
        await world.network.set_terms(world.other.slot, OFFLINE)
        await world.network.settle()  # a slot that is being made would repair the table by itself
        sh("nft flush ruleset")
        assert await world.guest.is_refused(SERVER), "nobody translates the address"
        assert await world.network.ensure() is True
        assert await world.guest.tcp(SERVER)
        assert await world.other.is_refused(SERVER)


@private_network
async def test_ipv6_does_not_exist_for_a_machine(tmp_path):
    async with two_machines(tmp_path) as world:
        world.guest.ip("link set eth0 addrgenmode eui64")
        world.guest.ip("addr add fd00::2/64 dev eth0 nodad")
        inside = f"nsenter --net={world.guest.slot.namespace_path}"
        assert sh(f"{inside} sh -c 'cat /proc/sys/net/ipv6/conf/*/disable_ipv6 | sort -u'") == "1\n"
        assert "inet6" not in sh(f"ip -n {world.guest.slot.namespace} addr show")
        assert "inet6" not in sh(f"ip addr show dev {world.guest.slot.veth}")


@private_network
async def test_ipv6_from_a_slots_namespace_is_dropped_by_the_host(tmp_path):
    async with two_machines(tmp_path) as world:
        slot = world.guest.slot
        sh(f"nsenter --net={slot.namespace_path} sh -c 'echo 0 > /proc/sys/net/ipv6/conf/{slot.peer}/disable_ipv6'")
        sh(f"ip -n {slot.namespace} addr add fd99::2/64 dev {slot.peer} nodad")
        sh(f"ip -n {slot.namespace} neigh add fd99::1 lladdr 02:00:00:00:00:01 dev {slot.peer}")
        sh(f'nsenter --net={slot.namespace_path} {sys.executable} -c "{SEND_IPV6}"')
        async with asyncio.timeout(PATIENCE_S):
            while "nfproto ipv6 counter packets 0" in (guard := sh(f"nft list chain inet {PLAN.table} guard")):
                await asyncio.sleep(0.01)
        assert re.search(r"nfproto ipv6 counter packets \d+", guard)


SEND_IPV6 = "import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', ('fd99::1', 7))"


@private_network
async def test_a_machine_has_a_bounded_number_of_connections(tmp_path):
    async with two_machines(tmp_path) as world:
        guest = world.guest
        # None ends while a busy machine makes the others.
        slow = "echo 3600 > /proc/sys/net/netfilter/nf_conntrack_udp_timeout"
        sh(f"{slow}; nsenter --net={guest.slot.namespace_path} sh -c '{slow}'")
        with await guest.connect(SERVER) as connection:

            def send(first: int) -> None:
                for port in range(first, first + 200):
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
                        datagram.bind((guest.slot.guest_address, port))
                        datagram.sendto(b"x", (SERVER, 9))

            limit = f"nsenter --net={guest.slot.namespace_path} nft list chain ip fuse forward | grep 'ct count'"
            first = 10_000
            # Frames that a busy test loses on the way only make it longer.
            while "counter packets 0" in sh(limit) and first < 60_000:
                await run_inside(f"/run/netns/{guest.namespace}", functools.partial(send, first))
                first += 200
                await asyncio.sleep(0.005)
            count = int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text())
            assert MAX_CONNECTIONS - 50 < count <= MAX_CONNECTIONS + 50
            assert await say(connection, b"open ones") == f"{HOST_ADDRESS} open ones"
            with pytest.raises(TimeoutError):
                await guest.tcp(SERVER, timeout_s=SILENCE_S)
            assert await world.other.tcp(SERVER)


@private_network
async def test_what_connection_tracking_cannot_place_does_not_leave_the_namespace(tmp_path):
    async with two_machines(tmp_path) as world:
        guest = world.guest

        def send() -> None:
            # A TCP segment with SYN and FIN (invalid to nf_conntrack_proto_tcp).
            segment = struct.pack("!HHIIBBHHH", 1234, 80, 1, 1, 0x50, 0x03, 1024, 0, 0)
            words = struct.unpack(
                "!16H",
                socket.inet_aton(guest.slot.guest_address)
                + socket.inet_aton(SERVER)
                + struct.pack("!BBH", 0, 6, len(segment))
                + segment,
            )
            total = sum(words)
            total = (total & 0xFFFF) + (total >> 16)
            total = (total & 0xFFFF) + (total >> 16)
            checked = segment[:16] + struct.pack("!H", ~total & 0xFFFF) + segment[18:]
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
                raw.sendto(checked, (SERVER, 0))

        await run_inside(f"/run/netns/{guest.namespace}", send)
        await asyncio.sleep(0.3)
        guard = sh(f"nft list chain inet {PLAN.table} guard")
        assert "@sources counter packets 0" in guard, "it would have left with the address of inside"


@private_network
async def test_a_machine_pings_its_gateway(tmp_path):
    async with two_machines(tmp_path) as world:

        def ping() -> bytes:
            echo = bytes.fromhex("0800f7ff00000000")
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
                raw.settimeout(60)
                raw.sendto(echo, (world.guest.slot.gateway, 0))
                return raw.recv(100)[20:21]

        assert await run_inside(f"/run/netns/{world.guest.namespace}", ping) == b"\0"
