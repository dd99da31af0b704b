"""The whole store as one `World`, for the invariants: every table read within one transaction, so that nothing seems
broken that was only changing."""

import sqlite3
from collections import defaultdict

import msgspec

from fusevm.control.store import transactions as tx
from fusevm.core.invariants import World
from fusevm.model.environment import Environment
from fusevm.model.fact import Fact
from fusevm.model.host import Resources

_environment = msgspec.json.Decoder(Environment)
_fact = msgspec.json.Decoder(Fact)


def read_world(connection: sqlite3.Connection) -> World:
    """Everything at one moment. A transaction of the caller's is joined, else one is opened and ended."""
    is_ours = not connection.in_transaction
    if is_ours:
        connection.execute("begin")
    try:
        return _read(connection)
    finally:
        if is_ours:
            connection.execute("rollback")


def _read(connection: sqlite3.Connection) -> World:
    records = [_environment.decode(row[0]) for row in tx.run(connection, "all_environments")]
    facts: defaultdict[str, list[Fact]] = defaultdict(list)
    for row in tx.run(connection, "all_events"):
        fact = _fact.decode(row[0])
        facts[fact.uid].append(fact)
    return World(
        environments={record.uid: record for record in records},
        hosts={host.id: host for host in tx.list_hosts(connection)},
        placements={
            uid: (host_id, Resources(cpus=cpus, ram_mb=ram_mb, storage_gb=storage_gb, vm_count=vm_count))
            for uid, host_id, cpus, ram_mb, storage_gb, vm_count in tx.run(connection, "all_placements")
        },
        facts={record.uid: tuple(facts.get(record.uid, ())) for record in records},
    )
