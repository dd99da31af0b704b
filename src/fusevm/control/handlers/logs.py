"""Logs: the machine's console, what the startup script wrote, what the user's daemon writes.

The console is kept by the host. The other two are kept by the guest agent, as two streams each; here they are one text.
Values of the environment's setup are masked in all of them: who may read logs, may not read secrets.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from starlette.responses import Response

from fusevm.control.activity import in_use
from fusevm.control.call import Call
from fusevm.control.entry import LOOK_AGAIN_S
from fusevm.control.guest_calls import GuestCalls
from fusevm.control.handlers.guest import RelayedResponse
from fusevm.control.host_api import GuestRequest, HostApi, Upstream
from fusevm.control.outcome import fence_of
from fusevm.control.plane import Plane
from fusevm.control.resolve import usable_environment
from fusevm.control.signals import Subscription
from fusevm.core.redaction import Redactor
from fusevm.model.environment import Environment, State
from fusevm.model.errors import BadField, LogNotFound, ProcessNotFound
from fusevm.wire.routes import LOG_SOURCES

#: A longer line is passed on in pieces, between which the other stream may come.
MAX_LINE = 64 << 10
#: Bytes that are looked through at a time.
PIECE = 4 << 10
#: Pieces that a reader may be behind.
_BEHIND = 8
#: While something is there to be asked.
_ALIVE = frozenset({State.PROVISIONING, State.RUNNING, State.DRAINING, State.DESTROYING})
_PATHS = {"startup": "processes/@startup/output", "agent": "agent/output"}


async def read_logs(plane: Plane, call: Call) -> Response:
    source = call.text("source") or LOG_SOURCES[0]
    if source not in LOG_SOURCES:
        raise BadField(field="source", problem=f"{source[:40]!r} is none of {', '.join(LOG_SOURCES)}")
    follow = call.flag("follow")
    env = await usable_environment(plane, call.caller, call.params["id"], _ALIVE)
    _check(env, source)

    known = Known(plane, env, await plane.vault.redactor(env))

    @asynccontextmanager
    async def use() -> AsyncIterator[None]:
        async with in_use(plane, env, f"request {call.request_id}"):
            with known.followed():
                yield

    streams = await _open(plane, env, source, "follow=true" if follow else "follow=false")
    return RelayedResponse(plane, call.caller, RedactedLog(streams, known, follow=follow), use)


def _check(env: Environment, source: str) -> None:
    if source == "startup" and not env.duties.startup_timeout_s:
        raise LogNotFound(id=env.id, source=source, problem="it was created without a startup script")
    if source == "agent" and not env.duties.agent:
        raise LogNotFound(id=env.id, source=source, problem="it was created without a daemon (`agent`)")
    if env.is_queued:
        raise LogNotFound(id=env.id, source=source, problem="it still waits for a place")


async def _open(plane: Plane, env: Environment, source: str, query: str) -> list[Upstream]:
    host = await plane.directory.client(env.host_id)
    if source not in _PATHS:
        return [await _open_console(plane, env, host, query)]
    guest = GuestCalls(host, fence_of(plane.store.cluster, env), env.machine_id)
    async with AsyncExitStack() as opened:
        try:
            out = await guest.open("GET", f"{_PATHS[source]}?stream=stdout&{query}")
            opened.push_async_callback(out.close)
            err = await guest.open("GET", f"{_PATHS[source]}?stream=stderr&{query}")
        except ProcessNotFound as error:
            problem = "its startup script has not been started yet"
            raise LogNotFound(id=env.id, source=source, problem=problem) from error
        opened.pop_all()
    return [out, err]


async def _open_console(plane: Plane, env: Environment, host: HostApi, query: str) -> Upstream:
    fence = fence_of(plane.store.cluster, env)
    return await host.relay(GuestRequest(fence=fence, machine_id=env.machine_id, method="GET", target=f"logs?{query}"))


class Known:
    """What is to be masked by now: a log that is followed outlives tokens."""

    def __init__(self, plane: Plane, env: Environment, redactor: Redactor) -> None:
        self.redactor = redactor
        self._plane = plane
        self._env = env
        self._news = Subscription()
        self._looked_s = -LOOK_AGAIN_S
        self._looking = asyncio.Lock()

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Hear of changes within the block."""
        with self._plane.signals.subscribe(self._env.uid) as news:
            self._news = news
            yield

    async def now(self) -> Redactor:
        """The redactor, made anew after another action (a new token is one) has begun. Raises what the store raises."""
        async with self._looking:
            now_s = asyncio.get_running_loop().time()
            if await self._news.changed(0) or now_s - self._looked_s >= LOOK_AGAIN_S:
                env = await self._plane.store.get(self._env.uid)
                if env is not None and not env.is_terminal and env.action_seq != self._env.action_seq:
                    self.redactor = await self._plane.vault.redactor(env)
                    self._env = env
                self._looked_s = now_s
        return self.redactor


class RedactedLog:
    """One text of one or two streams. Implements `host_api.Upstream`.

    What is there already comes one stream after the other, since nobody knows how they were mixed; what is followed
    comes as it is written, line by line.
    """

    status = 200

    def __init__(self, streams: Sequence[Upstream], known: Known, *, follow: bool) -> None:
        self._streams = streams
        self._known = known
        self._follow = follow
        lost = sum(_number(stream, "x-fuse-lost") for stream in streams)
        self.headers: Mapping[str, str] = {"content-type": "text/plain; charset=utf-8", "x-fuse-lost": str(lost)}

    async def chunks(self) -> AsyncIterator[bytes]:
        if self._follow and len(self._streams) > 1:
            async for piece in mixed([self._redacted(stream) for stream in self._streams]):
                yield piece
            return
        for stream in self._streams:
            async for piece in self._redacted(stream):
                yield piece

    async def _redacted(self, stream: Upstream) -> AsyncIterator[bytes]:
        begins_at = max(_number(stream, "x-fuse-offset"), _number(stream, "x-fuse-lost"))
        masked = self._known.redactor.stream(begins_at)
        async for chunk in stream.chunks():
            if self._follow:
                masked.use(await self._known.now())
            content = b""
            for begin in range(0, len(chunk), PIECE):
                content += masked.feed(chunk[begin : begin + PIECE])
                await asyncio.sleep(0)  # others go on, however much is read here
            if content:
                yield content
        if content := masked.end():
            yield content

    async def close(self) -> None:
        for stream in self._streams:
            await stream.close()


def _number(stream: Upstream, header: str) -> int:
    return int(stream.headers.get(header, "0"))


async def mixed(streams: Sequence[AsyncIterator[bytes]]) -> AsyncIterator[bytes]:
    """Whole lines of several streams as they come, until all have ended. Raises what a stream raises."""
    queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(_BEHIND)
    # Not a TaskGroup: a generator may be left in the middle.
    pumps = [asyncio.ensure_future(_pump(stream, queue)) for stream in streams]
    try:
        left = len(pumps)
        while left:
            piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(stream: AsyncIterator[bytes], queue: "asyncio.Queue[bytes | Exception | None]") -> None:
    rest = b""
    try:
        async for chunk in stream:
            lines, newline, rest = (rest + chunk).rpartition(b"\n")
            if newline:
                await queue.put(lines + newline)
            if len(rest) > MAX_LINE:
                await queue.put(rest)
                rest = b""
        if rest:
            await queue.put(rest)
    except Exception as error:  # noqa: BLE001 - raised by the reader
        await queue.put(error)
    else:
        await queue.put(None)
