"""The API socket: HTTP/1.1, ten connections at most, one request after another."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import h11

from fusevm.testing.fake_firecracker.rules import VERSION, Answer

MAX_CONNECTIONS = 10
Decide = Callable[[str, str, bytes], Awaitable[Answer]]


class ApiServer:
    """Serves `decide` on a Unix socket."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self._turn = asyncio.Lock()
        self._open = 0

    async def start(self, path: str) -> asyncio.Server:
        """Bind; fails when the file exists."""
        return await asyncio.start_unix_server(self._serve, path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= MAX_CONNECTIONS:
                await self._converse(reader, writer)
        except (ConnectionError, h11.RemoteProtocolError):
            pass
        finally:
            self._open -= 1
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            request, content = await _receive(connection, reader)
            if request is None:
                return
            async with self._turn:
                answer = await self._decide(request.method.decode(), request.target.decode(), content)
            body = json.dumps(answer.body).encode() if answer.body is not None else b""
            head = h11.Response(
                status_code=answer.status,
                headers=[
                    ("Server", f"Firecracker API {VERSION}"),
                    ("Connection", "keep-alive"),
                    *([("Content-Type", "application/json"), ("Content-Length", str(len(body)))] if body else []),
                ],
            )
            data = connection.send(head) or b""
            data += (connection.send(h11.Data(data=body)) or b"") if body else b""
            writer.write(data + (connection.send(h11.EndOfMessage()) or b""))
            await writer.drain()
            if connection.our_state is h11.MUST_CLOSE:
                return
            connection.start_next_cycle()


async def _receive(connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[h11.Request | None, bytes]:
    request, content = None, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(1 << 16))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            content += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return request, content
        else:
            return None, b""
