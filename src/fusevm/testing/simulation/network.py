"""The way from one replica to one host: slow, lossy, doubling, holding orders back for minutes, stuck, cut."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import TypeVar

from fusevm.control.host_api import GuestRequest, Reading, ReplyLost, Upstream, read_now
from fusevm.control.host_client import READING_S
from fusevm.model.errors import HostRejected, HostUnreachable, NotSupported, OrderExpired
from fusevm.model.machine import Fence
from fusevm.model.network import Network as Policy
from fusevm.testing.fake_host import FakeTerminal
from fusevm.testing.simulation.host import DisguisedRefusal, SimHost, Spawn
from fusevm.testing.simulation.scale import NO_FAULTS
from fusevm.testing.simulation.trace import Trace
from fusevm.wire.host_api import (
    CreateMachine,
    HostFacts,
    MachineBody,
    MachineEvent,
    MachineList,
)
from fusevm.wire.host_snapshots import SnapshotBody, TakeSnapshot

T = TypeVar("T")
#: Seconds until a caller gives up who hears nothing.
ORDER_TIMEOUT_S, READ_TIMEOUT_S = 60.0, 15.0
#: Longest times that an order is held back: shorter and longer than its caller waits.
LATE_S = (15.0, 200.0)


class Network:
    """What all ways have in common."""

    def __init__(self, chance: Random, spawn: Spawn, trace: Trace) -> None:
        self.luck = NO_FAULTS
        #: Replica and host that do not reach each other.
        self.cuts: dict[tuple[str, str], None] = {}
        #: Replica and host between which everything gets stuck, and the moment at which orders go on: a stream that
        #: stalls, or a replica that stands still.
        self.stuck_until_s: dict[tuple[str, str], float] = {}
        #: Replica and host to the last moment at which the host answered a heartbeat.
        self.heard_s: dict[tuple[str, str], float] = {}
        self.chance = chance
        self.spawn = spawn
        self.trace = trace

    def latency_s(self) -> float:
        """One way."""
        return self.chance.uniform(0.0005, 0.02)

    def meets(self, probability: float) -> bool:
        """Does something of this probability happen?"""
        return self.chance.random() < probability


class Way:
    """Implements `HostApi` for one process of a replica."""

    def __init__(self, network: Network, replica: str, host: SimHost, is_alive: Callable[[], bool]) -> None:
        self._network = network
        self._replica = replica
        self._host = host
        self._is_alive = is_alive
        self._reading: Reading | None = None

    # -- HostApi --------------------------------------------------------------------------------------------------

    async def info(self) -> HostFacts:
        try:
            facts, _ = await self._ask()
        except (HostRejected, DisguisedRefusal):
            self._hear()  # a refusal is an answer
            raise
        self._hear()
        return facts

    def _hear(self) -> None:
        self._network.heard_s[self._replica, self._host.id] = asyncio.get_running_loop().time()

    async def _ask(self) -> tuple[HostFacts, Reading]:
        facts = await self._read(self._host.info)
        self._reading = reading = read_now(facts.clock)
        return facts, reading

    async def read_clock(self) -> Reading:
        reading = self._reading
        if reading is not None and asyncio.get_running_loop().time() - reading.heard_s < READING_S:
            return reading
        return (await self._ask())[1]

    async def machines(self) -> MachineList:
        return await self._read(self._host.machines)

    async def create(self, fence: Fence, body: CreateMachine) -> MachineBody:
        limit_s = body.boot_timeout_ms / 1000 + READ_TIMEOUT_S
        return await self._order("create", fence, lambda: self._host.create(fence, body), limit_s)

    async def destroy(self, fence: Fence, machine_id: str) -> None:
        await self._order("destroy", fence, lambda: self._host.destroy(fence, machine_id))

    @property
    def address(self) -> str:
        return self._host.address

    async def set_network(self, fence: Fence, machine_id: str, network: Policy) -> None:
        await self._order("set_network", fence, lambda: self._host.set_network(fence, machine_id, network))

    async def take_snapshot(self, fence: Fence, machine_id: str, body: TakeSnapshot) -> SnapshotBody:
        return await self._order("snapshot", fence, lambda: self._host.take_snapshot(fence, machine_id, body))

    async def restore_snapshot(self, fence: Fence, machine_id: str, snapshot_id: str) -> None:
        await self._order("restore", fence, lambda: self._host.restore_snapshot(fence, machine_id, snapshot_id))

    async def delete_snapshot(self, cluster: str, snapshot_id: str) -> None:
        await self._order("free", snapshot_id, lambda: self._host.delete_snapshot(cluster, snapshot_id))

    async def events(self) -> AsyncIterator[MachineEvent]:
        await asyncio.sleep(self._network.latency_s())
        self._check_open()
        async for event in self._host.events():
            if not self._is_open():
                raise ReplyLost(id=self._host.id, problem="the connection ended")
            yield event

    async def relay(self, request: GuestRequest) -> Upstream:
        return await self._order("relay", request.fence, lambda: self._host.relay(request), request.timeout_s)

    async def open_frames(self, fence: Fence, machine_id: str) -> FakeTerminal:
        del fence
        raise NotSupported(feature=f"a terminal on {machine_id} in a simulation")

    # -- one exchange ---------------------------------------------------------------------------------------------

    def _is_open(self) -> bool:
        is_cut = (self._replica, self._host.id) in self._network.cuts
        return self._is_alive() and not is_cut and not self._host.is_gone

    def _check_open(self) -> None:
        if not self._is_open():
            raise HostUnreachable(id=self._host.id, problem="no route to host")

    async def _read(self, work: Callable[[], Awaitable[T]]) -> T:
        return await self._within(READ_TIMEOUT_S, self._exchange(work))

    async def _order(
        self, name: str, about: Fence | str, work: Callable[[], Awaitable[T]], limit_s: float = ORDER_TIMEOUT_S
    ) -> T:
        network = self._network
        late_s = network.chance.uniform(1.0, network.chance.choice(LATE_S))
        subject, number = (about.uid, f" {about.action_seq}") if isinstance(about, Fence) else (about, "")
        if (stuck_s := self._stuck_s()) > 0 and self._is_open():
            network.trace.note(subject, f"{name}{number} of {self._replica} is stuck for {stuck_s:.0f} s")
            network.spawn(self._deliver_late(stuck_s, work, f"{name}{number}", subject))
            return await self._within(limit_s, asyncio.get_running_loop().create_future())
        if self._is_open() and network.meets(network.luck.late):
            network.trace.note(subject, f"{name}{number} of {self._replica} is held back for {late_s:.0f} s")
            network.spawn(self._deliver_late(late_s, work, f"{name}{number}", subject))
            await asyncio.sleep(network.chance.uniform(0.1, 5.0))
            raise ReplyLost(id=self._host.id, problem="the connection was reset")
        if self._is_open() and network.meets(network.luck.duplicate):
            network.trace.note(subject, f"{name}{number} of {self._replica} will come again after {late_s:.0f} s")
            network.spawn(self._deliver_late(late_s, work, f"{name}{number}", subject))
        try:
            return await self._within(limit_s, self._exchange(work))
        except OrderExpired:
            self._reading = None
            raise

    def _stuck_s(self) -> float:
        """How long what is sent now is under way."""
        until_s = self._network.stuck_until_s.get((self._replica, self._host.id), 0.0)
        return until_s - asyncio.get_running_loop().time()

    async def _deliver_late(self, late_s: float, work: Callable[[], Awaitable[T]], what: str, subject: str) -> None:
        await asyncio.sleep(late_s)
        if self._host.is_up and not self._host.is_gone:
            self._network.trace.note(subject, f"{what} arrives at {self._host.id} after {late_s:.0f} s")
            self._host.deliver(work)

    async def _within(self, limit_s: float, exchange: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(limit_s):
                return await exchange
        except TimeoutError as error:
            raise ReplyLost(id=self._host.id, problem=f"no answer within {limit_s:.0f} s") from error

    async def _exchange(self, work: Callable[[], Awaitable[T]]) -> T:
        network = self._network
        await asyncio.sleep(max(network.latency_s(), self._stuck_s()))
        if not self._is_open():
            await self._silence()
            raise HostUnreachable(id=self._host.id, problem="no route to host")
        if network.meets(network.luck.lost_request):
            await self._silence()
            raise ReplyLost(id=self._host.id, problem="the connection was reset")
        answer = await self._host.deliver(work)
        await asyncio.sleep(network.latency_s())
        if not self._is_open() or network.meets(network.luck.lost_reply):
            await self._silence()
            raise ReplyLost(id=self._host.id, problem="the connection was reset")
        return answer

    async def _silence(self) -> None:
        """Nothing comes, until somebody notices: at once, or only by waiting."""
        if self._is_alive() and self._network.meets(0.5):
            await asyncio.sleep(self._network.chance.uniform(0.5, 90.0))
