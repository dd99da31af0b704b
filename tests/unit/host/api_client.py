"""A daemon that serves on a Unix socket, with a fake driver behind it, and a client."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import websockets.asyncio.client as ws

from fusevm.host.daemon import Daemon
from fusevm.model.errors import Error
from fusevm.testing.host_world import SPEC, World, fence
from fusevm.wire.errors import parse_error
from fusevm.wire.host_api import MachineAnswer, fence_headers
from fusevm.wire.http1 import Body, Connection, Response
from fusevm.wire.streams import open_unix

FENCE = fence_headers(fence())


class Api:
    """A daemon that serves, and a client."""

    def __init__(self, world: World, daemon: Daemon, path: Path) -> None:
        self.world = world
        self.daemon = daemon
        self.path = path

    @asynccontextmanager
    async def exchange(self, method: str, target: str, headers=None, body: Body = None) -> AsyncIterator[Response]:
        """One request on a connection of its own."""
        connection = Connection(await open_unix(str(self.path)))
        try:
            yield await connection.request(method, target, headers=headers or {}, body=body)
        finally:
            await connection.close()

    async def call(self, method: str, target: str, headers=None, body: Body = None) -> tuple[int, bytes]:
        """Status and whole body."""
        async with self.exchange(method, target, headers, body) as response:
            return response.status, await response.read()

    async def fails(self, method: str, target: str, headers=None, body: Body = None) -> Error:
        """The error of a request that is refused."""
        status, content = await self.call(method, target, headers, body)
        assert status >= 400, content
        flat = json.loads(content)
        assert set(flat) == {"error", "code", "details"}
        assert flat["details"]["reason"]
        error = parse_error(status, content)
        assert error.status == status
        return error

    async def create(self, machine_id: str = "m-1", uid: str = "u1") -> MachineAnswer:
        """A running machine."""
        body = {"machine_id": machine_id, "spec": msgspec.to_builtins(SPEC)}
        status, content = await self.call("POST", "/machines", fence_headers(fence(uid)), json.dumps(body).encode())
        assert status == 201, content
        return msgspec.json.decode(content, type=MachineAnswer)

    def frames(self, machine_id: str = "m-1", uid: str = "u1") -> ws.unix_connect:
        """The exec WebSocket."""
        uri = f"ws://fuse/machines/{machine_id}/guest/exec"
        headers = fence_headers(fence(uid))
        return ws.unix_connect(str(self.path), uri, additional_headers=headers, compression=None, ping_interval=None)
