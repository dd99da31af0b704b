"""The contract's fixed relays: ports of every machine that its host forwards, ssh and vnc from the start, exec when it
is asked for. They are published ports like any other, under ids of their own.
"""

from __future__ import annotations

from fusevm.host.port_rows import PortDraft, exposed_id
from fusevm.model.machine import Isolation, Machine, Phase
from fusevm.model.network import Exposure, PublishedPort
from fusevm.wire.contract import PortBody

#: By name, the guest's ports (computer-host.md 3.6).
GUEST_PORTS = {"ssh": 2222, "vnc": 6080, "exec": 49983}
#: Of a machine whose daemon has root; without, nothing can be forwarded later (`host.rewiring`).
_FROM_THE_START = ("ssh", "vnc")


def first_relays(isolation: Isolation) -> tuple[Exposure, ...]:
    """What is forwarded from the start."""
    names = _FROM_THE_START if isolation is Isolation.NAMESPACE else tuple(GUEST_PORTS)
    return tuple(_exposure(name) for name in names)


def exec_relay(machine: Machine) -> PortDraft:
    """The relay to a guest's exec daemon."""
    exposure = _exposure("exec")
    return PortDraft(id=exposed_id(machine.id, exposure), exposure=exposure)


def is_published(machine: Machine, draft: PortDraft) -> bool:
    """Does the host forward it already, to a machine that runs?"""
    return machine.phase is Phase.RUNNING and any(port.id == draft.id for port in machine.ports)


def render_ports(machine: Machine) -> list[PortBody]:
    """The contract's ports, with the host's ports where they are forwarded."""
    ports = {port.id: port.host_port for port in machine.ports}
    return [
        PortBody(name=name, port=port, host_port=ports.get(_id(machine, name), 0), protocol="tcp")
        for name, port in GUEST_PORTS.items()
    ]


def published_by_users(machine: Machine) -> list[PublishedPort]:
    """Ports without the relays of a machine that has some."""
    relays = {_id(machine, name) for name in GUEST_PORTS} if machine.contract is not None else set()
    return [port for port in machine.ports if port.id not in relays]


def _exposure(name: str) -> Exposure:
    return Exposure(port=GUEST_PORTS[name], name=name)


def _id(machine: Machine, name: str) -> str:
    return exposed_id(machine.id, _exposure(name))
