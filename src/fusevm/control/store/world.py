"""The whole store as one `World`, for the invariants. To be read of one moment, so that nothing seems broken that was
only changing."""

from collections import defaultdict

import msgspec

from fusevm.control.store import host_rows, snapshot_rows
from fusevm.control.store.statements import Transaction, rows
from fusevm.core.invariants import World
from fusevm.model.environment import Environment
from fusevm.model.fact import Fact

_environment = msgspec.json.Decoder(Environment)
_fact = msgspec.json.Decoder(Fact)


def read_world() -> Transaction[World]:
    """Everything."""
    records = [_environment.decode(row[0]) for row in (yield from rows("all_environments"))]
    facts: defaultdict[str, list[Fact]] = defaultdict(list)
    for row in (yield from rows("all_events")):
        fact = _fact.decode(row[0])
        facts[fact.uid].append(fact)
    hosts = [host_rows.decode(row) for row in (yield from rows("list_hosts"))]
    placements = yield from host_rows.placements()
    snapshots = yield from snapshot_rows.list_all()
    return World(
        environments={record.uid: record for record in records},
        hosts={host.id: host for host in hosts},
        placements=placements,
        snapshots={snapshot.id: snapshot for snapshot in snapshots},
        facts={record.uid: tuple(facts.get(record.uid, ())) for record in records},
    )
