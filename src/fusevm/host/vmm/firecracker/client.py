"""Firecracker's API socket: one request at a time on one kept connection, each with a deadline.

A refusal is a `Fault` with Firecracker's own words; they are no part of its promise, so nothing is decided by them.
"""

import asyncio
from pathlib import Path
from typing import Final

import msgspec

from fusevm.host.vmm.firecracker.calls import Call
from fusevm.host.vmm.firecracker.records import FaultBody, InstanceInfo
from fusevm.host.vmm.firecracker.sockets import connect_inside
from fusevm.wire.http1 import Connection

#: Seconds for a call that moves no memory (upstream's own tests allow 0.7).
CALL_S: Final = 10.0
_MAX_ANSWER: Final = 1 << 20


class Fault(Exception):
    """Firecracker refused a call."""

    def __init__(self, call: Call, status: int, message: str) -> None:
        super().__init__(f"{call.method} {call.path}: {message}")
        self.call = call
        self.status = status
        self.message = message


class ApiClient:
    """The API of one process. `close` it."""

    def __init__(self, socket: Path, uid: int | None) -> None:
        self._socket = socket
        self._uid = uid
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()

    async def info(self) -> InstanceInfo:
        """Who it is, and its state. Raises as `send`."""
        return msgspec.json.decode(await self.send(Call("GET", "/")), type=InstanceInfo)

    async def metadata(self) -> object:
        """What the guest may read from the metadata service. Raises as `send`."""
        return msgspec.json.decode(await self.send(Call("GET", "/mmds")))

    async def send(self, call: Call, limit_s: float = CALL_S) -> bytes:
        """Make a call; a good answer says that it has been carried out.

        Raises Fault, ConnectionError, TimeoutError (the VMM hangs: whether it was carried out is unknown).
        """
        body = msgspec.json.encode(call.body) if call.body is not None else None
        headers = {"content-type": "application/json", "accept": "application/json"} if body is not None else {}
        async with self._turn, asyncio.timeout(limit_s):
            connection = await self._ready()
            response = await connection.request(call.method, call.path, headers=headers, body=body)
            answer = await response.read(_MAX_ANSWER)
        if response.status >= 300:
            raise Fault(call, response.status, _message(answer))
        return answer

    async def close(self) -> None:
        """Drop the connection. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _ready(self) -> Connection:
        if self._connection is not None and not self._connection.is_reusable:
            await self.close()
        if self._connection is None:
            self._connection = Connection(await connect_inside(self._socket, self._uid), authority="localhost")
        return self._connection


def _message(answer: bytes) -> str:
    try:
        return msgspec.json.decode(answer, type=FaultBody).fault_message
    except msgspec.MsgspecError:
        return answer[:500].decode(errors="replace")
