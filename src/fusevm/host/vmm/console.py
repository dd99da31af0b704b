"""What a machine says on its serial port, and what its VMM says on standard error: read, bounded, kept.

`ConsoleLog` is a file and its predecessor (`<name>.1`), together at most `limit_bytes`; the newest bytes are kept. A
guest that floods its console is read at a bounded rate: it can neither fill the disk nor keep the daemon busy, and goes
on. While no daemon runs, what the guest says is lost (QEMU drops it), and VMM output waits in a pipe.
"""

import asyncio
import contextlib
import errno
import os
import re
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

_TAIL_BYTES = 16 << 10
_CHUNK = 1 << 16
#: What reading costs beside the bytes: QEMU hands over one to four bytes at a time, each a turn of the event loop.
_TURN_COST = 64
#: Cost units that a machine may use at once (an entire verbose boot) and per second thereafter.
_BURST, _RATE = 4 << 20, 64 << 10
_PAUSE_S = 0.1
#: A pipe has 1 MiB at most, unless root makes it larger (pipe(7)).
_DRAINED_CHUNKS = 16
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e]")


class ConsoleLog:
    """A bounded log. Writing never raises: a console must not take a machine down."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._half = max(limit_bytes // 2, 1)
        self._fd = -1
        self._size = 0
        self._tail = bytearray()
        #: Bytes that could not be written (disk full).
        self.lost_bytes = 0

    def write(self, data: bytes) -> None:
        """Append bytes, rotating when the file has its share of the limit."""
        self._tail += data
        del self._tail[:-_TAIL_BYTES]
        for start in range(0, len(data), self._half):
            part = data[start : start + self._half]
            try:
                self._append(part)
            except OSError:
                self.lost_bytes += len(part)

    @property
    def tail(self) -> bytes:
        """The last bytes written."""
        return bytes(self._tail)

    def load_tail(self) -> None:
        """Take up what an earlier daemon wrote for the same run of the machine."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            self._tail[:0] = file.read(_TAIL_BYTES)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, data: bytes) -> None:
        if self._fd < 0:
            self._open()
        if self._size + len(data) > self._half:
            self._rotate()
        written = os.write(self._fd, data)
        self._size += written
        self.lost_bytes += len(data) - written

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        self.close()
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        self._open()


class _Budget:
    """What may be read: a burst, and so much per second. It may be overdrawn by one turn."""

    def __init__(self) -> None:
        self._left = float(_BURST)
        self._refilled = time.monotonic()

    def take(self, size: int) -> bool:
        """Book a turn that read `size` bytes; False: pause."""
        now = time.monotonic()
        self._left = min(_BURST, self._left + (now - self._refilled) * _RATE) - size - _TURN_COST
        self._refilled = now
        return self._left >= 0

    def fill(self) -> None:
        """Let it be as at the start."""
        self._left = float(_BURST)


class ConsoleReader(asyncio.Protocol):
    """Reads the serial port's socket into a log, at a bounded rate."""

    def __init__(self, log: ConsoleLog) -> None:
        self._log = log
        self._transport: asyncio.Transport | None = None
        self._budget = _Budget()
        self._resuming: asyncio.TimerHandle | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: How often a flood was slowed down.
        self.pauses = 0

    @classmethod
    async def start(cls, connected: socket.socket, log: ConsoleLog) -> "ConsoleReader":
        """Take over a connected socket."""
        _transport, reader = await asyncio.get_running_loop().create_unix_connection(lambda: cls(log), sock=connected)
        return reader

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._log.write(data)
        if not self._budget.take(len(data)) and self._transport is not None:
            self.pauses += 1
            self._transport.pause_reading()
            self._resuming = asyncio.get_running_loop().call_later(_PAUSE_S, self._resume)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self._resuming is not None:
            self._resuming.cancel()
        if not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _resume(self) -> None:
        self._resuming = None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def drain(self) -> None:
        """Read on without pauses: the VMM has ended, and its last words are what matters."""
        self._budget.fill()
        if self._resuming is not None:
            self._resuming.cancel()
            self._resume()


class PipeReader:
    """Reads a named pipe, which keeps what is written while nobody reads, up to the pipe's size."""

    def __init__(self, path: Path, on_data: Callable[[bytes], None]) -> None:
        self._on_data = on_data
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._loop.add_reader(self._fd, self._read)

    def close(self) -> None:
        """Stop reading. Idempotent."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        if not self.ended.done():
            self.ended.set_result(None)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._on_data(data)
        else:
            self.close()


class FifoReader:
    """Reads a named pipe whose writer may come and go: the reader holds it open itself, so it never ends by itself.

    At a bounded rate: a writer that floods it fills the pipe, and loses what it writes beyond.
    """

    def __init__(self, path: Path, on_data: Callable[[bytes], None], *, uid: int | None = None) -> None:
        """`uid`: whose pipe it must be (None: anybody's). Raises OSError."""
        self._on_data = on_data
        self._loop = asyncio.get_running_loop()
        self._budget = _Budget()
        self._resuming: asyncio.TimerHandle | None = None
        #: How often a flood was slowed down.
        self.pauses = 0
        self._fd = _open_fifo(path, uid)
        self._loop.add_reader(self._fd, self._read)

    def drain(self) -> None:
        """Read what is left, at most a full pipe; the writer has ended."""
        for _ in range(_DRAINED_CHUNKS):
            if self._fd < 0 or not self._take():
                return

    def close(self) -> None:
        """Stop reading. Idempotent."""
        if self._resuming is not None:
            self._resuming.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> None:
        size = self._take()
        if size and not self._budget.take(size):
            self.pauses += 1
            self._loop.remove_reader(self._fd)
            self._resuming = self._loop.call_later(_PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._read)

    def _take(self) -> int:
        """Read once; how much there was."""
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return 0
        self._on_data(data)
        return len(data)


def _open_fifo(path: Path, uid: int | None) -> int:
    """Open a pipe for reading and writing in a directory that is the writer's.

    What is there may be anything, and the directory itself a link to another machine's: so it is looked at before it is
    opened, and opened by its descriptor.
    """
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(found)
        if not stat.S_ISFIFO(status.st_mode):
            raise OSError(errno.EINVAL, "not a named pipe", str(path))
        if uid not in (None, status.st_uid):
            raise OSError(errno.EPERM, "another user's named pipe", str(path))
        return os.open(f"/proc/self/fd/{found}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(found)


def last_lines(data: bytes, count: int = 6, limit: int = 600) -> str:
    """Return the last printable lines of a log, for a message. What a guest says is not to be trusted with more."""
    lines = [_UNPRINTABLE.sub("", line).strip() for line in data.decode("ascii", "replace").splitlines()]
    return "\n".join([line for line in lines if line][-count:])[-limit:]
