"""Connecting to sockets that a jailed process has made, without trusting it.

The directory belongs to the machine's user: a VMM that was broken into may put anything there, a link to another socket
of the host above all. So the file is opened without following links, looked at, and connected to by its descriptor;
that also lifts the 107 bytes that a socket's path may have.
"""

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fusevm.wire.streams import SocketStream

#: What is read ahead, at most.
_BUFFER: Final = 1 << 18
#: Firecracker's handshake: the port to reach, then the number that it has given the connection.
_MAX_ANSWER: Final = 32


def _nothing() -> None:
    """Nobody wants to know."""


class SocketRefused(ConnectionError):
    """What is there is not the socket of this machine."""


class GuestConnection(SocketStream):
    """A stream to the guest; each has a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        #: Called once it is closed.
        self.on_close: Callable[[], None] = _nothing

    async def close(self) -> None:
        """Drop the connection."""
        await super().close()
        self.on_close()

    @property
    def is_usable(self) -> bool:
        """False once either side has closed or broken it."""
        return not (self._writer.is_closing() or self._reader.at_eof())


async def connect_inside(path: Path, uid: int | None) -> GuestConnection:
    """Connect to a socket of a jail whose user is `uid` (None: any). Raises OSError (SocketRefused)."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISSOCK(found.st_mode) or uid not in (None, found.st_uid):
            raise SocketRefused(f"{path} is not a socket of this machine's user")
        return GuestConnection(*await asyncio.open_unix_connection(f"/proc/self/fd/{descriptor}", limit=_BUFFER))
    finally:
        os.close(descriptor)


async def connect_guest(path: Path, uid: int | None, port: int) -> GuestConnection:
    """Connect to a port of the guest through its vsock socket.

    Raises ConnectionError, also when nobody in the guest listens: Firecracker then closes without a word.
    """
    stream = await connect_inside(path, uid)
    try:
        await stream.write(b"CONNECT %d\n" % port)  # in one write: an incomplete line is dropped
        _check_answer(await _read_line(stream))
    except BaseException:
        await asyncio.shield(stream.close())
        raise
    return stream


async def _read_line(stream: SocketStream) -> bytes:
    """Up to the end of the line, byte by byte: what follows it is the guest's."""
    answer = b""
    while not answer.endswith(b"\n") and len(answer) < _MAX_ANSWER:
        data = await stream.read(1)
        if not data:
            break
        answer += data
    return answer


def _check_answer(answer: bytes) -> None:
    if not answer:
        raise ConnectionRefusedError("nobody listens in the guest")
    word, _, number = answer.partition(b" ")
    if word != b"OK" or not number.strip().isdigit():
        raise ConnectionError(f"the vsock handshake was answered with {answer!r}")
