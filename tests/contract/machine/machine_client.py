"""A client of the machine API that knows no Fuse: JSON in, JSON out."""

import json
from pathlib import Path
from typing import Any

from fusevm.host.daemon import Daemon
from fusevm.model.errors import Error
from fusevm.testing.host_world import World
from fusevm.wire.errors import parse_error
from fusevm.wire.http1 import Connection
from fusevm.wire.streams import open_unix

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHvLLtVN+AQN43Yh4dYkwmNAYXvuYW5AGRR5cfRtTbPW someone@somewhere"


class MachineApi:
    """A daemon that serves, and its client."""

    def __init__(self, world: World, daemon: Daemon, path: Path) -> None:
        self.world = world
        self.daemon = daemon
        self.path = path

    async def raw(self, method: str, target: str, body: Any = None, headers: Any = None) -> tuple[int, bytes]:
        """Status and body."""
        connection = Connection(await open_unix(str(self.path)))
        content = None if body is None else json.dumps(body).encode()
        try:
            response = await connection.request(method, target, headers=headers or {}, body=content)
            return response.status, await response.read(256 << 20)
        finally:
            await connection.close()

    async def call(self, method: str, target: str, body: Any = None, status: int = 200) -> Any:
        """The body of a success with exactly this status."""
        got, content = await self.raw(method, target, body)
        assert got == status, content
        return json.loads(content) if content else None

    async def fails(self, method: str, target: str, body: Any = None, headers: Any = None) -> Error:
        """The error of a request that is refused."""
        status, content = await self.raw(method, target, body, headers)
        assert status >= 400, content
        flat = json.loads(content)
        assert set(flat) == {"error", "code", "details"}
        error = parse_error(status, content)
        assert error.status == status
        return error

    async def create(self, machine_id: str = "m-1", **fields: Any) -> dict[str, Any]:
        """A machine of an image of the host's own."""
        body = {"machine_id": machine_id, "image": "debian-12", **fields}
        return (await self.call("POST", "/machines", body, 201))["machine"]

    async def files(self, operation: str, machine_id: str = "m-1", **fields: Any) -> Any:
        """One operation on files."""
        return await self.call("POST", f"/machines/{machine_id}/files/ops", {"operation": operation, **fields})

    async def files_fail(self, operation: str, **fields: Any) -> Error:
        """One operation on files that is refused."""
        return await self.fails("POST", "/machines/m-1/files/ops", {"operation": operation, **fields})
