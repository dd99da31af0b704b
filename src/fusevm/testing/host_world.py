"""A host daemon without a host: real journal, real machine tasks, fake driver and quarters.

`World` is what outlives a daemon (directory, VMMs, quarters); `world.daemon()` is one run of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fusevm.host.clock import SystemClock
from fusevm.host.config import HostConfig
from fusevm.host.daemon import Daemon, Identification, TrafficMeter
from fusevm.host.events import EventHub, Subscription
from fusevm.host.faults import Fault, is_known
from fusevm.host.image_service import ImageService
from fusevm.host.images.fetch import FetchPolicy
from fusevm.host.images.store import ImageStore
from fusevm.host.journal import Journal
from fusevm.host.machines import Machines
from fusevm.host.metrics import Metrics
from fusevm.host.net.traffic import Traffic
from fusevm.host.snapshots.folders import SnapshotFolders
from fusevm.host.snapshots.keeper import SnapshotKeeper
from fusevm.host.snapshots.ledger import Ledger
from fusevm.host.surroundings import Surroundings
from fusevm.host.sweep import Sweeper
from fusevm.model.errors import Error
from fusevm.model.machine import Fence, Isolation, MachineSpec
from fusevm.testing.fake_disks import FakeDisks
from fusevm.testing.fake_driver import BOOT_ID, FakeDriver, FakeQuarters
from fusevm.wire.host_api import CreateMachine, MachineEvent

SPEC = MachineSpec(image="debian-12", memory_mib=256, disk_bytes=1 << 30, hostname="box", env={"A": "1"})


def fence(uid: str = "u1", incarnation: int = 1, action_seq: int = 1, cluster: str = "c1") -> Fence:
    """An order's fence."""
    return Fence(cluster=cluster, uid=uid, incarnation=incarnation, action_seq=action_seq)


def order(
    machine_id: str = "m-1", spec: MachineSpec = SPEC, boot_timeout_ms: int = 60_000, snapshot_id: str = ""
) -> CreateMachine:
    """The body of a create."""
    return CreateMachine(machine_id=machine_id, spec=spec, boot_timeout_ms=boot_timeout_ms, snapshot_id=snapshot_id)


class KnownPoints:
    """Remembers the kill points that `host.faults` does not list: nobody would kill a daemon there."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()

    def reached(self, point: str) -> None:
        """Called from the event loop and from the journal's thread."""
        if not is_known(point):
            self.unknown.add(point)


class FakeMeter:
    """Implements `host.daemon.TrafficMeter`: counts nothing, and is told when ports were used."""

    def __init__(self) -> None:
        #: Network slot to seconds since a client used a published port.
        self.used: dict[int, int] = {}
        #: Why they cannot be read.
        self.problem: Error | None = None
        #: How often it was asked for them.
        self.asked = 0

    async def traffic(self) -> dict[int, Traffic]:
        return {}

    async def uses(self) -> dict[int, int]:
        self.asked += 1
        if self.problem is not None:
            raise self.problem
        return dict(self.used)


class World:
    """What a restart of the daemon does not touch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.driver = FakeDriver()
        self.disks = FakeDisks(root, root / "data" / "snapshots")
        self.quarters = FakeQuarters(self.driver, root, self.disks)
        self.boot_id = BOOT_ID
        #: Where snapshots may be carried, and fetched from.
        self.policy = FetchPolicy()
        #: Of the next daemon.
        self.points = KnownPoints()
        self.fault: Fault = self.points
        #: Counts what machines send, for the next daemon.
        self.meter: TrafficMeter | None = None
        self.events: list[MachineEvent] = []

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[Daemon]:
        """One run of the daemon, ended in order."""
        clock, fault = SystemClock(), self.fault
        journal = await Journal.open(self.root / "data", fault, clock.now_ms)
        ledger, folders = Ledger(journal, clock.now_ms), SnapshotFolders(self.root / "data" / "snapshots")
        parts = Surroundings(
            journal=journal,
            ledger=ledger,
            quarters=self.quarters,
            disks=self.disks,
            snapshot_folders=folders,
            driver=self.driver,
            events=EventHub("epoch", clock.now_ms),
            metrics=Metrics(),
            clock=clock,
            fault=fault,
            boot_id=lambda: self.boot_id,
        )
        machines = Machines(parts)
        parts.metrics.watch_machines(machines, lambda: parts.events.subscribers)
        config = HostConfig(data_root=self.root / "data", run_dir=self.root / "run")
        images = ImageService(config, ImageStore(config.artefacts), journal, parts.metrics)
        daemon = Daemon(
            config,
            parts,
            images=images,
            artifacts=images.artifacts,
            sweeper=Sweeper([], machines.claims),
            machines=machines,
            snapshots=SnapshotKeeper(ledger, folders, machines, parts, self.policy),
            identification=Identification(
                driver="fake",
                driver_reason="for tests",
                isolation=Isolation.NAMESPACE,
                arch="amd64",
                kernel="6",
                agent_version="0",
            ),
            network=self.meter,
        )
        try:
            with parts.events.subscribe() as subscription:
                listening = asyncio.create_task(self._listen(subscription))
                async with daemon.running(await journal.entries()):
                    yield daemon
                await listening
        finally:
            await journal.close()
        if self.points.unknown:
            raise RuntimeError(f"kill points that are not in host.faults: {sorted(self.points.unknown)}")

    async def _listen(self, subscription: Subscription) -> None:
        while (event := await subscription.next()) is not None:
            self.events.append(event)

    @property
    def leftovers(self) -> tuple[set[str], set[str], set[str]]:
        """Everything that exists: processes, quarters, disks."""
        return set(self.driver.processes), set(self.quarters.occupied), set(self.quarters.disks)


NOTHING: tuple[set[str], set[str], set[str]] = (set(), set(), set())


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Let other tasks run until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition may be anything
            await asyncio.sleep(0.002)
