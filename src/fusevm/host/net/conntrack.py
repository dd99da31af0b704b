"""The host's connection tracking table: which connections machines have, and the end of some of them.

By ctnetlink (linux/netfilter/nfnetlink_conntrack.h), since the kernel offers nothing else and `conntrack` is one more
program to install. A dump is one pass over the whole table, in a thread.

Messages, native endianness but for the values of attributes:

| offset | size | field |
|---|---|---|
| 0 | 16 | struct nlmsghdr: length, type (subsystem 1 in the high byte), flags, sequence, port |
| 16 | 4 | struct nfgenmsg: family, version 0, resource 0 |
| 20 | | attributes: length, type (0x8000: nested), value, padded to 4 |

Owns: the socket and the messages. Must not: decide which connections may stay.
"""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator

import msgspec

from fusevm.model.network import Flow

_NETLINK_NETFILTER = 12
_CT_GET, _CT_DELETE = (1 << 8) | 1, (1 << 8) | 2
_CT_GET_STATS = (1 << 8) | 5
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_DONE, _ERROR = 3, 2
_TUPLE_ORIG, _TUPLE_REPLY, _MARK = 1, 2, 8
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC, _IP_DST = 1, 2
_PROTO_NUMBER, _PROTO_DST_PORT = 1, 3
_TYPE_MASK = 0x3FFF
_HEADER, _GENERIC, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBH"), struct.Struct("=HH")
_RECEIVE_BYTES = 1 << 18


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the table, as its first packet was before any translation."""

    #: Who began it.
    source: str
    flow: Flow
    #: Who answers, after translation: a machine's address for a published port.
    answerer: str
    #: Names the entry when it is to be deleted.
    original: bytes


async def cut(is_doomed: Callable[[Connection], bool]) -> int:
    """Delete the IPv4 connections that a function picks; return how many. OSError if the kernel refuses."""
    return await asyncio.to_thread(_cut, is_doomed)


def load() -> None:
    """Have the kernel load connection tracking, which it otherwise does with the first rule. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        netlink.send(_render(_CT_GET_STATS, _REQUEST | _ACK, b""))
        netlink.recv(_RECEIVE_BYTES)


def parse_connections(data: bytes) -> Iterator[Connection]:
    """Read the entries of one datagram of a dump; what is no entry is passed over."""
    for kind, body in _messages(data):
        if kind == (1 << 8):
            attributes = dict(_attributes(body[_GENERIC.size :]))
            connection = _parse_connection(attributes)
            if connection is not None:
                yield connection


def _cut(is_doomed: Callable[[Connection], bool]) -> int:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        doomed = [connection for connection in _dump(netlink) if is_doomed(connection)]
        return sum(_delete(netlink, connection) for connection in doomed)


def _dump(netlink: socket.socket) -> Iterator[Connection]:
    netlink.send(_render(_CT_GET, _REQUEST | _DUMP, b""))
    while True:
        data = netlink.recv(_RECEIVE_BYTES)
        yield from parse_connections(data)
        for kind, body in _messages(data):
            if kind in (_DONE, _ERROR):
                if code := _code_of(body):
                    raise OSError(code, f"the connections could not be listed: {os.strerror(code)}")
                return


def _delete(netlink: socket.socket, connection: Connection) -> bool:
    """Delete one; False if it has ended by itself meanwhile."""
    original = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(connection.original), 0x8000 | _TUPLE_ORIG) + connection.original
    netlink.send(_render(_CT_DELETE, _REQUEST | _ACK, original))
    _, body = next(_messages(netlink.recv(_RECEIVE_BYTES)))
    code = _code_of(body)
    if code not in (0, errno.ENOENT):
        raise OSError(code, f"a connection could not be deleted: {os.strerror(code)}")
    return code == 0


def _code_of(body: bytes) -> int:
    """The errno that the messages ERROR and DONE begin with, negative on the wire; 0: none (netlink(7))."""
    code: int = struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
    return -code


def _render(kind: int, flags: int, attributes: bytes) -> bytes:
    body = _GENERIC.pack(socket.AF_INET, 0, 0) + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, position)
        if length < _HEADER.size:
            return
        yield kind, data[position + _HEADER.size : position + length]
        position += (length + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[position + _ATTRIBUTE.size : position + length]
        position += (length + 3) & ~3


def _parse_connection(attributes: dict[int, bytes]) -> Connection | None:
    original, reply = attributes.get(_TUPLE_ORIG, b""), attributes.get(_TUPLE_REPLY, b"")
    ends, back = _parse_tuple(original), _parse_tuple(reply)
    if ends is None or back is None:
        return None
    source, destination, protocol, port = ends
    mark = int.from_bytes(attributes.get(_MARK, b""), "big")
    flow = Flow(protocol=protocol, address=destination, port=port, mark=mark)
    return Connection(source=source, flow=flow, answerer=back[0], original=original)


def _parse_tuple(data: bytes) -> tuple[str, str, int, int] | None:
    """Source, destination, protocol, port of the destination; None for IPv6."""
    parts = dict(_attributes(data))
    addresses, service = dict(_attributes(parts.get(_TUPLE_IP, b""))), dict(_attributes(parts.get(_TUPLE_PROTO, b"")))
    source, destination = addresses.get(_IP_SRC, b""), addresses.get(_IP_DST, b"")
    if len(source) != 4 or len(destination) != 4:
        return None
    protocol = int.from_bytes(service.get(_PROTO_NUMBER, b""), "big")
    port = int.from_bytes(service.get(_PROTO_DST_PORT, b""), "big")
    return socket.inet_ntoa(source), socket.inet_ntoa(destination), protocol, port
