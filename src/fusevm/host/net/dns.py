"""A DNS forwarder for each machine, at the gateway address inside its namespace.

The sockets are made inside the namespace and served by the daemon's event loop; questions go on to the host's own
servers from the host's namespace. Nothing is cached. Only the guest of the slot is answered, and only what its policy
allows: names leak through DNS as well as data do through TCP. With the whole Internet every question goes on as it is;
with rules by domain only questions for the addresses of allowed names do (`names`); otherwise none.

Bounds: the kernel limits packets and connections per second (`tables`), here the number in work per slot. A daemon
that restarts opens the sockets of adopted slots again; until then their questions go unanswered.

Owns: the sockets. Must not: know more of a message than its question.
"""

import asyncio
import contextlib
import functools
import secrets
import socket
from collections.abc import Callable, Collection, Coroutine
from typing import Protocol, cast

import structlog

from fusevm.host.net.dns_message import (
    MAX_MESSAGE_BYTES,
    NOERROR,
    REFUSED,
    SERVFAIL,
    Query,
    is_answer,
    make_query,
    parse_query,
    read_addresses,
    render_addresses,
    render_failure,
)
from fusevm.host.net.names import (
    MAX_ADDRESSES,
    Ruling,
    bound_ttl,
    judge_question,
    matching_rules,
    pin_lifetime,
)
from fusevm.host.net.namespace import run_inside
from fusevm.host.net.plan import Slot
from fusevm.host.net.resolvers import DNS_PORT, Resolver, ResolverFile
from fusevm.model.errors import Error
from fusevm.model.network import Network, Rule

log = structlog.get_logger()

#: Questions over UDP and connections over TCP that one slot may have in work.
MAX_IN_FLIGHT = 64
MAX_CONNECTIONS = 16
#: One server gets this long; a guest's own resolver gives up after 5 s (resolv.conf(5)).
ATTEMPT_TIMEOUT_S = 1.5
MAX_ATTEMPTS = 3
#: A TCP connection of the guest without a question.
IDLE_TIMEOUT_S = 10.0

_Sockets = tuple[socket.socket, socket.socket]
_Ask = Callable[[Query, int, Resolver], Coroutine[None, None, bytes]]


class Policies(Protocol):
    """Who may ask for what, and reach what."""

    def policy(self, index: int) -> Network | None:
        """The policy of a slot; None when nobody is in it."""
        ...

    def is_reachable(self, address: str) -> bool:
        """May any machine reach an address? A public name that leads to a private address is an attack (rebinding)."""
        ...

    async def pin(self, index: int, rules: Collection[Rule], addresses: Collection[str], lifetime_s: int) -> bool:
        """Let a machine reach addresses for a while; return whether it may."""
        ...


class DnsForwarder:
    """The forwarders of all slots."""

    def __init__(self, resolvers: ResolverFile, policies: Policies) -> None:
        self._resolvers = resolvers
        self._policies = policies
        self._relays: dict[int, _Relay] = {}

    def refused(self) -> dict[int, int]:
        """How many questions each slot's machine had refused, since its forwarder was opened."""
        return {index: relay.refused for index, relay in self._relays.items()}

    async def serve(self, slot: Slot) -> None:
        """Open the forwarder of a slot. Idempotent. OSError if the namespace is missing or the address is taken."""
        if slot.index in self._relays:
            return
        relay = _Relay(slot, self._resolvers, self._policies)
        self._relays[slot.index] = relay
        try:
            listen = functools.partial(_listen, slot.gateway, slot.tap)
            await relay.open(await run_inside(slot.namespace_path, listen, discard=_close_sockets))
        except BaseException:
            del self._relays[slot.index]
            await relay.close()
            raise

    async def stop(self, index: int) -> None:
        """Close the forwarder of a slot and everything it has in work. Idempotent."""
        relay = self._relays.pop(index, None)
        if relay is not None:
            await relay.close()

    async def close(self) -> None:
        """Close all forwarders."""
        for index in list(self._relays):
            await self.stop(index)


class _Relay(asyncio.DatagramProtocol):
    """The forwarder of one slot."""

    def __init__(self, slot: Slot, resolvers: ResolverFile, policies: Policies) -> None:
        self._slot = slot
        self._resolvers = resolvers
        self._policies = policies
        self.refused = 0
        self._datagrams: asyncio.DatagramTransport | None = None
        self._server: asyncio.Server | None = None
        self._questions: set[asyncio.Task[None]] = set()
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self, sockets: _Sockets) -> None:
        datagram, stream = sockets
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.create_datagram_endpoint(lambda: self, sock=datagram)
            self._datagrams = transport
            self._server = await asyncio.start_server(self._accept, sock=stream, limit=MAX_MESSAGE_BYTES)
        except BaseException:
            _close_sockets(sockets)
            raise

    async def close(self) -> None:
        if self._datagrams is not None:
            self._datagrams.abort()
        if self._server is not None:
            self._server.close()
        tasks = [*self._questions, *self._connections]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = parse_query(data)
        if addr[0] != self._slot.guest_address or query is None:
            return
        if self._judge(query) is Ruling.REFUSE:
            self._send(self._refuse(query), addr)
        elif len(self._questions) < MAX_IN_FLIGHT:
            self._start(self._questions, self._answer(query, addr))

    def error_received(self, exc: Exception) -> None:
        """Ignore what the kernel reports about earlier datagrams: the guest's tap may be down."""

    async def _answer(self, query: Query, addr: tuple[str, int]) -> None:
        self._send(await self._resolve(query, _ask_datagram), addr)

    def _send(self, message: bytes, addr: tuple[str, int]) -> None:
        if self._datagrams is not None and not self._datagrams.is_closing():
            self._datagrams.sendto(message, addr)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_guest = writer.get_extra_info("peername")[0] == self._slot.guest_address
        if not is_guest or len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._start(self._connections, self._converse(reader, writer))

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the questions of one connection, one after the other."""
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                while True:
                    async with asyncio.timeout(IDLE_TIMEOUT_S):
                        query = parse_query(await _read_message(reader))
                    if query is None:
                        return
                    async with asyncio.timeout(IDLE_TIMEOUT_S):
                        await _write_message(writer, await self._resolve(query, _ask_stream))
        finally:
            writer.close()

    def _judge(self, query: Query) -> Ruling:
        return judge_question(self._policies.policy(self._slot.index), query.question)

    def _refuse(self, query: Query) -> bytes:
        self.refused += 1
        return render_failure(query, REFUSED)

    async def _resolve(self, query: Query, ask: _Ask) -> bytes:
        match self._judge(query):
            case Ruling.REFUSE:
                return self._refuse(query)
            case Ruling.FORWARD:
                return await _forward(query, self._resolvers.current(), ask)
            case Ruling.EMPTY:
                return render_failure(query, NOERROR)
            case Ruling.PIN:
                return await self._resolve_pinned(query)

    async def _resolve_pinned(self, query: Query) -> bytes:
        """Answer with the addresses of an allowed name, once the machine may reach them."""
        clean, resolvers = make_query(query.question), self._resolvers.current()
        try:
            found = read_addresses(await _forward(clean, resolvers, _ask_datagram), query.question)
            if found.is_truncated:
                found = read_addresses(await _forward(clean, resolvers, _ask_stream), query.question)
        except ValueError:
            return render_failure(query, SERVFAIL)
        if found.code != NOERROR:
            return render_failure(query, found.code)
        addresses = [address for address in found.addresses if self._policies.is_reachable(address)][:MAX_ADDRESSES]
        if not addresses:
            return render_failure(query, NOERROR)
        index, ttl = self._slot.index, bound_ttl(found.ttl)
        try:
            rules = matching_rules(self._policies.policy(index), query.question)
            is_pinned = await self._policies.pin(index, rules, addresses, pin_lifetime(ttl))
        except Error as e:
            log.warning("addresses_not_pinned", slot=index, problem=e.message)
            return render_failure(query, SERVFAIL)
        return render_addresses(query, addresses, ttl) if is_pinned else self._refuse(query)

    def _start(self, tasks: set[asyncio.Task[None]], work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"dns:{self._slot.index}")
        tasks.add(task)
        task.add_done_callback(functools.partial(_finish, tasks))


class _Exchange(asyncio.DatagramProtocol):
    """One question to one server, from a port of its own: the kernel drops datagrams of anybody else."""

    def __init__(self, number: int, query: Query) -> None:
        self._number = number
        self._query = query
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:  # noqa: ARG002
        if not self.answer.done() and is_answer(data, self._number, self._query.question):
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _forward(query: Query, resolvers: list[Resolver], ask: _Ask) -> bytes:
    """Ask the servers in turn; SERVFAIL if none of them answers."""
    attempts = [resolvers[turn % len(resolvers)] for turn in range(MAX_ATTEMPTS)] if resolvers else []
    for resolver in attempts:
        number = secrets.randbelow(2**16)
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                answer = await ask(query, number, resolver)
                return query.message[:2] + answer[2:]
    return render_failure(query, SERVFAIL)


async def _ask_datagram(query: Query, number: int, resolver: Resolver) -> bytes:
    outgoing = socket.socket(_family(resolver), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        outgoing.connect((resolver.address, resolver.port))
        exchange = _Exchange(number, query)
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: exchange, sock=outgoing)
    except BaseException:
        outgoing.close()
        raise
    try:
        transport.sendto(query.with_id(number))
        return await exchange.answer
    finally:
        transport.abort()


async def _ask_stream(query: Query, number: int, resolver: Resolver) -> bytes:
    reader, writer = await asyncio.open_connection(resolver.address, resolver.port, limit=MAX_MESSAGE_BYTES)
    try:
        await _write_message(writer, query.with_id(number))
        while True:
            answer = await _read_message(reader)
            if is_answer(answer, number, query.question):
                return answer
    finally:
        writer.transport.abort()


async def _read_message(reader: asyncio.StreamReader) -> bytes:
    """Read a message with its length before it (RFC 1035 section 4.2.2)."""
    return await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))


async def _write_message(writer: asyncio.StreamWriter, message: bytes) -> None:
    writer.write(len(message).to_bytes(2, "big") + message)
    await writer.drain()


def _finish(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    tasks.discard(task)
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.error("dns_forwarding_failed", exc_info=failure)


def _family(resolver: Resolver) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in resolver.address else socket.AF_INET


def _listen(address: str, device: str) -> _Sockets:
    """Open both sockets; runs inside the namespace."""
    sockets: list[socket.socket] = []
    try:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            opened = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            sockets.append(opened)
            if kind == socket.SOCK_STREAM:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            opened.bind((address, DNS_PORT))
        sockets[1].listen(MAX_CONNECTIONS)
    except BaseException:
        for opened in sockets:
            opened.close()
        raise
    return cast(_Sockets, tuple(sockets))


def _close_sockets(sockets: _Sockets) -> None:
    for opened in sockets:
        opened.close()
