"""The guest's sockets on the host: `CONNECT <port>` on the machine's Unix socket, then bytes."""

import asyncio
import contextlib
import itertools
import re
from collections.abc import Awaitable, Callable

from fusevm.wire.streams import ByteStream, SocketStream

AGENT_PORT = 1024
#: Numbers that connections from the host are given.
_FIRST_PORT = 1 << 30
_LINE = re.compile(rb"(?i:connect) (\d{1,10})\n")
_CHUNK = 1 << 16


class VsockServer:
    """Bridges connections to the agent."""

    def __init__(self, connect: Callable[[], Awaitable[ByteStream]], is_deaf: Callable[[], bool]) -> None:
        self._connect = connect
        self._is_deaf = is_deaf
        self._ports = itertools.count(_FIRST_PORT)

    async def start(self, path: str) -> asyncio.Server:
        """Bind; fails when the file exists."""
        return await asyncio.start_unix_server(self._serve, path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host = SocketStream(reader, writer)
        try:
            found = _LINE.fullmatch(await reader.read(32))  # one read: an incomplete line is dropped
            if found is None or int(found[1]) != AGENT_PORT:
                return
            if self._is_deaf():
                await asyncio.Event().wait()
            guest = await self._connect()
            try:
                await host.write(b"OK %d\n" % next(self._ports))
                await _join(host, guest)
            finally:
                await guest.close()
        except ConnectionError:
            pass
        finally:
            await host.close()


async def _join(host: ByteStream, guest: ByteStream) -> None:
    """Copy both ways until both sides have ended, or one has broken."""
    copies = [asyncio.ensure_future(_copy(host, guest)), asyncio.ensure_future(_copy(guest, host))]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for copy in copies:
            copy.cancel()
        await asyncio.gather(*copies, return_exceptions=True)


async def _copy(source: ByteStream, target: ByteStream) -> None:
    while data := await source.read(_CHUNK):
        await target.write(data)
    with contextlib.suppress(ConnectionError):
        await target.close_write()
