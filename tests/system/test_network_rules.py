"""Rules by address, port, protocol and name; pinned addresses; live changes; limits and counts."""

import asyncio
import contextlib
import functools
import os
import shutil
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace
from namespaces import private_network
from network_lab import (
    ECHO_PORT,
    HOST_ADDRESS,
    METADATA,
    NEIGHBOUR,
    PATIENCE_S,
    PLAN,
    SERVER,
    SILENCE_S,
    Guest,
    Internet,
    internet,
    namespace_path,
    plugged_in,
    question,
    say,
    serve_echo,
    sh,
)

from fusevm.host.net.namespace import run_inside
from fusevm.host.net.network import HostNetwork
from fusevm.host.net.terms import Forward, Terms
from fusevm.model.errors import CommandFailed
from fusevm.model.network import Network, Protocol, Rule, Transport, Verdict, check_network

OTHER = "198.51.100.20"
THIRD = "198.51.100.30"
#: Where the lab's own name server is asked, which answers as these tests want.
RESOLVER = "203.0.113.54"
A, CNAME, TXT, AAAA = 1, 5, 16, 28


def policy(*rules: Rule, internet: bool = False, **more) -> Terms:
    return Terms(policy=check_network(Network(internet=internet, rules=rules, **more)))


def allow(**rule) -> Rule:
    return Rule(**rule)


def deny(**rule) -> Rule:
    return Rule(action=Verdict.DENY, **rule)


def encode(name: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"


def record(name: str, kind: int, ttl: int, data: bytes) -> bytes:
    return encode(name) + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


def ask(name: str, kind: int = A) -> bytes:
    return struct.pack("!HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0) + encode(name) + struct.pack("!HH", kind, 1)


def code(answer: bytes) -> int:
    return answer[3] & 0x0F


def count(answer: bytes) -> int:
    return int.from_bytes(answer[6:8], "big")


def addresses(answer: bytes) -> list[str]:
    """The addresses at the end of an answer that the forwarder has made."""
    tail = answer[len(answer) - 16 * count(answer) :]
    return [socket.inet_ntoa(tail[at + 12 : at + 16]) for at in range(0, len(tail), 16)]


class Zone(asyncio.DatagramProtocol):
    """A name server with the records of a test."""

    def __init__(self, asked: list[bytes], records: dict[str, list[bytes]]) -> None:
        self._asked, self._records = asked, records

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._asked.append(data)
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode())
            at += 1 + data[at]
        found = self._records.get(".".join(labels), [])
        head = struct.pack("!HHHHH", 0x8180 if found else 0x8183, 1, len(found), 0, 0)
        self._transport.sendto(data[:2] + head + data[12 : at + 5] + b"".join(found), addr)


@dataclass
class World:
    internet: Internet
    network: HostNetwork
    guest: Guest
    stack: contextlib.AsyncExitStack
    asked: list[bytes] = field(default_factory=list)
    records: dict[str, list[bytes]] = field(default_factory=dict)

    async def set(self, terms: Terms) -> None:
        await self.network.set_terms(self.guest.slot, terms)

    async def resolve(self, name: str, kind: int = A) -> bytes:
        return await self.guest.udp(self.guest.slot.gateway, 53, ask(name, kind))

    def name(self, name: str, *found: str, ttl: int = 60) -> None:
        self.records[name] = [record(name, A, ttl, socket.inet_aton(address)) for address in found]

    async def reaches(self, address: str, port: int = ECHO_PORT) -> bool:
        try:
            await self.guest.tcp(address, port, timeout_s=SILENCE_S)
        except OSError:
            return False
        return True

    async def pings(self, address: str) -> bool:
        def ping() -> bool:
            echo = bytes.fromhex("0800f7ff00000000")
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
                raw.settimeout(SILENCE_S)
                raw.sendto(echo, (address, 0))
                try:
                    return raw.recv(100)[20:21] == b"\0"
                except OSError:
                    return False

        return await run_inside(namespace_path(self.guest.namespace), ping)


@contextlib.asynccontextmanager
async def world(tmp_path: Path, terms: Terms) -> AsyncIterator[World]:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"nameserver {RESOLVER}\n")
    async with contextlib.AsyncExitStack() as stack:
        far = await stack.enter_async_context(internet())
        for address in (OTHER, THIRD, RESOLVER):
            sh(f"ip -n internet addr add {address}/32 dev lo")
            await serve_echo(stack, namespace_path("internet"), far.senders, address)
        network = HostNetwork(PLAN, warm=1, resolv_conf=resolv_conf)
        await network.open({})
        stack.push_async_callback(network.sweep, set())
        stack.push_async_callback(network.close)
        slot = await network.acquire(0, terms)
        await network.serve_dns(slot)
        made = World(far, network, await stack.enter_async_context(plugged_in(slot)), stack)
        bind = functools.partial(_bound, RESOLVER, 53)
        names = await run_inside(namespace_path("internet"), bind)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: Zone(made.asked, made.records), sock=names)
        stack.callback(transport.close)
        yield made


def _bound(address: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    bound.bind((address, port))
    return bound


@private_network
async def test_the_first_rule_that_matches_decides_and_the_switch_decides_the_rest(tmp_path):
    closed = policy(
        deny(cidr=OTHER),
        allow(cidr="198.51.100.0/24", protocol=Protocol.TCP, ports=(ECHO_PORT,)),
    )
    async with world(tmp_path, closed) as lab:
        assert await lab.reaches(SERVER)
        assert not await lab.reaches(OTHER), "an earlier rule"
        with pytest.raises(OSError, match=r".*"):
            await lab.guest.udp(SERVER, timeout_s=SILENCE_S)
        await lab.set(policy(deny(cidr=SERVER, protocol=Protocol.TCP, ports=("1-1023",)), internet=True))
        assert not await lab.reaches(SERVER)
        assert await lab.reaches(OTHER)
        assert await lab.guest.udp(SERVER) == f"{HOST_ADDRESS} hello".encode()
        assert await lab.pings(SERVER)
        await lab.set(policy(deny(protocol=Protocol.ICMP), internet=True))
        assert not await lab.pings(SERVER)
        assert await lab.reaches(SERVER)


@private_network
async def test_no_rule_opens_what_is_denied_to_all(tmp_path):
    everything = policy(allow(cidr="0.0.0.0/0"))
    async with world(tmp_path, everything) as lab:
        assert await lab.reaches(SERVER)
        for address in (NEIGHBOUR, METADATA, HOST_ADDRESS, lab.guest.slot.host_address, "10.0.0.1"):
            assert await lab.guest.is_refused(address), address
        assert await lab.guest.is_refused(RESOLVER, 53), "no other resolver"
        assert code(await lab.resolve("example.org")) == 5, "and names only by rules"
        assert lab.asked == []


@private_network
async def test_a_name_opens_its_addresses_and_nothing_else(tmp_path):
    async with world(tmp_path, policy(allow(domain="example.org", ports=(ECHO_PORT,)))) as lab:
        lab.name("example.org", SERVER)
        lab.name("example.net", OTHER)
        assert not await lab.reaches(SERVER), "not before it was resolved"
        answer = await lab.resolve("Example.ORG")
        assert (code(answer), addresses(answer)) == (0, [SERVER])
        assert b"\x07Example\x03ORG" in answer, "in the question's own spelling"
        assert b"\x07example\x03org" in lab.asked[0], "but asked in ours"
        assert await lab.reaches(SERVER)
        assert await lab.guest.is_refused(SERVER, 8), "another port"
        assert not await lab.reaches(OTHER)
        for name in ("example.net", "www.example.org", "example.org.evil.net", "notexample.org"):
            assert code(await lab.resolve(name)) == 5
        assert len(lab.asked) == 1, "a name that is not allowed is told to nobody"
        assert (await lab.network.traffic())[0].names_refused == 4


@private_network
async def test_a_tunnel_through_names_is_refused(tmp_path):
    async with world(tmp_path, policy(allow(domain="example.org"))) as lab:
        lab.name("example.org", SERVER)
        for number in range(20):
            assert code(await lab.resolve(f"{number:02x}secret{number}.tunnel.evil.net")) == 5
        for kind in (TXT, AAAA, 10, 65):
            answer = await lab.resolve("example.org", kind)
            assert (code(answer), count(answer)) == (0, 0), "nothing but addresses"
        # A dot within a label is no label: this is one name below `org`.
        trick = struct.pack("!HHHHHH", 1, 0x0100, 1, 0, 0, 0) + b"\x0bexample.org\0" + struct.pack("!HH", 1, 1)
        assert code(await lab.guest.udp(lab.guest.slot.gateway, 53, trick)) == 5
        assert lab.asked == []
        # What is appended to an allowed question stays here, the case of its letters included.
        option = b"\0" + struct.pack("!HHIH", 41, 1232, 0, 12) + struct.pack("!HH", 65001, 8) + b"smuggled"
        extended = ask("eXaMpLe.OrG")[:10] + b"\0\1" + ask("eXaMpLe.OrG")[12:] + option
        assert addresses(await lab.guest.udp(lab.guest.slot.gateway, 53, extended)) == [SERVER]
        assert [asked[2:] for asked in lab.asked] == [ask("example.org")[2:]]
        # Other resolvers, by whatever port, and other ways out.
        assert await lab.guest.is_refused(RESOLVER, 53)
        assert await lab.guest.is_refused(RESOLVER, 853)
        assert not await lab.reaches(OTHER)


@private_network
async def test_wildcards_aliases_and_private_answers(tmp_path):
    async with world(tmp_path, policy(allow(domain="*.example.org"))) as lab:
        lab.records["www.example.org"] = [
            record("www.example.org", CNAME, 20, encode("cdn.example.net")),
            record("evil.example.net", A, 60, socket.inet_aton(THIRD)),
            record("cdn.example.net", A, 3600, socket.inet_aton(OTHER)),
        ]
        lab.name("rebind.example.org", "127.0.0.1", METADATA, "10.211.0.6", NEIGHBOUR)
        lab.name("half.example.org", NEIGHBOUR, SERVER)
        answer = await lab.resolve("www.example.org")
        assert addresses(answer) == [OTHER], "behind the alias, and only there"
        assert int.from_bytes(answer[-10:-6], "big") == 20, "as long as the shortest link"
        assert await lab.reaches(OTHER)
        assert not await lab.reaches(THIRD)
        rebound = await lab.resolve("rebind.example.org")
        assert (code(rebound), count(rebound)) == (0, 0), "private addresses are no answer"
        assert addresses(await lab.resolve("half.example.org")) == [SERVER]
        assert await lab.reaches(SERVER)
        assert code(await lab.resolve("example.org")) == 5, "the name itself is not below itself"
        assert code(await lab.resolve("nothing.example.org")) == 3
        lab.name("long.example.org", THIRD, ttl=86_400)
        answer = await lab.resolve("long.example.org")
        assert int.from_bytes(answer[-10:-6], "big") == 300, "an answer is kept for a bounded time"


@private_network
async def test_a_pin_expires_and_an_open_connection_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("fusevm.host.net.names._MIN_LIFETIME_S", 1)
    monkeypatch.setattr("fusevm.host.net.names._GRACE_S", 2)
    async with world(tmp_path, policy(allow(domain="example.org"))) as lab:
        lab.name("example.org", SERVER, ttl=1)
        await lab.resolve("example.org")
        with await lab.guest.connect(SERVER) as connection:
            async with asyncio.timeout(PATIENCE_S):
                while await lab.reaches(SERVER):
                    await asyncio.sleep(0.2)
            assert await say(connection, b"still") == f"{HOST_ADDRESS} still"
            await lab.resolve("example.org")
            assert await lab.reaches(SERVER), "asked again, it is there again"


@private_network
async def test_a_live_change_cuts_what_is_no_longer_allowed_and_only_that(tmp_path):
    both = policy(allow(domain="example.org"), allow(domain="example.net"), allow(cidr=THIRD))
    async with world(tmp_path, both) as lab:
        lab.name("example.org", SERVER)
        lab.name("example.net", OTHER)
        for name in ("example.org", "example.net"):
            await lab.resolve(name)
        async with contextlib.AsyncExitStack() as stack:
            open_ = {
                address: stack.enter_context(await lab.guest.connect(address)) for address in (SERVER, OTHER, THIRD)
            }
            await lab.set(policy(allow(domain="example.net")))
            assert await say(open_[OTHER], b"kept") == f"{HOST_ADDRESS} kept"
            assert await lab.reaches(OTHER), "its address stays pinned"
            for address in (SERVER, THIRD):
                with pytest.raises(ConnectionResetError):
                    await say(open_[address], b"cut")
                assert not await lab.reaches(address)
            tracked = Path("/proc/net/nf_conntrack")
            if tracked.exists():
                assert f"dst={THIRD}" not in tracked.read_text()
            await lab.set(Terms())
            assert await say(open_[OTHER], b"kept") == f"{HOST_ADDRESS} kept"


@private_network
async def test_pins_and_counts_survive_a_restart_of_the_daemon_and_a_flush(tmp_path):
    terms = policy(allow(domain="example.org"))
    async with world(tmp_path, terms) as lab:
        lab.name("example.org", SERVER, ttl=300)
        await lab.resolve("example.org")
        with await lab.guest.connect(SERVER) as connection:
            before = (await lab.network.traffic())[0]
            assert before.connections_opened == 1
            await lab.network.close()
            second = HostNetwork(PLAN, warm=1, resolv_conf=tmp_path / "resolv.conf")
            assert await second.open({0: terms}) == {}
            lab.stack.push_async_callback(second.sweep, set())
            lab.stack.push_async_callback(second.close)
            assert await say(connection, b"on") == f"{HOST_ADDRESS} on"
            assert await lab.reaches(SERVER), "still pinned"
            sh("nft flush ruleset")
            assert await second.ensure()
            assert await lab.reaches(SERVER), "still pinned"
            assert not await lab.reaches(OTHER)
            assert (await second.traffic())[0].connections_opened >= 2


@private_network
async def test_bytes_connections_and_refusals_are_counted(tmp_path):
    async with world(tmp_path, policy(deny(cidr=OTHER), internet=True)) as lab:
        for _ in range(3):
            assert await lab.reaches(SERVER)
        assert not await lab.reaches(OTHER)
        payload = b"x" * 40_000
        with await lab.guest.connect(SERVER) as connection:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(connection, payload)
            async with asyncio.timeout(PATIENCE_S):
                received = 0
                while received < len(payload):
                    received += len(await loop.sock_recv(connection, 65536))
        seen = (await lab.network.traffic())[0]
        assert seen.connections_opened == 4
        assert seen.connections_accepted == 0
        assert seen.packets_refused >= 1
        assert 40_000 < seen.sent_bytes < 80_000
        assert 40_000 < seen.received_bytes < 80_000


@private_network
async def test_bandwidth_is_limited_in_both_directions_and_changed_while_it_runs(tmp_path):
    slow = policy(internet=True, egress_kbit=2_000, ingress_kbit=4_000)
    async with world(tmp_path, slow) as lab:
        size = 1 << 20
        took = await send_and_receive(lab, size)
        # The bucket lets 128 KiB through at once; the rest goes out at 250 kB/s.
        assert took > (size - (256 << 10)) / 250_000
        slot = lab.guest.slot
        limits = sh(f"tc qdisc show dev {slot.veth}"), sh(f"tc -n {slot.namespace} qdisc show dev {slot.peer}")
        assert "rate 4Mbit" in limits[0]
        assert "rate 2Mbit" in limits[1]
        await lab.set(Terms())
        assert "tbf" not in sh(f"tc qdisc show dev {slot.veth}") + sh(f"tc -n {slot.namespace} qdisc show")
        assert await send_and_receive(lab, size) < took


@private_network
async def test_what_the_host_refuses_of_a_change_is_done_by_its_repetition(tmp_path, monkeypatch):
    """`tc` fails once the rules are changed: the second try must not take the rest for done."""
    programs, broken = tmp_path / "programs", tmp_path / "broken"
    programs.mkdir()
    (programs / "tc").write_text(f'#!/bin/sh\n[ ! -e {broken} ] || exit 1\nexec {shutil.which("tc")} "$@"\n')
    (programs / "tc").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    limited = policy(internet=True, egress_kbit=2_000, ingress_kbit=4_000)
    ported = replace(limited, forwards=frozenset({Forward(protocol=Transport.TCP, host_port=20_000, port=80)}))
    async with world(tmp_path, Terms()) as lab:
        slot = lab.guest.slot
        broken.touch()
        for terms in (limited, ported, ported):
            with pytest.raises(CommandFailed):
                await lab.set(terms)
        broken.unlink()
        await lab.set(ported)
        assert "rate 4Mbit" in sh(f"tc qdisc show dev {slot.veth}")
        assert "rate 2Mbit" in sh(f"tc -n {slot.namespace} qdisc show dev {slot.peer}")
        assert Path(f"/proc/sys/net/ipv4/conf/{slot.veth}/route_localnet").read_text() == "1\n"
        broken.touch()
        with pytest.raises(CommandFailed):
            await lab.set(policy(internet=True, egress_kbit=3_000))
        broken.unlink()
        await lab.set(Terms())
        assert "tbf" not in sh(f"tc qdisc show dev {slot.veth}") + sh(f"tc -n {slot.namespace} qdisc show")


async def send_and_receive(lab: World, size: int) -> float:
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    with await lab.guest.connect(SERVER) as connection:
        sending = asyncio.create_task(loop.sock_sendall(connection, b"x" * size))
        async with asyncio.timeout(PATIENCE_S):
            received = 0
            while received < size:
                received += len(await loop.sock_recv(connection, 1 << 20))
            await sending
    return time.monotonic() - began


@private_network
async def test_a_flood_of_names_costs_few_transactions(tmp_path):
    async with world(tmp_path, policy(allow(domain="*.example.org"))) as lab:
        for number in range(60):
            lab.name(f"n{number}.example.org", f"198.51.100.{100 + number}")
        answers = await asyncio.gather(*(lab.resolve(f"n{number}.example.org") for number in range(60)))
        assert [addresses(answer) for answer in answers] == [[f"198.51.100.{100 + n}"] for n in range(60)]
        listed = sh(f"nft list table inet {PLAN.table}")
        assert all(f"198.51.100.{100 + number} " in listed for number in range(60))


def test_the_lab_asks_as_it_should():
    assert ask("example.org") == question("example.org")
