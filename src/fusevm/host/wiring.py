"""How a machine is wired to the network: a slot of the pool as root, QEMU's user network otherwise.

Owns: the translation between machines and slots. Must not: know how slots are made (`host.net`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from fusevm.host.net.network import HostNetwork
from fusevm.host.net.plan import NetworkPlan, Slot, plan_slot, render_kernel_arguments
from fusevm.host.net.rootless import render_user_kernel_arguments, render_user_network
from fusevm.host.net.tap import open_tap
from fusevm.host.rows import Numbers
from fusevm.host.vmm.driver import Nic
from fusevm.model.errors import Error
from fusevm.model.machine import Isolation, Machine
from fusevm.model.network import Network

log = structlog.get_logger()

#: Ready slots that are offered to the journal.
_OFFERED = 16


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """One machine's connection."""

    nic: Nic | None
    #: `fuse.ip=... fuse.dns=...`
    kernel_arguments: str = ""
    #: Address by which the host reaches the machine; empty without one.
    address: str = ""
    nameservers: tuple[str, ...] = ()

    def close(self) -> None:
        """Close what the VMM has inherited. Once."""
        if self.nic is not None and self.nic.tap_fd is not None:
            os.close(self.nic.tap_fd)


class Wiring(Protocol):
    """Connects machines."""

    @property
    def isolation(self) -> Isolation: ...

    async def open(self, machines: Mapping[int, Network]) -> None:
        """Take the network over; these slots are in use."""
        ...

    async def connect(self, machine: Machine) -> Wire:
        """Connect a machine that has a slot, for a VMM that will be started. The caller closes the wire."""
        ...

    async def rejoin(self, machine: Machine) -> Wire:
        """Serve a machine whose VMM runs already."""
        ...

    async def disconnect(self, machine: Machine) -> None:
        """Take the slot back; the VMM has ended. Idempotent."""
        ...

    def numbers(self) -> Numbers:
        """Slots that a machine may get."""
        ...

    async def close(self) -> None:
        """Stop serving; everything stays as it is."""
        ...


class SlotWiring:
    """Machines in network namespaces of their own."""

    isolation = Isolation.NAMESPACE

    def __init__(self, plan: NetworkPlan, network: HostNetwork) -> None:
        self._plan = plan
        self.network = network

    async def open(self, machines: Mapping[int, Network]) -> None:
        """Take the slots over. One that cannot be finished costs its machine the network, not the daemon its start."""
        failures = await self.network.open(machines)
        for slot, failure in failures.items():
            log.error("slot_not_taken_over", slot=slot, problem=str(failure))

    async def connect(self, machine: Machine) -> Wire:
        """Acquire the machine's slot, open its tap and serve its DNS."""
        slot = await self.network.acquire(machine.slot, machine.spec.network)
        try:
            await self.network.serve_dns(slot)
            return self._wire(slot, tap_fd=await open_tap(slot.namespace_path, slot.tap))
        except BaseException:
            await self.network.release(machine.slot)
            raise

    async def rejoin(self, machine: Machine) -> Wire:
        """Serve its DNS again."""
        slot = plan_slot(self._plan, machine.slot)
        try:
            await self.network.serve_dns(slot)
        except (Error, OSError) as e:
            # The machine runs on without names rather than not at all; the sweep tries again.
            log.warning("dns_not_served", machine=machine.id, slot=machine.slot, problem=str(e))
        return self._wire(slot)

    async def disconnect(self, machine: Machine) -> None:
        """Release the slot."""
        if machine.slot >= 0:
            await self.network.release(machine.slot)

    def numbers(self) -> Numbers:
        """Warm slots first."""
        warm = tuple(itertools.islice(self.network.candidates(), _OFFERED))
        return Numbers(warm_slots=warm, slot_count=self._plan.capacity)

    async def close(self) -> None:
        """Let the slots be."""
        await self.network.close()

    def _wire(self, slot: Slot, tap_fd: int | None = None) -> Wire:
        return Wire(
            nic=Nic(tap_fd=tap_fd, mac=slot.guest_mac, netns=Path(slot.namespace_path)),
            kernel_arguments=render_kernel_arguments(slot),
            address=slot.address,
            nameservers=(slot.gateway,),
        )


class UserWiring:
    """Machines behind QEMU's user network, for a daemon without root."""

    isolation = Isolation.USER_NETWORK

    def __init__(self, *, user_network: bool) -> None:
        self._is_open = user_network

    async def open(self, machines: Mapping[int, Network]) -> None:
        """Nothing to take over."""

    async def connect(self, machine: Machine) -> Wire:
        """Render QEMU's argument."""
        return self._wire(machine)

    async def rejoin(self, machine: Machine) -> Wire:
        """The same argument again."""
        return self._wire(machine)

    async def disconnect(self, machine: Machine) -> None:
        """Nothing is held."""

    def numbers(self) -> Numbers:
        """A machine needs none."""
        return Numbers()

    async def close(self) -> None:
        """Nothing is served."""

    def _wire(self, machine: Machine) -> Wire:
        options = render_user_network(forwards={}, internet=machine.spec.network.internet, user_network=self._is_open)
        return Wire(nic=Nic(user_network=options), kernel_arguments=render_user_kernel_arguments())
