"""Hypothesis drives a store through random lives and compares it with a model of a few dictionaries after every step.
Where several replicas can share a database, two of them take turns."""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from store_harness import POLICY, Place, Remote, inline_place, sqlite_place

from fusevm.control.store.protocol import (
    Claim,
    Query,
    RequestKey,
    Reservation,
    ReservationLost,
    SnapshotQuery,
    Store,
    StoredRequest,
)
from fusevm.core import lifecycle
from fusevm.core.invariants import violations
from fusevm.core.lifecycle import Identity, Step
from fusevm.core.placement import can_reserve
from fusevm.core.spec import complete, resources_of
from fusevm.model.environment import Environment, SnapshotMachine
from fusevm.model.errors import (
    ActionUnderWay,
    Error,
    HostInUse,
    IdempotencyInProgress,
    RevisionConflict,
    TaskExists,
    WrongState,
)
from fusevm.model.event import (
    ActionRefused,
    BootRefused,
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    Event,
    HostLost,
    OutcomeUnknown,
    Placed,
    SnapshotRequested,
    SnapshotTaken,
)
from fusevm.model.host import Host, Resources
from fusevm.model.snapshot import Snapshot, SnapshotState
from fusevm.testing.postgres import PostgresServer

OWNERS = ("a", "b")
KINDS = ("up", "refused", "unknown", "destroy", "drain", "gone", "lost", "snapshot", "taken", "not taken")
LEASE_MS = 1000
KEEP_MS = 5000
KEYS, CLAIMANTS = st.sampled_from("kl"), st.sampled_from("pq")


@dataclass
class Known:
    """What was done under an Idempotency-Key."""

    fingerprint: str
    claimant: str
    claimed_at_ms: int
    uid: str = ""
    status: int = 0
    body: str = ""

    @property
    def expires_at_ms(self) -> int:
        return self.claimed_at_ms + KEEP_MS

    @property
    def is_open(self) -> bool:
        """Nothing is bound, and no answer kept."""
        return not self.uid and not self.status

    def is_free_for(self, fingerprint: str, claimant: str, now_ms: int, dead_after_ms: int | None) -> bool:
        if self.expires_at_ms <= now_ms:
            return True
        is_dead = dead_after_ms is not None and self.claimed_at_ms <= now_ms - dead_after_ms
        return self.is_open and self.fingerprint == fingerprint and (self.claimant == claimant or is_dead)


def _key(key: str, claimant: str, fingerprint: str = "f") -> RequestKey:
    return RequestKey("", "create", key, fingerprint, claimant)


class StoreMachine(RuleBasedStateMachine):
    """Environments, places, snapshots, leases, events, requests and restarts: `records`, `snapshots`, `leases`, `first`
    and `requests` are what the store must agree with."""

    uids = Bundle("uids")

    def __init__(self, make_place: Callable[[Path], Place], replicas: int, finish: Callable[[], None]) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory(prefix="fuse-store-")
        self.place = make_place(Path(self.folder.name))
        self.finish = finish
        self.records: dict[str, Environment] = {}
        self.snapshots: dict[str, Snapshot] = {}
        #: uid to (action seq, owner, until).
        self.leases: dict[str, tuple[int, str, int]] = {}
        #: uid to the number of its first event that is kept, if that is not 1.
        self.first: dict[str, int] = {}
        #: Idempotency-Key to what is known of it.
        self.requests: dict[str, Known] = {}
        self.number = 0
        self.stores: list[Store] = [self.run(self.place.open()) for _ in range(replicas)]
        for host_id in ("h1", "h2"):
            capacity = Resources(cpus=8, ram_mb=2048, storage_gb=100, vm_count=3)
            host = Host(id=host_id, url="x", capacity=capacity, created_at_ms=1, updated_at_ms=1)
            self.run(self.store.save_host(host))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @property
    def store(self) -> Store:
        """The replicas take turns."""
        self.stores.append(self.stores.pop(0))
        return self.stores[0]

    def teardown(self) -> None:
        for store in self.stores:
            self.run(store.close())
        if isinstance(self.place, Remote):
            self.run(self.place.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.folder.cleanup()
        self.finish()

    # -- rules -----------------------------------------------------------------------------------------------------

    @rule(
        target=uids,
        task=st.sampled_from("xyz"),
        host=st.sampled_from(["h1", "h2", ""]),
        owner=st.sampled_from(OWNERS),
        tenant=st.sampled_from(["", "t"]),
    )
    def create(self, task: str, host: str, owner: str, tenant: str) -> object:
        now_ms = self.place.now_ms()
        step = self._begin(task, host, tenant)
        is_taken = any(env.task_id == task and not env.is_terminal for env in self.records.values())
        is_full = self._is_full(host)
        try:
            env = self.run(self.store.create(step, self._room(step), Claim(owner, LEASE_MS) if host else None))
        except TaskExists:
            assert is_taken
            return multiple()
        except ReservationLost:
            assert is_full
            assert not is_taken
            return multiple()
        assert not is_taken
        assert not is_full
        self.records[env.uid] = env
        if host:
            self.leases[env.uid] = (1, owner, now_ms + LEASE_MS)
        return env.uid

    @rule(uid=uids, kind=st.sampled_from(KINDS), owner=st.sampled_from(OWNERS), is_stale=st.booleans())
    def feed(self, uid: str, kind: str, owner: str, is_stale: bool) -> None:
        env = self.records.get(uid)
        if env is None:
            return  # purged
        self._feed(env, self._event(kind, env), owner, is_stale=is_stale)

    @rule(uid=uids, host=st.sampled_from(["h1", "h2"]), owner=st.sampled_from(OWNERS))
    def place_it(self, uid: str, host: str, owner: str) -> None:
        env = self.records.get(uid)
        if env is None or not env.is_queued:
            return
        self._feed(env, Placed(cause="e", host_id=host), owner, is_stale=False)

    @rule(milliseconds=st.sampled_from([1, 400, 1000, 60_000]))
    def wait(self, milliseconds: int) -> None:
        self.run(self.place.advance(milliseconds))

    @rule(uid=uids, owner=st.sampled_from(OWNERS))
    def acquire(self, uid: str, owner: str) -> None:
        env = self.records.get(uid)
        if env is None:
            return  # purged
        seq = env.pending.seq if env.pending is not None else env.action_seq
        held = self.leases.get(uid)
        is_free = env.pending is not None and (held is None or held[2] <= self.place.now_ms())
        found = self.run(self.store.acquire(uid, seq, Claim(owner, LEASE_MS)))
        assert (found == env) is is_free
        if is_free:
            self.leases[uid] = (seq, owner, self.place.now_ms() + LEASE_MS)

    @rule(owner=st.sampled_from(OWNERS))
    def renew(self, owner: str) -> None:
        held = [(uid, seq) for uid, (seq, holder, _) in self.leases.items() if holder == owner]
        assert self.run(self.store.renew(held, Claim(owner, LEASE_MS))) == set(held)
        for uid, seq in held:
            self.leases[uid] = (seq, owner, self.place.now_ms() + LEASE_MS)

    @rule(owner=st.sampled_from(OWNERS))
    def release(self, owner: str) -> None:
        self.run(self.store.release(owner))
        self.leases = {uid: held for uid, held in self.leases.items() if held[1] != owner}

    @rule()
    def restart(self) -> None:
        """One process per SQLite file: its leases end with it. Those of replicas do not."""
        if len(self.stores) == 1:
            self.run(self.stores[0].close())
            self.stores = [self.run(self.place.open())]
            self.leases.clear()
        else:
            self.run(self.stores[-1].close())
            self.stores[-1] = self.run(self.place.open())

    @rule()
    def purge(self) -> None:
        self.run(self.place.advance(1))
        kept = {snapshot.uid for snapshot in self.snapshots.values()}
        gone = {uid for uid, env in self.records.items() if env.is_terminal and uid not in kept}
        assert self.run(self.store.purge(0, 1000)) == len(gone)
        self.records = {uid: env for uid, env in self.records.items() if uid not in gone}
        now_ms = self.place.now_ms()
        self.requests = {key: known for key, known in self.requests.items() if known.expires_at_ms > now_ms}

    @rule()
    def prune(self) -> None:
        self.run(self.place.advance(1))
        old = sum(env.event_seq - self.first.get(uid, 1) for uid, env in self.records.items())
        assert self.run(self.store.prune_events(0, 10_000)) == old
        self.first = {uid: env.event_seq for uid, env in self.records.items()}

    @rule(key=KEYS, fingerprint=st.sampled_from("fg"), by=CLAIMANTS, dead_after_ms=st.sampled_from([None, 500]))
    def claim(self, key: str, fingerprint: str, by: str, dead_after_ms: int | None) -> None:
        found = self.run(self.store.claim_request(_key(key, by, fingerprint), KEEP_MS, dead_after_ms))
        known, now_ms = self.requests.get(key), self.place.now_ms()
        if known is None or known.is_free_for(fingerprint, by, now_ms, dead_after_ms):
            assert found is None
            self.requests[key] = Known(fingerprint, by, now_ms)
        else:
            assert found == StoredRequest(known.fingerprint, known.uid, known.status, known.body, is_sealed=False)

    @rule(key=KEYS, by=CLAIMANTS, task=st.sampled_from("xyz"))
    def bind(self, key: str, by: str, task: str) -> None:
        """By a create, all or nothing."""
        known = self.requests.get(key)
        if any(env.task_id == task and not env.is_terminal for env in self.records.values()):
            return
        step = self._begin(task, "", "")
        is_ours = known is not None and known.claimant == by and known.is_open
        try:
            env = self.run(self.store.create(step, None, None, _key(key, by)))
        except IdempotencyInProgress:
            assert not is_ours
            return
        assert is_ours
        self.records[env.uid] = env
        known.uid = env.uid

    @rule(key=KEYS, by=CLAIMANTS, status=st.sampled_from([201, 400]), is_by_uid=st.booleans())
    def finish(self, key: str, by: str, status: int, is_by_uid: bool) -> None:
        known = self.requests.get(key)
        uid = known.uid if known is not None and is_by_uid else ""
        self.run(self.store.finish_request(_key(key, by), status, f"{status} {by}", uid=uid))
        if known is not None and not known.status and (known.claimant == by or uid):
            known.status, known.body = status, f"{status} {by}"

    @rule(key=KEYS, by=CLAIMANTS, fingerprint=st.sampled_from("fg"))
    def forget(self, key: str, by: str, fingerprint: str) -> None:
        known = self.requests.get(key)
        found = self.run(self.store.forget_request(_key(key, by, fingerprint)))
        if known is not None and known.claimant == by and known.is_open:
            assert found == ""
            del self.requests[key]
        else:
            assert found == (known.uid if known is not None and known.fingerprint == fingerprint else "")

    @rule(owner=st.sampled_from(OWNERS))
    def delete_a_snapshot(self, owner: str) -> None:
        for snapshot in self.snapshots.values():
            if snapshot.state in (SnapshotState.READY, SnapshotState.ERROR):
                deleting = msgspec.structs.replace(snapshot, state=SnapshotState.DELETING)
                deleting = self.run(self.store.save_snapshot(deleting))
                assert self.run(self.store.due(10)).snapshots == (snapshot.id,)
                assert self.run(self.store.acquire_snapshot(snapshot.id, Claim(owner, LEASE_MS))) == deleting
                self.run(self.store.drop_snapshot(snapshot.id))
                del self.snapshots[snapshot.id]
                return

    @rule(host=st.sampled_from(["h1", "h2"]))
    def keep_a_host_that_is_in_use(self, host: str) -> None:
        count = self._count(host)
        if count:
            with pytest.raises(HostInUse) as caught:
                self.run(self.store.drop_host(host))
            assert caught.value.machines == count

    # -- what is expected ------------------------------------------------------------------------------------------

    def _feed(self, env: Environment, event: Event, owner: str, *, is_stale: bool) -> None:
        try:
            step = lifecycle.step(env, event, self.place.now_ms(), POLICY)
        except (WrongState, ActionUnderWay):
            return
        booking = self._room(step) if not env.host_id and step.record.host_id else None
        is_full = booking is not None and self._is_full(step.record.host_id)
        revision = env.revision - 1 if is_stale else env.revision
        try:
            saved = self.run(self.store.commit(env.uid, revision, step, Claim(owner, LEASE_MS), reservation=booking))
        except RevisionConflict:
            assert is_stale
            return
        except ReservationLost:
            assert is_full
            return
        assert not is_stale
        assert not is_full
        self.records[env.uid] = saved
        assert saved == msgspec.structs.replace(step.record, revision=env.revision + 1)
        for snapshot in step.snapshots:
            before = self.snapshots.get(snapshot.id)
            revision = before.revision if before is not None else 0
            self.snapshots[snapshot.id] = msgspec.structs.replace(snapshot, revision=revision + 1)
        if saved.pending is None:
            self.leases.pop(env.uid, None)
        elif saved.pending != env.pending:
            self.leases[env.uid] = (saved.pending.seq, owner, self.place.now_ms() + LEASE_MS)

    def _begin(self, task: str, host: str, tenant: str) -> Step:
        self.number += 1
        identity = Identity(uid=f"u{self.number:04}", task_id=task, machine_id=f"m-{self.number}", tenant=tenant)
        spec = complete(POLICY, queue_seconds=100)
        return lifecycle.begin(identity, spec, host, cause="c", now_ms=self.place.now_ms(), policy=POLICY)

    def _event(self, kind: str, env: Environment) -> Event:
        seq = env.action_seq
        match kind:
            case "up":
                return BootSucceeded(cause="e", seq=seq)
            case "refused":
                return BootRefused(cause="e", seq=seq, reason="boot_failed", message="no")
            case "unknown":
                return OutcomeUnknown(cause="e", seq=seq, message="lost")
            case "destroy":
                return DestroyRequested(cause="e")
            case "drain":
                return DrainRequested(cause="e")
            case "gone":
                return DestroyConfirmed(cause="e", seq=seq)
            case "snapshot":
                return SnapshotRequested(cause="e", snapshot=self._new_snapshot(env))
            case "taken" if isinstance(env.pending, SnapshotMachine):
                return SnapshotTaken(cause="e", seq=seq, size_bytes=1, digest="d")
            case "not taken" if isinstance(env.pending, SnapshotMachine):
                return ActionRefused(cause="e", seq=seq, reason="snapshot_failed", message="no")
            case _:
                return HostLost(cause="e", host_id=env.host_id or "none")

    def _new_snapshot(self, env: Environment) -> Snapshot:
        self.number += 1
        now_ms = self.place.now_ms()
        return Snapshot(
            id=f"snap-{self.number:04}",
            uid=env.uid,
            task_id=env.task_id,
            tenant=env.tenant,
            host_id=env.host_id,
            machine_id=env.machine_id,
            state=SnapshotState.CREATING,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
        )

    def _room(self, step: Step) -> Reservation | None:
        spec, host_id = step.record.spec, step.record.host_id
        if not host_id:
            return None
        return Reservation(host_id, resources_of(spec), lambda found: can_reserve(found, spec, POLICY))

    def _count(self, host: str) -> int:
        return sum(env.host_id == host and not env.is_terminal for env in self.records.values())

    def _is_full(self, host: str) -> bool:
        return bool(host) and self._count(host) >= 3

    @invariant()
    def the_store_agrees(self) -> None:
        found = self.run(self.store.world())
        assert found.environments == self.records
        assert found.snapshots == self.snapshots
        assert violations(found, POLICY) == []
        for uid, facts in found.facts.items():
            assert facts[0].seq == self.first.get(uid, 1)
        due = self.run(self.store.due(1000))
        assert {uid for uid, _ in due.actions} == {uid for uid, env in self.records.items() if self._is_due(env)}
        live = sorted(uid for uid, env in self.records.items() if not env.is_terminal)
        assert [env.uid for env in self.run(self.store.list_page(Query(limit=1000)))] == live
        waiting = [uid for uid in live if self.records[uid].is_queued]
        assert [env.uid for env in self.run(self.store.queued_after("", 1000))] == waiting
        assert sorted(env.uid for env in self.run(self.store.queued(1000))) == waiting
        listed = self.run(self.store.snapshots(SnapshotQuery(limit=1000)))
        assert [snapshot.id for snapshot in listed] == sorted(self.snapshots, reverse=True)

    def _is_due(self, env: Environment) -> bool:
        held = self.leases.get(env.uid)
        now_ms = self.place.now_ms()
        return env.pending is not None and env.pending.not_before_ms <= now_ms and (held is None or held[2] <= now_ms)


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def _nothing() -> None:
    pass


def test_sqlite_agrees_with_its_model() -> None:
    def make() -> StoreMachine:
        return StoreMachine(lambda folder: sqlite_place(folder / "fuse.db"), 1, _nothing)

    run_state_machine_as_test(make, settings=_settings(30))


def test_the_store_of_the_simulation_agrees_with_its_model() -> None:
    def make() -> StoreMachine:
        return StoreMachine(lambda _folder: inline_place(), 2, _nothing)

    run_state_machine_as_test(make, settings=_settings(60))


def test_postgres_agrees_with_its_model(postgres_server: PostgresServer) -> None:
    def make() -> StoreMachine:
        url = postgres_server.create_database()
        return StoreMachine(lambda _folder: Remote(url), 2, lambda: postgres_server.drop_database(url))

    run_state_machine_as_test(make, settings=_settings(10))


def test_the_model_notices_what_is_wrong() -> None:
    """A checker must be seen to fail."""

    class Wrong(StoreMachine):
        @rule(uid=StoreMachine.uids)
        def lose_a_lease(self, uid: str) -> None:
            self.run(self.store.release("a"))

    def make() -> StoreMachine:
        return Wrong(lambda _folder: inline_place(), 2, _nothing)

    with pytest.raises((AssertionError, Error)):
        run_state_machine_as_test(
            make, settings=settings(_settings(200), derandomize=True, print_blob=False, report_multiple_bugs=False)
        )
