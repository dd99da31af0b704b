"""A control plane on a real loopback server in the test's event loop, in front of fake hosts.

When a server ends, two things are checked of every test: no invariant of the core is broken, and every error that was
answered is in its route's table.
"""

import asyncio
import contextlib
import inspect
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import httpx
import msgspec
import uvicorn

from fusevm.control.app import build_app
from fusevm.control.clock import Clock
from fusevm.control.config import ControlConfig, HostSetting, check
from fusevm.control.main import HttpServer, base_url, bind, open_plane, run_server, server_config
from fusevm.control.plane import Plane
from fusevm.control.store.protocol import Store
from fusevm.core.invariants import World, violations
from fusevm.core.policy import Policy
from fusevm.core.reconcile import ObservedMachine
from fusevm.model.environment import Environment
from fusevm.testing.fake_host import FakeHost, fake_host_app
from fusevm.wire.routes import ROUTES, errors_of
from fusevm.wire.sse import Message, MessageDecoder

#: Of whatever is waited for: it comes, also on a busy machine.
TIMEOUT_S = 60.0
FAST = {"poll_s": 0.05, "heartbeat_s": 0.05, "reconcile_s": 0.05, "keepalive_s": 0.2, "lease_s": 300.0, "wait_s": 60.0}
#: Reached by the matcher before a route is known.
BEFORE_ROUTING = {"route_not_found", "method_not_allowed", "unknown_action"}


class Running:
    """A server under test."""

    def __init__(self, url: str, plane: Plane, http: httpx.AsyncClient, hosts: Mapping[str, FakeHost]) -> None:
        self.url = url
        self.plane = plane
        self.http = http
        self.hosts = hosts

    @property
    def host(self) -> FakeHost:
        return next(iter(self.hosts.values()))

    async def create(self, task_id: str = "t1", **body: Any) -> dict[str, Any]:
        answer = await self.http.post("/v1/environments", json={"task_id": task_id, **body})
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def create_ends(self, task_id: str = "t1", **body: Any) -> dict[str, str]:
        """A create whose environment ends instead of coming up: reason, id, uid, record."""
        answer = await self.http.post("/v1/environments", json={"task_id": task_id, **body})
        details: dict[str, str] = answer.json()["error"]["details"]
        assert "record" in details, answer.text
        return details

    async def get(self, task_id: str = "t1", **params: str) -> httpx.Response:
        return await self.http.get(f"/v1/environments/fuse-{task_id}", params=params)

    async def delete(self, task_id: str = "t1") -> httpx.Response:
        return await self.http.delete(f"/v1/environments/fuse-{task_id}")

    async def act(self, task_id: str, action: str, body: Any = None, **headers: str) -> httpx.Response:
        url = f"/v1/environments/fuse-{task_id}?action={action}"
        return await self.http.post(url, json=body, headers=headers)

    async def record(self, uid: str) -> Environment:
        found = await self.plane.store.get(uid)
        assert found is not None
        return found


def config(fakes: Mapping[str, FakeHost], **changes: Any) -> ControlConfig:
    settings = tuple(HostSetting(id=host_id, url="http://127.0.0.1:1") for host_id in fakes)
    # Other fakes, too, are served over plain HTTP (`served`).
    given = {"listen": "127.0.0.1:0", "hosts": settings, "allow_local_hosts": True, **FAST, **changes}
    return ControlConfig(**given)


@contextlib.asynccontextmanager
async def running(
    *hosts: FakeHost,
    clock: Clock | None = None,
    checked: bool = True,
    headers: dict[str, str] | None = None,
    **changes: Any,
) -> AsyncIterator[Running]:
    """A server; without hosts, one FakeHost `h1`. `checked=False` for tests that break the store on purpose."""
    by_id = {host.id: host for host in hosts or (FakeHost("h1"),)}
    settings = config(by_id, **changes)
    check(settings)
    listener, stop = bind(settings), asyncio.Event()
    url = base_url(settings, listener)
    async with (
        _closing(listener),
        open_plane(settings, clock=clock, clients=by_id) as plane,
        httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, headers=headers, verify=False) as http,
        asyncio.TaskGroup() as group,
    ):
        server = HttpServer(server_config(settings, build_app(plane)))
        group.create_task(run_server(plane, server, listener, stop))
        await server.up.wait()
        try:
            yield Running(url, plane, http, by_id)
            check_errors_in_tables(plane)
            if checked:
                assert await broken_rules(plane, by_id) == []
        finally:
            await http.aclose()
            stop.set()


@contextlib.asynccontextmanager
async def _closing(listener: socket.socket) -> AsyncIterator[None]:
    with listener:
        yield


async def until(condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """Poll until the condition (plain or async) is true; its value."""
    async with asyncio.timeout(timeout_s):
        while True:
            value = condition()
            if inspect.isawaitable(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.005)


async def leave(asking: Awaitable[object], once: Callable[[], Any]) -> None:
    """Be a client that asks, and hangs up when the condition is true."""
    task = asyncio.ensure_future(asking)
    await until(once)
    assert not task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@contextlib.asynccontextmanager
async def waking(server: Running) -> AsyncIterator[None]:
    """Within the block every stream is woken all the time for what it tells nothing of, as on a busy server."""

    async def wake() -> None:
        while True:
            server.plane.signals.wake_all()
            await asyncio.sleep(server.plane.config.keepalive_s / 10)

    task = asyncio.ensure_future(wake())
    try:
        yield
    finally:
        task.cancel()


@contextlib.asynccontextmanager
async def stream(server: Running, path: str, **options: Any) -> AsyncIterator[AsyncIterator[Message]]:
    """Messages of an event stream."""
    async with server.http.stream("GET", path, **options) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield messages(response)


async def messages(response: httpx.Response) -> AsyncIterator[Message]:
    decoder = MessageDecoder()
    async for chunk in response.aiter_bytes():
        for message in decoder.feed(chunk):
            yield message


async def next_message(source: AsyncIterator[Message]) -> tuple[str, dict[str, Any]]:
    """(id, JSON) of the next message."""
    async with asyncio.timeout(TIMEOUT_S):
        message = await anext(source)
    return message.id, msgspec.json.decode(message.data)


async def rest_of(source: AsyncIterator[Message]) -> list[dict[str, Any]]:
    async with asyncio.timeout(TIMEOUT_S):
        return [msgspec.json.decode(message.data) async for message in source]


def check_errors_in_tables(plane: Plane) -> None:
    allowed = {route.name: {cls.reason for cls in errors_of(route)} for route in ROUTES}
    for metric in plane.metrics.errors.collect():
        for sample in metric.samples:
            route, reason = sample.labels.get("route"), sample.labels.get("reason")
            if route is not None and reason not in BEFORE_ROUTING:
                assert reason in allowed.get(route, {"forbidden", "bad_field"}), f"{route} answered {reason}"


@contextlib.asynccontextmanager
async def served(host: FakeHost, secret: str = "") -> AsyncIterator[str]:
    """A fake host over HTTP on loopback; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(fake_host_app(host, secret), log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = HttpServer(settings)
    async with _closing(listener), asyncio.TaskGroup() as group:
        group.create_task(server.serve([listener]))
        await server.up.wait()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True


async def world(store: Store, hosts: Mapping[str, FakeHost] | None = None) -> World:
    """One consistent reading of the whole store, and of the fake hosts."""

    found = await store.world()
    machines = {host.id: observed(host) for host in (hosts or {}).values() if not host.is_down}
    return msgspec.structs.replace(found, machines=machines)


def observed(host: FakeHost) -> tuple[ObservedMachine, ...]:
    return tuple(
        ObservedMachine(
            id=machine.id,
            cluster=machine.cluster,
            uid=machine.uid,
            incarnation=machine.incarnation,
            phase=machine.phase,
        )
        for machine in host.table.values()
    )


async def broken_rules(plane: Plane, hosts: Mapping[str, FakeHost]) -> list[str]:
    return violations(await world(plane.store, hosts), plane.config.policy)


__all__ = ["Policy", "Running", "config", "leave", "next_message", "rest_of", "running", "stream", "until", "world"]
