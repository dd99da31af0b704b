"""Interactive sessions for asyncio: the twin of `sdk.session`, over the asyncio client of `websockets`."""

import contextlib
from collections.abc import AsyncIterator

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from fusevm.model.errors import Timeout
from fusevm.sdk.address import Dialer, describe
from fusevm.sdk.core import raise_for_status
from fusevm.sdk.exchange import Exchange
from fusevm.sdk.failures import ConnectionLost, ProtocolBroken, ServerUnreachable
from fusevm.sdk.session import HANDSHAKE_TIMEOUT_S, MAX_MESSAGE, STDIN_CHUNK, to_answer
from fusevm.wire.frames import Frame, FrameType
from fusevm.wire.guest import ExecRequest, Exit


class AsyncSession:
    """A running command. `pid` is known after the first frame, `exit` after the last."""

    def __init__(self, connection: ClientConnection, url: str) -> None:
        self._connection = connection
        self._url = url
        self._exchange = Exchange(url)

    @property
    def pid(self) -> int | None:
        """Process id in the machine."""
        return self._exchange.pid

    @property
    def exit(self) -> Exit | None:
        """How the command ended; None while it runs."""
        return self._exchange.exit

    async def frames(self) -> AsyncIterator[Frame]:
        """Output (STDOUT, STDERR) as it comes, until the command has ended.

        Raises the error with which the server refused or ended the command, or ConnectionLost.
        """
        while self._exchange.exit is None:
            try:
                message = await self._connection.recv(decode=False)
            except ConnectionClosed as error:
                raise self._lost(error) from error
            for frame in self._exchange.feed(message):
                yield frame

    async def wait(self) -> Exit:
        """Drop all further output and return how the command ended."""
        async for _ in self.frames():
            pass
        return self._exchange.exit or Exit()

    async def send_stdin(self, data: bytes) -> None:
        """Send input; waits while the machine takes no more. Needs another task in `frames()` meanwhile."""
        view = memoryview(data)
        for start in range(0, len(view), STDIN_CHUNK):
            await self.send(Frame(FrameType.STDIN, bytes(view[start : start + STDIN_CHUNK])))

    async def close_stdin(self) -> None:
        """End the command's input."""
        await self.send(Frame(FrameType.STDIN_EOF))

    async def resize(self, rows: int, cols: int) -> None:
        """Tell a terminal its new size."""
        await self.send(self._exchange.resize(rows, cols))

    async def signal(self, name: str) -> None:
        """Send a signal ("INT") to the command's process group, or to the foreground group of a terminal."""
        await self.send(self._exchange.signal(name))

    async def start(self, request: ExecRequest) -> None:
        """Send the command; the first frame, sent by `open_session`."""
        await self.send(self._exchange.start(request))

    async def send(self, frame: Frame) -> None:
        """Send any frame; waits while too much is unsent."""
        try:
            await self._connection.send(self._exchange.encode(frame))
        except ConnectionClosed as error:
            raise self._lost(error) from error

    def _lost(self, error: ConnectionClosed) -> ConnectionLost:
        reason = error.rcvd.reason if error.rcvd is not None else ""
        return ConnectionLost(url=self._url, problem=reason or "closed before the command ended")


@contextlib.asynccontextmanager
async def open_session(
    dialer: Dialer, target: str, headers: dict[str, str], request: ExecRequest | None
) -> AsyncIterator[AsyncSession]:
    """Open a session; leaving the block before the end ends the command. `request` None: the server starts it."""
    proxy = dialer.proxy
    proxy_url = None
    if proxy is not None:
        credentials = f"{proxy.credentials}@" if proxy.credentials else ""
        proxy_url = f"{proxy.scheme}://{credentials}{proxy.host}:{proxy.port}"
    url = dialer.address.url
    connecting = connect(
        dialer.address.websocket_url(target),
        additional_headers=headers,
        user_agent_header=None,
        ssl=dialer.tls,
        compression=None,
        proxy=proxy_url,
        open_timeout=HANDSHAKE_TIMEOUT_S,
        close_timeout=1.0,
        # A reader that takes its time is no dead peer; TCP's own keep-alive finds those.
        ping_timeout=None,
        max_size=MAX_MESSAGE,
    )
    try:
        connection = await connecting
    except InvalidStatus as refusal:
        raise_for_status(to_answer(refusal.response))
        raise ProtocolBroken(url=url, problem=str(refusal)) from refusal
    except TimeoutError as error:
        raise Timeout(what="opening the session", limit_s=round(HANDSHAKE_TIMEOUT_S)) from error
    except WebSocketException as error:
        raise ProtocolBroken(url=url, problem=str(error)) from error
    except OSError as error:
        raise ServerUnreachable(url=url, problem=describe(error)) from error
    async with connection:
        session = AsyncSession(connection, url)
        if request is not None:
            await session.start(request)
        yield session
