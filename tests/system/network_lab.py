"""A small world for network tests, within the namespaces of `namespaces.private_network`.

The test's own namespace is the host. `Internet` is a namespace behind the host's uplink that answers on public,
private and metadata addresses alike. `Guest` is a namespace in the place of a machine: its network card is a tap whose
frames are pumped to and from the slot's tap by descriptor, as a VMM does.

All sockets are made inside their namespaces and served by the test's event loop.
"""

import asyncio
import contextlib
import functools
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from fusevm.host.net.namespace import run_inside
from fusevm.host.net.plan import NetworkPlan, Slot
from fusevm.host.net.tap import attach_tap, open_tap

UPLINK = "wan0"
HOST_ADDRESS = "203.0.113.2"
SERVER = "198.51.100.10"
NAME_SERVER = "203.0.113.53"
NEIGHBOUR = "192.168.77.1"
METADATA = "169.254.169.254"
ECHO_PORT = 7
RANGE = "10.211.0.0/16"
PLAN = NetworkPlan(prefix="ft", range=RANGE)

#: An answer that comes is waited for that long, one that must not come this long.
PATIENCE_S = 60.0
SILENCE_S = 2.0


def sh(command: str) -> str:
    """Run a shell command that must succeed; return its output."""
    done = subprocess.run(command, shell=True, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def snapshot_of_host() -> dict[str, str]:
    """What must be the same after a sweep as it was before."""
    return {name: sh(name) for name in ("ip netns list", "ip -o link show", "nft list ruleset")}


def namespace_path(name: str) -> str:
    return f"/run/netns/{name}"


class _Echo(asyncio.DatagramProtocol):
    """Answers each datagram with the sender's address and the data, and remembers who sent."""

    def __init__(self, senders: list[str], peers: list[tuple[asyncio.DatagramTransport, tuple[str, int]]]) -> None:
        self._senders = senders
        self._peers = peers

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._senders.append(addr[0])
        self._peers.append((self._transport, addr))
        self._transport.sendto(addr[0].encode() + b" " + data, addr)


class _Names(asyncio.DatagramProtocol):
    """A name server that answers every A question with 198.51.100.10, and remembers what was asked."""

    def __init__(self, asked: list[bytes]) -> None:
        self._asked = asked

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._asked.append(data)
        self._transport.sendto(answer_to(data), addr)


def question(name: str, number: int = 0x1234) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", 1, 1)


def answer_to(query: bytes) -> bytes:
    record = struct.pack("!HHHIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(SERVER)
    return query[:2] + struct.pack("!HHHHH", 0x8180, 1, 1, 0, 0) + query[12:] + record


@dataclass
class Internet:
    """The far side of the host's uplink."""

    #: Source addresses of the datagrams that arrived at the echo service.
    senders: list[str] = field(default_factory=list)
    #: Questions that arrived at the name server.
    asked: list[bytes] = field(default_factory=list)
    #: Whom the echo service has answered by datagram, from where.
    peers: list[tuple[asyncio.DatagramTransport, tuple[str, int]]] = field(default_factory=list)

    def send_again(self, data: bytes) -> None:
        """Send a datagram to the last that sent one."""
        transport, addr = self.peers[-1]
        transport.sendto(data, addr)


@contextlib.asynccontextmanager
async def internet() -> AsyncIterator[Internet]:
    """Build the Internet and the host's uplink to it, with echo and name services on every address."""
    sh("ip netns add internet")
    sh(f"ip link add {UPLINK} type veth peer name lan0 netns internet")
    sh(f"ip addr add {HOST_ADDRESS}/24 dev {UPLINK} && ip link set {UPLINK} up")
    sh("ip -n internet link set lo up && ip -n internet link set lan0 up")
    sh("ip -n internet addr add 203.0.113.1/24 dev lan0")
    sh("ip route add default via 203.0.113.1")
    for address in (SERVER, NAME_SERVER, NEIGHBOUR, METADATA):
        sh(f"ip -n internet addr add {address}/32 dev lo")
    world = Internet()
    async with contextlib.AsyncExitStack() as stack:
        for address in (SERVER, NAME_SERVER, NEIGHBOUR, METADATA):
            await serve_echo(stack, namespace_path("internet"), world.senders, address, world.peers)
        loop = asyncio.get_running_loop()
        names = await run_inside(namespace_path("internet"), lambda: bound(socket.SOCK_DGRAM, NAME_SERVER, 53))
        transport, _ = await loop.create_datagram_endpoint(lambda: _Names(world.asked), sock=names)
        stack.callback(transport.close)
        stream = await run_inside(namespace_path("internet"), lambda: bound(socket.SOCK_STREAM, NAME_SERVER, 53))
        await serve_stream(stack, stream, functools.partial(_answer_names, world.asked))
        yield world


async def serve_echo(
    stack: contextlib.AsyncExitStack,
    path: str | None,
    senders: list[str],
    address: str = "0.0.0.0",
    peers: list[tuple[asyncio.DatagramTransport, tuple[str, int]]] | None = None,
) -> None:
    """Serve echo by TCP and UDP in a namespace, or on the host (None)."""
    loop = asyncio.get_running_loop()

    async def make(kind: socket.SocketKind) -> socket.socket:
        bind = functools.partial(bound, kind, address, ECHO_PORT)
        return await run_inside(path, bind) if path else bind()

    answered = [] if peers is None else peers
    datagram = await make(socket.SOCK_DGRAM)
    transport, _ = await loop.create_datagram_endpoint(lambda: _Echo(senders, answered), sock=datagram)
    stack.callback(transport.close)
    await serve_stream(stack, await make(socket.SOCK_STREAM), _echo)


_Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def serve_stream(stack: contextlib.AsyncExitStack, bound: socket.socket, converse: _Conversation) -> None:
    """Serve a TCP socket until the stack ends, with every connection that is open then."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await converse(reader, writer)
        finally:
            writer.transport.abort()

    async def end() -> None:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    server = await asyncio.start_server(accept, sock=bound)
    stack.push_async_callback(end)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    peer = writer.get_extra_info("peername")[0].encode()
    while data := await reader.read(65536):
        writer.write(peer + b" " + data)
        await writer.drain()


async def _answer_names(asked: list[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        query = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        asked.append(query)
        answer = answer_to(query)
        writer.write(len(answer).to_bytes(2, "big") + answer)
        await writer.drain()


def bound(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    """A socket at an address of the caller's namespace; TCP listens."""
    bound = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((address, port))
    if kind == socket.SOCK_STREAM:
        bound.listen(64)
    return bound


class Guest:
    """A namespace where a machine would be."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.namespace = f"guest-{slot.index}"
        self._descriptors: list[int] = []

    async def plug_in(self) -> None:
        """Connect the guest's network card to the slot's tap and configure it as the agent does."""
        sh(f"ip netns add {self.namespace}")
        outer = await open_tap(self.slot.namespace_path, self.slot.tap)
        inner = await run_inside(namespace_path(self.namespace), lambda: attach_tap("eth0"))
        self._descriptors = [outer, inner]
        loop = asyncio.get_running_loop()
        loop.add_reader(outer, _pump, outer, inner)
        loop.add_reader(inner, _pump, inner, outer)
        self.ip("link set lo up")
        self.ip(f"link set eth0 address {self.slot.guest_mac} addrgenmode none up")
        self.ip(f"addr add {self.slot.guest_address}/{self.slot.guest_prefix_length} dev eth0")
        self.ip(f"route add default via {self.slot.gateway}")

    def unplug(self) -> None:
        for descriptor in self._descriptors:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._descriptors = []
        sh(f"ip netns del {self.namespace}")

    def ip(self, arguments: str) -> str:
        return sh(f"ip -n {self.namespace} {arguments}")

    async def open_socket(self, kind: socket.SocketKind, source: str = "") -> socket.socket:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
            if source:
                made.bind((source, 0))
            return made

        return await run_inside(namespace_path(self.namespace), make)

    async def connect(self, address: str, port: int = ECHO_PORT, *, timeout_s: float = PATIENCE_S) -> socket.socket:
        """Open a TCP connection; OSError when it is refused, TimeoutError when nobody answers."""
        connection = await self.open_socket(socket.SOCK_STREAM)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(connection, (address, port))
        except BaseException:
            connection.close()
            raise
        return connection

    async def tcp(self, address: str, port: int = ECHO_PORT, *, timeout_s: float = PATIENCE_S) -> str:
        """Exchange a word by TCP; return what the service said."""
        connection = await self.connect(address, port, timeout_s=timeout_s)
        with connection:
            return await say(connection, b"hello", timeout_s=timeout_s)

    async def udp(
        self,
        address: str,
        port: int = ECHO_PORT,
        data: bytes = b"hello",
        *,
        source: str = "",
        timeout_s: float = PATIENCE_S,
    ) -> bytes:
        """Exchange a datagram; OSError or TimeoutError when there is no answer."""
        loop = asyncio.get_running_loop()
        with await self.open_socket(socket.SOCK_DGRAM, source) as datagram:
            async with asyncio.timeout(timeout_s):
                await loop.sock_connect(datagram, (address, port))
                await loop.sock_sendall(datagram, data)
                return await loop.sock_recv(datagram, 65536)

    async def is_refused(self, address: str, port: int = ECHO_PORT) -> bool:
        """Tell whether neither TCP nor UDP gets an answer."""
        tcp = self.tcp(address, port, timeout_s=SILENCE_S)
        answers = await asyncio.gather(tcp, self.udp(address, port, timeout_s=SILENCE_S), return_exceptions=True)
        assert all(isinstance(answer, OSError | str | bytes) for answer in answers), answers  # TimeoutError is one
        return all(isinstance(answer, OSError) for answer in answers)


async def say(connection: socket.socket, data: bytes, *, timeout_s: float = PATIENCE_S) -> str:
    """Send on an open connection and return the answer; TimeoutError when none comes."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        await loop.sock_sendall(connection, data)
        return (await loop.sock_recv(connection, 65536)).decode()


def _pump(source: int, target: int) -> None:
    # A tap that is down refuses frames with EIO; a full queue with EAGAIN: both drop the frame, as a wire does.
    with contextlib.suppress(OSError):
        os.write(target, os.read(source, 65600))


@contextlib.asynccontextmanager
async def plugged_in(slot: Slot) -> AsyncIterator[Guest]:
    guest = Guest(slot)
    await guest.plug_in()
    try:
        yield guest
    finally:
        guest.unplug()
