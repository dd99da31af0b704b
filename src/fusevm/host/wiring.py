"""How a machine is wired to the network: a slot of the pool as root, QEMU's user network otherwise.

Owns: the translation between machines and slots. Must not: know how slots are made (`host.net`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import structlog

from fusevm.host.net.network import HostNetwork
from fusevm.host.net.plan import NetworkPlan, Slot, plan_slot, render_kernel_arguments
from fusevm.host.net.rootless import render_user_kernel_arguments, render_user_network
from fusevm.host.net.tap import lend_tap, open_tap
from fusevm.host.net.terms import Terms, make_terms
from fusevm.host.ports import PortHolder, is_port_free
from fusevm.host.rows import Numbers
from fusevm.host.vmm.driver import Nic
from fusevm.model.errors import Error
from fusevm.model.machine import Isolation, Machine
from fusevm.model.network import PortRange

log = structlog.get_logger()

#: How a VMM comes to its tap: it inherits a descriptor, or opens it by name.
Taps = Literal["descriptor", "name"]
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

    async def open(self, machines: Mapping[int, Terms]) -> None:
        """Take the network over; these slots are in use."""
        ...

    async def connect(self, machine: Machine) -> Wire:
        """Connect a machine that has a slot, for a VMM that will be started. The caller closes the wire."""
        ...

    async def rejoin(self, machine: Machine) -> Wire:
        """Serve a machine whose VMM runs already."""
        ...

    async def rewire(self, machine: Machine) -> None:
        """Make policy and published ports of a connected machine what its record says. Idempotent."""
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


def terms_of(machine: Machine) -> Terms:
    """What the network grants a machine."""
    return make_terms(machine.spec.network, machine.ports)


class SlotWiring:
    """Machines in network namespaces of their own."""

    isolation = Isolation.NAMESPACE

    def __init__(self, plan: NetworkPlan, network: HostNetwork, ports: PortRange, *, taps: Taps = "descriptor") -> None:
        self._plan = plan
        self._ports = ports
        self._holder = PortHolder()
        self.network = network
        self._taps = taps

    async def open(self, machines: Mapping[int, Terms]) -> None:
        """Take the slots over. One that cannot be finished costs its machine the network, not the daemon its start."""
        failures = await self.network.open(machines)
        for slot, failure in failures.items():
            log.error("slot_not_taken_over", slot=slot, problem=str(failure))

    async def connect(self, machine: Machine) -> Wire:
        """Acquire the machine's slot, open its tap and serve its DNS. HostPortTaken if one of its ports is."""
        self._holder.hold_all(machine.id, machine.ports)
        try:
            slot = await self.network.acquire(machine.slot, terms_of(machine))
        except BaseException:
            self._holder.let_go(machine.id)
            raise
        try:
            await self.network.serve_dns(slot)
            return self._wire(slot, tap_fd=await self._prepare_tap(slot, machine))
        except BaseException:
            self._holder.let_go(machine.id)
            await self.network.release(machine.slot)
            raise

    async def rejoin(self, machine: Machine) -> Wire:
        """Serve its DNS and hold its ports again; the rules have been made from its record already."""
        self._holder.hold(machine.id, machine.ports)
        slot = plan_slot(self._plan, machine.slot)
        try:
            await self.network.serve_dns(slot)
        except (Error, OSError) as e:
            # The machine runs on without names rather than not at all; the sweep tries again.
            log.warning("dns_not_served", machine=machine.id, slot=machine.slot, problem=str(e))
        return self._wire(slot)

    async def rewire(self, machine: Machine) -> None:
        """Change the slot's terms. A port that another program has taken meanwhile is forwarded all the same."""
        self._holder.hold(machine.id, machine.ports)
        await self.network.set_terms(plan_slot(self._plan, machine.slot), terms_of(machine))

    async def disconnect(self, machine: Machine) -> None:
        """Release the slot."""
        self._holder.let_go(machine.id)
        if machine.slot >= 0:
            await self.network.release(machine.slot)

    def numbers(self) -> Numbers:
        """Warm slots first."""
        warm = tuple(itertools.islice(self.network.candidates(), _OFFERED))
        return Numbers(warm_slots=warm, slot_count=self._plan.capacity, ports=self._ports, is_port_free=is_port_free)

    async def close(self) -> None:
        """Let the slots be."""
        self._holder.close()
        await self.network.close()

    async def _prepare_tap(self, slot: Slot, machine: Machine) -> int | None:
        """Open the tap, or let the machine's user open it."""
        if self._taps == "descriptor":
            return await open_tap(slot.namespace_path, slot.tap)
        await lend_tap(slot.namespace_path, slot.tap, machine.uid)
        return None

    def _wire(self, slot: Slot, tap_fd: int | None = None) -> Wire:
        return Wire(
            nic=Nic(tap=slot.tap, tap_fd=tap_fd, mac=slot.guest_mac, netns=Path(slot.namespace_path)),
            kernel_arguments=render_kernel_arguments(slot),
            address=slot.address,
            nameservers=(slot.gateway,),
        )


class UserWiring:
    """Machines behind QEMU's user network, for a daemon without root."""

    isolation = Isolation.USER_NETWORK

    def __init__(self, *, user_network: bool, ports: PortRange) -> None:
        self._is_open = user_network
        self._ports = ports

    async def open(self, machines: Mapping[int, Terms]) -> None:
        """Nothing to take over."""

    async def connect(self, machine: Machine) -> Wire:
        """Render QEMU's argument."""
        return self._wire(machine)

    async def rejoin(self, machine: Machine) -> Wire:
        """The same argument again."""
        return self._wire(machine)

    async def rewire(self, machine: Machine) -> None:
        """QEMU was told everything when it was started; `rewiring` refuses changes."""

    async def disconnect(self, machine: Machine) -> None:
        """Nothing is held: QEMU has bound the ports itself."""

    def numbers(self) -> Numbers:
        """A machine needs ports only."""
        return Numbers(ports=self._ports, is_port_free=is_port_free)

    async def close(self) -> None:
        """Nothing is served."""

    def _wire(self, machine: Machine) -> Wire:
        forwards = terms_of(machine).forwards
        options = render_user_network(
            forwards=forwards, internet=machine.spec.network.internet, user_network=self._is_open
        )
        return Wire(nic=Nic(user_network=options), kernel_arguments=render_user_kernel_arguments())
