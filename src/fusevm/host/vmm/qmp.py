"""QEMU's control socket (QMP): one JSON object a line; commands are answered in order, events come in between.

https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

#: Longest line; a query of everything stays far below.
_LINE_BYTES = 1 << 20


class QmpError(Exception):
    """QEMU refused a command."""


class Event(msgspec.Struct, frozen=True):
    """What QEMU says by itself."""

    name: str
    data: dict[str, Any] = {}


class Qmp:
    """A client. Owns its socket and one reading task; `close` it."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_event: Callable[[Event], None]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._on_event = on_event
        self._answers: deque[asyncio.Future[Any]] = deque()
        loop = asyncio.get_running_loop()
        #: Done when QEMU has greeted, its devices are made and events flow; fails when it went before that.
        self.ready: asyncio.Future[None] = loop.create_future()
        #: Done when the connection has ended.
        self.ended: asyncio.Future[None] = loop.create_future()
        self._reading = loop.create_task(self._read(), name="qmp")

    @classmethod
    async def start(cls, connected: socket.socket, on_event: Callable[[Event], None]) -> "Qmp":
        """Take over a connected socket. Does not wait for QEMU; raises OSError."""
        reader, writer = await asyncio.open_unix_connection(sock=connected, limit=_LINE_BYTES)
        return cls(reader, writer, on_event)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its answer. Raises QmpError, ConnectionError."""
        await asyncio.shield(self.ready)
        return await self._send(command, arguments)

    async def close(self) -> None:
        """Drop the connection. Idempotent."""
        self._writer.transport.abort()
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    async def _send(self, command: str, arguments: dict[str, Any]) -> Any:
        if self.ended.done():
            raise ConnectionError("QEMU's control socket is closed")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        self._writer.write(msgspec.json.encode({"execute": command, "arguments": arguments}) + b"\n")
        return await answer

    async def _read(self) -> None:
        negotiating: asyncio.Task[None] | None = None
        try:
            while line := await self._reader.readline():
                message = msgspec.json.decode(line)
                if "QMP" in message:
                    negotiating = asyncio.get_running_loop().create_task(self._negotiate(), name="qmp negotiation")
                elif "event" in message:
                    self._on_event(Event(message["event"], message.get("data", {})))
                else:
                    self._answer(message)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            pass  # broken, or no QMP, of which a QEMU that was broken into may say anything: the same to who waits
        finally:
            self._end()
            if negotiating is not None:
                await asyncio.wait({negotiating})

    async def _negotiate(self) -> None:
        try:
            await self._send("qmp_capabilities", {})
        except (ConnectionError, QmpError) as e:
            self._fail(self.ready, ConnectionError(f"QEMU does not speak QMP: {e}"))
        else:
            if not self.ready.done():
                self.ready.set_result(None)

    def _answer(self, message: dict[str, Any]) -> None:
        if not self._answers:
            return
        answer = self._answers.popleft()
        if answer.done():  # the caller gave up
            return
        if "error" in message:
            answer.set_exception(QmpError(str(message["error"].get("desc", message["error"]))))
        else:
            answer.set_result(message.get("return"))

    def _end(self) -> None:
        self._writer.transport.abort()
        gone = ConnectionError("QEMU's control socket broke")
        for answer in self._answers:
            self._fail(answer, gone)
        self._answers.clear()
        self._fail(self.ready, gone)
        if not self.ended.done():
            self.ended.set_result(None)

    @staticmethod
    def _fail(future: asyncio.Future[Any], error: Exception) -> None:
        if not future.done():
            future.set_exception(error)
            future.exception()  # nobody has to be waiting
