"""A host that only pretends, for development when nothing is configured: machines "boot" at once and run nothing.

What it answers: exec exits with 0 and prints `stub host: <command>`; setups, scripts and daemons are pretended to work,
snapshots to be taken; everything else inside a machine is 501. It keeps fences and tombstones like a real host, in
memory only: after a restart its machines are gone, and their environments fail with `machine_missing`.
"""

import asyncio
import base64
import hashlib
import shlex
from collections.abc import AsyncIterator, Mapping

import msgspec

from fusevm.control.host_api import Duplex, GuestRequest, Reading, read_now
from fusevm.control.pretended_guest import PretendedGuest
from fusevm.control.pretended_ports import pretended_ports
from fusevm.model.errors import MachineNotFound, NotSupported, SnapshotNotFound, WrongCluster
from fusevm.model.fencing import Seen, check_new, check_number, check_valid
from fusevm.model.host import Resources
from fusevm.model.machine import Fence, Moment, Phase
from fusevm.model.network import Network
from fusevm.model.snapshot import SnapshotKind
from fusevm.wire.guest import ExecRequest, ExecResult, StreamTotals
from fusevm.wire.host_api import (
    CreateMachine,
    HostFacts,
    MachineBody,
    MachineEvent,
    MachineList,
)
from fusevm.wire.host_snapshots import SnapshotBody, TakeSnapshot

STUB_ID = "stub"
STUB_URL = "stub:"
#: Large enough never to be the reason for a refusal.
CAPACITY = Resources(cpus=1 << 20, ram_mb=1 << 30, storage_gb=1 << 24, vm_count=1 << 20)


class StubHost:
    """Implements `host_api.HostApi` without a machine."""

    def __init__(self, version: str, created_at: str = "1970-01-01T00:00:00Z") -> None:
        self._version = version
        self._created_at = created_at
        self._cluster = ""
        self._machines: dict[str, MachineBody] = {}
        #: Per environment, ended ones included.
        self._seen: dict[str, Seen] = {}
        self._guests: dict[str, PretendedGuest] = {}
        self._snapshots: dict[str, SnapshotBody] = {}
        #: Ids that nothing is taken under any more.
        self._freed: set[str] = set()

    async def info(self) -> HostFacts:
        return HostFacts(
            version=self._version,
            epoch="stub",
            clock=_now(),
            cluster=self._cluster,
            driver="stub",
            driver_reason="no host is configured: machines are only pretended",
            capacity=CAPACITY,
        )

    async def read_clock(self) -> Reading:
        return read_now(_now())

    async def machines(self) -> MachineList:
        return MachineList(machines=list(self._machines.values()))

    async def create(self, fence: Fence, body: CreateMachine) -> MachineBody:
        self._check_cluster(fence)
        found = self._machines.get(body.machine_id)
        if found is None:
            check_new(self._seen.get(fence.uid, Seen()), fence)
            check_valid(fence, _now())
            if body.snapshot_id and body.snapshot_id not in self._snapshots:
                raise SnapshotNotFound(id=body.snapshot_id)
            self._guests[body.machine_id] = PretendedGuest("stub host")
            found = MachineBody(
                id=body.machine_id,
                cluster=fence.cluster,
                uid=fence.uid,
                incarnation=fence.incarnation,
                phase=Phase.RUNNING,
                spec=body.spec,
                driver="stub",
                published_ports=pretended_ports(body),
                created_at=self._created_at,
            )
            self._machines[body.machine_id] = found
        self._note(fence)
        return found

    @property
    def address(self) -> str:
        return "127.0.0.1"

    async def set_network(self, fence: Fence, machine_id: str, network: Network) -> None:
        self._order(fence, machine_id)
        found = self._machines[machine_id]
        spec = msgspec.structs.replace(found.spec, network=network)
        self._machines[machine_id] = msgspec.structs.replace(found, spec=spec)

    async def destroy(self, fence: Fence, machine_id: str) -> None:
        self._check_cluster(fence)
        check_valid(fence, _now())
        self._machines.pop(machine_id, None)
        self._guests.pop(machine_id, None)
        self._seen[fence.uid] = self._seen.get(fence.uid, Seen()).with_deletion(fence)

    async def take_snapshot(self, fence: Fence, machine_id: str, body: TakeSnapshot) -> SnapshotBody:
        self._order(fence, machine_id)
        if body.snapshot_id in self._freed:
            raise SnapshotNotFound(id=body.snapshot_id)
        kind = SnapshotKind.LIVE if body.live else SnapshotKind.DISK
        digest = "sha256:" + hashlib.sha256(body.snapshot_id.encode()).hexdigest()
        made = SnapshotBody(
            id=body.snapshot_id, machine_id=machine_id, kind=kind, digest=digest, created_at=self._created_at
        )
        return self._snapshots.setdefault(made.id, made)

    async def restore_snapshot(self, fence: Fence, machine_id: str, snapshot_id: str) -> None:
        self._order(fence, machine_id)
        if snapshot_id not in self._snapshots:
            raise SnapshotNotFound(id=snapshot_id)
        self._guests[machine_id] = PretendedGuest("stub host")

    async def delete_snapshot(self, cluster: str, snapshot_id: str) -> None:
        if self._cluster and cluster != self._cluster:
            raise WrongCluster(cluster=self._cluster, asked=cluster)
        self._freed.add(snapshot_id)
        if self._snapshots.pop(snapshot_id, None) is None:
            raise SnapshotNotFound(id=snapshot_id)

    async def events(self) -> AsyncIterator[MachineEvent]:
        yield MachineEvent(kind="hello", epoch="stub")
        await asyncio.Event().wait()  # nothing ever happens to a pretended machine

    async def relay(self, request: GuestRequest) -> "StubAnswer":
        if request.fence.valid_until is not None:
            self._order(request.fence, request.machine_id)
        self._find(request.machine_id)
        said = self._guests[request.machine_id].hear(request) if request.target.startswith("guest/") else None
        if said is not None:
            return StubAnswer(said.body, said.status, said.kind)
        if request.method != "POST" or request.target != "guest/exec" or not isinstance(request.body, bytes):
            raise NotSupported(feature=f"{request.method} {request.target.partition('?')[0]} on the stub host")
        asked = msgspec.json.decode(request.body, type=ExecRequest)
        text = f"stub host: {asked.shell or shlex.join(asked.cmd)}\n".encode()
        result = ExecResult(
            exit_code=0, stdout_b64=base64.b64encode(text).decode(), total=StreamTotals(stdout=len(text))
        )
        return StubAnswer(msgspec.json.encode(result))

    async def open_frames(self, fence: Fence, machine_id: str) -> Duplex:  # noqa: ARG002 - the protocol's names
        self._find(machine_id)
        raise NotSupported(feature="a terminal on the stub host")

    def _find(self, machine_id: str) -> MachineBody:
        found = self._machines.get(machine_id)
        if found is None:
            raise MachineNotFound(id=machine_id)
        return found

    def _check_cluster(self, fence: Fence) -> None:
        self._cluster = self._cluster or fence.cluster
        if fence.cluster != self._cluster:
            raise WrongCluster(cluster=self._cluster, asked=fence.cluster)

    def _order(self, fence: Fence, machine_id: str) -> None:
        """Accept an order about a machine."""
        self._check_cluster(fence)
        self._find(machine_id)
        check_number(self._seen.get(fence.uid, Seen()), fence)
        check_valid(fence, _now())
        self._note(fence)

    def _note(self, fence: Fence) -> None:
        self._seen[fence.uid] = self._seen.get(fence.uid, Seen()).with_order(fence)


def _now() -> Moment:
    """This process is the host: its clock is the event loop's."""
    return Moment(clock="stub", ms=int(asyncio.get_running_loop().time() * 1000))


class StubAnswer:
    """A JSON answer that is there at once. Implements `host_api.Upstream`."""

    def __init__(self, content: bytes, status: int = 200, kind: str = "application/json") -> None:
        self._content = content
        self.status = status
        self.headers: Mapping[str, str] = {
            "content-type": kind,
            "content-length": str(len(content)),
        }

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self._content

    async def close(self) -> None:
        return
