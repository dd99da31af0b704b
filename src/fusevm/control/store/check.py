"""Looks for damage in a database, from the outside: what no program of ours would have written.

Everything is read of one moment and nothing is changed, so it is safe beside a running control plane. A finding says in
one sentence what is wrong, and in another what to do.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec

from fusevm.control.store import host_rows, snapshot_rows
from fusevm.control.store.migrate import schema_problem, stored_versions
from fusevm.control.store.protocol import RequestKey
from fusevm.control.store.sql import Dialect, load_migrations
from fusevm.control.store.statements import Row, Statement, Transaction, rows
from fusevm.control.store.transactions import sealed_owner
from fusevm.core.invariants import World, violations
from fusevm.core.lifecycle import next_deadline_ms
from fusevm.core.policy import Policy
from fusevm.model.api_key import ApiKey
from fusevm.model.environment import Environment
from fusevm.model.errors import Error
from fusevm.model.fact import Fact
from fusevm.model.host import Host, Resources
from fusevm.model.snapshot import Snapshot

R = TypeVar("R", Environment, Host, Snapshot, Fact, ApiKey)
#: Between them lie the deadlines of every control plane, whatever its settings.
_NARROWEST = Policy(linger_ms=0, activity_grain_ms=0)
_WIDEST = Policy(linger_ms=1 << 50, activity_grain_ms=1 << 50)
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


def examine(dialect: Dialect, sealer: Opener | None) -> Transaction[list[Finding]]:
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
    found += [Finding("invariant", sentence, _RESTORE) for sentence in violations(world, None)]
    found += yield from _orphans(world, records)
    found += yield from _missing_setups(world)
    found += yield from _secrets(sealer)
    found += yield from _requests(world, sealer)
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

    def compare_lease(self, table: str, key: str, owner: str | None, until_ms: int | None) -> None:
        """A lease without an end would never run out."""
        if (owner is None) != (until_ms is None):
            problem = f"{table} {key}: it is leased to {owner!r} until {until_ms!r}"
            self._found.append(Finding("record", problem, _RESTORE))

    def compare_deadline(self, env: Environment, deadline_ms: int | None) -> None:
        """Part of it follows the settings: what it is under the narrowest and the widest bounds it."""
        first_ms, last_ms = next_deadline_ms(env, _NARROWEST), next_deadline_ms(env, _WIDEST)
        if first_ms is None or last_ms is None:
            self.compare("environments", env.uid, {"deadline_ms": (deadline_ms, None)})
        elif deadline_ms is None or not first_ms <= deadline_ms <= last_ms:
            problem = f"environments {env.uid}: the column deadline_ms is {deadline_ms!r}, it must be within"
            self._found.append(Finding("record", f"{problem} {first_ms} and {last_ms}", _RESTORE))


def _read(found: list[Finding]) -> Transaction[tuple[World, frozenset[str]]]:
    """The world of all records that can be read, and the uids of all rows."""
    reader = _Reader(found)
    environment_rows = yield from rows("check_environments")
    environments = dict(_environments(reader, environment_rows))
    facts = _facts(reader, (yield from rows("check_events")), environments)
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
    for uid, tenant in (yield from rows("check_placements")):
        if uid in environments:
            reader.compare("placements", uid, {"tenant": (tenant, environments[uid].tenant)})
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
    for row in found:
        uid, task_id, tenant, state, host_id, is_live, revision, pending_seq, not_before_ms = row[:9]
        deadline_ms, ended_at_ms, lease_owner, lease_until_ms, doc = row[9:]
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
                "not_before_ms": (not_before_ms, env.pending.not_before_ms if env.pending else None),
                "ended_at_ms": (ended_at_ms, env.ended_at_ms),
            },
        )
        reader.compare_deadline(env, deadline_ms)
        reader.compare_lease("environments", uid, lease_owner, lease_until_ms)
        yield uid, env


def _hosts(reader: _Reader, found: Sequence[Row]) -> Iterator[tuple[str, Host]]:
    for id_, revision, cpus, ram_mb, storage_gb, vm_count, last_seen_ms, lease_owner, lease_until_ms, doc in found:
        host = reader.decode("hosts", id_, doc, Host)
        if host is None:
            continue
        reader.compare("hosts", id_, {"id": (id_, host.id), "revision": (revision, host.revision)})
        reader.compare_lease("hosts", id_, lease_owner, lease_until_ms)
        allocated = Resources(cpus=cpus, ram_mb=ram_mb, storage_gb=storage_gb, vm_count=vm_count)
        yield id_, msgspec.structs.replace(host, allocated=allocated, last_seen_ms=last_seen_ms)


def _snapshots(reader: _Reader, found: Sequence[Row]) -> Iterator[tuple[str, Snapshot]]:
    for id_, uid, task_id, tenant, host_id, state, mode, name, layer_key, arch, size_bytes, *rest in found:
        revision, due_ms, lease_owner, lease_until_ms, doc = rest
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
                "name": (name, snapshot.metadata.get("name", "")),
                "layer_key": (layer_key, snapshot.layer_key),
                "arch": (arch, snapshot.arch),
                "size_bytes": (size_bytes, snapshot.size_bytes),
                "revision": (revision, snapshot.revision),
                "due_ms": (due_ms, snapshot_rows.due_ms(snapshot)),
            },
        )
        reader.compare_lease("snapshots", id_, lease_owner, lease_until_ms)
        yield id_, snapshot


def _facts(reader: _Reader, found: Sequence[Row], environments: Mapping[str, Environment]) -> dict[str, list[Fact]]:
    """Task and tenant, which decide who may read an event, are the environment's."""
    facts: defaultdict[str, list[Fact]] = defaultdict(list)
    for uid, seq, task_id, tenant, at_ms, doc in found:
        key, env = f"{uid}:{seq}", environments.get(uid)
        if env is not None:
            reader.compare("events", key, {"task_id": (task_id, env.task_id), "tenant": (tenant, env.tenant)})
        fact = reader.decode("events", key, doc, Fact)
        if fact is not None:
            columns = {"uid": (uid, fact.uid), "seq": (seq, fact.seq), "at_ms": (at_ms, fact.at_ms)}
            reader.compare("events", key, columns)
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


# -- what is missing, and what is sealed ---------------------------------------------------------------------------


def _missing_setups(world: World) -> Transaction[list[Finding]]:
    sealed = {str(row[0]) for row in (yield from rows("all_secrets"))}
    return [
        Finding("record", f"the sealed setup of {env.uid} is missing", "delete the environment and create it again")
        for env in world.environments.values()
        if env.duties.setup and not env.is_terminal and sealed_owner(env.uid) not in sealed
    ]


def _requests(world: World, sealer: Opener | None) -> Transaction[list[Finding]]:
    """Answers under Idempotency-Keys. An environment that is gone was kept long enough."""
    found: list[Finding] = []
    for scope, route, key, uid, status, body, is_sealed, claimed_at_ms, expires_at_ms, is_over in (
        yield from rows("check_requests")
    ):
        where = f"idempotency {scope} {route} {key}"
        env = world.environments.get(uid or "")
        problems = {
            f"the status is {status!r} beside {'no' if body is None else 'an'} answer": (status is None)
            != (body is None),
            f"it was claimed at {claimed_at_ms} and expires at {expires_at_ms}": expires_at_ms < claimed_at_ms,
            f"it is bound to {uid}, which is of tenant {env.tenant if env else ''!r}": env is not None
            and scope.startswith("tenant:")
            and scope != f"tenant:{env.tenant}",
        }
        found += [Finding("record", f"{where}: {problem}", _RESTORE) for problem, is_so in problems.items() if is_so]
        if sealer is not None and is_sealed and body is not None and not is_over:
            try:
                sealer.open(body, row=RequestKey(scope, route, key, "", "").row)
            except Error as error:
                problem = f"{where}: the answer cannot be opened: {error.message}"
                remedy = "set TOKEN_ENCRYPTION_KEY_PREVIOUS to the key it was sealed with, or let it expire"
                found.append(Finding("secret", problem, remedy))
    return found


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
