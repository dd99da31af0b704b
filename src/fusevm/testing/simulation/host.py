"""A host with a life of its own: slow, refusing, crashing, rebooting, forgetful where a safeguard is off.

What it is asked runs as a task of the host, so that an order is carried out although its caller has gone. Fences,
tombstones and limits of orders are judged as every host does (`fusevm.model.fencing`); its clock is its own.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from random import Random
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from fusevm.control.host_api import GuestRequest, ReplyLost
from fusevm.control.pretended_guest import PretendedGuest
from fusevm.control.pretended_ports import pretended_ports
from fusevm.model.errors import (
    Error,
    GuestUnreachable,
    HostFull,
    HostRejected,
    HostUnreachable,
    ImageNotFound,
    MachineNotFound,
    SnapshotNotFound,
    StaleAction,
    StaleIncarnation,
)
from fusevm.model.fencing import Seen, check_new, check_valid
from fusevm.model.host import Resources
from fusevm.model.machine import Fence, Phase
from fusevm.testing.fake_host import CREATED_AT, FakeAnswer, FakeHost
from fusevm.testing.simulation.scale import NO_FAULTS, Safeguards
from fusevm.wire.host_api import CreateMachine, MachineBody, MachineEvent, MachineList
from fusevm.wire.host_snapshots import SnapshotBody, TakeSnapshot

T = TypeVar("T")
#: An incomplete list is followed by this many complete ones, and by this many seconds without another.
FULL_LISTS, QUIET_S = 4, 60.0


class DisguisedRefusal(HostUnreachable):
    """A refusal that looks like silence: the safeguard is off."""


class HostWatch(Protocol):
    """Who sees what really happens on hosts."""

    def made(self, host: "SimHost", machine: MachineBody) -> None:
        """A machine begins to live."""
        ...

    def put_back(self, host: "SimHost", machine: MachineBody, fence: Fence, *, is_stale: bool) -> None:
        """A machine's disk was replaced; `is_stale`: by an order that a newer one had superseded, or a second time."""
        ...

    def accepted(self, host: "SimHost", fence: Fence, what: str) -> None:
        """An order to do something to a machine is about to be carried out."""
        ...

    def changed(self, host: "SimHost", what: str, subject: str) -> None:
        """Something else happened."""
        ...


Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class SimHost(FakeHost):
    """One simulated host."""

    def __init__(
        self,
        host_id: str,
        capacity: Resources,
        *,
        chance: Random,
        watch: HostWatch,
        safeguards: Safeguards,
        spawn: Spawn,
    ) -> None:
        super().__init__(host_id, capacity=capacity)
        self.luck = NO_FAULTS
        self.is_up = True
        #: Will never answer again.
        self.is_gone = False
        #: How many faults make it refuse every token.
        self.refusing = 0
        self._chance = chance
        self._watch = watch
        self._safeguards = safeguards
        self._spawn = spawn
        self.ahead_s = chance.uniform(0.0, 1e7)
        self._work: dict[asyncio.Future[Any], asyncio.Task[None]] = {}
        #: Machine to the end of what is being done to it.
        self._busy: dict[str, asyncio.Future[None]] = {}
        self._put_back: dict[str, int] = {}
        self._readers: dict[asyncio.Queue[MachineEvent | None], None] = {}
        self._is_list_short = False
        self._full_lists = FULL_LISTS
        self._short_at_s = -QUIET_S

    # -- being asked ----------------------------------------------------------------------------------------------

    def deliver(self, work: Callable[[], Awaitable[T]]) -> "asyncio.Future[T]":
        """Begin to carry out what has arrived. Raises HostUnreachable. The future fails when the daemon dies first."""
        if not self.is_up or self.is_gone:
            raise HostUnreachable(id=self.id, problem="connection refused")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_seen)
        self._work[answer] = self._spawn(self._carry_out(work, answer))
        return answer

    async def _carry_out(self, work: Callable[[], Awaitable[T]], answer: "asyncio.Future[T]") -> None:
        try:
            self._check_token()
            result = await work()
        except Error as error:
            if not answer.done():
                answer.set_exception(error)
        else:
            if not answer.done():
                answer.set_result(result)
        finally:
            self._work.pop(answer, None)

    def _check_token(self) -> None:
        if self.refusing and self._safeguards.refusals:
            raise HostRejected(id=self.id)
        if self.refusing:
            raise DisguisedRefusal(id=self.id, problem="it refused the token")

    async def events(self) -> AsyncIterator[MachineEvent]:
        if not self.is_up or self.is_gone:
            raise HostUnreachable(id=self.id, problem="connection refused")
        queue: asyncio.Queue[MachineEvent | None] = asyncio.Queue()
        self._readers[queue] = None
        try:
            yield MachineEvent(kind="hello", epoch="e1")
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._readers.pop(queue, None)

    def _tell(self, machine: MachineBody) -> None:
        event = MachineEvent(
            kind="phase", machine_id=machine.id, uid=machine.uid, incarnation=machine.incarnation, phase=machine.phase
        )
        for queue in self._readers:
            queue.put_nowait(event)

    # -- fate -----------------------------------------------------------------------------------------------------

    def die(self) -> None:
        """The daemon is killed. Its VMMs run on; what it was at is finished or undone at the next start."""
        self.is_up = False
        for answer, task in list(self._work.items()):
            task.cancel()
            if not answer.done():
                answer.set_exception(ReplyLost(id=self.id, problem="the connection was reset"))
        self._work.clear()
        for queue in self._readers:
            queue.put_nowait(None)
        self._busy.clear()
        self._watch.changed(self, "the daemon dies", self.id)

    def start(self) -> None:
        """The daemon starts: each thing that was under way is finished or undone."""
        for machine in list(self.table.values()):
            is_undone = machine.phase is Phase.CREATING and self._chance.random() < 0.5
            if machine.phase is Phase.DELETING or is_undone:
                self._remove(machine.id)
            elif machine.phase in (Phase.CREATING, Phase.STOPPED):
                self.guests[machine.id] = PretendedGuest("fake")
                self._become(machine.id, Phase.RUNNING)
        self.is_up = True
        self._watch.changed(self, "the daemon is back", self.id)

    def reboot(self) -> None:
        """Like `die`, with every VMM. Its clock begins anew."""
        self.die()
        self.clock, self.ahead_s = f"{self.clock}'", -asyncio.get_running_loop().time()
        for machine in list(self.table.values()):
            if machine.phase in (Phase.RUNNING, Phase.PAUSED, Phase.CREATING, Phase.STOPPED):
                self._become(machine.id, Phase.FAILED, "the host was restarted")

    def break_machine(self) -> None:
        """One VMM ends by itself."""
        self._strike_one(Phase.FAILED, "the VMM was killed")

    def stop_machine(self) -> None:
        """The virtual CPUs of one machine stand still from now on."""
        self._strike_one(Phase.PAUSED)

    def _strike_one(self, phase: Phase, error: str = "") -> None:
        running = [machine.id for machine in self.table.values() if machine.phase is Phase.RUNNING]
        if running and self.is_up:
            self._become(self._chance.choice(running), phase, error)

    def shorten_next_list(self) -> None:
        """The next list will leave machines out, unless one did so lately."""
        now_s = asyncio.get_running_loop().time()
        if self._full_lists >= FULL_LISTS and now_s >= self._short_at_s + QUIET_S:
            self._is_list_short, self._short_at_s = True, now_s

    # -- machines -------------------------------------------------------------------------------------------------

    async def machines(self) -> MachineList:
        listed = self.listed()
        await asyncio.sleep(self._chance.uniform(0.0, 0.2))
        if not self._is_list_short:
            self._full_lists += 1
            return MachineList(machines=listed)
        self._is_list_short, self._full_lists = False, 0
        shown = [machine for machine in listed if self._chance.random() < 0.5]
        if len(shown) < len(listed):
            self._watch.changed(self, f"a list leaves {len(listed) - len(shown)} machines out", self.id)
        return MachineList(machines=shown)

    async def create(self, fence: Fence, body: CreateMachine) -> MachineBody:
        self._check_cluster(fence)
        found = self.table.get(body.machine_id)
        if found is None:
            self._admit_new(fence, body)
            self._make(fence, body)
        elif fence.incarnation < found.incarnation and self._safeguards.fences:
            raise StaleIncarnation(uid=fence.uid, incarnation=fence.incarnation, seen=found.incarnation)
        await self._settled(body.machine_id)
        made = self.table.get(body.machine_id)
        if made is None or made.phase is Phase.DELETING:
            raise StaleIncarnation(uid=fence.uid, incarnation=fence.incarnation, seen=fence.incarnation)
        return made

    def _admit_new(self, fence: Fence, body: CreateMachine) -> None:
        seen = self.seen.get(fence.uid, Seen())
        try:
            check_new(seen, fence)
        except StaleAction:
            if self._safeguards.fences:
                raise
        self._check_valid(fence)
        if body.snapshot_id and body.snapshot_id not in self.snapshots:
            raise SnapshotNotFound(id=body.snapshot_id)
        if self._chance.random() < self.luck.refused_boot:
            if self._chance.random() < 0.5:
                raise ImageNotFound(image=body.spec.image, known="others")
            raise HostFull(resource="memory", needed="1 MiB", free="0")
        if len(self.table) >= self.capacity.vm_count:
            raise HostFull(resource="machines", needed="1", free="0")

    def _make(self, fence: Fence, body: CreateMachine) -> None:
        machine = MachineBody(
            id=body.machine_id,
            cluster=fence.cluster,
            uid=fence.uid,
            incarnation=fence.incarnation,
            phase=Phase.CREATING,
            spec=body.spec,
            driver="fake",
            published_ports=pretended_ports(body),
            created_at=CREATED_AT,
        )
        self.table[machine.id] = machine
        self.seen[fence.uid] = self.seen.get(fence.uid, Seen()).with_order(fence)
        self._watch.made(self, machine)
        self._begin(machine.id, lambda: self._boot(machine.id, body.boot_timeout_ms / 1000))

    async def _boot(self, machine_id: str, limit_s: float) -> None:
        is_slow = self._chance.random() < self.luck.slow_boot
        needed_s = self._chance.uniform(20, 140) if is_slow else self._chance.uniform(0.3, 3.0)
        will_fail = self._chance.random() < self.luck.failed_boot or needed_s > limit_s
        await asyncio.sleep(min(needed_s, limit_s))
        if will_fail:
            self._become(machine_id, Phase.FAILED, "the guest agent did not answer")
        else:
            self.guests[machine_id] = PretendedGuest("fake")
            self._become(machine_id, Phase.RUNNING)

    async def destroy(self, fence: Fence, machine_id: str) -> None:
        self._check_cluster(fence)
        self._check_valid(fence)
        machine = self.table.get(machine_id)
        seen = self.seen.get(fence.uid, Seen())
        if machine is None:
            self._bury(fence, seen.with_deletion(fence))
            raise MachineNotFound(id=machine_id)
        if self._safeguards.fences and fence.incarnation < machine.incarnation:
            raise StaleIncarnation(uid=fence.uid, incarnation=fence.incarnation, seen=machine.incarnation)
        self._bury(fence, seen.with_order(fence).with_deletion(replace(fence, incarnation=machine.incarnation)))
        if machine.phase is not Phase.DELETING:
            self._stop_work(machine_id)
            self._become(machine_id, Phase.DELETING)
            self._begin(machine_id, lambda: self._delete(machine_id))
        await self._settled(machine_id)

    async def _delete(self, machine_id: str) -> None:
        await asyncio.sleep(self._chance.uniform(0.1, 2.0))
        self._remove(machine_id)

    def _bury(self, fence: Fence, seen: Seen) -> None:
        if self._safeguards.tombstones:
            self.seen[fence.uid] = seen
        else:
            self.seen.pop(fence.uid, None)

    # -- snapshots ------------------------------------------------------------------------------------------------

    async def take_snapshot(self, fence: Fence, machine_id: str, body: TakeSnapshot) -> SnapshotBody:
        self._accept(fence, machine_id)
        if body.snapshot_id not in self.snapshots | dict.fromkeys(self.freed):
            self._watch.accepted(self, fence, f"snapshot {body.snapshot_id} is taken")
        await asyncio.sleep(self._chance.uniform(0.5, 5.0))
        self._usable(machine_id)
        return self._take_snapshot(machine_id, body)

    async def restore_snapshot(self, fence: Fence, machine_id: str, snapshot_id: str) -> None:
        is_stale = self._is_stale(fence)
        self._accept(fence, machine_id)
        if snapshot_id not in self.snapshots:
            raise SnapshotNotFound(id=snapshot_id)
        is_second = self._put_back.get(machine_id, 0) >= fence.action_seq
        if is_second and self._safeguards.fences:
            await self._settled(machine_id)
            return
        await self._settled(machine_id)
        self._check_valid(fence)
        self._watch.accepted(self, fence, f"{machine_id} is put back")
        self._put_back[machine_id] = max(fence.action_seq, self._put_back.get(machine_id, 0))
        self._watch.put_back(self, self._find(machine_id), fence, is_stale=is_stale or is_second)
        self._become(machine_id, Phase.STOPPED)
        self._begin(machine_id, lambda: self._start_again(machine_id))
        await self._settled(machine_id)
        self._usable(machine_id)

    async def _start_again(self, machine_id: str) -> None:
        await asyncio.sleep(self._chance.uniform(0.5, 5.0))
        self.guests[machine_id] = PretendedGuest("fake")
        self._become(machine_id, Phase.RUNNING)

    def _accept(self, fence: Fence, machine_id: str) -> None:
        self._check_cluster(fence)
        self._usable(machine_id)
        seen = self.seen.get(fence.uid, Seen())
        if self._is_stale(fence) and self._safeguards.fences:
            raise StaleAction(uid=fence.uid, action_seq=fence.action_seq, seen=seen.action_seq)
        self._check_valid(fence)
        self._note(fence)

    def _is_stale(self, fence: Fence) -> bool:
        return fence.action_seq < self.seen.get(fence.uid, Seen()).action_seq

    def _check_valid(self, fence: Fence) -> None:
        if self._safeguards.deadlines:
            check_valid(fence, self.now())

    # -- guests ---------------------------------------------------------------------------------------------------

    async def relay(self, request: GuestRequest) -> FakeAnswer:
        self._usable(request.machine_id)
        await asyncio.sleep(self._chance.uniform(0.001, 0.05))
        self._usable(request.machine_id)
        return await super().relay(request)

    def _usable(self, machine_id: str) -> None:
        if self._find(machine_id).phase is not Phase.RUNNING:
            raise GuestUnreachable(id=machine_id, problem="the machine does not run")

    # -- one thing at a time per machine --------------------------------------------------------------------------

    def _begin(self, machine_id: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        end.add_done_callback(_seen)
        task = self._spawn(_started(work))
        task.add_done_callback(lambda _task: self._finish(machine_id, end))
        self._busy[machine_id], self._work[end] = end, task

    def _finish(self, machine_id: str, end: "asyncio.Future[None]") -> None:
        self._work.pop(end, None)
        if self._busy.get(machine_id) is end:
            del self._busy[machine_id]
        if not end.done():
            end.set_result(None)

    def _stop_work(self, machine_id: str) -> None:
        end = self._busy.get(machine_id)
        task = self._work.get(end) if end is not None else None
        if task is not None:
            task.cancel()

    async def _settled(self, machine_id: str) -> None:
        while (end := self._busy.get(machine_id)) is not None:
            await asyncio.wait([end])

    def _become(self, machine_id: str, phase: Phase, error: str = "") -> None:
        machine = self.table[machine_id] = replace(self.table[machine_id], phase=phase, error=error)
        self._watch.changed(self, f"{machine_id} is {phase}{f' ({error})' if error else ''}", machine.uid)
        self._tell(machine)

    def _remove(self, machine_id: str) -> None:
        machine = self.table.pop(machine_id)
        self.guests.pop(machine_id, None)
        self._put_back.pop(machine_id, None)
        self._watch.changed(self, f"{machine_id} is gone", machine.uid)


async def _started(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await work()


def _seen(answer: "asyncio.Future[Any]") -> None:
    """Whoever asked may have gone: a failure is nobody's then."""
    if not answer.cancelled():
        answer.exception()
