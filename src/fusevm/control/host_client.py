"""The host daemon over HTTP (`wire.host_api`): every call once, with a deadline, its failures told apart.

Not connected: HostUnreachable; connected to somebody else: HostUnproven. Sent, and no answer came: ReplyLost. Took too
long: Timeout. Answered with an error: that error, as the class it was raised as.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import TypeVar

import msgspec

from fusevm.control.dial import Endpoint, Lane, Pool
from fusevm.control.host_api import Body, GuestRequest, Reading, ReplyLost, read_now
from fusevm.control.websocket_client import HandshakeRefused, WebSocketClient
from fusevm.model.errors import (
    Error,
    Forbidden,
    HostRejected,
    Internal,
    NotSupported,
    OrderExpired,
    RouteNotFound,
    Timeout,
    Unauthorized,
)
from fusevm.model.machine import Fence
from fusevm.model.network import Network
from fusevm.wire.decode import UNREADABLE
from fusevm.wire.errors import parse_error
from fusevm.wire.host_api import (
    CLUSTER_HEADER,
    CreateMachine,
    HostFacts,
    MachineAnswer,
    MachineBody,
    MachineEvent,
    MachineList,
    fence_headers,
)
from fusevm.wire.host_snapshots import RestoreInPlace, SnapshotAnswer, SnapshotBody, TakeSnapshot
from fusevm.wire.http1 import Response

T = TypeVar("T")
READ_TIMEOUT_S = 10
#: Longest that a host may destroy a machine.
DESTROY_TIMEOUT_S = 60
#: How long a reading of a host's clock is used: clocks drift by less than a millisecond within it.
READING_S = 60.0
#: Longest that a host may copy a disk.
DISK_TIMEOUT_S = 3_600
MAX_ERROR = 1 << 20
_MAX_LINE = 1 << 20


class HttpHost:
    """One host daemon. Implements `host_api.HostApi`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._pool = Pool(endpoint)
        self._reading: Reading | None = None

    async def info(self) -> HostFacts:
        return (await self._ask())[0]

    async def _ask(self) -> tuple[HostFacts, Reading]:
        facts = self._decode(await self._call("GET", "/info", timeout_s=READ_TIMEOUT_S), HostFacts)
        self._reading = reading = read_now(facts.clock)
        return facts, reading

    async def read_clock(self) -> Reading:
        reading = self._reading
        if reading is not None and asyncio.get_running_loop().time() - reading.heard_s < READING_S:
            return reading
        return (await self._ask())[1]

    async def machines(self) -> MachineList:
        return self._decode(await self._call("GET", "/machines", timeout_s=READ_TIMEOUT_S), MachineList)

    async def create(self, fence: Fence, body: CreateMachine) -> MachineBody:
        limit_s = body.boot_timeout_ms // 1000 + READ_TIMEOUT_S
        payload = msgspec.json.encode(body)
        headers = {**fence_headers(fence), "content-type": "application/json"}
        answer = await self._call("POST", "/machines", headers=headers, body=payload, timeout_s=limit_s)
        return self._decode(answer, MachineAnswer).machine

    @property
    def address(self) -> str:
        return self._endpoint.address

    async def set_network(self, fence: Fence, machine_id: str, network: Network) -> None:
        headers = {**fence_headers(fence), "content-type": "application/json"}
        payload = msgspec.json.encode(network)
        path = f"/machines/{machine_id}/network"
        try:
            await self._call("PUT", path, headers=headers, body=payload, timeout_s=READ_TIMEOUT_S)
        except RouteNotFound as error:
            raise NotSupported(feature=f"changing a network on host {self._endpoint.host_id}") from error

    async def destroy(self, fence: Fence, machine_id: str) -> None:
        await self._call("DELETE", f"/machines/{machine_id}", headers=fence_headers(fence), timeout_s=DESTROY_TIMEOUT_S)

    async def take_snapshot(self, fence: Fence, machine_id: str, body: TakeSnapshot) -> SnapshotBody:
        answer = await self._order(f"/machines/{machine_id}/snapshots", fence, body)
        return self._decode(answer, SnapshotAnswer).snapshot

    async def restore_snapshot(self, fence: Fence, machine_id: str, snapshot_id: str) -> None:
        await self._order(f"/machines/{machine_id}/restore", fence, RestoreInPlace(snapshot_id=snapshot_id))

    async def delete_snapshot(self, cluster: str, snapshot_id: str) -> None:
        headers = {CLUSTER_HEADER: cluster}
        try:
            await self._call("DELETE", f"/snapshots/{snapshot_id}", headers=headers, timeout_s=READ_TIMEOUT_S)
        except RouteNotFound as error:
            raise NotSupported(feature=f"deleting snapshots on host {self._endpoint.host_id}") from error

    async def _order(self, path: str, fence: Fence, body: msgspec.Struct) -> bytes:
        """An order that writes a disk; the caller has the deadline."""
        headers = {**fence_headers(fence), "content-type": "application/json"}
        payload = msgspec.json.encode(body)
        try:
            return await self._call("POST", path, headers=headers, body=payload, timeout_s=DISK_TIMEOUT_S)
        except RouteNotFound as error:
            raise NotSupported(feature=f"snapshots on host {self._endpoint.host_id}") from error

    async def events(self) -> AsyncIterator[MachineEvent]:
        upstream = await self._open("GET", "/events", {}, None, READ_TIMEOUT_S)
        try:
            rest = b""
            async for chunk in upstream.chunks():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield self._decode(line, MachineEvent)
                if len(rest) > _MAX_LINE:
                    raise Internal(problem=f"host {self._endpoint.host_id} sent an endless line of events")
        finally:
            await upstream.close()

    async def relay(self, request: GuestRequest) -> "HttpUpstream":
        headers = {**request.headers, **fence_headers(request.fence)}
        path = f"/machines/{request.machine_id}/{request.target}"
        return await self._open(request.method, path, headers, request.body, request.timeout_s)

    async def open_frames(self, fence: Fence, machine_id: str) -> "HttpFrames":
        lane = await self._endpoint.open()
        path = f"/machines/{machine_id}/guest/exec"
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                socket = await WebSocketClient.connect(
                    lane.stream, self._endpoint.authority, path, {**self._authorization(), **fence_headers(fence)}
                )
        except HandshakeRefused as refusal:
            await lane.stream.close()
            raise self._error(refusal.status, refusal.body) from refusal
        except TimeoutError as error:
            await lane.stream.close()
            raise Timeout(what=f"opening a terminal on {machine_id}", limit_s=READ_TIMEOUT_S) from error
        except OSError as error:
            await lane.stream.close()
            raise self._lost(error) from error
        except BaseException:
            await lane.stream.close()
            raise
        return HttpFrames(socket, self._endpoint.host_id)

    async def close(self) -> None:
        """Close idle connections."""
        await self._pool.close()

    # -- one exchange ---------------------------------------------------------------------------------------------

    async def _call(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                upstream = await self._open(method, path, headers or {}, body, timeout_s)
                try:
                    return b"".join([chunk async for chunk in upstream.chunks()])
                finally:
                    await upstream.close()
        except TimeoutError as error:
            raise self._late(method, path, timeout_s) from error

    async def _open(
        self, method: str, path: str, headers: Mapping[str, str], body: Body, timeout_s: float
    ) -> "HttpUpstream":
        """Send a request; the answer's head is there, its body not yet. Errors of the daemon are raised."""
        lane = await self._pool.take()
        try:
            async with asyncio.timeout(timeout_s):
                fields = {**headers, **self._authorization()}
                response = await lane.connection.request(method, path, headers=fields, body=body)
                if response.status < 400:
                    return HttpUpstream(self._pool, lane, response, self._endpoint.host_id)
                content = await response.read(MAX_ERROR) if method != "HEAD" else b""
        except TimeoutError as error:
            await lane.connection.close()
            raise self._late(method, path, timeout_s) from error
        except OSError as error:
            await lane.connection.close()
            raise self._lost(error) from error
        except BaseException:
            await lane.connection.close()
            raise
        if method == "HEAD":
            await _finish_head(response)
        await self._pool.give_back(lane)
        raise self._error(response.status, content)

    def _authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._endpoint.secret}"} if self._endpoint.secret else {}

    def _decode(self, content: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except UNREADABLE as error:
            raise Internal(problem=f"host {self._endpoint.host_id} answered something unreadable: {error}") from error

    def _error(self, status: int, body: bytes) -> Error:
        error = parse_error(status, body)
        if isinstance(error, OrderExpired):
            # Perhaps by a clock that is no more: the host was restarted.
            self._reading = None
        if isinstance(error, Unauthorized | Forbidden):
            return HostRejected(id=self._endpoint.host_id)
        return error

    def _lost(self, error: OSError) -> ReplyLost:
        return ReplyLost(id=self._endpoint.host_id, problem=str(error) or type(error).__name__)

    def _late(self, method: str, path: str, timeout_s: float) -> Timeout:
        return Timeout(
            what=f"{method} {path.partition('?')[0]} on host {self._endpoint.host_id}", limit_s=int(timeout_s)
        )


class HttpUpstream:
    """Implements `host_api.Upstream`."""

    def __init__(self, pool: Pool, lane: Lane, response: Response, host_id: str) -> None:
        self._pool = pool
        self._lane: Lane | None = lane
        self._response = response
        self._host_id = host_id
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.chunks():
                yield chunk
        except OSError as error:
            raise ReplyLost(id=self._host_id, problem=f"the answer was cut off: {error}") from error

    async def close(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            await self._pool.give_back(lane)


class HttpFrames:
    """Implements `host_api.Duplex`."""

    def __init__(self, socket: WebSocketClient, host_id: str) -> None:
        self._socket = socket
        self._host_id = host_id

    async def send(self, message: bytes) -> None:
        try:
            await self._socket.send(message)
        except OSError as error:
            raise ReplyLost(id=self._host_id, problem=str(error)) from error

    async def receive(self) -> bytes | None:
        try:
            return await self._socket.receive()
        except OSError as error:
            raise ReplyLost(id=self._host_id, problem=str(error)) from error

    async def close(self) -> None:
        await self._socket.close()


async def _finish_head(response: Response) -> None:
    """Let the connection see the end of an answer that has no body."""
    async for _ in response.chunks():
        pass
