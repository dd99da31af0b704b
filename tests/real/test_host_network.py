"""Who can reach what, with real guests on a real host's rules.

The host is a box whose uplink leads to a namespace that answers by TCP and DNS on public, private and metadata
addresses alike.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from real_host import Box, Guest, Host, make_fence, reason_of

from own_world import run_prefix

#: The last test restarts the daemon of the module.
pytestmark = pytest.mark.shared_stack

SERVER, OTHER = "198.51.100.10", "198.51.100.20"
METADATA, PRIVATE, RESOLVER = "169.254.169.254", "192.168.77.1", "203.0.113.53"
HOST_ADDRESS, OUTSIDE = "203.0.113.2", "203.0.113.1"
PORT = 7
#: Answers on every address: a word to whoever connects; the addresses of two names, and nothing of others.
SERVICES = """
import socket, struct, sys, threading
NAMES = {b"allowed.example": ["198.51.100.10"], b"other.example": ["198.51.100.20"],
         b"rebind.example": ["192.168.77.1", "169.254.169.254"]}
log = open(sys.argv[1], "ab", 0)
def names():
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
threading.Thread(target=names, daemon=True).start()
s = socket.create_server(("0.0.0.0", 7), backlog=64)
while True:
    connection, peer = s.accept(); connection.sendall(peer[0].encode() + b"\\n"); connection.close()
"""
#: In the guest: connect, and say what came.
PROBE = """
import socket, sys
s = socket.socket(); s.settimeout(4)
try:
    s.connect((sys.argv[1], int(sys.argv[2]))); print("open", s.recv(100).decode().strip())
except OSError as e:
    print("closed", e)
"""
#: In the guest: ask the gateway for a name, and print the response code and the number of answers.
ASK = """
import socket, struct, sys
labels = b"".join(bytes([len(p)]) + p.encode() for p in sys.argv[1].split("."))
query = struct.pack("!HHHHHH", 7, 0x100, 1, 0, 0, 0) + labels + b"\\0" + struct.pack("!HH", int(sys.argv[2]), 1)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20); s.sendto(query, (sys.argv[3], 53))
answer = s.recv(4096); print(answer[3] & 15, int.from_bytes(answer[6:8], "big"))
"""
GATEWAY = "10.208.0.1"


@pytest.fixture(scope="module")
def network_host(artefacts: Path) -> Iterator[Host]:
    """A running daemon whose box has an uplink to services on every kind of address."""
    host = Host(Box(), artefacts, f"{run_prefix()}n", warm_slots=1)
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
            *(f"ip -n internet addr add {a}/32 dev lo" for a in (SERVER, OTHER, METADATA, PRIVATE, RESOLVER)),
        ):
            host.box.run(*command.split())
        resolv = host.folder / "resolv.conf"
        resolv.write_text(f"nameserver {RESOLVER}\n")
        host.box.run("mount", "--bind", resolv, Path("/etc/resolv.conf").resolve())
        services = host.folder / "services.py"
        services.write_text(SERVICES)
        argv = host.box.enter("ip", "netns", "exec", "internet", sys.executable, services, host.folder / "asked")
        server = subprocess.Popen(argv)
        asyncio.run(host.start())
        yield host
    finally:
        host.close()
        server.wait()


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


async def test_who_can_reach_what(network_host: Host):
    host = network_host
    expose = [{"port": 7000}]
    async with machine(host, "one", expose=expose) as one, machine(host, "two") as two:
        records = {record.id: record for record in await host.machines()}
        neighbour = records["m-two"].address
        # The Internet, as the host; no private, special or metadata address, not the host, not the other machine.
        assert await reach(one, SERVER) == f"open {HOST_ADDRESS}"
        host_side = records["m-one"].address.rpartition(".")
        own_host_end = f"{host_side[0]}.{int(host_side[2]) - 1}"
        for address in (METADATA, PRIVATE, HOST_ADDRESS, own_host_end, neighbour, "10.0.0.1", "127.0.0.2"):
            assert (await reach(one, address)).startswith("closed"), address
        assert await ask(one, "allowed.example") == (0, 1)
        assert (await reach(one, RESOLVER, 53)).startswith("closed"), "no resolver but the gateway's"
        # A source that is not the machine's own goes nowhere.
        await one.shell("ip addr add 10.208.0.9/32 dev eth0 2>/dev/null || true")
        spoof = PROBE.replace("s.settimeout(4)", 's.settimeout(4); s.bind(("10.208.0.9", 0))')
        said = await one.shell(f"python3 -c '{spoof}' {SERVER} {PORT}")
        assert said.startswith("closed")
        # Its published port, from outside and from the host; not from the other machine.
        (port,) = records["m-one"].published_ports
        listen = 'import socket; s=socket.create_server(("",7000)); c,p=s.accept(); c.sendall(p[0].encode())'
        for place in (["ip", "netns", "exec", "internet"], []):
            waiting = asyncio.create_task(one.shell(f"python3 -c '{listen}'"))
            target = HOST_ADDRESS if place else "127.0.0.1"
            heard = await _insist(host, place, target, port.host_port)
            assert heard == (OUTSIDE if place else own_host_end)
            await waiting
        assert (await reach(two, HOST_ADDRESS, port.host_port)).startswith("closed")


async def _insist(host: Host, place: list[str], address: str, port: int) -> str:
    """Connect until somebody listens."""
    script = f"import socket; s=socket.create_connection(({address!r}, {port}), 60); print(s.recv(100).decode())"
    async with asyncio.timeout(120):
        while True:
            argv = host.box.enter(*place, sys.executable, "-c", script)
            done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.strip()
            await asyncio.sleep(0.2)


async def test_names_decide_what_a_machine_reaches_and_a_change_cuts(network_host: Host):
    host = network_host
    rules = [{"domain": "allowed.example", "ports": [PORT]}, {"domain": "rebind.example"}]
    async with machine(host, "names", network={"internet": False, "rules": rules}) as guest:
        before = len(asked(host))
        assert (await reach(guest, SERVER)).startswith("closed"), "not before it was resolved"
        assert await ask(guest, "allowed.example") == (0, 1)
        assert await reach(guest, SERVER) == f"open {HOST_ADDRESS}"
        assert (await reach(guest, OTHER)).startswith("closed")
        # Tunnels: names that are not allowed, and types that are no addresses, are told to nobody.
        for name in ("other.example", "c2VjcmV0.evil.example", "x.allowed.example"):
            assert await ask(guest, name) == (5, 0)
        assert await ask(guest, "allowed.example", 16) == (0, 0)
        assert asked(host)[before:] == ["allowed.example"]
        assert await ask(guest, "rebind.example") == (0, 0)
        assert (await reach(guest, PRIVATE)).startswith("closed")
        # Another policy, while a connection is open.
        path = f"/machines/{guest.id}/network"
        change = json.dumps({"internet": False, "rules": [{"cidr": f"{OTHER}/32"}]}).encode()
        await host.ask("PUT", path, guest.fence, change)
        assert (await reach(guest, SERVER)).startswith("closed")
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
        assert (await reach(guest, SERVER)).startswith("closed")
        assert await reach(guest, OTHER) == f"open {HOST_ADDRESS}"
