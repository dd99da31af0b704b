"""All machines of the host: finds the task that an order is for, makes and ends tasks.

An order that was accepted is carried out even if its caller goes away. Orders are accepted by the journal (fence,
admission, intent in one transaction); the commit's callback hands the machine to its task before anything else runs,
so that journal and tasks agree at every moment.

Owns: the tasks. Must not: do what tasks do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import structlog

from fusevm.host.admission import Size
from fusevm.host.channel import AgentClient
from fusevm.host.disk.grow import check_size
from fusevm.host.drift import Claim, claim_of
from fusevm.host.fencing import check_owner, check_reserved
from fusevm.host.machine import MachineTask
from fusevm.host.mailbox import Delete, Publish, SetNetwork, Unpublish
from fusevm.host.port_rows import PortDraft
from fusevm.host.quarantine import Quarantine
from fusevm.host.rewiring import check_enforceable, check_spec_network
from fusevm.host.rows import Draft, Entry
from fusevm.host.snapshots.record import HostSnapshot, check_ready, seed_of
from fusevm.host.surroundings import Blueprint, Surroundings
from fusevm.model.errors import BadField, GuestUnreachable, MachineNotFound, ShuttingDown, SnapshotMismatch
from fusevm.model.fencing import check_valid
from fusevm.model.ids import parse_machine_id, parse_published_port_id, parse_snapshot_id
from fusevm.model.machine import Contract, Fence, Machine, MachineSpec, Phase
from fusevm.model.network import Network, PublishedPort, check_exposures, check_network
from fusevm.wire.host_api import CreateMachine

T = TypeVar("T")

log = structlog.get_logger()

#: Bounds of a create; the control plane has narrower ones.
_MAX_CPUS = 32
_MIN_MEMORY_MIB = 64
_MIN_DISK_BYTES = 16 << 20
_MAX_BOOT_TIMEOUT_MS = 600_000
#: A create that comes while an earlier attempt is being undone begins anew this often.
_ATTEMPTS = 3
DEFAULT_BOOT_TIMEOUT_MS = 60_000


class Machines:
    """The machines of one daemon. Use within `running`."""

    def __init__(self, parts: Surroundings) -> None:
        self._parts = parts
        self._tasks: dict[str, MachineTask] = {}
        self._group: asyncio.TaskGroup | None = None
        #: Everything that runs in the group.
        self._children: set[asyncio.Task[None]] = set()
        self._is_closing = False

    @asynccontextmanager
    async def running(self, entries: list[Entry]) -> AsyncIterator[None]:
        """Take up what the journal has, and carry out orders. At the end VMMs are let go of; they run on."""
        failure: Exception | None = None
        async with asyncio.TaskGroup() as self._group:
            for entry in entries:
                self._take_up(entry)
            try:
                yield
            except Exception as e:  # noqa: BLE001 - raised below as it is, not in the group's wrapping
                failure = e
            finally:
                self._is_closing = True
                for child in list(self._children):
                    child.cancel()
        if failure is not None:
            raise failure

    # -- reading ----------------------------------------------------------------------------------------------------

    def records(self) -> list[Machine]:
        """Every machine, oldest first."""
        live = [task.record for task in self._tasks.values() if not task.is_gone]
        return sorted(live, key=lambda machine: (machine.created_at_ms, machine.id))

    def record(self, machine_id: str) -> Machine:
        """One machine. Raises MachineNotFound."""
        return self._find(machine_id).record

    def owned(self, machine_id: str, fence: Fence | None) -> Machine:
        """One machine, for whoever may use it. Raises MachineNotFound, and for the fence."""
        machine = self.record(machine_id)
        check_reserved(fence)
        check_owner(machine, fence)
        return machine

    def ids(self) -> set[str]:
        """Ids of every machine of which anything may exist."""
        return {machine_id for machine_id, task in self._tasks.items() if not task.is_gone}

    def claims(self) -> dict[str, Claim]:
        """What every machine must and may have on the host, as of now."""
        live = {machine_id: task for machine_id, task in self._tasks.items() if not task.is_gone}
        return {machine_id: claim_of(task.record, is_quiet=task.is_quiet) for machine_id, task in live.items()}

    def quarantined(self) -> dict[str, Quarantine]:
        """Machines of which something is open that has failed."""
        live = {machine_id: task.quarantine for machine_id, task in self._tasks.items() if not task.is_gone}
        return {machine_id: state for machine_id, state in live.items() if state is not None}

    async def guest(self, machine_id: str, fence: Fence | None) -> AgentClient:
        """Return the agent of a running machine. Raises MachineNotFound, WrongState, and for the fence.

        What has a limit is an order of the control plane, and is judged and remembered like one about the machine.
        """
        self.owned(machine_id, fence)
        task = self._find(machine_id)
        agent = await task.guest()
        if fence is not None and fence.valid_until is not None:
            self.check_valid(fence)
            await task.note_order(fence)
        return agent

    @asynccontextmanager
    async def files(self, machine_id: str, fence: Fence | None) -> AsyncIterator[AgentClient]:
        """The agent of a machine's files, whether it runs or rests. Raises what `guest` raises, and HostFull."""
        if self.owned(machine_id, fence).phase not in (Phase.STOPPED, Phase.FAILED):
            yield await self.guest(machine_id, fence)
            return
        async with self._find(machine_id).visit() as agent:
            yield agent

    def check_valid(self, fence: Fence) -> None:
        """Raise OrderExpired for an order that is too late."""
        check_valid(fence, self._parts.clock.moment())

    # -- orders -----------------------------------------------------------------------------------------------------

    async def create(self, body: CreateMachine, fence: Fence | None, contract: Contract | None = None) -> Machine:
        """Make a machine and return it when its agent is configured. Idempotent by (uid, incarnation).

        With `contract` it is one of computer-host's API: never a repetition, and one whose guest does not get ready
        stays, as failed.

        Raises BadField, ImageNotFound, HostFull, NoSpace, MachineExists, StaleIncarnation, StaleAction, OrderExpired,
        WrongCluster, BootFailed (then nothing is left).
        """
        parse_machine_id(body.machine_id)
        check_spec(body.spec)
        body = msgspec.structs.replace(body, spec=check_spec_network(body.spec))
        if not 0 < body.boot_timeout_ms <= _MAX_BOOT_TIMEOUT_MS:
            raise BadField(field="boot_timeout_ms", problem=f"must be 1 to {_MAX_BOOT_TIMEOUT_MS}")
        check_reserved(fence)
        return await self._protect(self._create(body, fence, contract))

    async def start(self, machine_id: str, fence: Fence | None) -> Machine:
        """Boot a stopped machine with its disk; one that runs is returned. Raises WrongState, HostFull, BootFailed."""
        check_reserved(fence)
        return await self._protect(self._find(machine_id).start(fence, DEFAULT_BOOT_TIMEOUT_MS))

    async def stop(self, machine_id: str, fence: Fence | None) -> Machine:
        """End a machine in order and keep its disk. Idempotent."""
        check_reserved(fence)
        return await self._protect(self._find(machine_id).stop(fence))

    async def set_network(self, machine_id: str, fence: Fence | None, network: Network) -> Machine:
        """Hold a machine to another policy. Raises BadField, PolicyNotEnforceable, and for the fence."""
        check_reserved(fence)
        order = SetNetwork(fence, check_network(network))
        return await self._protect(self._find(machine_id).rewire(order))

    async def publish(self, machine_id: str, fence: Fence | None, draft: PortDraft) -> PublishedPort:
        """Publish a port of a running machine. Idempotent by the port's id.

        Raises BadField, WrongState, HostPortTaken, PublishedPortExists, HostFull, PolicyNotEnforceable.
        """
        check_reserved(fence)
        (exposure,) = check_exposures([draft.exposure])
        order = Publish(fence, PortDraft(id=parse_published_port_id(draft.id), exposure=exposure))
        machine = await self._protect(self._find(machine_id).rewire(order))
        return next(port for port in machine.ports if port.id == draft.id)

    async def unpublish(self, machine_id: str, fence: Fence | None, port_id: str) -> None:
        """Take a published port back. Idempotent. Raises BadField for one of another machine."""
        check_reserved(fence)
        task = self._find(machine_id)
        await self._protect(task.rewire(Unpublish(fence, parse_published_port_id(port_id))))

    async def take_snapshot(self, machine_id: str, snapshot_id: str, fence: Fence | None) -> HostSnapshot:
        """Copy a machine's disk at one moment. Raises what `DiskWork.take` raises."""
        return await self._protect(self._find(machine_id).take_snapshot(fence, snapshot_id))

    async def restore(self, machine_id: str, snapshot_id: str, fence: Fence | None) -> Machine:
        """Put a snapshot's disk in place of the machine's and start it. Raises what `DiskWork.begin_restore` raises."""
        check_reserved(fence)
        return await self._protect(self._find(machine_id).restore(fence, snapshot_id, DEFAULT_BOOT_TIMEOUT_MS))

    async def tidy(self, machine_id: str) -> None:
        """Remove what a machine at rest should not have. Raises MachineNotFound, and what the removal raises."""
        await self._protect(self._find(machine_id).tidy())

    async def resize(self, machine_id: str, fence: Fence | None, size: Size) -> Machine:
        """Give a machine more memory or a larger disk. What runs is stopped for it. Raises WrongState, HostFull."""
        check_reserved(fence)
        if size.memory_mib and size.memory_mib < _MIN_MEMORY_MIB:
            raise BadField(field="memory_mib", problem=f"must be at least {_MIN_MEMORY_MIB}")
        check_size(size.disk_bytes)
        return await self._protect(self._find(machine_id).resize(fence, size))

    async def delete(self, machine_id: str, fence: Fence | None) -> None:
        """Remove a machine, whatever it is doing, and remember that. Idempotent."""
        parse_machine_id(machine_id)
        check_reserved(fence)
        await self._protect(self._delete(machine_id, fence))

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _create(self, body: CreateMachine, fence: Fence | None, contract: Contract | None) -> Machine:
        parts = self._parts
        for _attempt in range(_ATTEMPTS):
            deadline_ms = parts.clock.now_ms() + body.boot_timeout_ms
            draft = msgspec.structs.replace(await self._draft(body, fence, deadline_ms), contract=contract)

            def commit(machine: Machine, deadline_ms: int = deadline_ms) -> None:
                if machine.id not in self.ids():
                    self._spawn(machine).begin_create(deadline_ms)

            limits = await parts.quarters.limits()
            began_ms = parts.clock.monotonic_ms()
            machine = await parts.journal.begin_create(draft, fence, limits, parts.quarters.numbers(), commit)
            parts.metrics.note_phases({"reserve": (parts.clock.monotonic_ms() - began_ms) / 1000})
            task = self._tasks.get(machine.id)
            if task is None:
                continue
            made = await task.wait_created()
            if not task.is_gone:
                return made
        raise GuestUnreachable(id=body.machine_id, problem="earlier attempts are still being cleaned up")

    async def _draft(self, body: CreateMachine, fence: Fence | None, deadline_ms: int) -> Draft:
        snapshot = await self._snapshot(body, fence)
        blueprint = await self._blueprint(body, snapshot)
        check_enforceable(body.spec.network, blueprint.isolation)
        return Draft(
            id=body.machine_id,
            spec=body.spec,
            image_digest=blueprint.image_digest,
            kernel_digest=blueprint.kernel_digest,
            driver=blueprint.driver,
            isolation=blueprint.isolation,
            nonce=self._parts.clock.entropy(16).hex(),
            deadline_ms=deadline_ms,
            seed=seed_of(snapshot) if snapshot is not None else None,
            seed_bytes=await self._parts.disks.seed_bytes(snapshot.id) if snapshot is not None else 0,
        )

    async def _snapshot(self, body: CreateMachine, fence: Fence | None) -> HostSnapshot | None:
        """The snapshot that the machine's disk begins with. Raises SnapshotNotFound, WrongCluster, SnapshotMismatch."""
        if not body.snapshot_id:
            return None
        cluster = fence.cluster if fence is not None else ""
        snapshot = await self._parts.ledger.owned(parse_snapshot_id(body.snapshot_id), cluster)
        check_ready(snapshot)
        if snapshot.disk_bytes > body.spec.disk_bytes:
            problem = f"its disk has {snapshot.disk_bytes} bytes, the machine would have {body.spec.disk_bytes}"
            raise SnapshotMismatch(id=snapshot.id, problem=problem)
        return snapshot

    async def _blueprint(self, body: CreateMachine, snapshot: HostSnapshot | None) -> Blueprint:
        """What the machine is made of; a repeated create must not fail because the image has gone since."""
        known = self._tasks.get(body.machine_id)
        if known is None or known.is_gone:
            # The disk of a snapshot fits the image that it was above, whatever the image's name means by now.
            image = body.spec.image if snapshot is None else snapshot.image_digest
            return await self._parts.quarters.resolve(msgspec.structs.replace(body.spec, image=image))
        record = known.record
        return Blueprint(
            image_digest=record.image_digest,
            kernel_digest=record.kernel_digest,
            driver=record.driver,
            isolation=record.isolation,
        )

    async def _delete(self, machine_id: str, fence: Fence | None) -> None:
        orders: list[Delete] = []

        def commit(machine: Machine | None) -> None:
            if machine is not None:
                task = self._tasks.get(machine_id) or self._spawn(machine)
                orders.append(task.begin_delete(machine))

        await self._parts.journal.begin_delete(machine_id, fence, commit)
        for order in orders:
            await order.wait()

    def _find(self, machine_id: str) -> MachineTask:
        task = self._tasks.get(parse_machine_id(machine_id))
        if task is None or task.is_gone:
            raise MachineNotFound(id=machine_id)
        return task

    def _take_up(self, entry: Entry) -> None:
        """Begin the task of a machine that an earlier daemon made."""
        task = self._spawn(entry.machine)
        if entry.damage:
            log.error("record_damaged", machine=entry.machine.id, problem=entry.damage)
            task.isolate(entry.machine.error)
        if entry.operation is not None or not entry.damage:
            task.recover()

    def _spawn(self, machine: Machine) -> MachineTask:
        task = self._tasks[machine.id] = MachineTask(machine, self._parts)
        self._parts.events.publish(machine)
        self._begin(self._keep_running(task), name=f"machine {machine.id}")
        return task

    async def _keep_running(self, task: MachineTask) -> None:
        """Run a machine's task; a bug in it costs this machine a restart of its task and no other machine anything.

        Whatever is logged within is about this machine, and about no request: not the one that it was made in either.
        """
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(machine=task.record.id, uid=task.record.fence.uid)
        try:
            while not task.is_gone:
                await self._run_once(task)
        finally:
            task.end()
        if self._tasks.get(task.record.id) is task:
            del self._tasks[task.record.id]

    async def _run_once(self, task: MachineTask) -> None:
        try:
            await task.run()
        except Exception as e:
            log.exception("machine_task_crashed", machine=task.record.id)
            await asyncio.sleep(task.note_crash(f"{type(e).__name__}: {e}"))
            task.recover()

    async def _protect(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to its end even if the caller is cancelled."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def end(_child: object) -> None:
            # A task that is cancelled before it has begun never runs.
            work.close()
            _fail(outcome, ShuttingDown())

        try:
            self._begin(_run_into(outcome, work), name="order").add_done_callback(end)
        except ShuttingDown:
            work.close()
            raise
        return await asyncio.shield(outcome)

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        if self._group is None or self._is_closing:
            work.close()
            raise ShuttingDown
        child = self._group.create_task(work, name=name)
        self._children.add(child)
        child.add_done_callback(self._children.discard)
        return child


def check_spec(spec: MachineSpec) -> None:
    """Raise BadField for a machine that cannot be."""
    if not 1 <= spec.cpus <= _MAX_CPUS:
        raise BadField(field="spec.cpus", problem=f"must be 1 to {_MAX_CPUS}")
    if spec.memory_mib < _MIN_MEMORY_MIB:
        raise BadField(field="spec.memory_mib", problem=f"must be at least {_MIN_MEMORY_MIB}")
    if spec.disk_bytes < _MIN_DISK_BYTES:
        raise BadField(field="spec.disk_bytes", problem=f"must be at least {_MIN_DISK_BYTES}")
    if not spec.image:
        raise BadField(field="spec.image", problem="must name an image")
    if spec.hostname:
        _check_hostname(spec.hostname)
    for name in spec.env:
        if not name or "=" in name or "\0" in name or "\0" in spec.env[name]:
            raise BadField(field="spec.env", problem=f"{name[:80]!r} is no name of an environment variable")


def _check_hostname(text: str) -> None:
    """RFC 1123: it becomes a word of the kernel's command line, so nothing else may get through."""
    labels = text.split(".")
    is_good = len(text) <= 63 and all(
        label and label.isascii() and label.replace("-", "a").isalnum() and label[0] != "-" and label[-1] != "-"
        for label in labels
    )
    if not is_good:
        raise BadField(field="spec.hostname", problem=f"{text[:80]!r} is no host name")


async def _run_into(outcome: asyncio.Future[T], work: Coroutine[Any, Any, T]) -> None:
    """Run `work`; its outcome, good or bad, is the future's."""
    try:
        value = await work
    except asyncio.CancelledError:
        _fail(outcome, ShuttingDown())
        raise
    except Exception as e:  # noqa: BLE001 - raised to whoever waits; logged by the boundary of the API
        _fail(outcome, e)
    else:
        if not outcome.done():
            outcome.set_result(value)


def _fail(outcome: asyncio.Future[Any], error: Exception) -> None:
    if not outcome.done():
        outcome.set_exception(error)
        outcome.exception()  # the caller may have gone away
