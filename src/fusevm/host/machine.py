"""One machine, owned by one task that reads its mailbox.

Orders (create, stop, start, delete) and observations (the VMM ended, the daemon has started) are carried out one
after another, so there is no lock. A delete overtakes: it cancels what is under way, which undoes itself, and then
removes everything. Users' streams to the guest never pass through the mailbox.

What an operation could not complete (a full disk, a tool that fails) is open in the journal and is tried again after a
pause. An order that comes meanwhile does not wait for that: what is open is finished or undone first, or the order
fails with what keeps it open. Only a delete takes its place.

Owns: whose turn it is, and when something is tried again. Must not: know HTTP, or how an operation is done (`life`).
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import AbstractAsyncContextManager

import structlog

from fusevm.host.admission import Size
from fusevm.host.channel import AgentClient
from fusevm.host.life import Life
from fusevm.host.mailbox import (
    AnyOrder,
    Create,
    Delete,
    Exited,
    Mailbox,
    Publish,
    Recover,
    Resize,
    RestoreDisk,
    Rewiring,
    SetNetwork,
    Start,
    Stop,
    TakeSnapshot,
    Tidy,
    Unpublish,
)
from fusevm.host.quarantine import Quarantine
from fusevm.host.retry import Retry
from fusevm.host.snapshots.record import HostSnapshot
from fusevm.host.surroundings import Surroundings
from fusevm.host.tasks import Stopped, run_unless
from fusevm.host.visitors import Visit
from fusevm.host.writer import Superseded
from fusevm.model.errors import (
    Error,
    GuestUnreachable,
    Internal,
    MachineNotFound,
    ShuttingDown,
    WrongState,
)
from fusevm.model.machine import Fence, Machine, Phase

log = structlog.get_logger()

#: How long a caller waits for a machine that is being adopted.
_RECOVERY_WAIT_S = 15.0


class MachineTask:
    """The one task of a machine. `run` is it; everything else may be called from other tasks."""

    def __init__(self, machine: Machine, parts: Surroundings) -> None:
        self._parts = parts
        self._mailbox = Mailbox()
        self._life = Life(machine, parts, lambda vmm, reason: self._mailbox.post(Exited(vmm, reason)))
        self._creating: Create | None = None
        #: The last visit; new visitors may come while it is open.
        self._visiting: Visit | None = None
        #: Not set while it is unknown whether the machine runs.
        self._settled = asyncio.Event()
        self._settled.set()
        self._retry = Retry(parts.clock, lambda: self._mailbox.post(Recover()))
        self._is_busy = False
        self._log = log.bind(machine=machine.id, uid=machine.fence.uid)

    # -- for other tasks --------------------------------------------------------------------------------------------

    @property
    def record(self) -> Machine:
        """The machine as the journal has it."""
        return self._life.record

    @property
    def is_gone(self) -> bool:
        """True when nothing is left of it, neither in the journal."""
        return self._life.is_gone

    @property
    def quarantine(self) -> Quarantine | None:
        """What could not be carried out and is tried again; None while all is well."""
        return self._retry.quarantine

    @property
    def is_quiet(self) -> bool:
        """True while nothing is under way with it, and nothing waits or is in quarantine."""
        is_well = self._settled.is_set() and self._retry.quarantine is None
        return is_well and self._mailbox.is_empty and not (self._is_busy or self.is_gone)

    def isolate(self, problem: str) -> None:
        """Nothing is tried with it until somebody orders it: its record cannot be trusted."""
        self._retry.give_up(problem)

    def note_crash(self, problem: str) -> float:
        """The task itself has failed, by a bug of ours; return the seconds until it should run again."""
        return self._retry.note_crash(problem)

    def begin_create(self, deadline_ms: int) -> None:
        """The intent was just written: boot the machine. Returns at once; `wait_created` has the outcome."""
        self._creating = Create(deadline_ms)
        self._mailbox.post(self._creating)

    async def wait_created(self) -> Machine:
        """Share the outcome of the create that is under way, or return the record of a machine that is made.

        Raises what the create raises (BootFailed and others); then the machine is gone.
        """
        if self._creating is not None:
            return await self._creating.wait()
        await self._wait_settled()
        if self.record.phase is Phase.CREATING and not self.is_gone:
            raise GuestUnreachable(id=self.record.id, problem="an earlier attempt is still being cleaned up")
        return self.record

    async def start(self, fence: Fence | None, timeout_ms: int) -> Machine:
        """Boot it again, with its disk. Returns the record of one that runs. Raises WrongState for a failed one."""
        order = Start(fence, timeout_ms)
        self._mailbox.post(order)
        return await order.wait()

    async def stop(self, fence: Fence | None) -> Machine:
        """End its VMM and keep its disk. Idempotent; a failed machine becomes a stopped one."""
        order = Stop(fence)
        self._mailbox.post(order)
        return await order.wait()

    async def resize(self, fence: Fence | None, size: Size) -> Machine:
        """Give it more memory or a larger disk; it is stopped for that, and stays so."""
        order = Resize(fence, size)
        self._mailbox.post(order)
        return await order.wait()

    def visit(self) -> AbstractAsyncContextManager[AgentClient]:
        """The agent of a machine at rest, to be used for its files alone, with whoever else visits it."""
        if self._visiting is None or not self._visiting.is_open:
            self._visiting = Visit()
            self._mailbox.post(self._visiting)
        return self._visiting.enter()

    async def take_snapshot(self, fence: Fence | None, snapshot_id: str) -> HostSnapshot:
        """Copy its disk at one moment; what is left of the work needs the machine no more. Idempotent by the id."""
        order = TakeSnapshot(fence, snapshot_id)
        self._mailbox.post(order)
        await order.wait()
        if order.taken is None:
            raise Internal(problem=f"snapshot {snapshot_id} was not taken")
        return order.taken

    async def restore(self, fence: Fence | None, snapshot_id: str, timeout_ms: int) -> Machine:
        """Put the disk of a snapshot in place and start it. Idempotent by the number of the order."""
        order = RestoreDisk(fence, snapshot_id, timeout_ms)
        self._mailbox.post(order)
        return await order.wait()

    async def tidy(self) -> None:
        """Remove what it should not have, if it rests."""
        order = Tidy()
        self._mailbox.post(order)
        await order.wait()

    async def rewire(self, order: Rewiring) -> Machine:
        """Change its policy or its published ports."""
        self._mailbox.post(order)
        return await order.wait()

    def begin_delete(self, machine: Machine) -> Delete:
        """The intent was just written, with this record: remove everything. Returns the order to wait for."""
        self._life.commit(machine)
        order = Delete()
        self._mailbox.post(order)
        return order

    def recover(self) -> None:
        """Finish or undo what an earlier daemon left, or adopt its VMM. Returns at once."""
        self._settled.clear()
        self._retry.begin()
        self._mailbox.post(Recover())

    async def guest(self) -> AgentClient:
        """Return the running machine's agent. Raises WrongState."""
        await self._wait_settled()
        agent = self._life.agent
        if agent is None or self.record.phase is not Phase.RUNNING:
            state = self.record.phase.value
            raise WrongState(id=self.record.id, state=state, wanted="it must be running for this")
        return agent

    async def note_order(self, fence: Fence) -> None:
        """Take note of an order to the guest. Raises StaleAction for one that a newer one has superseded."""
        if fence.action_seq != self.record.fence.action_seq:
            await self._parts.journal.note_order(self.record.id, fence, on_commit=self._life.commit)

    # -- the task ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry out orders until the machine is gone. Cancelled, it lets go of the VMM, which runs on.

        Orders that wait stay where they are; `end` answers them.
        """
        async with self._life.watched():
            try:
                while not self.is_gone:
                    await self._carry_out(await self._mailbox.take())
            finally:
                self._retry.cancel()

    def end(self) -> None:
        """`run` will not be called again: answer everybody who waits."""
        self._settled.set()
        error = MachineNotFound(id=self.record.id) if self.is_gone else ShuttingDown()
        self._mailbox.close(lambda order: self._answer_late(order, error))

    async def _carry_out(self, order: AnyOrder) -> None:
        if isinstance(order, Delete):
            await self._perform(order)
            return
        try:
            await run_unless(self._mailbox.wait_overtaking(), self._perform(order))
        except Stopped:
            order.fail(self._life.interruption())  # it may not even have begun
            self._log.info("order_overtaken", order=type(order).__name__.lower())

    async def _perform(self, order: AnyOrder) -> None:
        """Carry out one order; whatever happens reaches those who wait for it."""
        name = type(order).__name__.lower()
        self._is_busy = True
        try:
            order.succeed(await self._dispatch(order))
            if not self._retry.is_open:
                self._settle()
        except asyncio.CancelledError:
            order.fail(self._life.interruption())
            raise
        except Superseded:
            order.fail(self._life.interruption())
        except Error as e:
            self._log.warning("order_failed", order=name, problem=e.message, notes=getattr(e, "__notes__", []))
            await self._fail(order, e, e.message)
        except Exception as e:  # noqa: BLE001 - the loop's boundary: logged with its traceback, told, tried again
            self._log.exception("order_crashed", order=name)
            problem = f"{type(e).__name__}: {e}"
            await self._fail(order, Internal(problem=problem), problem)
        finally:
            self._is_busy = False
            if not self._retry.is_open:
                self._settled.set()

    async def _fail(self, order: AnyOrder, error: Error, problem: str) -> None:
        """Those who wait hear of it whatever comes; a machine that is in quarantine then is so before they do."""
        try:
            await self._look_again(order, problem)
        finally:
            order.fail(error)

    async def _look_again(self, order: AnyOrder, problem: str) -> None:
        """What is open in the journal, or unknown, is looked at again after a while: until then it is in quarantine."""
        if self.is_gone:
            return
        kind = await self._open_kind()
        comes_first = bool(kind) or self._retry.is_open or isinstance(order, Exited)
        if not (comes_first or self._life.must_rewire):
            return
        retry_s = self._retry.fail(f"{kind}: {problem}" if kind else problem, comes_first=comes_first)
        self._log.warning("machine_quarantined", kind=kind or "none", problem=problem, retry_s=retry_s)

    async def _open_kind(self) -> str:
        """The operation that is open; empty without one. A journal that cannot be read may hold any."""
        try:
            operation = await self._parts.journal.operation(self.record.id)
        except (Error, sqlite3.Error) as e:
            self._log.warning("operation_unknown", problem=str(e))
            return "unknown"
        return operation.kind if operation is not None else ""

    async def _dispatch(self, order: AnyOrder) -> Machine:
        life = self._life
        if self._retry.is_open and not isinstance(order, Create | Delete | Exited | Recover):
            await self._recover()
            if life.is_gone:
                raise MachineNotFound(id=self.record.id)
        match order:
            case Create():
                return await self._create(order)
            case Start():
                return await life.start(order)
            case Stop():
                return await life.stop(order)
            case Resize():
                return await life.resize(order)
            case Visit():
                return await life.receive(order, self._mailbox.wait_order)
            case TakeSnapshot():
                return await life.take_snapshot(order)
            case RestoreDisk():
                return await life.restore(order)
            case Delete():
                return await life.delete()
            case SetNetwork() | Publish() | Unpublish():
                return await life.rewire(order)
            case Exited() | Recover() | Tidy():
                return await self._react(order)

    async def _react(self, order: Exited | Recover | Tidy) -> Machine:
        """What nobody has ordered."""
        match order:
            case Exited():
                return await self._life.note_exit(order.vmm, order.reason)
            case Recover():
                if self._retry.is_open:
                    await self._recover()
                await self._life.mend_network()
                return self.record
            case Tidy():
                return await self._life.tidy()

    async def _create(self, order: Create) -> Machine:
        try:
            return await self._life.create(order.deadline_ms)
        finally:
            self._creating = None

    async def _recover(self) -> None:
        await self._life.recover()
        self._settle()

    # -- small ------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Orders may come. A network that is not as the record says keeps none waiting: they may be what mends it."""
        self._retry.is_open = False
        if not self._life.must_rewire:
            self._retry.settle()

    def _answer_late(self, order: AnyOrder, error: Error) -> None:
        """An order that came too late; to delete what is gone is no error."""
        if isinstance(order, Delete) and self.is_gone:
            order.succeed(self.record)
        else:
            order.fail(error)

    async def _wait_settled(self) -> None:
        try:
            async with asyncio.timeout(_RECOVERY_WAIT_S):
                await self._settled.wait()
        except TimeoutError:
            problem = "the daemon is still finding out how it is"
            raise GuestUnreachable(id=self.record.id, problem=problem) from None
