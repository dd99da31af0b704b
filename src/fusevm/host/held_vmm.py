"""The VMM of a machine, as the machine's task holds it: adopted, watched until it ends, asked to end, killed.

Owns: the VMM and the connections to its agent. Must not: know the journal, or what the end of a VMM means.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from fusevm.host.agent import ask_shutdown
from fusevm.host.channel import AgentClient
from fusevm.host.surroundings import Surroundings
from fusevm.host.tasks import CLEAN_UP_TIMEOUT_S
from fusevm.host.vmm.driver import Vmm
from fusevm.host.vmm.exit_reason import HOST_REBOOTED, explain_absence
from fusevm.model.errors import Error
from fusevm.model.machine import Machine

log = structlog.get_logger()

#: How long a guest may take to end in order. Its agent waits 1.2 s for processes (guest/internal/machine/ending.go);
#: the rest is for a guest that has much to write back, or whose processors are emulated.
SHUTDOWN_GRACE_S = 10.0
#: How long an adopted VMM may take to be taken over, and its guest to say who it is.
ADOPTION_TIMEOUT_S = 10.0


class HeldVmm:
    """At most one VMM at a time. `tell_end` hears of a VMM that ends by itself while it is held, and why."""

    def __init__(self, machine_id: str, parts: Surroundings, tell_end: Callable[[Vmm, str], None]) -> None:
        self._id = machine_id
        self._parts = parts
        self._tell_end = tell_end
        self._vmm: Vmm | None = None
        #: Connections to the agent of the VMM above; they break with it.
        self._agent: AgentClient | None = None
        self._watch: asyncio.Task[None] | None = None
        #: Within which it is watched.
        self.group: asyncio.TaskGroup | None = None

    @property
    def vmm(self) -> Vmm | None:
        """The VMM; None: the machine has none, or it is not known yet."""
        return self._vmm

    @property
    def agent(self) -> AgentClient | None:
        """Its guest's agent; None without a VMM."""
        return self._agent if self._vmm is not None else None

    def adopt(self, vmm: Vmm) -> None:
        """The VMM is the machine's from here on."""
        self._vmm = vmm
        self._agent = AgentClient(vmm.open_stream)
        if self.group is not None:
            self._watch = self.group.create_task(self._watch_exit(vmm), name=f"watch {self._id}")

    async def find(self, machine: Machine) -> Vmm | None:
        """Adopt the VMM of a machine's record, if exactly that process still lives. TimeoutError, Error."""
        if self._vmm is not None:
            return self._vmm
        lodging = await self._parts.quarters.rejoin(machine)
        if machine.vmm is None:
            return None
        async with asyncio.timeout(ADOPTION_TIMEOUT_S):
            vmm = await self._parts.driver.adopt(lodging.plan, machine.vmm)
        if vmm is not None:
            self.adopt(vmm)
        return vmm

    async def shut_down(self) -> None:
        """Let the guest end in order; kill what does not."""
        vmm = self._vmm
        if vmm is None:
            return
        try:
            async with asyncio.timeout(SHUTDOWN_GRACE_S):
                await ask_shutdown(vmm)
                await vmm.wait_exit()
        except (TimeoutError, ConnectionError, Error) as e:
            log.info("guest_not_shut_down", machine=self._id, problem=str(e) or "it took too long")
        await self.kill()

    async def kill(self) -> None:
        """End it now. It is held until it is gone."""
        vmm = self._vmm
        if vmm is None:
            return
        async with asyncio.timeout(CLEAN_UP_TIMEOUT_S):
            await vmm.kill()
        self._vmm = None
        self.stop_watching()
        await vmm.close()

    async def release(self) -> None:
        """Let go of it: it runs on, or has ended."""
        vmm, self._vmm = self._vmm, None
        if vmm is not None:
            await vmm.close()

    def stop_watching(self) -> None:
        """Nobody is told of its end any more."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def _watch_exit(self, vmm: Vmm) -> None:
        try:
            reason = await vmm.wait_exit()
        except ConnectionError:
            return  # it was let go
        self._tell_end(vmm, reason)


def was_rebooted(machine: Machine, parts: Surroundings) -> bool:
    """Tell whether the VMM of a record was of an earlier boot of the host."""
    return machine.vmm is not None and machine.vmm.boot_id != parts.boot_id()


async def why_gone(machine: Machine, parts: Surroundings) -> str:
    """Nobody has seen its VMM end: what it has left is all that tells."""
    if was_rebooted(machine, parts):
        return HOST_REBOOTED
    left = await parts.quarters.remains(machine.id)
    return explain_absence(left.console, is_out_of_memory=left.is_out_of_memory, is_disk_clean=left.is_disk_clean)
