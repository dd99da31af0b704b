"""Looks for damage in a database, from the outside: what no program of ours would have written.

Everything is read of one moment and nothing is changed, so it is safe beside a running control plane. A finding says in
one sentence what is wrong, and in another what to do.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import msgspec

from fusevm.control.store import host_rows
from fusevm.control.store.migrate import schema_problem, stored_versions
from fusevm.control.store.sql import Dialect, load_migrations
from fusevm.control.store.statements import Row, Statement, Transaction, rows
from fusevm.control.store.transactions import sealed_owner
from fusevm.core.invariants import World, violations
from fusevm.core.policy import Policy
from fusevm.model.api_key import ApiKey
from fusevm.model.environment import Environment
from fusevm.model.errors import Error
from fusevm.model.fact import Fact
from fusevm.model.host import Host, Resources
from fusevm.model.snapshot import Snapshot

R = TypeVar("R", Environment, Host, Snapshot, Fact, ApiKey)
_RESTORE = "restore a backup, or report it with this line"
_DELETE = "if you can do without it, stop the control plane and run: delete from {table} where {column} = '{value}'"


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong."""

    #: `schema`, `file`, `record`, `orphan`, `invariant` or `secret`.
    kind: str
    problem: str
    remedy: str
    #: The database cannot be used, or not be judged further.
    is_fatal: bool = False


class Opener(Protocol):
    """Opens sealed values."""

    def open(self, sealed: str, *, row: str) -> str:
        """The value. Raises Error."""
        ...


def examine(dialect: Dialect, policy: Policy, sealer: Opener | None) -> Transaction[list[Finding]]:
    """Everything that is wrong; empty: all is well. `sealer` None: sealed values are not tried."""
    found = yield from _schema(dialect)
    if found:
        return found
    if dialect is Dialect.SQLITE:
        for (line,) in (yield Statement("", (), "pragma integrity_check")):
            if line != "ok":
                found.append(Finding("file", f"the file is damaged: {line}", "restore a backup", is_fatal=True))
        if found:
            return found
    world, records = yield from _read(found)
    found += [Finding("invariant", sentence, _RESTORE) for sentence in violations(world, policy)]
    found += yield from _orphans(world, records)
    found += yield from _secrets(sealer)
    return found


def _schema(dialect: Dialect) -> Transaction[list[Finding]]:
    applied = yield from stored_versions()
    if applied is None:
        return [Finding("schema", "the database has no schema of Fuse", "run `fuse db migrate`", is_fatal=True)]
    migrations = load_migrations(dialect)
    problem = schema_problem(applied, migrations)
    if problem:
        return [Finding("schema", problem, "use the program that made it, or restore a backup", is_fatal=True)]
    missing = [migration.name for migration in migrations if migration.version not in applied]
    if missing:
        problem = f"the schema lacks {', '.join(missing)}"
        return [Finding("schema", problem, "run `fuse db migrate`", is_fatal=True)]
    return []


# -- records -------------------------------------------------------------------------------------------------------


class _Reader:
    """Decodes documents and compares them with the columns beside them; what does not fit becomes a finding."""

    def __init__(self, found: list[Finding]) -> None:
        self._found = found

    def decode(self, table: str, key: str, doc: str, type_: type[R]) -> R | None:
        try:
            return msgspec.json.decode(doc, type=type_)
        except (msgspec.MsgspecError, UnicodeError) as error:
            problem = f"{table} {key}: the document cannot be read ({error})"
            self._found.append(Finding("record", problem, _RESTORE))
            return None

    def compare(self, table: str, key: str, columns: dict[str, tuple[object, object]]) -> None:
        for name, (column, document) in columns.items():
            if column != document:
                problem = f"{table} {key}: the column {name} is {column!r}, the document says {document!r}"
                self._found.append(Finding("record", problem, _RESTORE))


def _read(found: list[Finding]) -> Transaction[tuple[World, frozenset[str]]]:
    """The world of all records that can be read, and the uids of all rows."""
    reader = _Reader(found)
    environment_rows = yield from rows("check_environments")
    environments = dict(_environments(reader, environment_rows))
    facts = _facts(reader, (yield from rows("check_events")))
    hosts = dict(_hosts(reader, (yield from rows("check_hosts"))))
    snapshots = dict(_snapshots(reader, (yield from rows("check_snapshots"))))
    for id_, prefix, created_at_ms, doc in (yield from rows("check_keys")):
        key = reader.decode("api_keys", id_, doc, ApiKey)
        if key is not None:
            reader.compare(
                "api_keys",
                id_,
                {
                    "id": (id_, key.id),
                    "prefix": (prefix, key.prefix),
                    "created_at_ms": (created_at_ms, key.created_at_ms),
                },
            )
    placements = yield from host_rows.placements()
    world = World(
        environments=environments,
        hosts=hosts,
        placements=placements,
        facts={uid: tuple(facts.get(uid, ())) for uid in environments},
        snapshots=snapshots,
    )
    return world, frozenset(str(row[0]) for row in environment_rows)


def _environments(reader: _Reader, found: Sequence[Row]) -> Iterator[tuple[str, Environment]]:
    for uid, task_id, tenant, state, host_id, is_live, revision, pending_seq, ended_at_ms, doc in found:
        env = reader.decode("environments", uid, doc, Environment)
        if env is None:
            continue
        reader.compare(
            "environments",
            uid,
            {
                "uid": (uid, env.uid),
                "task_id": (task_id, env.task_id),
                "tenant": (tenant, env.tenant),
                "state": (state, str(env.state)),
                "host_id": (host_id, env.host_id),
                "is_live": (bool(is_live), not env.is_terminal),
                "revision": (revision, env.revision),
                "pending_seq": (pending_seq, env.pending.seq if env.pending else None),
                "ended_at_ms": (ended_at_ms, env.ended_at_ms),
            },
        )
        yield uid, env


def _hosts(reader: _Reader, found: Sequence[Row]) -> Iterator[tuple[str, Host]]:
    for id_, revision, cpus, ram_mb, storage_gb, vm_count, last_seen_ms, doc in found:
        host = reader.decode("hosts", id_, doc, Host)
        if host is None:
            continue
        reader.compare("hosts", id_, {"id": (id_, host.id), "revision": (revision, host.revision)})
        allocated = Resources(cpus=cpus, ram_mb=ram_mb, storage_gb=storage_gb, vm_count=vm_count)
        yield id_, msgspec.structs.replace(host, allocated=allocated, last_seen_ms=last_seen_ms)


def _snapshots(reader: _Reader, found: Sequence[Row]) -> Iterator[tuple[str, Snapshot]]:
    for id_, uid, task_id, tenant, host_id, state, mode, layer_key, arch, revision, doc in found:
        snapshot = reader.decode("snapshots", id_, doc, Snapshot)
        if snapshot is None:
            continue
        reader.compare(
            "snapshots",
            id_,
            {
                "id": (id_, snapshot.id),
                "uid": (uid, snapshot.uid),
                "task_id": (task_id, snapshot.task_id),
                "tenant": (tenant, snapshot.tenant),
                "host_id": (host_id, snapshot.host_id),
                "state": (state, str(snapshot.state)),
                "mode": (mode, snapshot.mode),
                "layer_key": (layer_key, snapshot.layer_key),
                "arch": (arch, snapshot.arch),
                "revision": (revision, snapshot.revision),
            },
        )
        yield id_, snapshot


def _facts(reader: _Reader, found: Sequence[Row]) -> dict[str, list[Fact]]:
    facts: defaultdict[str, list[Fact]] = defaultdict(list)
    for uid, seq, _task_id, _tenant, doc in found:
        fact = reader.decode("events", f"{uid}:{seq}", doc, Fact)
        if fact is not None:
            reader.compare("events", f"{uid}:{seq}", {"uid": (uid, fact.uid), "seq": (seq, fact.seq)})
            facts[uid].append(fact)
    return facts


# -- what belongs to nothing ---------------------------------------------------------------------------------------


def _orphans(world: World, records: frozenset[str]) -> Transaction[list[Finding]]:
    """Placements are the invariants' part."""
    found: list[Finding] = []
    owners = sorted({str(row[0]) for row in (yield from rows("check_events"))} - records)
    for uid in owners:
        remedy = _DELETE.format(table="events", column="uid", value=uid)
        found.append(Finding("orphan", f"there are events of {uid}, and no such environment", remedy))
    for snapshot in world.snapshots.values():
        if snapshot.uid not in records:
            remedy = _DELETE.format(table="snapshots", column="id", value=snapshot.id)
            found.append(
                Finding("orphan", f"snapshot {snapshot.id} is of {snapshot.uid}, which does not exist", remedy)
            )
    live = {sealed_owner(uid) for uid in records - _ended(world)}
    for owner in sorted({str(row[0]) for row in (yield from rows("all_secrets"))}):
        kind, _, name = owner.partition(":")
        is_lost = (kind == "env" and owner not in live) or (kind == "host" and name not in world.hosts)
        if is_lost:
            remedy = _DELETE.format(table="secrets", column="owner", value=owner)
            found.append(Finding("orphan", f"there are secrets of {owner}, which has none any more", remedy))
    return found


def _ended(world: World) -> frozenset[str]:
    return frozenset(uid for uid, env in world.environments.items() if env.is_terminal)


def _secrets(sealer: Opener | None) -> Transaction[list[Finding]]:
    if sealer is None:
        return []
    found: list[Finding] = []
    for owner, name, sealed in (yield from rows("all_secrets")):
        try:
            sealer.open(sealed, row=f"{owner}/{name}")
        except Error as error:
            remedy = (
                "set TOKEN_ENCRYPTION_KEY (or TOKEN_ENCRYPTION_KEY_PREVIOUS) to the key it was sealed with, "
                "or register the host or create the environment again"
            )
            found.append(Finding("secret", f"{owner}/{name} cannot be opened: {error.message}", remedy))
    return found
