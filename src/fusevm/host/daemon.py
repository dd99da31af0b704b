"""The running daemon: what the API asks, and what happens by itself.

Owns: the parts that live as long as the process, and the loop that sweeps. Must not: know HTTP, or build its own parts
(`main` does).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from fusevm import __version__
from fusevm.host.admission import render_admission, render_capacity, render_reserved
from fusevm.host.agent import run_command
from fusevm.host.channel import AgentClient
from fusevm.host.config import HostConfig
from fusevm.host.contract.create import Importer
from fusevm.host.events import EventHub
from fusevm.host.image_service import ImageService
from fusevm.host.journal import Journal
from fusevm.host.machines import Machines
from fusevm.host.metrics import Metrics
from fusevm.host.net.traffic import Traffic
from fusevm.host.render import render_time
from fusevm.host.rows import Entry
from fusevm.host.snapshots.keeper import SnapshotKeeper
from fusevm.host.storage import observe_storage
from fusevm.host.surroundings import Surroundings
from fusevm.host.sweep import Sweeper
from fusevm.model.errors import Error
from fusevm.model.machine import Fence, Isolation, Machine, MachineSpec, Phase
from fusevm.wire.guest import ExecRequest, ExecResult
from fusevm.wire.host_api import HostFacts, StorageReport

log = structlog.get_logger()

#: Between sweeps, the interval varies by this part of it, so that hosts of a fleet do not march in step.
_JITTER = 0.1


class Identification(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while the daemon runs."""

    driver: str
    driver_reason: str
    isolation: Isolation
    arch: str
    kernel: str
    agent_version: str
    vmm_version: str = ""


class TrafficMeter(Protocol):
    """Counts what machines send and receive."""

    async def traffic(self) -> dict[int, Traffic]:
        """By network slot."""
        ...

    async def uses(self) -> dict[int, int]:
        """Seconds since clients last used published ports, by network slot."""
        ...


class Daemon:
    """Everything that serves requests. Use within `running`."""

    def __init__(
        self,
        config: HostConfig,
        parts: Surroundings,
        *,
        images: ImageService,
        artifacts: Importer,
        sweeper: Sweeper,
        machines: Machines,
        snapshots: SnapshotKeeper,
        identification: Identification,
        network: TrafficMeter | None = None,
    ) -> None:
        self.config = config
        self._parts = parts
        self.images = images
        self.artifacts = artifacts
        self._sweeper = sweeper
        self._identification = identification
        self.machines = machines
        self._network = network
        self.snapshots = snapshots

    @property
    def events(self) -> EventHub:
        return self._parts.events

    @property
    def metrics(self) -> Metrics:
        return self._parts.metrics

    @property
    def journal(self) -> Journal:
        return self._parts.journal

    @property
    def isolation(self) -> Isolation:
        """Of its machines."""
        return self._identification.isolation

    def entropy(self, size: int) -> bytes:
        """Fresh random bytes."""
        return self._parts.clock.entropy(size)

    @asynccontextmanager
    async def running(self, entries: list[Entry]) -> AsyncIterator[None]:
        """Take up the journal's machines, sweep, and keep sweeping. At the end VMMs run on."""
        async with self.snapshots.running(), self.machines.running(entries):
            await self._sweep(is_start=True)
            sweeping = asyncio.create_task(self._keep_sweeping(), name="sweep")
            try:
                yield
            finally:
                self.events.close()
                sweeping.cancel()
                await asyncio.wait({sweeping})

    async def facts(self) -> HostFacts:
        """What this host is and can take."""
        limits = await self._parts.quarters.limits()
        usage = await self.journal.usage()
        known = self._identification
        return HostFacts(
            version=__version__,
            epoch=self.events.epoch,
            clock=self._parts.clock.moment(),
            cluster=await self.journal.cluster(),
            arch=known.arch,
            driver=known.driver,
            driver_reason=known.driver_reason,
            isolation=known.isolation,
            capacity=render_capacity(limits),
            reserved=render_reserved(usage, limits),
            admission=render_admission(usage, limits),
            images=await self.images.names(),
            agent_version=known.agent_version,
            kernel=known.kernel,
            vmm_version=known.vmm_version,
        )

    async def traffic(self) -> dict[str, Traffic]:
        """What each machine with a network slot has sent and received since its start."""
        by_slot = await self._network.traffic() if self._network is not None else {}
        return {machine.id: by_slot[machine.slot] for machine in self.machines.records() if machine.slot in by_slot}

    async def uses(self) -> dict[str, int]:
        """Seconds since a client last sent something to a machine's published ports, where one has since its start."""
        machines = [machine for machine in self.machines.records() if machine.ports]
        if self._network is None or not machines:
            return {}
        try:
            by_slot = await self._network.uses()
        except (Error, OSError) as e:
            # Whoever asks takes what is not there for unused, and may end it.
            log.warning("use_unknown", problem=str(e))
            return {machine.id: 0 for machine in machines}
        return {machine.id: by_slot[machine.slot] for machine in machines if machine.slot in by_slot}

    async def render_metrics(self) -> bytes:
        """All metrics, as text."""
        try:
            self.metrics.note_traffic(await self.traffic())
        except (Error, OSError) as e:
            log.warning("traffic_not_counted", problem=str(e))
        return self.metrics.render()

    async def run_command(self, machine_id: str, fence: Fence | None, request: ExecRequest) -> ExecResult:
        """Run a command in a machine to its end. Cancelled: it is killed."""
        return await run_command(await self.machines.guest(machine_id, fence), request)

    async def guest(self, machine_id: str, fence: Fence | None) -> AgentClient:
        """The agent of a running machine, for whoever may use it now."""
        return await self.machines.guest(machine_id, fence)

    def console_log(self, machine_id: str, fence: Fence | None) -> tuple[Machine, Path]:
        """A machine and where its console is. Raises MachineNotFound, and for the fence."""
        machine = self.machines.owned(machine_id, fence)
        return machine, self.config.data_root / "machines" / machine_id / "console.log"

    def is_live(self, machine: Machine) -> bool:
        """May exactly this machine, and not a later one of its id, still say something?"""
        try:
            now = self.machines.record(machine.id)
        except Error:
            return False
        is_same = (now.fence.uid, now.fence.incarnation) == (machine.fence.uid, machine.fence.incarnation)
        return is_same and now.phase not in (Phase.STOPPED, Phase.FAILED)

    async def render_state(self) -> dict[str, Any]:
        """The journal, and what is observed beside it."""
        state = await self.journal.render_state()
        observed = {
            "epoch": self.events.epoch,
            "phases": {machine.id: machine.phase.value for machine in self.machines.records()},
            "drift": msgspec.to_builtins(self._sweeper.drift),
            "quarantine": msgspec.to_builtins(self.machines.quarantined()),
        }
        return {"journal": state, "observed": observed, "host": msgspec.to_builtins(await self.facts())}

    async def image_digest(self, name: str) -> str:
        """The digest of an image's name or digest. Raises ImageNotFound, ImageCorrupt."""
        return (await self._parts.quarters.resolve(MachineSpec(image=name))).image_digest

    async def observe_storage(self) -> StorageReport:
        """What takes how much of the disk."""
        now = render_time(self._parts.clock.now_ms())
        report = await asyncio.to_thread(observe_storage, self.config, now)
        published = sum(len(machine.ports) for machine in self.machines.records())
        return msgspec.structs.replace(report, published_ports=published)

    # -- by itself --------------------------------------------------------------------------------------------------

    async def _keep_sweeping(self) -> None:
        interval_s = self.config.sweep_interval_s
        while True:
            await asyncio.sleep(interval_s * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311 - spreads load
            await self._sweep(is_start=False)

    async def _sweep(self, *, is_start: bool) -> None:
        """Remove leftovers and expired fences. What fails is logged and tried again; it stops nothing else."""
        await _try("leftovers", self._remove_leftovers(is_start=is_start))
        await _try("snapshots", self.snapshots.tidy())
        await _try("fences", self.journal.purge())
        await _try("ballast", self.journal.ensure_ballast())
        await _try("images", self.images.relieve())

    async def _remove_leftovers(self, *, is_start: bool) -> None:
        began = time.monotonic()
        removed = await self._sweeper.sweep(is_start=is_start)
        self.metrics.note_sweep(self._sweeper.drift, removed, time.monotonic() - began)


async def _try(what: str, work: Awaitable[object]) -> None:
    try:
        await work
    except Exception:
        log.exception("sweep_failed", part=what)
