"""The forwarder at the gateway address, against name servers that misbehave."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvloop
from namespaces import private_network
from network_lab import PLAN, Guest, answer_to, plugged_in, question, serve_stream, sh

from fusevm.host.net import dns
from fusevm.host.net.links import ensure_links
from fusevm.host.net.network import HostNetwork
from fusevm.host.net.plan import plan_slot
from fusevm.host.net.resolvers import ResolverFile
from fusevm.host.net.terms import Terms
from fusevm.model.network import Network

GATEWAY = "10.208.0.1"
#: What a name server says to a question: any number of datagrams.
Behaviour = Callable[[bytes], list[bytes]]


@dataclass
class NameServer(asyncio.DatagramProtocol):
    """A name server on one of the host's addresses."""

    behaviour: Behaviour
    asked: list[bytes] = field(default_factory=list)

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.asked.append(data)
        for message in self.behaviour(data):
            self.transport.sendto(message, addr)


@dataclass
class World:
    guest: Guest
    forwarder: dns.DnsForwarder
    resolv_conf: Path
    stack: contextlib.AsyncExitStack
    is_allowed: bool = True

    async def add_server(self, address: str, behaviour: Behaviour) -> NameServer:
        server = NameServer(behaviour)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: server, local_addr=(address, 53))
        self.stack.callback(transport.close)
        return server

    def use(self, *addresses: str) -> None:
        self.resolv_conf.write_text("".join(f"nameserver {address}\n" for address in addresses))

    async def ask(self, name: str = "example.org", number: int = 0x1234) -> bytes:
        return await self.guest.udp(GATEWAY, 53, question(name, number))


class Policies:
    """The whole Internet, or nothing."""

    def __init__(self, is_allowed: Callable[[], bool]) -> None:
        self._is_allowed = is_allowed

    def policy(self, _index: int) -> Network:
        return Network(internet=self._is_allowed())

    def is_reachable(self, _address: str) -> bool:
        return True

    async def pin(self, *_: object) -> bool:
        return True


@contextlib.asynccontextmanager
async def one_guest(tmp_path: Path) -> AsyncIterator[World]:
    slot = plan_slot(PLAN, 0)
    assert await ensure_links(PLAN, [slot]) == {}
    async with contextlib.AsyncExitStack() as stack:
        guest = await stack.enter_async_context(plugged_in(slot))
        resolv_conf = tmp_path / "resolv.conf"
        forwarder = dns.DnsForwarder(ResolverFile(resolv_conf), Policies(lambda: world.is_allowed))
        world = World(guest, forwarder, resolv_conf, stack)
        world.use("127.0.0.1")
        await forwarder.serve(slot)
        stack.push_async_callback(forwarder.close)
        yield world


def well(query: bytes) -> list[bytes]:
    return [answer_to(query)]


def code(message: bytes) -> int:
    return message[3] & 0x0F


@private_network
async def test_questions_go_on_under_random_ids_and_answers_come_back_under_the_guests(tmp_path):
    async with one_guest(tmp_path) as world:
        server = await world.add_server("127.0.0.1", well)
        for number in (1, 1, 1, 0xFFFF):
            reply = await world.ask(number=number)
            assert reply == answer_to(question("example.org", number))
        ids = {asked[:2] for asked in server.asked}
        assert len(ids) > 1
        assert [asked[2:] for asked in server.asked] == [question("example.org")[2:]] * 4


@private_network
async def test_an_answer_with_a_wrong_id_or_question_is_passed_over(tmp_path):
    def lies_first(query: bytes) -> list[bytes]:
        wrong_id = bytes([query[0] ^ 1, query[1]])
        other = question("evil.example.org")
        return [wrong_id + answer_to(query)[2:], query[:2] + answer_to(other)[2:], b"x", answer_to(query)]

    async with one_guest(tmp_path) as world:
        await world.add_server("127.0.0.1", lies_first)
        assert await world.ask() == answer_to(question("example.org"))


@private_network
async def test_an_answer_from_another_address_is_passed_over(tmp_path):
    async with one_guest(tmp_path) as world:
        server = await world.add_server("127.0.0.1", lambda _: [])
        other = await world.add_server("127.0.0.2", well)
        original = server.datagram_received
        server.datagram_received = lambda data, addr: (original(data, addr), other.datagram_received(data, addr))
        reply = await world.guest.udp(GATEWAY, 53, question("example.org"))
        assert code(reply) == 2
        assert len(other.asked) == dns.MAX_ATTEMPTS


@private_network
async def test_a_silent_server_is_followed_by_the_next(tmp_path):
    async with one_guest(tmp_path) as world:
        silent = await world.add_server("127.0.0.1", lambda _: [])
        await world.add_server("127.0.0.2", well)
        world.use("127.0.0.1", "127.0.0.2")
        start = time.monotonic()
        assert code(await world.guest.udp(GATEWAY, 53, question("example.org"))) == 0
        assert time.monotonic() - start >= dns.ATTEMPT_TIMEOUT_S
        assert len(silent.asked) == 1


@private_network
async def test_without_a_server_the_guest_is_told_at_once(tmp_path):
    async with one_guest(tmp_path) as world:
        assert code(await world.ask()) == 2  # nobody listens on 127.0.0.1: ECONNREFUSED
        world.use()
        assert code(await world.ask()) == 2
        world.resolv_conf.unlink()
        assert code(await world.ask()) == 2
        await world.add_server("127.0.0.3", well)
        world.use("127.0.0.3")
        assert code(await world.ask()) == 0, "the file is read again"


@private_network
async def test_a_machine_without_internet_is_refused(tmp_path):
    async with one_guest(tmp_path) as world:
        server = await world.add_server("127.0.0.1", well)
        world.is_allowed = False
        assert code(await world.ask()) == 5
        assert server.asked == []


@private_network
async def test_nobody_but_the_guest_is_answered(tmp_path):
    async with one_guest(tmp_path) as world:
        server = await world.add_server("127.0.0.1", well)
        slot = world.guest.slot
        sh(f"nsenter --net={slot.namespace_path} nft flush ruleset")  # the forwarder must hold without the rules
        world.guest.ip("addr add 198.51.100.9/32 dev lo")
        sh(f"ip -n {slot.namespace} route add 198.51.100.9 dev {slot.tap}")
        with pytest.raises(TimeoutError):
            await world.guest.udp(GATEWAY, 53, question("example.org"), source="198.51.100.9", timeout_s=0.5)
        inside = Guest(slot)
        inside.namespace = slot.namespace
        with pytest.raises(TimeoutError):
            await inside.udp(GATEWAY, 53, question("example.org"), timeout_s=0.5)
        with pytest.raises(OSError, match=r".*"):
            await inside.tcp(GATEWAY, 53)
        assert server.asked == []
        assert code(await world.ask()) == 0


@private_network
async def test_garbage_is_dropped(tmp_path):
    async with one_guest(tmp_path) as world:
        server = await world.add_server("127.0.0.1", well)
        for garbage in (b"", b"x", question("example.org")[:20], answer_to(question("example.org"))):
            with pytest.raises(TimeoutError):
                await world.guest.udp(GATEWAY, 53, garbage, timeout_s=0.2)
        assert server.asked == []


@private_network
async def test_a_guest_has_a_bounded_number_of_questions_in_work(tmp_path):
    async with one_guest(tmp_path) as world:
        server = await world.add_server("127.0.0.1", lambda _: [])
        loop = asyncio.get_running_loop()
        with await world.guest.open_socket(socket.SOCK_DGRAM) as datagram:
            await loop.sock_connect(datagram, (GATEWAY, 53))
            for number in range(dns.MAX_IN_FLIGHT + 40):
                await loop.sock_sendall(datagram, question(f"n{number}.example.org", number))
            async with asyncio.timeout(60):
                while len(server.asked) < dns.MAX_IN_FLIGHT:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
        # Without their numbers: each is asked again when there is no answer in time.
        assert len({query[2:] for query in server.asked}) == dns.MAX_IN_FLIGHT


@private_network
async def test_a_flood_is_stopped_by_the_kernel(tmp_path):
    async with one_guest(tmp_path) as world:
        received: list[bytes] = []
        world.is_allowed = False
        loop = asyncio.get_running_loop()
        with await world.guest.open_socket(socket.SOCK_DGRAM) as datagram:
            await loop.sock_connect(datagram, (GATEWAY, 53))
            start = time.monotonic()
            sent = 0
            # Until some must have been refused, whatever the speed of this machine.
            while sent < 3000 or sent < 400 + 400 * (time.monotonic() - start):
                for _ in range(20):
                    await loop.sock_sendall(datagram, question("example.org", sent % 65536))
                    sent += 1
                await asyncio.sleep(0)
            await asyncio.sleep(0.3)
            with contextlib.suppress(BlockingIOError):
                while True:
                    received.append(datagram.recv(4096))
            duration_s = time.monotonic() - start
        assert 0 < len(received) <= 300 + 300 * duration_s
        assert len(received) < sent


@private_network
async def test_tcp_answers_several_questions_and_is_bounded(tmp_path):
    async with one_guest(tmp_path) as world:
        asked: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                query = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
                asked.append(query)
                answer = answer_to(query) + b"\0" * 20_000
                writer.write(len(answer).to_bytes(2, "big") + answer)
                await writer.drain()

        upstream = socket.create_server(("127.0.0.1", 53))
        upstream.setblocking(False)
        await serve_stream(world.stack, upstream, serve)
        connections = [await world.guest.connect(GATEWAY, 53) for _ in range(dns.MAX_CONNECTIONS)]
        first = connections[0]
        for number in range(60):  # more segments than connections are allowed in a second
            reply = await exchange(first, question("example.org", number))
            assert reply[:2] == number.to_bytes(2, "big")
            assert len(reply) > 20_000
        extra = await world.guest.connect(GATEWAY, 53)
        with extra, pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await exchange(extra, question("example.org"))
        world.is_allowed = False
        assert code(await exchange(first, question("example.org"))) == 5
        await world.forwarder.stop(0)
        with pytest.raises((ConnectionResetError, BrokenPipeError, asyncio.IncompleteReadError)):
            await exchange(first, question("example.org"))
        for connection in connections:
            connection.close()
        with pytest.raises(ConnectionRefusedError):
            await world.guest.connect(GATEWAY, 53)
        await world.forwarder.stop(0)
        await world.forwarder.serve(world.guest.slot)
        assert code(await world.ask()) == 5, "it can be opened again"


@private_network
def test_it_works_on_uvloop(tmp_path):
    async def check() -> None:
        async with one_guest(tmp_path) as world:
            await world.add_server("127.0.0.1", well)
            assert code(await world.ask()) == 0
            with await world.guest.connect(GATEWAY, 53) as stream:
                assert code(await exchange(stream, question("example.org"))) == 2  # nobody listens there by TCP
        network = HostNetwork(PLAN, warm=2)
        await network.open({})
        await network.acquire(1, Terms(policy=Network(internet=False)))
        await network.settle()
        assert (await network.observe()).rules.machines[1] is False
        await network.close()
        await network.sweep(())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check())


async def exchange(connection: socket.socket, query: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60):
        await loop.sock_sendall(connection, len(query).to_bytes(2, "big") + query)
        data = b""
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
            chunk = await loop.sock_recv(connection, 65536)
            if not chunk:
                raise asyncio.IncompleteReadError(data, None)
            data += chunk
        return data[2:]
