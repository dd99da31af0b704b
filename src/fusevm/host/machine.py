"""One machine, owned by one task that reads its mailbox.

Orders (create, stop, start, delete) and observations (the VMM ended, the daemon has started) are carried out one
after another, so there is no lock. A delete overtakes: it cancels what is under way, which undoes itself, and then
removes everything. Users' streams to the guest never pass through the mailbox.

Journal first: the intent is on disk before the first side effect, and goes when the operation is complete or undone.
What cannot be completed now (a full disk, a tool that fails) stays in the journal and is tried again after a pause. An
order that comes meanwhile does not wait for that: what is open is finished or undone first, or the order fails with
what keeps it open. Only a delete takes its place.

Owns: the machine's record and its VMM. Must not: know HTTP, or other machines.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Literal, TypeAlias

import msgspec
import structlog

from fusevm.host.admission import Size
from fusevm.host.adoption import judge_adopted, meet_again
from fusevm.host.boot import bring_up
from fusevm.host.channel import AgentClient
from fusevm.host.held_vmm import HeldVmm, why_gone
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
from fusevm.host.resize import finish_resize, resize_machine
from fusevm.host.retry import Retry
from fusevm.host.rewiring import carry_out_rewiring
from fusevm.host.rows import Operation
from fusevm.host.snapshots.record import HostSnapshot
from fusevm.host.snapshots.work import DiskWork
from fusevm.host.surroundings import Surroundings
from fusevm.host.tasks import CLEAN_UP_TIMEOUT_S, CleanUp, Stopped, run_unless
from fusevm.host.visit import end_visit, hold_visit
from fusevm.host.visitors import Visit
from fusevm.host.vmm.driver import Vmm
from fusevm.host.vmm.exit_reason import SHUT_DOWN
from fusevm.host.writer import Superseded
from fusevm.model.errors import (
    BootFailed,
    Error,
    GuestUnreachable,
    Internal,
    MachineNotFound,
    ShuttingDown,
    StaleIncarnation,
    WrongState,
)
from fusevm.model.machine import Fence, Machine, Phase, VmmProcess

log = structlog.get_logger()

_Boot: TypeAlias = Literal["create", "start", "restore"]

#: What a boot gets that a restarted daemon has to begin anew.
LATE_BOOT_MS = 60_000
#: How long a caller waits for a machine that is being adopted.
_RECOVERY_WAIT_S = 15.0
#: Reasons of an exit that the guest itself wanted (`Vmm.wait_exit`).
ORDERLY = (SHUT_DOWN, f"{SHUT_DOWN} while the daemon was away")


class MachineTask:
    """The one task of a machine. `run` is it; everything else may be called from other tasks."""

    def __init__(self, machine: Machine, parts: Surroundings) -> None:
        self._record = machine
        self._parts = parts
        self._work = DiskWork(parts)
        self._mailbox = Mailbox()
        self._creating: Create | None = None
        self._held = HeldVmm(machine.id, parts, lambda vmm, reason: self._mailbox.post(Exited(vmm, reason)))
        self._is_gone = False
        #: The last visit; new visitors may come while it is open.
        self._visiting: Visit | None = None
        #: Not set while it is unknown whether the machine runs.
        self._settled = asyncio.Event()
        self._settled.set()
        #: Why the last boot failed that did.
        self._why_lost = ""
        #: The last process that was seen to end by itself, and why.
        self._seen_end: tuple[VmmProcess | None, str] = (None, "")
        self._retry = Retry(parts.clock, lambda: self._mailbox.post(Recover()))
        self._is_busy = False
        #: The record says of its network what the host may not have made true.
        self._must_rewire = False
        self._log = log.bind(machine=machine.id, uid=machine.fence.uid)

    # -- for other tasks --------------------------------------------------------------------------------------------

    @property
    def record(self) -> Machine:
        """The machine as the journal has it."""
        return self._record

    @property
    def is_gone(self) -> bool:
        """True when nothing is left of it, neither in the journal."""
        return self._is_gone

    @property
    def quarantine(self) -> Quarantine | None:
        """What could not be carried out and is tried again; None while all is well."""
        return self._retry.quarantine

    @property
    def is_quiet(self) -> bool:
        """True while nothing is under way with it, and nothing waits or is in quarantine."""
        is_well = self._settled.is_set() and self._retry.quarantine is None
        return is_well and self._mailbox.is_empty and not (self._is_busy or self._is_gone)

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
        if self._record.phase is Phase.CREATING and not self._is_gone:
            raise GuestUnreachable(id=self._record.id, problem="an earlier attempt is still being cleaned up")
        return self._record

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
        self._commit(machine)
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
        agent = self._held.agent
        if agent is None or self._record.phase is not Phase.RUNNING:
            state = self._record.phase.value
            raise WrongState(id=self._record.id, state=state, wanted="it must be running for this")
        return agent

    async def note_order(self, fence: Fence) -> None:
        """Take note of an order to the guest. Raises StaleAction for one that a newer one has superseded."""
        if fence.action_seq != self._record.fence.action_seq:
            await self._parts.journal.note_order(self._record.id, fence, on_commit=self._commit)

    # -- the task ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry out orders until the machine is gone. Cancelled, it lets go of the VMM, which runs on.

        Orders that wait stay where they are; `end` answers them.
        """
        try:
            async with asyncio.TaskGroup() as self._held.group:
                try:
                    while not self._is_gone:
                        await self._carry_out(await self._mailbox.take())
                finally:
                    self._held.stop_watching()
        finally:
            self._retry.cancel()
            await self._held.release()

    def end(self) -> None:
        """`run` will not be called again: answer everybody who waits."""
        self._settled.set()
        error = MachineNotFound(id=self._record.id) if self._is_gone else ShuttingDown()
        self._mailbox.close(lambda order: self._answer_late(order, error))

    async def _carry_out(self, order: AnyOrder) -> None:
        if isinstance(order, Delete):
            await self._perform(order)
            return
        try:
            await run_unless(self._mailbox.wait_overtaking(), self._perform(order))
        except Stopped:
            order.fail(self._interruption())  # it may not even have begun
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
            order.fail(self._interruption())
            raise
        except Superseded:
            order.fail(self._interruption())
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
        if self._is_gone:
            return
        kind = await self._open_kind()
        comes_first = bool(kind) or self._retry.is_open or isinstance(order, Exited)
        if not (comes_first or self._must_rewire):
            return
        retry_s = self._retry.fail(f"{kind}: {problem}" if kind else problem, comes_first=comes_first)
        self._log.warning("machine_quarantined", kind=kind or "none", problem=problem, retry_s=retry_s)

    async def _open_kind(self) -> str:
        """The operation that is open; empty without one. A journal that cannot be read may hold any."""
        try:
            operation = await self._parts.journal.operation(self._record.id)
        except (Error, sqlite3.Error) as e:
            self._log.warning("operation_unknown", problem=str(e))
            return "unknown"
        return operation.kind if operation is not None else ""

    async def _dispatch(self, order: AnyOrder) -> Machine:
        if self._retry.is_open and not isinstance(order, Create | Delete | Exited | Recover):
            await self._recover()
            if self._is_gone:
                raise MachineNotFound(id=self._record.id)
        match order:
            case Create():
                return await self._boot("create", order.deadline_ms)
            case Start():
                return await self._start(order)
            case Stop():
                return await self._stop(order)
            case Resize():
                return await resize_machine(self._record, order, self._parts, self._held.shut_down, self._commit)
            case Visit():
                return await hold_visit(order, self._record, self._parts, self._mailbox.wait_order, self._commit)
            case TakeSnapshot():
                order.taken = await self._work.take(self._record, self._held.vmm, order, self._commit)
                return self._record
            case RestoreDisk():
                return await self._restore(order)
            case Delete():
                return await self._delete()
            case SetNetwork() | Publish() | Unpublish():
                return await self._rewire(order)
            case Exited() | Recover() | Tidy():
                return await self._react(order)

    async def _react(self, order: Exited | Recover | Tidy) -> Machine:
        """What nobody has ordered."""
        match order:
            case Exited():
                if order.vmm is self._held.vmm:
                    await self._note_exit(order.reason)
                return self._record
            case Recover():
                if self._retry.is_open:
                    await self._recover()
                if self._must_rewire:
                    await self._parts.quarters.rewire(self._record)
                    self._must_rewire = False
                return self._record
            case Tidy():
                if self._record.phase in (Phase.STOPPED, Phase.FAILED):
                    await self._parts.quarters.vacate(self._record, keep_disk=True)
                return self._record

    async def _rewire(self, order: Rewiring) -> Machine:
        """Change its network. Once the journal has the change, it is tried until the host has it, too."""

        def commit(machine: Machine) -> None:
            self._must_rewire = True
            self._commit(machine)

        changed = await carry_out_rewiring(self._record, order, self._parts, commit)
        self._must_rewire = False
        return changed

    # -- create and start -------------------------------------------------------------------------------------------

    async def _start(self, order: Start) -> Machine:
        parts = self._parts
        machine = await parts.journal.begin_start(
            self._record.id,
            order.fence,
            await parts.quarters.limits(),
            parts.quarters.numbers(),
            nonce=parts.clock.entropy(16).hex(),
            deadline_ms=parts.clock.now_ms() + order.timeout_ms,
            on_commit=self._commit,
        )
        if machine.phase is Phase.CREATING:
            return await self._boot("start", parts.clock.now_ms() + order.timeout_ms)
        if machine.phase is Phase.FAILED:
            raise WrongState(id=machine.id, state="failed", wanted="stop it first, then start it")
        return machine

    async def _restore(self, order: RestoreDisk) -> Machine:
        if await self._work.begin_restore(self._record, order, self._commit) is None:
            return self._record
        return await self._finish_restore(self._parts.clock.now_ms() + order.timeout_ms)

    async def _finish_restore(self, deadline_ms: int) -> Machine:
        await self._held.kill()
        await self._work.put_in_place(self._record)
        return await self._boot("restore", deadline_ms)

    async def _boot(self, kind: _Boot, deadline_ms: int) -> Machine:
        undo = CleanUp()
        return await self._complete(kind, undo, bring_up(self._record, kind, deadline_ms, self._parts, undo))

    async def _complete(self, kind: _Boot, undo: CleanUp, work: Coroutine[None, None, tuple[Machine, Vmm]]) -> Machine:
        """Carry a boot to its end: the machine runs, or nothing is left of the attempt."""
        try:
            machine, vmm = await work
            return await self._finish_boot(kind, machine, vmm, undo)
        except BaseException as error:
            self._why_lost = error.problem if isinstance(error, BootFailed) else self._explain(error)
            await undo.run(blame=error)
            if not undo.problems:
                await self._give_up(kind, error)
            raise
        finally:
            self._creating = None

    async def _finish_boot(self, kind: _Boot, machine: Machine, vmm: Vmm, undo: CleanUp) -> Machine:
        """Write `running`. From the commit on the machine is there, even if we are cancelled in that moment."""

        def commit(saved: Machine) -> None:
            undo.keep_all()
            self._held.adopt(vmm)
            self._commit(saved)

        machine = msgspec.structs.replace(
            machine, phase=Phase.RUNNING, error="", started_at_ms=self._parts.clock.now_ms()
        )
        return await self._parts.journal.finish(machine, kind, "running", on_commit=commit)

    async def _give_up(self, kind: _Boot, error: BaseException) -> None:
        """Everything is undone: take the intent back."""
        if self._record.phase is Phase.RUNNING:
            return  # cancelled in the moment of its commit
        self._parts.metrics.boot_failures.inc()
        text = self._explain(error)
        try:
            if kind == "create" and not self._is_kept(error):
                gone = msgspec.structs.replace(self._record, phase=Phase.FAILED, error=text)
                await self._parts.journal.forget(gone.id, kind, "undone", on_commit=lambda _none: self._end(gone))
            else:
                failed = msgspec.structs.replace(self._record, phase=Phase.FAILED, error=text)
                await self._parts.journal.finish(failed, kind, "undone", on_commit=self._commit)
        except Superseded:
            return
        except Error as e:
            error.add_note(f"the journal could not take the intent back: {e.message}")

    def _explain(self, error: BaseException) -> str:
        """Why a boot was given up."""
        return error.message if isinstance(error, Error) else self._interruption().message

    def _is_kept(self, error: BaseException) -> bool:
        """The contract's users look at a machine whose guest did not get ready, and stop and start it, or delete it."""
        return self._record.contract is not None and isinstance(error, BootFailed)

    # -- stop, delete, exit -----------------------------------------------------------------------------------------

    async def _stop(self, order: Stop) -> Machine:
        machine = await self._parts.journal.begin_stop(self._record.id, order.fence, on_commit=self._commit)
        match machine.phase:
            case Phase.RUNNING | Phase.PAUSED:
                await self._held.shut_down()
                return await self._finish_stop()
            case Phase.FAILED:
                stopped = msgspec.structs.replace(machine, phase=Phase.STOPPED)
                return await self._parts.journal.observe(stopped, "vacated", on_commit=self._commit)
            case Phase.STOPPED:
                return machine
            case Phase.CREATING | Phase.DELETING:
                raise WrongState(id=machine.id, state=machine.phase.value, wanted="wait until that is done")

    async def _finish_stop(self) -> Machine:
        self._parts.fault.reached("stop.killed")
        await self._parts.quarters.vacate(self._record, keep_disk=True)
        stopped = msgspec.structs.replace(self._record, phase=Phase.STOPPED, error="")
        return await self._parts.journal.finish(stopped, "stop", "done", on_commit=self._commit)

    async def _delete(self) -> Machine:
        await self._held.kill()
        self._parts.fault.reached("delete.killed")
        await self._parts.quarters.vacate(self._record, keep_disk=False)
        self._parts.fault.reached("delete.vacated")
        await self._parts.journal.forget(
            self._record.id, "delete", "gone", on_commit=lambda _none: self._end(self._record)
        )
        return self._record

    async def _note_exit(self, reason: str) -> None:
        """The VMM has ended by itself: say so at once, then free what the run occupied. The disk stays."""
        self._seen_end = (self._record.vmm, reason)
        await self._held.release()
        phase = Phase.STOPPED if reason in ORDERLY else Phase.FAILED
        seen = msgspec.structs.replace(self._record, phase=phase, error=reason)
        await self._parts.journal.observe(seen, "seen", on_commit=self._commit)
        self._parts.metrics.exits.inc()
        self._log.warning("machine_exited", reason=reason, phase=phase.value)
        await self._vacate()

    async def _vacate(self) -> None:
        """Free what a run has occupied that nobody ordered to end."""
        async with asyncio.timeout(CLEAN_UP_TIMEOUT_S):
            await self._parts.quarters.vacate(self._record, keep_disk=True)
        await self._parts.journal.observe(self._record, "vacated", on_commit=self._commit)

    # -- after a restart, or a failure ------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Finish or undo what is open now, and find out how the machine is. Raises what keeps it so."""
        operation = await self._parts.journal.operation(self._record.id)
        try:
            await self._finish(operation)
        except (Error, OSError) as e:
            if operation is None or await self._parts.journal.operation(self._record.id) is not None:
                raise
            # Undone, which its own caller has heard of, or nobody.
            self._log.warning("operation_undone", kind=operation.kind, problem=str(e) or "it took too long")
            if not self._is_gone:
                await self._resume()
        self._settle()

    async def _finish(self, operation: Operation | None) -> Machine:
        if operation is None:
            return await self._resume()
        match operation.kind:
            case "delete":
                return await self._delete()
            case "create" | "start":
                return await self._resume_boot(operation.kind, operation)
            case "stop":
                await self._held.find(self._record)
                await self._held.shut_down()
                return await self._finish_stop()
            case "resize":
                if self._record.phase is not Phase.STOPPED:
                    await self._held.find(self._record)
                    await self._held.shut_down()
                return await finish_resize(self._record, self._parts, self._commit)
            case "visit":
                return await end_visit(self._record, self._parts, self._commit)
            case "snapshot":
                await self._work.undo_takes(self._record)
                resumed = await self._resume()
                if self._held.vmm is not None:
                    await self._work.let_write(self._record, self._held.vmm)
                return resumed
            case "restore":
                return await self._recover_restore(operation)

    async def _recover_restore(self, operation: Operation) -> Machine:
        """Before its commit it never was; after that it is carried to its end."""
        match operation.step:
            case "intent":
                await self._work.undo_restore(self._record, self._commit)
                return await self._resume()
            case "booted":
                return await self._resume_boot("restore", operation)
            case _:
                await self._held.find(self._record)
                return await self._finish_restore(max(operation.deadline_ms, self._parts.clock.now_ms() + LATE_BOOT_MS))

    async def _resume(self) -> Machine:
        """No operation was open: the machine runs, or rests."""
        if self._record.phase in (Phase.STOPPED, Phase.FAILED):
            if self._record.slot >= 0 or self._record.vmm is not None:
                await self._vacate()
            return self._record
        vmm = await self._held.find(self._record)
        if vmm is None:
            process, reason = self._seen_end
            is_known = process is not None and process == self._record.vmm
            await self._note_exit(reason if is_known else await why_gone(self._record, self._parts))
            return self._record
        if problem := await judge_adopted(self._record, vmm):
            await self._held.kill()
            await self._note_exit(problem)
        return self._record

    async def _resume_boot(self, kind: _Boot, operation: Operation) -> Machine:
        """Go on waiting for a guest that an earlier daemon started, or undo what that one began."""
        undo = CleanUp()
        undo.push("quarters", lambda: self._parts.quarters.vacate(self._record, keep_disk=kind != "create"))
        again = meet_again(self._record, kind, operation, self._parts, undo, self._why_lost)
        return await self._complete(kind, undo, again)

    # -- small ------------------------------------------------------------------------------------------------------

    def _commit(self, machine: Machine) -> None:
        """The journal has this record now."""
        has_changed = machine.phase is not self._record.phase
        self._record = machine
        if machine.phase not in (Phase.RUNNING, Phase.PAUSED):
            self._must_rewire = False  # its next run is connected as the record says
        if has_changed:
            self._parts.events.publish(machine)

    def _end(self, machine: Machine) -> None:
        """The journal has no record any more."""
        self._is_gone = True
        self._parts.events.publish(machine, kind="gone")

    def _settle(self) -> None:
        """Orders may come. A network that is not as the record says keeps none waiting: they may be what mends it."""
        self._retry.is_open = False
        if not self._must_rewire:
            self._retry.settle()

    def _interruption(self) -> Error:
        """What callers hear whose order was cancelled."""
        if self._record.phase is not Phase.DELETING:
            return ShuttingDown()
        fence = self._record.fence
        return StaleIncarnation(uid=fence.uid, incarnation=fence.incarnation, seen=fence.incarnation)

    def _answer_late(self, order: AnyOrder, error: Error) -> None:
        """An order that came too late; to delete what is gone is no error."""
        if isinstance(order, Delete) and self._is_gone:
            order.succeed(self._record)
        else:
            order.fail(error)

    async def _wait_settled(self) -> None:
        try:
            async with asyncio.timeout(_RECOVERY_WAIT_S):
                await self._settled.wait()
        except TimeoutError:
            problem = "the daemon is still finding out how it is"
            raise GuestUnreachable(id=self._record.id, problem=problem) from None
