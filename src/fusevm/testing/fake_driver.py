"""A driver and quarters without a VMM: machines that exist in memory, with scripted delays and failures.

`FakeDriver` outlives the daemon that uses it, as real VMMs do: a second daemon adopts its machines. `FakeQuarters`
records who occupies what. Tests hold a step with `hold` and let it go with the event that this returns.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from fusevm.host.admission import Limits
from fusevm.host.rows import Numbers
from fusevm.host.surroundings import Blueprint, Lodging, Remains
from fusevm.host.vmm.driver import BootPlan, VmmGone
from fusevm.model.errors import BootFailed, Error, ImageNotFound
from fusevm.model.machine import Isolation, Machine, MachineSpec, VmmProcess
from fusevm.testing.fake_agent import FakeAgent, MemoryStream, memory_pair
from fusevm.testing.fake_disks import FakeDisks
from fusevm.testing.fake_files import FakeFiles
from fusevm.wire.guest import Configure

BOOT_ID = "00000000-0000-4000-8000-000000000000"
GUEST_SHUT_DOWN = "the guest shut down"


class Holds:
    """Named steps that wait until a test lets them go."""

    def __init__(self) -> None:
        self._held: dict[str, asyncio.Event] = {}
        self._reached: dict[str, asyncio.Event] = {}

    def hold(self, step: str) -> asyncio.Event:
        """Let everyone who comes to `step` wait for the returned event."""
        return self._held.setdefault(step, asyncio.Event())

    def reached(self, step: str) -> asyncio.Event:
        """Set when somebody has come to `step`."""
        return self._reached.setdefault(step, asyncio.Event())

    async def come_to(self, step: str) -> None:
        """Wait if the step is held."""
        self.reached(step).set()
        if step in self._held:
            await self._held[step].wait()


class FakeProcess:
    """A VMM process with its guest. Lives on when a daemon lets go of it."""

    def __init__(self, driver: FakeDriver, plan: BootPlan, identity: VmmProcess, nonce: str) -> None:
        self.driver = driver
        self.plan = plan
        self.identity = identity
        disk = driver.contents.setdefault(plan.machine_id, FakeFiles({}))
        self.agent = FakeAgent(nonce, lambda: self.end(GUEST_SHUT_DOWN), protocol=driver.protocol, disk=disk)
        self.exit_reason = ""
        self.is_paused = False
        self.ended = asyncio.Event()
        self.serving: set[asyncio.Task[None]] = set()

    def end(self, reason: str) -> None:
        """The process is no more, for this reason."""
        if not self.ended.is_set():
            self.exit_reason = reason
            self.driver.processes.pop(self.plan.machine_id, None)
            self.ended.set()
            self.agent.close()
            for task in self.serving:
                task.cancel()


async def _serve(agent: FakeAgent, stream: MemoryStream) -> None:
    try:
        await agent.serve(stream)
    finally:
        await stream.close()


class FakeVmm:
    """One daemon's hold on a fake process."""

    def __init__(self, running: FakeProcess) -> None:
        self._running = running
        self._let_go = asyncio.Event()

    @property
    def process(self) -> VmmProcess:
        """Identity of the process."""
        return self._running.identity

    async def open_stream(self) -> MemoryStream:
        """Connect to the agent."""
        await self._running.driver.holds.come_to("agent")
        if self._running.ended.is_set() or self._running.driver.is_mute:
            await self._running.ended.wait()
            raise ConnectionError("the VMM has gone")
        ours, theirs = memory_pair()
        serving = asyncio.create_task(_serve(self._running.agent, theirs), name="fake agent")
        self._running.serving.add(serving)
        serving.add_done_callback(self._running.serving.discard)
        return ours

    async def pause(self) -> None:
        """Stop; streams to the agent are not held up."""
        if self._running.ended.is_set():
            raise VmmGone(self._running.exit_reason)
        self._running.is_paused = True

    async def resume(self) -> None:
        """Go on."""
        if self._running.ended.is_set():
            raise VmmGone(self._running.exit_reason)
        self._running.is_paused = False

    async def wait_exit(self) -> str:
        """Wait for the end of the process, or for `close`."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._running.ended, self._let_go)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._running.ended.is_set():
            return self._running.exit_reason
        raise ConnectionError("the daemon let go of the VMM")

    async def kill(self) -> None:
        """End the process."""
        await self._running.driver.holds.come_to("kill")
        self._running.end("killed by the daemon")

    async def close(self) -> None:
        """Let go."""
        self._let_go.set()
        for task in list(self._running.serving):
            task.cancel()


class FakeDriver:
    """Starts fake processes."""

    name = "fake"

    def __init__(self) -> None:
        #: By machine id.
        self.processes: dict[str, FakeProcess] = {}
        #: What is on the machines' disks, by machine id.
        self.contents: dict[str, FakeFiles] = {}
        self.holds = Holds()
        #: Raised by the next boots.
        self.boot_error: Error | None = None
        #: The agent never answers.
        self.is_mute = False
        #: The guest repeats another nonce than it was given.
        self.is_impostor = False
        self.protocol = "1.2"
        self.boots = 0
        self._pids = itertools.count(4_000_001)

    async def boot(self, plan: BootPlan) -> FakeVmm:
        """Start a process."""
        self.boots += 1
        await self.holds.come_to("boot")
        if self.boot_error is not None:
            raise self.boot_error
        if plan.machine_id in self.processes:
            raise BootFailed(id=plan.machine_id, problem="it runs already")
        words = dict(word.partition("=")[::2] for word in plan.command_line.split())
        nonce = "impostor" if self.is_impostor else words["fuse.nonce"]
        identity = VmmProcess(pid=next(self._pids), start_ticks=1, boot_id=BOOT_ID)
        running = self.processes[plan.machine_id] = FakeProcess(self, plan, identity, nonce)
        return FakeVmm(running)

    async def adopt(self, plan: BootPlan, process: VmmProcess) -> FakeVmm | None:
        """Find a process that still runs."""
        running = self.processes.get(plan.machine_id)
        return FakeVmm(running) if running is not None and running.identity == process else None


class FakeQuarters:
    """Remembers who occupies what."""

    def __init__(self, driver: FakeDriver, root: Path, disks: FakeDisks | None = None) -> None:
        self._driver = driver
        #: The content, for tests that care.
        self._contents = disks
        self._root = root
        self.holds = Holds()
        #: Machine ids with a slot, cgroup and run directory; and with a disk.
        self.occupied: set[str] = set()
        self.disks: set[str] = set()
        self.prepare_error: Error | None = None
        #: Raised by that many calls of `vacate`.
        self.vacate_errors: list[Error] = []
        #: Raised by that many calls of `grow`; and the disks that have grown.
        self.grow_errors: list[Error] = []
        self.sizes: dict[str, int] = {}
        #: How often the disk of a machine at rest was opened.
        self.visits = 0
        #: Records as they were when the network was told of them, and what it answers.
        self.rewired: dict[str, Machine] = {}
        self.rewire_error: Error | None = None
        self.left = Remains()
        self.limits_now = Limits(
            max_machines=1000,
            cpus=16,
            cpu_ratio=4.0,
            memory_mib=64 << 10,
            overhead_mib=100,
            disk_bytes=1 << 40,
            disk_ratio=4.0,
            disk_free_bytes=1 << 40,
            disk_reserve_bytes=1 << 30,
        )

    async def prepare(self, machine: Machine, *, is_visit: bool = False) -> Lodging:
        """Occupy."""
        await self.holds.come_to("prepare")
        if self.prepare_error is not None:
            raise self.prepare_error
        if self._contents is not None:
            self._contents.make(machine)
        self.occupied.add(machine.id)
        self.disks.add(machine.id)
        if is_visit:
            self.visits += 1
        return self._lodging(machine)

    async def grow(self, machine: Machine) -> None:
        """Remember the size."""
        await self.holds.come_to("grow")
        if self.grow_errors:
            raise self.grow_errors.pop(0)
        self.sizes[machine.id] = machine.spec.disk_bytes

    async def rejoin(self, machine: Machine) -> Lodging:
        """Take over."""
        await self.holds.come_to("rejoin")
        return self._lodging(machine)

    async def rewire(self, machine: Machine) -> None:
        """Remember what the record says."""
        await self.holds.come_to("rewire")
        if self.rewire_error is not None:
            raise self.rewire_error
        self.rewired[machine.id] = machine

    async def vacate(self, machine: Machine, *, keep_disk: bool) -> None:
        """Give up, and end stray processes."""
        await self.holds.come_to("vacate")
        if self.vacate_errors:
            raise self.vacate_errors.pop(0)
        if machine.id in self._driver.processes:
            self._driver.processes[machine.id].end("killed as a stray")
        self.occupied.discard(machine.id)
        if not keep_disk:
            self.disks.discard(machine.id)
            self._driver.contents.pop(machine.id, None)
            if self._contents is not None:
                self._contents.remove(machine.id)

    async def resolve(self, spec: MachineSpec) -> Blueprint:
        """Every image exists but `missing`."""
        if spec.image == "missing":
            raise ImageNotFound(image=spec.image, known="every other name")
        name = spec.image.removeprefix("sha256:")
        return Blueprint(
            image_digest=f"sha256:{name}",
            kernel_digest="k",
            driver="fake",
            isolation=Isolation.NAMESPACE,
        )

    async def limits(self) -> Limits:
        """What the test says."""
        return self.limits_now

    def numbers(self) -> Numbers:
        """Plenty."""
        return Numbers(warm_slots=(2, 3), slot_count=1000, uid_base=200_000, uid_count=1000, ports=(20_000, 39_999))

    async def remains(self, machine_id: str) -> Remains:
        """What the test says."""
        del machine_id
        return self.left

    def _lodging(self, machine: Machine) -> Lodging:
        plan = BootPlan(
            machine_id=machine.id,
            cpus=machine.spec.cpus,
            memory_mib=machine.spec.memory_mib,
            kernel=self._root / "vmlinux",
            initramfs=self._root / "initramfs",
            command_line=f"fuse.nonce={machine.nonce}",
            run_dir=self._root / machine.id,
            console_log=self._root / f"{machine.id}.log",
        )
        return Lodging(plan=plan, address="10.0.0.2", configure=Configure(hostname=machine.spec.hostname))
