"""A host daemon in memory that a test can make slow, silent, forgetful or dead.

`FakeHost` implements `control.host_api.HostApi` and keeps the rules of a real host: fences, tombstones, one cluster.
`fake_host_app` serves one over HTTP, for what is between the control plane and a host. Faults are switched on by
attributes; `script` gives one-time faults for the next calls of one name:

    host.script("create", lose_reply)         # carried out, but nobody learns of it
    host.script("create", HostFull(...))      # refused once
    host.hold["create"] = asyncio.Event()     # every create waits until it is set
    host.is_down = True                       # nothing answers
"""

import asyncio
import base64
import contextlib
import hashlib
import math
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote

import msgspec
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from fusevm.control.host_api import Body, GuestRequest, Reading, ReplyLost, read_now
from fusevm.control.pretended_guest import PretendedGuest
from fusevm.control.pretended_ports import pretended_ports
from fusevm.control.race import first_of
from fusevm.model.errors import (
    BadRange,
    Error,
    FileNotFound,
    HostUnreachable,
    MachineNotFound,
    NotSupported,
    ProcessNotFound,
    SnapshotNotFound,
    Unauthorized,
    WrongCluster,
)
from fusevm.model.fencing import Seen, check_new, check_number, check_valid
from fusevm.model.host import Resources
from fusevm.model.machine import Fence, Moment, Phase
from fusevm.model.network import Network
from fusevm.model.snapshot import SnapshotKind
from fusevm.wire.errors import render_flat
from fusevm.wire.frames import Frame, FrameType, decode_message, encode_frame
from fusevm.wire.guest import ExecRequest, ExecResult, Exit, FileWritten, StreamTotals
from fusevm.wire.host_api import (
    CLUSTER_HEADER,
    CreateMachine,
    HostFacts,
    MachineAnswer,
    MachineBody,
    MachineEvent,
    MachineList,
    NetworkAnswer,
    parse_fence,
)
from fusevm.wire.host_snapshots import RestoreInPlace, SnapshotAnswer, SnapshotBody, TakeSnapshot

CREATED_AT = "2026-01-01T00:00:00Z"


class _LoseReply(Exception):
    """Marks a scripted lost reply."""


#: Script this: the call is carried out and its answer lost.
lose_reply = _LoseReply()


class FakeHost:
    """One host in memory."""

    def __init__(
        self, host_id: str = "h1", *, capacity: Resources | None = None, images: list[str] | None = None
    ) -> None:
        self.id = host_id
        self.capacity = capacity or Resources(cpus=1000, ram_mb=1 << 20, storage_gb=10_000, vm_count=1000)
        self.images = images or []
        self.cluster = ""
        self.table: dict[str, MachineBody] = {}
        #: Environment uid to what was seen of it.
        self.seen: dict[str, Seen] = {}
        #: Name of the clock that limits of orders go by; and how far it is ahead of the event loop's.
        self.clock = "boot 1"
        self.ahead_s = 3_600.0
        #: (name, what) of every call that arrived.
        self.calls: list[tuple[str, Any]] = []
        self.is_down = False
        #: Calls of that name wait for the event.
        self.hold: dict[str, asyncio.Event] = {}
        #: Phase in which created machines are reported.
        self.boot_phase = Phase.RUNNING
        #: Answers one-shot commands.
        self.on_exec: Callable[[ExecRequest], ExecResult] = echo
        self.files: dict[str, bytes] = {}
        #: Machine id to what is pretended in it.
        self.guests: dict[str, PretendedGuest] = {}
        #: Snapshot id to what was taken; and whether this host can take any.
        self.snapshots: dict[str, SnapshotBody] = {}
        self.has_snapshots = True
        #: Machine id to when, by the event loop's clock, a client last sent something to its ports.
        self.uses: dict[str, float] = {}
        #: Ids that nothing is taken under any more.
        self.freed: set[str] = set()
        self.log_lines = b"booted\n"
        self._faults: defaultdict[str, deque[Exception]] = defaultdict(deque)
        self._listeners: set[asyncio.Queue[MachineEvent]] = set()

    # -- for tests ------------------------------------------------------------------------------------------------

    def script(self, name: str, *faults: Exception) -> None:
        """The next calls of that name meet these faults, one each."""
        self._faults[name].extend(faults)

    def count(self, name: str) -> int:
        """How many calls of that name arrived."""
        return sum(1 for called, _ in self.calls if called == name)

    def crash(self, machine_id: str, error: str = "the VMM was killed") -> None:
        """The VMM of a machine ends."""
        self.table[machine_id] = replace(self.table[machine_id], phase=Phase.FAILED, error=error)
        self._tell(self.table[machine_id])

    def now(self) -> Moment:
        """What the clock shows."""
        return Moment(clock=self.clock, ms=int((asyncio.get_running_loop().time() + self.ahead_s) * 1000))

    def forget(self, machine_id: str) -> None:
        """The machine is gone and the host knows nothing of it."""
        del self.table[machine_id]

    def use(self, machine_id: str) -> None:
        """A client sends something to a published port of the machine."""
        self.uses[machine_id] = asyncio.get_running_loop().time()

    def listed(self) -> list[MachineBody]:
        """The machines as a list has them."""
        now_s = asyncio.get_running_loop().time()
        ages = {machine_id: math.ceil(now_s - at_s) for machine_id, at_s in self.uses.items()}
        return [replace(machine, ports_used_s_ago=ages.get(machine.id)) for machine in self.table.values()]

    def plant(self, body: MachineBody) -> None:
        """A machine that no control plane asked for."""
        self.table[body.id] = body

    # -- HostApi --------------------------------------------------------------------------------------------------

    async def info(self) -> HostFacts:
        await self._arrive("info", None)
        return HostFacts(
            version="fake",
            epoch="e1",
            clock=self.now(),
            cluster=self.cluster,
            driver="fake",
            capacity=self.capacity,
            images=self.images,
        )

    async def read_clock(self) -> Reading:
        return read_now(self.now())

    async def machines(self) -> MachineList:
        await self._arrive("machines", None)
        return MachineList(machines=self.listed())

    async def create(self, fence: Fence, body: CreateMachine) -> MachineBody:
        lost = await self._arrive("create", (fence, body))
        self._check_cluster(fence)
        found = self.table.get(body.machine_id)
        if found is None:
            check_new(self.seen.get(fence.uid, Seen()), fence)
            check_valid(fence, self.now())
            if body.snapshot_id and body.snapshot_id not in self.snapshots:
                raise SnapshotNotFound(id=body.snapshot_id)
            found = MachineBody(
                id=body.machine_id,
                cluster=fence.cluster,
                uid=fence.uid,
                incarnation=fence.incarnation,
                phase=self.boot_phase,
                spec=body.spec,
                driver="fake",
                published_ports=pretended_ports(body),
                created_at=CREATED_AT,
            )
            self.table[found.id] = found
            self.guests[found.id] = PretendedGuest("fake")
            self._tell(found)
        self._note(fence)
        self._maybe_lose(lost)
        return found

    @property
    def address(self) -> str:
        return "127.0.0.1"

    async def set_network(self, fence: Fence, machine_id: str, network: Network) -> None:
        lost = await self._arrive("set_network", (fence, machine_id, network))
        self._accept(fence, machine_id)
        found = self.table[machine_id]
        self.table[machine_id] = replace(found, spec=replace(found.spec, network=network))
        self._maybe_lose(lost)

    async def destroy(self, fence: Fence, machine_id: str) -> None:
        lost = await self._arrive("destroy", (fence, machine_id))
        self._check_cluster(fence)
        check_valid(fence, self.now())
        self.table.pop(machine_id, None)
        self.guests.pop(machine_id, None)
        self.seen[fence.uid] = self.seen.get(fence.uid, Seen()).with_deletion(fence)
        self._maybe_lose(lost)

    async def take_snapshot(self, fence: Fence, machine_id: str, body: TakeSnapshot) -> SnapshotBody:
        lost = await self._arrive("take_snapshot", (fence, machine_id, body))
        self._accept(fence, machine_id)
        taken = self._take_snapshot(machine_id, body)
        self._maybe_lose(lost)
        return taken

    def _take_snapshot(self, machine_id: str, body: TakeSnapshot) -> SnapshotBody:
        self._check_snapshots()
        if body.snapshot_id in self.freed:
            raise SnapshotNotFound(id=body.snapshot_id)
        kind = SnapshotKind.LIVE if body.live else SnapshotKind.DISK
        digest = "sha256:" + hashlib.sha256(body.snapshot_id.encode()).hexdigest()
        made = SnapshotBody(
            id=body.snapshot_id,
            machine_id=machine_id,
            kind=kind,
            size_bytes=1 << 20,
            digest=digest,
            created_at=CREATED_AT,
        )
        return self.snapshots.setdefault(made.id, made)

    async def restore_snapshot(self, fence: Fence, machine_id: str, snapshot_id: str) -> None:
        lost = await self._arrive("restore_snapshot", (fence, machine_id, snapshot_id))
        self._accept(fence, machine_id)
        self._check_snapshots()
        if snapshot_id not in self.snapshots:
            raise SnapshotNotFound(id=snapshot_id)
        self.guests[machine_id] = PretendedGuest("fake")
        self._maybe_lose(lost)

    async def delete_snapshot(self, cluster: str, snapshot_id: str) -> None:
        lost = await self._arrive("delete_snapshot", (cluster, snapshot_id))
        self.freed.add(snapshot_id)
        if self.snapshots.pop(snapshot_id, None) is None:
            raise SnapshotNotFound(id=snapshot_id)
        self._maybe_lose(lost)

    def _check_snapshots(self) -> None:
        if not self.has_snapshots:
            raise NotSupported(feature="a snapshot on this host")

    async def events(self) -> AsyncIterator[MachineEvent]:
        await self._arrive("events", None)
        queue: asyncio.Queue[MachineEvent] = asyncio.Queue()
        self._listeners.add(queue)  # before the greeting: what happens after it is not missed
        try:
            yield MachineEvent(kind="hello", epoch="e1")
            while True:
                yield await queue.get()
        finally:
            self._listeners.discard(queue)

    async def relay(self, request: GuestRequest) -> "FakeAnswer":
        lost = await self._arrive("relay", request)
        if request.fence.valid_until is not None:
            self._accept(request.fence, request.machine_id)
        self._find(request.machine_id)
        body = await _collected(request.body)
        answer = self._answer(request.machine_id, request.method, request.target, request.headers, body)
        self._maybe_lose(lost)
        return answer

    async def open_frames(self, fence: Fence, machine_id: str) -> "FakeTerminal":
        await self._arrive("open_frames", (fence, machine_id))
        self._find(machine_id)
        return FakeTerminal()

    # -- rules ----------------------------------------------------------------------------------------------------

    async def _arrive(self, name: str, what: Any) -> bool:
        """Note the call and meet its fault. True: the reply will be lost."""
        self.calls.append((name, what))
        if self.is_down:
            raise HostUnreachable(id=self.id, problem="connection refused")
        held = self.hold.get(name)
        if held is not None:
            await held.wait()
        fault = self._faults[name].popleft() if self._faults[name] else None
        if fault is lose_reply:
            return True
        if fault is not None:
            raise fault
        return False

    def _maybe_lose(self, is_lost: bool) -> None:
        if is_lost:
            raise ReplyLost(id=self.id, problem="the connection ended before the answer")

    def _check_cluster(self, fence: Fence) -> None:
        self.cluster = self.cluster or fence.cluster
        if fence.cluster != self.cluster:
            raise WrongCluster(cluster=self.cluster, asked=fence.cluster)

    def _accept(self, fence: Fence, machine_id: str) -> None:
        """Accept an order about a machine, or refuse it."""
        self._check_cluster(fence)
        self._find(machine_id)
        check_number(self.seen.get(fence.uid, Seen()), fence)
        check_valid(fence, self.now())
        self._note(fence)

    def _note(self, fence: Fence) -> None:
        self.seen[fence.uid] = self.seen.get(fence.uid, Seen()).with_order(fence)

    def _find(self, machine_id: str) -> MachineBody:
        found = self.table.get(machine_id)
        if found is None:
            raise MachineNotFound(id=machine_id)
        return found

    def _tell(self, machine: MachineBody) -> None:
        event = MachineEvent(
            kind="phase", machine_id=machine.id, uid=machine.uid, incarnation=machine.incarnation, phase=machine.phase
        )
        for queue in self._listeners:
            queue.put_nowait(event)

    # -- the guest ------------------------------------------------------------------------------------------------

    def _answer(
        self, machine_id: str, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> "FakeAnswer":
        path, _, query = target.partition("?")
        params = dict(parse_qsl(query, keep_blank_values=True))
        if (method, path) == ("POST", "guest/exec"):
            return _json(self.on_exec(msgspec.json.decode(body, type=ExecRequest)))
        if path == "guest/files" and method in ("GET", "HEAD", "PUT", "DELETE"):
            return self._file(method, params.get("path", ""), headers, body)
        if path.startswith("guest/") and (guest := self.guests.get(machine_id)) is not None:
            said = guest.answer(method, path.removeprefix("guest/"), params, body)
            if said is not None:
                return FakeAnswer(said.status, {"content-type": said.kind}, said.body)
        if path == "logs":
            return FakeAnswer(200, {"content-type": "text/plain"}, self.log_lines)
        if path.startswith("guest/processes/"):
            raise ProcessNotFound(pid=unquote(path.split("/")[2]))
        if path.split("/")[0] == "guest":
            told = {"method": method, "target": target, "body": body.decode("utf-8", "replace")}
            return _json(told)
        raise NotSupported(feature=f"{method} {path}")

    def _file(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> "FakeAnswer":
        if method == "PUT":
            self.files[path] = body
            return _json(FileWritten(path=path, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest()))
        if path not in self.files:
            raise FileNotFound(path=path)
        if method == "DELETE":
            del self.files[path]
            return FakeAnswer(204, {}, b"")
        content, status = self.files[path], 200
        fields = {"content-type": "application/octet-stream", "x-fuse-mode": "0644", "accept-ranges": "bytes"}
        if "range" in headers:
            first, _, last = headers["range"].removeprefix("bytes=").partition("-")
            if int(first) >= len(content):
                raise BadRange(size=len(content))
            end = min(int(last) + 1 if last else len(content), len(content))
            fields["content-range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[int(first) : end], 206
        fields["content-length"] = str(len(content))
        return FakeAnswer(status, fields, b"" if method == "HEAD" else content)


class FakeAnswer:
    """Implements `host_api.Upstream`."""

    def __init__(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.status = status
        self.headers: Mapping[str, str] = headers
        self.content = content

    async def chunks(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.content), 1 << 16):
            yield self.content[start : start + (1 << 16)]

    async def close(self) -> None:
        return


class FakeTerminal:
    """Implements `host_api.Duplex`: STARTED, then every STDIN comes back as STDOUT; STDIN_EOF ends with exit code 0."""

    def __init__(self) -> None:
        self._out: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.started: ExecRequest | None = None
        self.received: list[Frame] = []
        self.is_closed = False

    async def send(self, message: bytes) -> None:
        frame = decode_message(message)
        self.received.append(frame)
        match frame.type:
            case FrameType.START:
                self.started = msgspec.json.decode(frame.payload, type=ExecRequest)
                self._put(FrameType.STARTED, b'{"pid":1}')
            case FrameType.STDIN:
                self._put(FrameType.STDOUT, frame.payload)
            case FrameType.STDIN_EOF:
                self._put(FrameType.EXIT, msgspec.json.encode(Exit(exit_code=0)))
                self._out.put_nowait(None)
            case _:
                pass

    def _put(self, kind: FrameType, payload: bytes) -> None:
        self._out.put_nowait(encode_frame(Frame(kind, payload)))

    async def receive(self) -> bytes | None:
        return await self._out.get()

    async def close(self) -> None:
        self.is_closed = True


def echo(asked: ExecRequest) -> ExecResult:
    """Exit 0, and print the command."""
    return result((asked.shell or " ".join(asked.cmd)).encode() + b"\n")


def result(stdout: bytes = b"", stderr: bytes = b"", exit_code: int = 0) -> ExecResult:
    """What the agent answers to a one-shot command."""
    return ExecResult(
        exit_code=exit_code,
        stdout_b64=base64.b64encode(stdout).decode(),
        stderr_b64=base64.b64encode(stderr).decode(),
        total=StreamTotals(stdout=len(stdout), stderr=len(stderr)),
    )


def _json(value: object) -> FakeAnswer:
    content = msgspec.json.encode(value)
    return FakeAnswer(200, {"content-type": "application/json", "content-length": str(len(content))}, content)


async def _collected(body: Body) -> bytes:
    if body is None or isinstance(body, bytes):
        return body or b""
    return b"".join([chunk async for chunk in body])


# -- over HTTP -----------------------------------------------------------------------------------------------------


def fake_host_app(host: FakeHost, secret: str = "") -> Starlette:
    """The machine API (`wire.host_api`) over a FakeHost, as a Starlette application."""
    fake = _HttpFake(host, secret)
    return Starlette(
        routes=[
            Route("/info", fake.info),
            Route("/machines", fake.machines, methods=["GET", "POST"]),
            Route("/machines/{id}", fake.machine, methods=["DELETE"]),
            Route("/machines/{id}/network", fake.set_network, methods=["PUT"]),
            Route("/machines/{id}/snapshots", fake.take_snapshot, methods=["POST"]),
            Route("/machines/{id}/restore", fake.restore_snapshot, methods=["POST"]),
            Route("/snapshots/{id}", fake.delete_snapshot, methods=["DELETE"]),
            Route("/events", fake.events),
            WebSocketRoute("/machines/{id}/guest/exec", fake.frames),
            Route("/machines/{id}/{rest:path}", fake.rest, methods=["GET", "PUT", "POST", "DELETE"]),
        ],
        exception_handlers={Error: _refusal},
    )


async def _refusal(_request: Request, error: Exception) -> Response:
    if not isinstance(error, Error):
        raise error
    return Response(render_flat(error), error.status, media_type="application/json")


class _HttpFake:
    """Requests in, calls on the FakeHost."""

    def __init__(self, host: FakeHost, secret: str) -> None:
        self._host = host
        self._secret = secret

    def _check(self, headers: Mapping[str, str]) -> None:
        if self._secret and headers.get("authorization") != f"Bearer {self._secret}":
            raise Unauthorized(problem="wrong token")

    async def info(self, request: Request) -> Response:
        self._check(request.headers)
        return _body(await self._host.info())

    async def machines(self, request: Request) -> Response:
        self._check(request.headers)
        if request.method == "GET":
            return _body(await self._host.machines())
        order = msgspec.json.decode(await request.body(), type=CreateMachine)
        return _body(MachineAnswer(machine=await self._host.create(_fence(request.headers), order)), 201)

    async def machine(self, request: Request) -> Response:
        self._check(request.headers)
        await self._host.destroy(_fence(request.headers), request.path_params["id"])
        return Response(status_code=204)

    async def set_network(self, request: Request) -> Response:
        self._check(request.headers)
        network = msgspec.json.decode(await request.body(), type=Network)
        machine_id = request.path_params["id"]
        await self._host.set_network(_fence(request.headers), machine_id, network)
        return _body(NetworkAnswer(network=network))

    async def take_snapshot(self, request: Request) -> Response:
        self._check(request.headers)
        order = msgspec.json.decode(await request.body(), type=TakeSnapshot)
        taken = await self._host.take_snapshot(_fence(request.headers), request.path_params["id"], order)
        return _body(SnapshotAnswer(snapshot=taken), 201)

    async def restore_snapshot(self, request: Request) -> Response:
        self._check(request.headers)
        order = msgspec.json.decode(await request.body(), type=RestoreInPlace)
        await self._host.restore_snapshot(_fence(request.headers), request.path_params["id"], order.snapshot_id)
        return Response(status_code=204)

    async def delete_snapshot(self, request: Request) -> Response:
        self._check(request.headers)
        await self._host.delete_snapshot(request.headers.get(CLUSTER_HEADER, ""), request.path_params["id"])
        return Response(status_code=204)

    async def events(self, request: Request) -> Response:
        self._check(request.headers)

        async def lines() -> AsyncIterator[bytes]:
            async for event in self._host.events():
                yield msgspec.json.encode(event) + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def rest(self, request: Request) -> Response:
        self._check(request.headers)
        raw = request.scope["raw_path"].decode().split("/", 3)[3]
        query = request.scope["query_string"].decode()
        asked = GuestRequest(
            fence=_fence(request.headers),
            machine_id=request.path_params["id"],
            method=request.method,
            target=raw + (f"?{query}" if query else ""),
            headers=dict(request.headers),
            body=request.stream(),
        )
        answer = await self._host.relay(asked)
        return Response(answer.content, answer.status, headers=dict(answer.headers))

    async def frames(self, socket: WebSocket) -> None:
        try:
            self._check(socket.headers)
            terminal = await self._host.open_frames(_fence(socket.headers), socket.path_params["id"])
        except Error as error:
            await socket.send_denial_response(Response(render_flat(error), error.status))
            return
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            await first_of(_outgoing(socket, terminal), _incoming(socket, terminal))
            await socket.close()


async def _outgoing(socket: WebSocket, terminal: FakeTerminal) -> None:
    while (message := await terminal.receive()) is not None:
        await socket.send_bytes(message)


async def _incoming(socket: WebSocket, terminal: FakeTerminal) -> None:
    while True:
        await terminal.send(await socket.receive_bytes())


def _body(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _fence(headers: Mapping[str, str]) -> Fence:
    fence = parse_fence(headers)
    if fence is None:
        raise Unauthorized(problem="an order without a fence")
    return fence
