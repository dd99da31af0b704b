"""Hosts for one suite: the fake one and the stub in memory, and the daemon itself behind HTTP with a fake VMM."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec

from fusevm.control.dial import Endpoint
from fusevm.control.host_api import HostApi
from fusevm.control.host_client import HttpHost
from fusevm.control.stub_host import StubHost
from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.config import Listen
from fusevm.host.listeners import bind_tcp, serving
from fusevm.testing.fake_host import FakeHost, fake_host_app
from fusevm.testing.host_world import World


class Hosted(msgspec.Struct, frozen=True):
    """A host under test."""

    api: HostApi


Make = Callable[[Path], AbstractAsyncContextManager[Hosted]]


@asynccontextmanager
async def stub(_folder: Path) -> AsyncIterator[Hosted]:
    yield Hosted(StubHost("1"))


@asynccontextmanager
async def fake(_folder: Path) -> AsyncIterator[Hosted]:
    yield Hosted(FakeHost())


@asynccontextmanager
async def fake_over_http(_folder: Path) -> AsyncIterator[Hosted]:
    listener = bind_tcp(Listen(host="127.0.0.1", port=0))
    async with serving(listener, fake_host_app(FakeHost())):
        client = HttpHost(Endpoint("h1", f"http://127.0.0.1:{listener.getsockname()[1]}", ""))
        try:
            yield Hosted(client)
        finally:
            await client.close()


@asynccontextmanager
async def daemon(folder: Path) -> AsyncIterator[Hosted]:
    world = World(folder)
    async with world.daemon() as running:
        listener = bind_tcp(Listen(host="127.0.0.1", port=0))
        async with serving(listener, Boundary(make_router(running), running.metrics, secret=None)):
            client = HttpHost(Endpoint("h1", f"http://127.0.0.1:{listener.getsockname()[1]}", ""))
            try:
                yield Hosted(client)
            finally:
                await client.close()
                running.events.close()


EVERY: list[Make] = [stub, fake, fake_over_http, daemon]
