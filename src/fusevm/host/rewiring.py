"""Changes of a machine's network while it exists: its policy, its published ports.

The journal first, then the kernel: what a crash leaves half done is done when the daemon starts, since all rules are
then made from the records; what the kernel refuses is tried again by the machine's task until it is as the record
says. A policy that the host cannot enforce is refused before anything is written.

Owns: the order of the two. Must not: know nftables.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import msgspec

from fusevm.host.mailbox import Publish, Rewiring, SetNetwork, Unpublish
from fusevm.host.port_rows import publish, unpublish
from fusevm.host.surroundings import Surroundings
from fusevm.model.errors import Error, PolicyNotEnforceable, WrongState
from fusevm.model.machine import Fence, Isolation, Machine, MachineSpec, Phase
from fusevm.model.network import Network, check_exposures, check_network

Commit = Callable[[Machine], None]
_WHY_NOT = "its machines are in QEMU's user network, since the daemon is not root"


def check_spec_network(spec: MachineSpec) -> MachineSpec:
    """Return a spec with its policy and ports in normal form. Raises BadField."""
    network, expose = check_network(spec.network, "spec.network"), check_exposures(spec.expose, "spec.expose")
    return msgspec.structs.replace(spec, network=network, expose=expose)


def check_enforceable(network: Network, isolation: Isolation) -> None:
    """Raise PolicyNotEnforceable for a policy that a machine of this kind cannot be held to."""
    if isolation is Isolation.NAMESPACE:
        return
    if network.rules:
        raise PolicyNotEnforceable(what="network rules", why=_WHY_NOT)
    if network.ingress_kbit or network.egress_kbit:
        raise PolicyNotEnforceable(what="bandwidth limits", why=_WHY_NOT)


async def carry_out_rewiring(machine: Machine, order: Rewiring, parts: Surroundings, commit: Commit) -> Machine:
    """Do what an order says, journal first. `commit` hears of every record that the journal has."""
    match order:
        case SetNetwork():
            return await set_network(machine, order, parts, commit)
        case Publish():
            return await publish_port(machine, order, parts, commit)
        case Unpublish():
            return await unpublish_port(machine, order, parts, commit)


async def set_network(machine: Machine, order: SetNetwork, parts: Surroundings, commit: Commit) -> Machine:
    """Change the policy of a machine; one that runs is held to it, open connections included, when this returns."""
    check_enforceable(order.network, machine.isolation)
    if machine.isolation is not Isolation.NAMESPACE and order.network != machine.spec.network:
        raise PolicyNotEnforceable(what="a change of the network of a machine that exists", why=_WHY_NOT)

    def change(_db: sqlite3.Connection, now: Machine) -> Machine:
        return msgspec.structs.replace(now, spec=msgspec.structs.replace(now.spec, network=order.network))

    return await _rewire(machine, order.fence, change, "network.changed", parts, commit)


async def publish_port(machine: Machine, order: Publish, parts: Surroundings, commit: Commit) -> Machine:
    """Publish a port of a running machine. If the host cannot forward it, it is not published."""
    _check_running(machine)
    _check_slot(machine)
    numbers = parts.quarters.numbers()

    def change(db: sqlite3.Connection, now: Machine) -> Machine:
        return publish(db, now, order.draft, numbers, parts.clock.now_ms())

    changed = await parts.journal.rewire(machine.id, order.fence, change, "port.published", commit)
    try:
        await _apply(changed, "port.published", parts)
    except (Error, OSError) as e:
        await _take_back(changed, order, parts, commit, blame=e)
        raise
    return changed


async def unpublish_port(machine: Machine, order: Unpublish, parts: Surroundings, commit: Commit) -> Machine:
    """Take a published port back; its open connections end. Idempotent."""
    if any(port.id == order.port_id for port in machine.ports):
        _check_slot(machine)

    def change(db: sqlite3.Connection, now: Machine) -> Machine:
        return unpublish(db, now, order.port_id)

    return await _rewire(machine, order.fence, change, "port.unpublished", parts, commit)


async def _rewire(
    machine: Machine,
    fence: Fence | None,
    change: Callable[[sqlite3.Connection, Machine], Machine],
    point: str,
    parts: Surroundings,
    commit: Commit,
) -> Machine:
    changed = await parts.journal.rewire(machine.id, fence, change, point, commit)
    await _apply(changed, point, parts)
    return changed


async def _take_back(
    machine: Machine, order: Publish, parts: Surroundings, commit: Commit, *, blame: Exception
) -> None:
    """Remove the reservation of a port that the host cannot forward. Part of the order, and never too late."""
    fence = msgspec.structs.replace(order.fence, valid_until=None) if order.fence is not None else None

    def change(db: sqlite3.Connection, now: Machine) -> Machine:
        return unpublish(db, now, order.draft.id)

    try:
        await parts.journal.rewire(machine.id, fence, change, "port.undone", commit)
    except Error as e:
        blame.add_note(f"its reservation could not be taken back: {e.message}")


async def _apply(changed: Machine, point: str, parts: Surroundings) -> None:
    if changed.phase in (Phase.RUNNING, Phase.PAUSED):
        await parts.quarters.rewire(changed)
        parts.fault.reached(f"{point}.applied")


def _check_running(machine: Machine) -> None:
    if machine.phase is not Phase.RUNNING:
        raise WrongState(id=machine.id, state=machine.phase.value, wanted="it must be running for this")


def _check_slot(machine: Machine) -> None:
    if machine.isolation is not Isolation.NAMESPACE:
        what = "publishing a port of a machine that exists (name its ports when it is created)"
        raise PolicyNotEnforceable(what=what, why=_WHY_NOT)
