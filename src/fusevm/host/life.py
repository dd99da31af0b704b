"""What becomes of one machine: it is made, started, stopped, changed, deleted, and found again after a crash.

Journal first: the intent is on disk before the first side effect, and goes when the operation is complete or undone.
What cannot be completed now stays in the journal, and is finished or undone by `recover`, whenever that is.

Owns: the machine's record and its VMM. Must not: know orders' turns (the machine's one task calls, one order at a time,
and cancels what is overtaken), or how often something is tried.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeAlias

import msgspec
import structlog

from fusevm.host.adoption import judge_adopted, meet_again
from fusevm.host.boot import bring_up
from fusevm.host.channel import AgentClient
from fusevm.host.held_vmm import HeldVmm, why_gone
from fusevm.host.mailbox import Resize, RestoreDisk, Rewiring, Start, Stop, TakeSnapshot
from fusevm.host.resize import finish_resize, resize_machine
from fusevm.host.rewiring import carry_out_rewiring
from fusevm.host.rows import Operation
from fusevm.host.snapshots.work import DiskWork
from fusevm.host.surroundings import Surroundings
from fusevm.host.tasks import CLEAN_UP_TIMEOUT_S, CleanUp
from fusevm.host.visit import end_visit, hold_visit
from fusevm.host.visitors import Visit
from fusevm.host.vmm.driver import Vmm
from fusevm.host.vmm.exit_reason import SHUT_DOWN
from fusevm.host.writer import Superseded
from fusevm.model.errors import BootFailed, Error, ShuttingDown, StaleIncarnation, WrongState
from fusevm.model.machine import Machine, Phase, VmmProcess

log = structlog.get_logger()

_Boot: TypeAlias = Literal["create", "start", "restore"]

#: What a boot gets that a restarted daemon has to begin anew.
LATE_BOOT_MS = 60_000
#: Reasons of an exit that the guest itself wanted (`Vmm.wait_exit`).
ORDERLY = (SHUT_DOWN, f"{SHUT_DOWN} while the daemon was away")


class Life:
    """The operations on one machine. For its own task alone."""

    def __init__(self, machine: Machine, parts: Surroundings, tell_end: Callable[[Vmm, str], None]) -> None:
        """`tell_end` hears of a VMM that ends by itself, and why."""
        self._record = machine
        self._parts = parts
        self._work = DiskWork(parts)
        self._held = HeldVmm(machine.id, parts, tell_end)
        self._is_gone = False
        #: Why the last boot failed that did.
        self._why_lost = ""
        #: The last process that was seen to end by itself, and why.
        self._seen_end: tuple[VmmProcess | None, str] = (None, "")
        #: The record says of its network what the host may not have made true.
        self.must_rewire = False
        self._log = log.bind(machine=machine.id, uid=machine.fence.uid)

    @property
    def record(self) -> Machine:
        """The machine as the journal has it."""
        return self._record

    @property
    def is_gone(self) -> bool:
        """True when nothing is left of it, neither in the journal."""
        return self._is_gone

    @property
    def agent(self) -> AgentClient | None:
        """Its guest's agent; None while it has no VMM."""
        return self._held.agent

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Be told of its VMM's end in here. At the end the VMM is let go, and runs on."""
        try:
            async with asyncio.TaskGroup() as self._held.group:
                try:
                    yield
                finally:
                    self._held.stop_watching()
        finally:
            await self._held.release()

    # -- create, start, restore -------------------------------------------------------------------------------------

    async def create(self, deadline_ms: int) -> Machine:
        """The intent is in the journal: boot the machine. If that fails it is gone."""
        return await self._boot("create", deadline_ms)

    async def start(self, order: Start) -> Machine:
        """Boot it with its disk. Raises WrongState for a failed one."""
        parts = self._parts
        machine = await parts.journal.begin_start(
            self._record.id,
            order.fence,
            await parts.quarters.limits(),
            parts.quarters.numbers(),
            nonce=parts.clock.entropy(16).hex(),
            deadline_ms=parts.clock.now_ms() + order.timeout_ms,
            on_commit=self.commit,
        )
        if machine.phase is Phase.CREATING:
            return await self._boot("start", parts.clock.now_ms() + order.timeout_ms)
        if machine.phase is Phase.FAILED:
            raise WrongState(id=machine.id, state="failed", wanted="stop it first, then start it")
        return machine

    async def restore(self, order: RestoreDisk) -> Machine:
        """Boot it with the disk of a snapshot; one that was put back by this very order stays as it is."""
        if await self._work.begin_restore(self._record, order, self.commit) is None:
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

    async def _finish_boot(self, kind: _Boot, machine: Machine, vmm: Vmm, undo: CleanUp) -> Machine:
        """Write `running`. From the commit on the machine is there, even if we are cancelled in that moment."""

        def commit(saved: Machine) -> None:
            undo.keep_all()
            self._held.adopt(vmm)
            self.commit(saved)

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
                await self._parts.journal.finish(failed, kind, "undone", on_commit=self.commit)
        except Superseded:
            return
        except Error as e:
            error.add_note(f"the journal could not take the intent back: {e.message}")

    def _explain(self, error: BaseException) -> str:
        """Why a boot was given up."""
        return error.message if isinstance(error, Error) else self.interruption().message

    def _is_kept(self, error: BaseException) -> bool:
        """The contract's users look at a machine whose guest did not get ready, and stop and start it, or delete it."""
        return self._record.contract is not None and isinstance(error, BootFailed)

    # -- what is done to one that is there --------------------------------------------------------------------------

    async def resize(self, order: Resize) -> Machine:
        """Give it another size; a running one is stopped for that."""
        return await resize_machine(self._record, order, self._parts, self._held.shut_down, self.commit)

    async def receive(self, visit: Visit, wait_other: Callable[[], Coroutine[Any, Any, None]]) -> Machine:
        """Let visitors to its disk in, while it rests."""
        return await hold_visit(visit, self._record, self._parts, wait_other, self.commit)

    async def take_snapshot(self, order: TakeSnapshot) -> Machine:
        """Copy its disk."""
        order.taken = await self._work.take(self._record, self._held.vmm, order, self.commit)
        return self._record

    async def rewire(self, order: Rewiring) -> Machine:
        """Change its network. Once the journal has the change, it is tried until the host has it, too."""

        def commit(machine: Machine) -> None:
            self.must_rewire = True
            self.commit(machine)

        changed = await carry_out_rewiring(self._record, order, self._parts, commit)
        self.must_rewire = False
        return changed

    async def mend_network(self) -> None:
        """Make the host do what the record says of its network, where it may not yet."""
        if self.must_rewire:
            await self._parts.quarters.rewire(self._record)
            self.must_rewire = False

    async def tidy(self) -> Machine:
        """Remove what it should not have, if it rests."""
        if self._record.phase in (Phase.STOPPED, Phase.FAILED):
            await self._parts.quarters.vacate(self._record, keep_disk=True)
        return self._record

    # -- stop, delete, exit -----------------------------------------------------------------------------------------

    async def stop(self, order: Stop) -> Machine:
        """End its VMM in order, and keep its disk."""
        machine = await self._parts.journal.begin_stop(self._record.id, order.fence, on_commit=self.commit)
        match machine.phase:
            case Phase.RUNNING | Phase.PAUSED:
                await self._held.shut_down()
                return await self._finish_stop()
            case Phase.FAILED:
                stopped = msgspec.structs.replace(machine, phase=Phase.STOPPED)
                return await self._parts.journal.observe(stopped, "vacated", on_commit=self.commit)
            case Phase.STOPPED:
                return machine
            case Phase.CREATING | Phase.DELETING:
                raise WrongState(id=machine.id, state=machine.phase.value, wanted="wait until that is done")

    async def _finish_stop(self) -> Machine:
        self._parts.fault.reached("stop.killed")
        await self._parts.quarters.vacate(self._record, keep_disk=True)
        stopped = msgspec.structs.replace(self._record, phase=Phase.STOPPED, error="")
        return await self._parts.journal.finish(stopped, "stop", "done", on_commit=self.commit)

    async def delete(self) -> Machine:
        """The intent is in the journal: end its VMM at once and remove everything."""
        await self._held.kill()
        self._parts.fault.reached("delete.killed")
        await self._parts.quarters.vacate(self._record, keep_disk=False)
        self._parts.fault.reached("delete.vacated")
        await self._parts.journal.forget(
            self._record.id, "delete", "gone", on_commit=lambda _none: self._end(self._record)
        )
        return self._record

    async def note_exit(self, vmm: Vmm, reason: str) -> Machine:
        """Its VMM has ended by itself, if it is still the one that it has."""
        if vmm is self._held.vmm:
            await self._note_exit(reason)
        return self._record

    async def _note_exit(self, reason: str) -> None:
        """The VMM has ended by itself: say so at once, then free what the run occupied. The disk stays."""
        self._seen_end = (self._record.vmm, reason)
        await self._held.release()
        phase = Phase.STOPPED if reason in ORDERLY else Phase.FAILED
        seen = msgspec.structs.replace(self._record, phase=phase, error=reason)
        await self._parts.journal.observe(seen, "seen", on_commit=self.commit)
        self._parts.metrics.exits.inc()
        self._log.warning("machine_exited", reason=reason, phase=phase.value)
        await self._vacate()

    async def _vacate(self) -> None:
        """Free what a run has occupied that nobody ordered to end."""
        async with asyncio.timeout(CLEAN_UP_TIMEOUT_S):
            await self._parts.quarters.vacate(self._record, keep_disk=True)
        await self._parts.journal.observe(self._record, "vacated", on_commit=self.commit)

    # -- after a restart, or a failure ------------------------------------------------------------------------------

    async def recover(self) -> None:
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

    async def _finish(self, operation: Operation | None) -> Machine:
        if operation is None:
            return await self._resume()
        match operation.kind:
            case "delete":
                return await self.delete()
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
                return await finish_resize(self._record, self._parts, self.commit)
            case "visit":
                return await end_visit(self._record, self._parts, self.commit)
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
                await self._work.undo_restore(self._record, self.commit)
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

    # -- the record -------------------------------------------------------------------------------------------------

    def commit(self, machine: Machine) -> None:
        """The journal has this record now."""
        has_changed = machine.phase is not self._record.phase
        self._record = machine
        if machine.phase not in (Phase.RUNNING, Phase.PAUSED):
            self.must_rewire = False  # its next run is connected as the record says
        if has_changed:
            self._parts.events.publish(machine)

    def _end(self, machine: Machine) -> None:
        """The journal has no record any more."""
        self._is_gone = True
        self._parts.events.publish(machine, kind="gone")

    def interruption(self) -> Error:
        """What callers hear whose order was cancelled."""
        if self._record.phase is not Phase.DELETING:
            return ShuttingDown()
        fence = self._record.fence
        return StaleIncarnation(uid=fence.uid, incarnation=fence.incarnation, seen=fence.incarnation)
