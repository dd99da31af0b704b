"""Who can reach what, with real guests on a real host's rules.

The host is a box whose uplink leads to a namespace that answers by TCP and DNS on public, private and metadata
addresses alike; the host itself, and the machine that nobody shall reach, answer, too.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from real_host import Box, Guest, Host, make_fence, reason_of, until

from fusevm.host.net.plan import GATEWAY, GATEWAY_MAC
from fusevm.wire.frames import FrameType
from fusevm.wire.host_api import MachineBody
from own_world import run_prefix

#: The last test restarts the daemon of the module.
pytestmark = pytest.mark.shared_stack

SERVER, OTHER, THIRD = "198.51.100.10", "198.51.100.20", "198.51.100.30"
METADATA, PRIVATE, RESOLVER = "169.254.169.254", ("192.168.77.1", "10.0.0.1"), "203.0.113.53"
HOST_ADDRESS, OUTSIDE = "203.0.113.2", "203.0.113.1"
PORT = 7
#: Where on the box something runs: behind the uplink, or on the host.
OUT, HERE = ["ip", "netns", "exec", "internet"], []
#: Whoever is kept out by the rules is told so (ICMP "administratively prohibited"); a closed port says ECONNREFUSED.
REFUSED = "closed EHOSTUNREACH"
#: Answers on every address of a place: a line with the caller's address, and then what it is sent. Writes down who was
#: called; datagrams with what is in them.
ECHO = """
import contextlib, socket, sys, threading
place, log = sys.argv[1].encode(), open(sys.argv[2], "ab", 0)
def talk(connection, peer):
    connection.sendall(peer[0].encode() + b"\\n")
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(100):
            connection.sendall(data)
def serve(port):
    s = socket.create_server(("0.0.0.0", port), backlog=64)
    while True:
        connection, peer = s.accept(); log.write(b"%s %s:%d\\n" % (place, connection.getsockname()[0].encode(), port))
        threading.Thread(target=talk, args=(connection, peer), daemon=True).start()
for port in (7, 53):
    threading.Thread(target=serve, args=(port,), daemon=True).start()
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("0.0.0.0", 7))
while True:
    log.write(b"%s datagram %s\\n" % (place, s.recv(100)))
"""
#: The addresses of two names, and nothing of others. Writes down what was asked.
NAMES = """
import socket, struct, sys
NAMES = {b"allowed.example": ["198.51.100.10"], b"other.example": ["198.51.100.20"],
         b"rebind.example": ["192.168.77.1", "169.254.169.254"]}
log = open(sys.argv[1], "ab", 0)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("203.0.113.53", 53))
while True:
    data, peer = s.recvfrom(4096)
    labels, at = [], 12
    while data[at]:
        labels.append(data[at + 1 : at + 1 + data[at]]); at += 1 + data[at]
    name = b".".join(labels); log.write(name + b"\\n")
    found = NAMES.get(name, []) if data[at + 1 : at + 5] == b"\\0\\1\\0\\1" else []
    records = b"".join(b"\\xc0\\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton(a) for a in found)
    head = struct.pack("!HHHHH", 0x8180 if name in NAMES else 0x8183, 1, len(found), 0, 0)
    s.sendto(data[:2] + head + data[12 : at + 5] + records, peer)
"""
#: In the guest: connect, and say what came.
PROBE = """
import errno, socket, sys
s = socket.socket(); s.settimeout(4)
try:
    s.connect((sys.argv[1], int(sys.argv[2]))); print("open", s.recv(100).decode().strip())
except OSError as e:
    print("closed", errno.errorcode.get(e.errno, e))
"""
#: In the guest: tell each caller its address, and say who called.
LISTEN = """
import socket
s = socket.create_server(("", 7)); print("listening", flush=True)
while True:
    c, p = s.accept(); print(p[0], flush=True); c.sendall(p[0].encode() + b"\\n"); c.close()
"""
#: In the guest: connect to some addresses; for each line of input, say on which connections it came back.
TALK = """
import socket, sys
def say(s, line):
    try:
        s.sendall(line); return "echoed" if s.recv(100) == line else "cut"
    except ConnectionResetError:
        return "reset"
talks = [socket.create_connection((address, 7), 20) for address in sys.argv[1:]]
print("open", *(s.makefile().readline().strip() for s in talks), flush=True)
for line in sys.stdin:
    print(line.strip(), *(say(s, line.encode()) for s in talks), flush=True)
"""
#: In the guest: datagrams as frames, under an address and a hardware address that are not its own; then an honest one.
SPOOF = """
import socket, struct, sys
server, gateway = sys.argv[1], bytes.fromhex(sys.argv[2].replace(":", ""))
card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); card.bind(("eth0", 0))
mine = card.getsockname()[4]
route = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); route.connect((server, 7)); own = route.getsockname()[0]
def send(word, address, hardware):
    data = struct.pack("!HHHH", 4000, 7, 8 + len(word), 0) + word
    ends = socket.inet_aton(address) + socket.inet_aton(server)
    head = struct.pack("!BBHHHBBH", 69, 0, 28 + len(word), 0, 0, 64, 17, 0) + ends
    total = sum(struct.unpack("!10H", head))
    while total >> 16:
        total = (total >> 16) + (total & 0xffff)
    card.send(gateway + hardware + b"\\x08\\x00" + head[:10] + struct.pack("!H", total ^ 0xffff) + head[12:] + data)
send(b"foreign-address", "10.208.0.9", mine)
send(b"neighbours-address", sys.argv[3], mine)
send(b"foreign-card", own, bytes.fromhex("0600000000ff"))
send(b"honest", own, mine)
"""
#: In the guest: ask the gateway for a name, and print the response code and the number of answers.
ASK = """
import socket, struct, sys
labels = b"".join(bytes([len(p)]) + p.encode() for p in sys.argv[1].split("."))
query = struct.pack("!HHHHHH", 7, 0x100, 1, 0, 0, 0) + labels + b"\\0" + struct.pack("!HH", int(sys.argv[2]), 1)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20); s.sendto(query, (sys.argv[3], 53))
answer = s.recv(4096); print(answer[3] & 15, int.from_bytes(answer[6:8], "big"))
"""


@pytest.fixture(scope="module")
def network_host(artefacts: Path) -> Iterator[Host]:
    """A running daemon whose box has an uplink to services on every kind of address."""
    host = Host(Box(), artefacts, f"{run_prefix()}n", warm_slots=1)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for command in (
            "ip netns add internet",
            "ip link add wan0 type veth peer name lan0 netns internet",
            f"ip addr add {HOST_ADDRESS}/24 dev wan0",
            "ip link set wan0 up",
            "ip -n internet link set lo up",
            "ip -n internet link set lan0 up",
            f"ip -n internet addr add {OUTSIDE}/24 dev lan0",
            f"ip route add default via {OUTSIDE}",
            *(f"ip -n internet addr add {a}/32 dev lo" for a in (SERVER, OTHER, THIRD, METADATA, *PRIVATE, RESOLVER)),
        ):
            host.box.run(*command.split())
        resolv = host.folder / "resolv.conf"
        resolv.write_text(f"nameserver {RESOLVER}\n")
        host.box.run("mount", "--bind", resolv, Path("/etc/resolv.conf").resolve())
        heard = host.folder / "heard"
        heard.touch()
        servers.append(serve(host, OUT, NAMES, host.folder / "asked"))
        servers.append(serve(host, OUT, ECHO, "internet", heard))
        servers.append(serve(host, HERE, ECHO, "host", heard))
        asyncio.run(host.start())
        yield host
    finally:
        host.close()
        for server in servers:
            server.wait()


def serve(host: Host, place: list[str], script: str, *words: str | Path) -> subprocess.Popen[bytes]:
    """Run a service of the box, which ends with it."""
    return subprocess.Popen(host.box.enter(*place, sys.executable, "-c", script, *words))


@asynccontextmanager
async def machine(host: Host, name: str, **spec: object) -> AsyncIterator[Guest]:
    fence = make_fence(name)
    await host.create(f"m-{name}", fence, **spec)
    try:
        yield Guest(host, f"m-{name}", fence)
    finally:
        await host.delete(f"m-{name}", fence)


async def reach(guest: Guest, address: str, port: int = PORT) -> str:
    done = await guest.shell(f"python3 -c '{PROBE}' {address} {port}")
    return done.strip()


async def ask(guest: Guest, name: str, kind: int = 1) -> tuple[int, int]:
    code, count = (await guest.shell(f"python3 -c '{ASK}' {name} {kind} {GATEWAY}")).split()
    return int(code), int(count)


def asked(host: Host) -> list[str]:
    return (host.folder / "asked").read_text().split()


def heard(host: Host) -> list[str]:
    """Who was called so far, outside machines."""
    return (host.folder / "heard").read_text().splitlines()


async def call(host: Host, place: list[str], address: str, port: int = PORT) -> str:
    """Connect from a place of the box; the address that the other side sees."""
    script = f"import socket; s=socket.create_connection(({address!r}, {port}), 60); print(s.recv(100).decode())"
    argv = host.box.enter(*place, sys.executable, "-c", script)
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (address, port, done.stderr)
    return done.stdout.strip()


def host_end(record: MachineBody) -> str:
    """The host's address on the link to a machine."""
    start, _, last = record.address.rpartition(".")
    return f"{start}.{int(last) - 1}"


async def test_who_can_reach_what(network_host: Host):
    host = network_host
    async with (
        machine(host, "one") as one,
        machine(host, "two", expose=[{"port": PORT}]) as two,
        two.frames("python3", "-c", LISTEN) as listener,
    ):
        await listener.read_until(b"listening\n")
        records = {record.id: record for record in await host.machines()}
        neighbour, own_end, other_end = records["m-two"].address, host_end(records["m-one"]), host_end(records["m-two"])
        (port,) = records["m-two"].published_ports
        # Everybody answers whoever may ask: what is refused below, the rules refuse.
        forbidden = {METADATA: HOST_ADDRESS, **dict.fromkeys(PRIVATE, HOST_ADDRESS), neighbour: other_end}
        forbidden |= {address: address for address in (HOST_ADDRESS, own_end, other_end)}
        for address, seen_as in forbidden.items():
            assert await call(host, HERE, address) == seen_as
        assert await call(host, HERE, RESOLVER, 53) == HOST_ADDRESS
        # The published port: from outside and from the host.
        assert await call(host, OUT, HOST_ADDRESS, port.host_port) == OUTSIDE
        assert await call(host, HERE, "127.0.0.1", port.host_port) == other_end
        uses = {record.id: record.ports_used_s_ago is not None for record in await host.machines()}
        assert uses == {"m-one": False, "m-two": True}

        before = len(heard(host))
        for address in forbidden:
            assert await reach(one, address) == REFUSED, address
        assert await reach(one, RESOLVER, 53) == REFUSED, "no resolver but the gateway's"
        assert await reach(one, HOST_ADDRESS, port.host_port) == REFUSED, "not by the host's way to the other machine"
        # The Internet, as the host, and names by the gateway.
        assert await reach(one, SERVER) == f"open {HOST_ADDRESS}"
        assert await ask(one, "allowed.example") == (0, 1)
        # A source that is not the machine's own goes nowhere.
        await one.shell(f"python3 -c '{SPOOF}' {SERVER} {GATEWAY_MAC} {neighbour}")
        await until(lambda: "internet datagram honest" in heard(host))
        assert heard(host)[before:] == [f"internet {SERVER}:{PORT}", "internet datagram honest"]
        # The other machine answers still, and nobody else has come to it.
        assert await call(host, OUT, HOST_ADDRESS, port.host_port) == OUTSIDE
        called = [other_end, OUTSIDE, other_end, OUTSIDE]
        await listener.read_until("".join(f"{caller}\n" for caller in ("listening", *called)).encode())


async def test_names_decide_what_a_machine_reaches_and_a_change_cuts(network_host: Host):
    host = network_host
    rules = [
        {"domain": "allowed.example", "ports": [PORT]},
        {"domain": "rebind.example"},
        {"cidr": f"{THIRD}/32", "ports": [PORT]},
    ]
    async with machine(host, "names", network={"internet": False, "rules": rules}) as guest:
        before = len(asked(host))
        assert await reach(guest, SERVER) == REFUSED, "not before it was resolved"
        assert await ask(guest, "allowed.example") == (0, 1)
        assert await reach(guest, SERVER) == f"open {HOST_ADDRESS}"
        assert await reach(guest, OTHER) == REFUSED
        # Tunnels: names that are not allowed, and types that are no addresses, are told to nobody.
        for name in ("other.example", "c2VjcmV0.evil.example", "x.allowed.example"):
            assert await ask(guest, name) == (5, 0)
        assert await ask(guest, "allowed.example", 16) == (0, 0)
        assert asked(host)[before:] == ["allowed.example"]
        assert await ask(guest, "rebind.example") == (0, 0)
        assert await reach(guest, PRIVATE[0]) == REFUSED
        # Another policy: of two open connections it allows one.
        path = f"/machines/{guest.id}/network"
        change = json.dumps({"internet": False, "rules": [{"cidr": f"{a}/32"} for a in (OTHER, THIRD)]}).encode()
        async with guest.frames("python3", "-c", TALK, SERVER, THIRD) as terminal:
            await terminal.read_until(f"open {HOST_ADDRESS} {HOST_ADDRESS}\n".encode())
            await terminal.send(FrameType.STDIN, b"before\n")
            await terminal.read_until(b"before echoed echoed\n")
            await host.ask("PUT", path, guest.fence, change)
            await terminal.send(FrameType.STDIN, b"after\n")
            await terminal.read_until(b"after reset echoed\n")
        assert await reach(guest, SERVER) == REFUSED
        assert await reach(guest, OTHER) == f"open {HOST_ADDRESS}"
        bad = json.dumps({"rules": [{"cidr": "10.0.0.0/8"}]}).encode()
        assert await reason_of(host.ask("PUT", path, guest.fence, bad)) == "bad_field"
        shown = json.loads(await host.ask("GET", path, guest.fence))
        assert shown["traffic"]["packets_refused"] > 0
        assert shown["traffic"]["names_refused"] == 3
        metrics = (await host.ask("GET", "/metrics")).decode()
        assert f'fuse_host_machine_network_bytes_total{{direction="in",machine="{guest.id}"}}' in metrics
        # It is what the next daemon finds, too.
        await host.stop()
        await host.start()
        assert await reach(guest, SERVER) == REFUSED
        assert await reach(guest, OTHER) == f"open {HOST_ADDRESS}"
