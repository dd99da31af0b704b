"""The rows of the journal: reading and writing them, inside the transactions of `journal`.

Every function takes the connection of a transaction that somebody else began and will commit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec

from fusevm.host.admission import Usage
from fusevm.host.fencing import check_repeated
from fusevm.host.sql import load_queries
from fusevm.host.writer import Superseded
from fusevm.model.errors import HostFull, Internal, MachineExists, StaleIncarnation, WrongState
from fusevm.model.fencing import Seen
from fusevm.model.machine import ALLOWED, Contract, DiskSeed, Fence, Isolation, Machine, MachineSpec, Phase
from fusevm.model.network import Transport
from fusevm.wire.decode import UNREADABLE

#: A visit opens the disk of a machine at rest (`host.visit`).
Kind: TypeAlias = Literal["create", "start", "stop", "delete", "resize", "visit", "snapshot", "restore"]

#: How long the host remembers what it has seen of an environment that has no machine here.
FENCE_LIFETIME_MS = 24 * 3_600_000

SQL = load_queries()


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """An intent that is not complete."""

    kind: Kind
    #: How far it came: `intent`, `prepared`, `booted`.
    step: str
    started_at_ms: int
    #: 0: no limit.
    deadline_ms: int


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as the journal has it."""

    machine: Machine
    operation: Operation | None
    #: Why its record could not be read; `machine` is then made up from the columns.
    damage: str = ""


def _is_free(_protocol: Transport, _port: int) -> bool:
    return True


class Numbers(msgspec.Struct, frozen=True, kw_only=True):
    """Which numbers a machine may get. A count of 0: it needs none."""

    #: Slots that are ready, best first.
    warm_slots: tuple[int, ...] = ()
    slot_count: int = 0
    uid_base: int = 0
    uid_count: int = 0
    #: Ports of the host that may be published: first and last.
    ports: tuple[int, int] = (0, -1)
    #: Does no other program use a port?
    is_port_free: Callable[[Transport, int], bool] = _is_free


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that is to be made: what is known before numbers are reserved."""

    id: str
    spec: MachineSpec
    image_digest: str
    kernel_digest: str
    driver: str
    isolation: Isolation
    nonce: str
    deadline_ms: int
    #: Of the contract's machine API, which knows no repetition: a machine that exists is a conflict.
    contract: Contract | None = None
    seed: DiskSeed | None = None
    #: What making its disk takes of the host's disk at once.
    seed_bytes: int = 0


def check_repetition(existing: Machine, draft: Draft, order: Fence) -> Machine:
    """Return the machine that a repeated create means. Raises MachineExists, StaleIncarnation."""
    check_repeated(existing, order)
    if draft.contract is not None:
        raise MachineExists(id=existing.id)
    if existing.phase is Phase.DELETING:
        raise StaleIncarnation(uid=order.uid, incarnation=order.incarnation, seen=existing.fence.incarnation)
    # The policy may have been changed since.
    is_same = msgspec.structs.replace(existing.spec, network=draft.spec.network) == draft.spec
    if not is_same or _origin(existing.seed) != _origin(draft.seed):
        raise MachineExists(id=draft.id)
    return existing


def _origin(seed: DiskSeed | None) -> str:
    return seed.snapshot_id if seed is not None else ""


def draft_machine(draft: Draft, order: Fence, now_ms: int) -> Machine:
    """The record of a machine that is about to be made."""
    return Machine(
        id=draft.id,
        fence=order,
        spec=draft.spec,
        phase=Phase.CREATING,
        image_digest=draft.image_digest,
        kernel_digest=draft.kernel_digest,
        driver=draft.driver,
        isolation=draft.isolation,
        nonce=draft.nonce,
        contract=draft.contract,
        seed=draft.seed,
        generation=1,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
    )


def expect_one(cursor: sqlite3.Cursor) -> None:
    """The intent must still be the caller's."""
    if cursor.rowcount != 1:
        raise Superseded


def load_machine(db: sqlite3.Connection, machine_id: str) -> Machine | None:
    """The machine of an id; a damaged record is made up from the columns."""
    row = db.execute(SQL["get_machine"], {"id": machine_id}).fetchone()
    if row is None:
        return None
    try:
        return msgspec.json.decode(row[0], type=Machine)
    except UNREADABLE:
        return next(entry.machine for entry in load_entries(db) if entry.machine.id == machine_id)


def insert_machine(db: sqlite3.Connection, machine: Machine) -> None:
    """Save a new machine; there must be none of its id, nor of its incarnation."""
    db.execute(SQL["insert_machine"], _columns(machine))


def save_machine(db: sqlite3.Connection, machine: Machine, now_ms: int) -> Machine:
    """Save a changed record. Raises Superseded when the machine is gone, Internal for an unknown transition."""
    old = load_machine(db, machine.id)
    if old is None:
        raise Superseded
    if machine.phase is not old.phase and machine.phase not in ALLOWED[old.phase]:
        raise Internal(problem=f"machine {machine.id} cannot go from {old.phase} to {machine.phase}")
    machine = msgspec.structs.replace(machine, updated_at_ms=now_ms)
    _update(db, machine)
    return machine


def save_intent(db: sqlite3.Connection, machine_id: str, kind: Kind, now_ms: int, deadline_ms: int = 0) -> None:
    """Write what is about to be done. Only a delete may replace what was intended before (`check_complete`)."""
    values = {"id": machine_id, "kind": kind, "step": "intent", "started_at_ms": now_ms, "deadline_ms": deadline_ms}
    db.execute(SQL["put_operation"], values)


def reserve_numbers(db: sqlite3.Connection, machine: Machine, numbers: Numbers) -> Machine:
    """Give a machine the numbers that it lacks. Raises HostFull."""
    slot, uid = machine.slot, machine.uid
    if numbers.slot_count and slot < 0:
        slot = _free_slot(db, numbers)
        db.execute(SQL["reserve"], {"kind": "slot", "number": slot, "machine_id": machine.id})
    if numbers.uid_count and uid < 0:
        uid = _first_free(db, "uid", numbers.uid_base)
        if uid >= numbers.uid_base + numbers.uid_count:
            raise HostFull(resource="user ids", needed="1", free="0")
        db.execute(SQL["reserve"], {"kind": "uid", "number": uid, "machine_id": machine.id})
    machine = msgspec.structs.replace(machine, slot=slot, uid=uid)
    _update(db, machine)
    return machine


def _free_slot(db: sqlite3.Connection, numbers: Numbers) -> int:
    for number in numbers.warm_slots:
        if db.execute(SQL["is_reserved"], {"kind": "slot", "number": number}).fetchone() is None:
            return number
    slot = _first_free(db, "slot", 0)
    if slot >= numbers.slot_count:
        raise HostFull(resource="network slots", needed="1", free="0")
    return slot


def _first_free(db: sqlite3.Connection, kind: str, first: int) -> int:
    return int(db.execute(SQL["first_free"], {"kind": kind, "first": first}).fetchone()[0])


def release_slot(db: sqlite3.Connection, machine: Machine) -> Machine:
    """A machine at rest needs no slot; its disk still belongs to its uid."""
    if machine.phase not in (Phase.STOPPED, Phase.FAILED):
        return machine
    db.execute(SQL["release"], {"machine_id": machine.id, "kind": "slot"})
    return msgspec.structs.replace(machine, slot=-1, address="", vmm=None)


def load_seen(db: sqlite3.Connection, order: Fence) -> Seen:
    """What the host has seen of the environment that an order means."""
    row = db.execute(SQL["get_fence"], {"cluster": order.cluster, "uid": order.uid}).fetchone()
    return Seen(incarnation=row[0], action_seq=row[1], ended=row[2]) if row else Seen()


def save_fence(db: sqlite3.Connection, order: Fence, seen: Seen, now_ms: int) -> None:
    """Remember what was seen."""
    values = {"cluster": order.cluster, "uid": order.uid, "expires_at_ms": now_ms + FENCE_LIFETIME_MS}
    db.execute(SQL["put_fence"], {**values, **msgspec.structs.asdict(seen)})


def load_usage(db: sqlite3.Connection, exclude: str = "") -> Usage:
    """What all machines, or all but one, have booked."""
    row = db.execute(SQL["usage"], {"except": exclude}).fetchone()
    return Usage(machines=row[0], active=row[1], cpus=row[2], memory_mib=row[3], disk_bytes=row[4])


def _update(db: sqlite3.Connection, machine: Machine) -> None:
    db.execute(SQL["update_machine"], _columns(machine))


def _columns(machine: Machine) -> dict[str, str | int | bytes]:
    return {
        "id": machine.id,
        "cluster": machine.fence.cluster,
        "uid": machine.fence.uid,
        "incarnation": machine.fence.incarnation,
        "phase": machine.phase.value,
        "cpus": machine.spec.cpus,
        "memory_mib": machine.spec.memory_mib,
        "disk_bytes": machine.spec.disk_bytes,
        "record": msgspec.json.encode(machine),
    }


def load_operation(db: sqlite3.Connection, machine_id: str) -> Operation | None:
    """What is not complete with a machine."""
    row = db.execute(SQL["get_operation"], {"id": machine_id}).fetchone()
    return Operation(kind=row[0], step=row[1], started_at_ms=row[2], deadline_ms=row[3]) if row else None


def check_complete(db: sqlite3.Connection, machine: Machine) -> None:
    """Raise WrongState while an operation is open: replacing its intent would leave it half done for ever."""
    operation = load_operation(db, machine.id)
    if operation is not None:
        wanted = f"its {operation.kind} is not complete yet and is tried again; repeat this later, or delete it"
        raise WrongState(id=machine.id, state=machine.phase.value, wanted=wanted)


def load_entries(db: sqlite3.Connection) -> list[Entry]:
    """Every machine, with its operation."""
    held: dict[tuple[str, str], int] = {
        (row[2], row[0]): row[1] for row in db.execute(SQL["list_reservations"]).fetchall()
    }
    return [_entry(row, held) for row in db.execute(SQL["list_machines"]).fetchall()]


def _entry(row: tuple[Any, ...], held: dict[tuple[str, str], int]) -> Entry:
    machine_id, cluster, uid, incarnation, phase, cpus, memory_mib, disk_bytes, record, *operation = row
    kind, step, started_at_ms, deadline_ms = operation
    damage = ""
    try:
        machine = msgspec.json.decode(record, type=Machine)
    except UNREADABLE as e:
        damage = str(e)
        machine = Machine(
            id=machine_id,
            fence=Fence(cluster=cluster, uid=uid, incarnation=incarnation, action_seq=0),
            spec=MachineSpec(image="", cpus=cpus, memory_mib=memory_mib, disk_bytes=disk_bytes),
            phase=_phase(phase),
            slot=held.get((machine_id, "slot"), -1),
            uid=held.get((machine_id, "uid"), -1),
            error=f"its record is damaged: {damage}",
            created_at_ms=0,
            updated_at_ms=0,
        )
    pending = Operation(kind=kind, step=step, started_at_ms=started_at_ms, deadline_ms=deadline_ms) if kind else None
    return Entry(machine=machine, operation=pending, damage=damage)


def _phase(text: str) -> Phase:
    """A phase that only a newer daemon knows is that of a machine which this one cannot serve."""
    try:
        return Phase(text)
    except ValueError:
        return Phase.FAILED


def render_state(db: sqlite3.Connection) -> dict[str, Any]:
    """The whole journal as JSON values, without secrets."""
    entries = [msgspec.to_builtins(entry) for entry in load_entries(db)]
    for entry in entries:
        entry["machine"].pop("nonce", None)
        entry["machine"]["spec"].pop("env", None)
        if entry["machine"]["contract"] is not None:
            entry["machine"]["contract"]["login"].pop("host_key")
    fences = db.execute(SQL["list_fences"])
    names = [column[0] for column in fences.description]
    return {
        "cluster": load_meta(db, "cluster"),
        "created_at_ms": int(load_meta(db, "created_at_ms") or 0),
        "entries": entries,
        "reservations": [
            {"kind": row[0], "number": row[1], "machine_id": row[2]} for row in db.execute(SQL["list_reservations"])
        ],
        "published_ports": [
            {"protocol": row[0], "host_port": row[1], "id": row[2], "machine_id": row[3]}
            for row in db.execute(SQL["list_published"])
        ],
        "fences": [dict(zip(names, row, strict=True)) for row in fences.fetchall()],
    }


def load_meta(db: sqlite3.Connection, key: str) -> str:
    """A value of the meta table; empty when it is not set."""
    row = db.execute(SQL["get_meta"], {"key": key}).fetchone()
    return str(row[0]) if row else ""
