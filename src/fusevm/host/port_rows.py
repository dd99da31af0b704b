"""Published ports in the journal: which ports of the host are taken, by whom; inside the transactions of `journal`.

A port belongs to its machine until it is unpublished or the machine is deleted, also while the machine is stopped.
"""

from __future__ import annotations

import sqlite3

import msgspec

from fusevm.host.rows import Numbers
from fusevm.host.sql import load_queries
from fusevm.model.errors import BadField, HostFull, HostPortTaken, PublishedPortExists
from fusevm.model.machine import Machine
from fusevm.model.network import MAX_PUBLISHED, Exposure, PublishedPort, Transport

SQL = load_queries()


class PortDraft(msgspec.Struct, frozen=True, kw_only=True):
    """A port that is to be published."""

    id: str
    exposure: Exposure


def exposed_id(machine_id: str, exposure: Exposure) -> str:
    """The id of a port that is published with its machine."""
    return f"{machine_id}-{exposure.protocol}-{exposure.port}"


def publish_all(db: sqlite3.Connection, machine: Machine, numbers: Numbers, now_ms: int) -> Machine:
    """Publish what a new machine exposes; the changed record, which the caller saves.

    Raises HostPortTaken, PublishedPortExists, HostFull.
    """
    for exposure in machine.spec.expose:
        draft = PortDraft(id=exposed_id(machine.id, exposure), exposure=exposure)
        machine = publish(db, machine, draft, numbers, now_ms)
    return machine


def publish(db: sqlite3.Connection, machine: Machine, draft: PortDraft, numbers: Numbers, now_ms: int) -> Machine:
    """Reserve a port of the host for one of the machine; the changed record. A repetition changes nothing.

    Raises HostPortTaken, PublishedPortExists, HostFull.
    """
    known = next((port for port in machine.ports if port.id == draft.id), None)
    if known is not None and _means(known, draft.exposure):
        return machine
    if db.execute(SQL["get_published"], {"id": draft.id}).fetchone() is not None:
        raise PublishedPortExists(id=draft.id)
    if len(machine.ports) >= MAX_PUBLISHED:
        raise HostFull(resource=f"published ports of {machine.id}", needed="1", free="0")
    wanted = draft.exposure
    host_port = _choose(db, wanted.protocol, wanted.host_port, numbers)
    row = {"protocol": wanted.protocol.value, "host_port": host_port, "id": draft.id, "machine_id": machine.id}
    db.execute(SQL["publish"], row)
    port = PublishedPort(
        id=draft.id,
        name=wanted.name,
        port=wanted.port,
        host_port=host_port,
        protocol=wanted.protocol,
        created_at_ms=now_ms,
    )
    return msgspec.structs.replace(machine, ports=(*machine.ports, port))


def unpublish(db: sqlite3.Connection, machine: Machine, port_id: str) -> Machine:
    """Give a port back; the changed record. Idempotent. Raises BadField for a port of another machine."""
    row = db.execute(SQL["get_published"], {"id": port_id}).fetchone()
    if row is not None and row[0] != machine.id:
        raise BadField(field="published_port_id", problem=f"{port_id!r} is a port of another machine")
    db.execute(SQL["unpublish"], {"id": port_id, "machine_id": machine.id})
    return msgspec.structs.replace(machine, ports=tuple(port for port in machine.ports if port.id != port_id))


def _means(port: PublishedPort, wanted: Exposure) -> bool:
    same = (port.port, port.protocol, port.name) == (wanted.port, wanted.protocol, wanted.name)
    return same and wanted.host_port in (0, port.host_port)


def _choose(db: sqlite3.Connection, protocol: Transport, wanted: int, numbers: Numbers) -> int:
    """The wanted port of the host, or the first that neither a machine nor another program has."""
    first, last = numbers.ports
    if wanted and not first <= wanted <= last:
        raise BadField(
            field="host_port", problem=f"{wanted} is not within {first} to {last}, which this host publishes"
        )
    taken = {row[0] for row in db.execute(SQL["published_numbers"], {"protocol": protocol.value})}
    if wanted:
        if wanted in taken or not numbers.is_port_free(protocol, wanted):
            raise HostPortTaken(port=wanted, protocol=protocol.value)
        return wanted
    for port in range(first, last + 1):
        if port not in taken and numbers.is_port_free(protocol, port):
            return port
    raise HostFull(resource=f"{protocol} ports from {first} to {last}", needed="1", free="0")
