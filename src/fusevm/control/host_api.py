"""What the control plane asks of a host daemon. Implemented by the HTTP client, the stub host and the fake host."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import msgspec

from fusevm.model.errors import HostUnreachable
from fusevm.model.machine import Fence, Moment
from fusevm.model.network import Network
from fusevm.wire.host_api import (
    CreateMachine,
    HostFacts,
    MachineBody,
    MachineEvent,
    MachineList,
)
from fusevm.wire.host_snapshots import SnapshotBody, TakeSnapshot

Body = bytes | AsyncIterator[bytes] | None


class ReplyLost(HostUnreachable):
    """The order was sent and no answer came: it may or may not have been carried out."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """A reading of a host's clock. It was taken before it was heard, so the host's clock is never behind `at`."""

    moment: Moment
    #: By the event loop's clock.
    heard_s: float

    def at(self, loop_s: float) -> Moment:
        """What the host's clock shows at least when the event loop's shows `loop_s`."""
        return Moment(clock=self.moment.clock, ms=self.moment.ms + int((loop_s - self.heard_s) * 1000))


def read_now(moment: Moment) -> Reading:
    """A reading that is heard in this moment."""
    return Reading(moment=moment, heard_s=asyncio.get_running_loop().time())


class GuestRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request below `/machines/{machine_id}/`, passed on unchanged."""

    fence: Fence
    machine_id: str
    method: str
    #: Path below the machine with its query, percent-encoded: `guest/files?path=/etc`.
    target: str
    headers: dict[str, str] = {}
    body: Body = None
    #: Seconds until the head of the answer.
    timeout_s: float = 60.0


class Upstream(Protocol):
    """An answer whose body is still to be read. Close it in any case."""

    status: int
    #: Names in lower case.
    headers: Mapping[str, str]

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ReplyLost when it is cut off."""
        ...

    async def close(self) -> None:
        """Let go of the connection. Idempotent."""
        ...


class Duplex(Protocol):
    """A WebSocket: one message is one exec frame."""

    async def send(self, message: bytes) -> None:
        """Raises ReplyLost when the host went away."""
        ...

    async def receive(self) -> bytes | None:
        """The next message; None at the end."""
        ...

    async def close(self) -> None:
        """Say goodbye and let go. Idempotent."""
        ...


class HostApi(Protocol):
    """One host daemon. Every call has a deadline and is made once; failures of the connection are HostUnreachable
    (never sent) or ReplyLost, failures of the daemon are the errors it answers with. An order that arrives after its
    fence's `valid_until` is OrderExpired."""

    async def info(self) -> HostFacts:
        """What the host is; also the heartbeat."""
        ...

    async def read_clock(self) -> Reading:
        """A reading of the clock that limits of orders go by; it may be an earlier one."""
        ...

    async def machines(self) -> MachineList:
        """All machines, of all clusters."""
        ...

    async def create(self, fence: Fence, body: CreateMachine) -> MachineBody:
        """Make a machine and wait for its agent. Idempotent by (uid, incarnation)."""
        ...

    @property
    def address(self) -> str:
        """Name or address under which published ports of its machines are reached."""
        ...

    async def set_network(self, fence: Fence, machine_id: str, network: Network) -> None:
        """Hold a machine to another policy. Idempotent. Raises PolicyNotEnforceable, NotSupported."""
        ...

    async def destroy(self, fence: Fence, machine_id: str) -> None:
        """Destroy a machine and leave a tombstone. Raises MachineNotFound when there is nothing to destroy."""
        ...

    async def take_snapshot(self, fence: Fence, machine_id: str, body: TakeSnapshot) -> SnapshotBody:
        """Take a snapshot and wait for it. Idempotent by its id.

        Raises NotSupported where the driver has none, SnapshotNotFound for an id that was freed: an order that comes
        late or twice must not bring back bytes that nobody knows of.
        """
        ...

    async def restore_snapshot(self, fence: Fence, machine_id: str, snapshot_id: str) -> None:
        """Put the machine's disk back and start it again; waits for the agent. Idempotent by the fence's action.

        Raises SnapshotNotFound, NotSupported.
        """
        ...

    async def delete_snapshot(self, cluster: str, snapshot_id: str) -> None:
        """Free a snapshot's bytes, and take nothing under its id any more. Raises SnapshotNotFound when there is
        nothing to free."""
        ...

    def events(self) -> AsyncIterator[MachineEvent]:
        """Changes as they happen, from now on, until the connection ends."""
        ...

    async def relay(self, request: GuestRequest) -> Upstream:
        """Pass a request on. An answer of 400 and above is raised as its error."""
        ...

    async def open_frames(self, fence: Fence, machine_id: str) -> Duplex:
        """Open the exec WebSocket of a machine."""
        ...
