"""One replica of the control plane: the real `open_plane` and the real application, in a process that can be killed at
any await, with a clock of its own that drifts from the others' and jumps."""

import asyncio
from collections.abc import Callable, Mapping
from random import Random
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from fusevm.control.app import build_app
from fusevm.control.config import ControlConfig
from fusevm.control.dial import Endpoint
from fusevm.control.host_api import HostApi
from fusevm.control.main import open_plane
from fusevm.control.middleware import Edge
from fusevm.control.store.protocol import Store
from fusevm.model.errors import Error
from fusevm.testing.clock import START_MS
from fusevm.testing.simulation.host import Spawn
from fusevm.testing.simulation.scale import POLICY
from fusevm.testing.simulation.trace import Trace

CONFIG = ControlConfig(policy=POLICY, encryption_key="5e" * 32, wait_s=30.0, lease_s=10.0)


class SkewedClock:
    """Implements `control.clock.Clock` on virtual time."""

    def __init__(self, offset_ms: int = 0) -> None:
        self.offset_ms = offset_ms
        self._loop = asyncio.get_running_loop()

    def now_ms(self) -> int:
        return START_MS + self.offset_ms + self.steady_ms()

    def steady_ms(self) -> int:
        return round(self._loop.time() * 1000)

    async def sleep_until(self, at_ms: int) -> None:
        left_ms = at_ms - self.now_ms()
        if left_ms > 0:
            await asyncio.sleep(left_ms / 1000)


class Gone(Exception):
    """The replica does not answer, or has died meanwhile."""


class Answer(msgspec.Struct, frozen=True):
    """What a client got."""

    status: int
    body: dict[str, Any] = {}

    @property
    def reason(self) -> str:
        """The stable reason of an error; empty for a success."""
        details = self.body["error"]["details"] if self.status >= 400 else {}
        return str(details.get("reason", ""))


class _Process:
    """One life of a replica."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.is_alive = True
        self.app: Edge | None = None
        self.stop = asyncio.Event()
        self.main: asyncio.Task[None] | None = None
        self.requests: dict[asyncio.Task[None], asyncio.Future[Answer]] = {}


class Replica:
    """One place where processes of the control plane live, one after the other."""

    def __init__(
        self,
        name: str,
        *,
        open_store: Callable[[str], Any],
        open_way: Callable[[str, str, Callable[[], bool]], HostApi],
        chance: Random,
        spawn: Spawn,
        trace: Trace,
    ) -> None:
        self.name = name
        self.clock = SkewedClock()
        #: Unexpected exceptions that loops of the product have caught.
        self.failures: list[str] = []
        self._open_store = open_store
        self._open_way = open_way
        self._chance = chance
        self._spawn = spawn
        self._trace = trace
        self._process: _Process | None = None

    @property
    def is_serving(self) -> bool:
        """Are requests answered?"""
        return self._process is not None and self._process.app is not None

    # -- lives ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin a new life, unless there is one."""
        if self._process is not None:
            return
        process = self._process = _Process(self._open_store(self.name))
        process.main = self._spawn(self._live(process))
        self._trace.note(self.name, "starts")

    def kill(self) -> None:
        """End the process as SIGKILL does: whatever it was at, nothing of it has an effect any more."""
        process, self._process = self._process, None
        if process is None:
            return
        self._trace.note(self.name, "is killed")
        process.is_alive = False
        process.store.die()
        self._cut_off(process)
        if process.main is not None:
            process.main.cancel()

    def stop(self) -> None:
        """Ask the process to end, as SIGTERM does."""
        process, self._process = self._process, None
        if process is None:
            return
        self._trace.note(self.name, "is stopped")
        process.stop.set()
        self._cut_off(process)

    def _cut_off(self, process: _Process) -> None:
        for task, answer in list(process.requests.items()):
            task.cancel()
            if not answer.done():
                answer.set_exception(Gone())
        process.app = None

    async def _live(self, process: _Process) -> None:
        try:
            async with open_plane(
                CONFIG,
                clock=self.clock,
                store=_as_store(process.store),
                dial=lambda endpoint: self._dial(endpoint, process),
                entropy=self._chance.randbytes,
            ) as plane:
                if process.is_alive and not process.stop.is_set():
                    process.app = build_app(plane)
                await process.stop.wait()
        except asyncio.CancelledError:
            if process.is_alive:
                raise
        except Error as error:
            self._trace.note(self.name, f"cannot start: {error.message}")
            if self._process is process:
                self._process = None
        except ExceptionGroup:
            if process.is_alive:
                raise

    def _dial(self, endpoint: Endpoint, process: _Process) -> HostApi:
        return self._open_way(self.name, endpoint.host_id, lambda: process.is_alive)

    # -- requests -------------------------------------------------------------------------------------------------

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        patience_s: float = 60.0,
    ) -> Answer:
        """One request of a client that hangs up after `patience_s`. Raises Gone."""
        process = self._process
        if process is None or process.app is None:
            await asyncio.sleep(0.05)
            raise Gone
        request = _Request(method, path, query or {}, body, headers or {})
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        task = self._spawn(request.carry_out(process.app, answer))
        process.requests[task] = answer
        task.add_done_callback(lambda done: process.requests.pop(done, None))
        try:
            async with asyncio.timeout(patience_s):
                return await answer
        except TimeoutError as error:
            raise Gone from error
        finally:
            request.hung_up.set()


class _Request:
    """A request as an ASGI server hands it to the application."""

    def __init__(self, method: str, path: str, query: Mapping[str, str], body: Any, headers: Mapping[str, str]) -> None:
        self.hung_up = asyncio.Event()
        self._content = msgspec.json.encode(body) if body is not None else b""
        self._is_sent = False
        self._status = 0
        self._answer = bytearray()
        sent = {"host": "127.0.0.1", "content-length": str(len(self._content)), **headers}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": quote(path).encode(),
            "query_string": urlencode(query).encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
            "client": ("127.0.0.1", 50_000),
            "server": ("127.0.0.1", 8080),
        }

    async def carry_out(self, app: Edge, answer: "asyncio.Future[Answer]") -> None:
        await asyncio.sleep(0.001)
        try:
            await app(self._scope, self._receive, self._send)
        except Exception:  # what an ASGI server does with it, too
            if not answer.done():
                answer.set_exception(Gone())
            raise
        if not answer.done():
            content = msgspec.json.decode(self._answer) if self._answer else {}
            answer.set_result(Answer(self._status, content))

    async def _receive(self) -> dict[str, Any]:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._content, "more_body": False}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            self._answer += message.get("body", b"")


def _as_store(store: Store) -> Store:
    """A SimStore fits the protocol; the checker of types sees it here."""
    return store
