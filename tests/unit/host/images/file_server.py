"""A web server that says whatever a test wants, on loopback."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

Answer = Callable[[str, dict[str, str]], bytes | AsyncIterator[bytes]]


class FileServer:
    """Answers each request by `answer(target, headers)`: the raw bytes of the answer, or pieces of it."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.requests: list[str] = []
        self.port = 0
        self._serving: set[asyncio.Task[None]] = set()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            line, *fields = head.strip().split("\r\n")
            target = line.split(" ")[1]
            self.requests.append(target)
            headers = dict(field.lower().split(": ", 1) for field in fields)
            said = self._answer(target, headers)
            if isinstance(said, bytes):
                writer.write(said)
            else:
                async for piece in said:
                    writer.write(piece)
                    await writer.drain()
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def close(self) -> None:
        """End what is still being answered."""
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[FileServer]:
    """Serve on a free port of 127.0.0.1."""
    files = FileServer(answer)
    server = await asyncio.start_server(files.serve, "127.0.0.1", 0)
    files.port = server.sockets[0].getsockname()[1]
    try:
        yield files
    finally:
        server.close()
        await files.close()
        await server.wait_closed()


def ok(body: bytes, *fields: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """A whole answer."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *fields]
    return "\r\n".join([*head, "", ""]).encode() + body


def redirect(to: str, status: str = "302 Found") -> bytes:
    return ok(b"", f"Location: {to}", status=status)
