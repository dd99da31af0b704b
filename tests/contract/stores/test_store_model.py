"""A store against a model of it: any sequence of operations, by hypothesis. Invariants of the core after every step."""

import asyncio
import tempfile
from pathlib import Path

import msgspec
from control_harness import world
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from fusevm.control.store.protocol import Claim, Query, Reservation, ReservationLost
from fusevm.control.store.sqlite import SqliteStore
from fusevm.core import lifecycle
from fusevm.core.invariants import violations
from fusevm.core.lifecycle import Identity
from fusevm.core.placement import can_reserve
from fusevm.core.policy import Policy
from fusevm.core.spec import complete, resources_of
from fusevm.model.environment import (
    BootRefused,
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    Environment,
    Event,
    HostLost,
    OutcomeUnknown,
)
from fusevm.model.errors import RevisionConflict, TaskExists, WrongState
from fusevm.model.host import Host, Resources
from fusevm.testing.clock import FakeClock

POLICY = Policy()
OWNERS = ("a", "b")


class StoreMachine(RuleBasedStateMachine):
    """Environments, leases and restarts; `records` and `leases` are what the store must agree with."""

    uids = Bundle("uids")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory(prefix="fuse-store-")
        self.clock = FakeClock()
        self.records: dict[str, Environment] = {}
        #: uid to (action seq, owner, until).
        self.leases: dict[str, tuple[int, str, int]] = {}
        self.number = 0
        self.store = self.run(self._open())
        for host_id in ("h1", "h2"):
            capacity = Resources(cpus=8, ram_mb=2048, storage_gb=100, vm_count=3)
            host = Host(id=host_id, url="x", capacity=capacity, created_at_ms=1, updated_at_ms=1)
            self.run(self.store.save_host(host))

    def run(self, work):  # type: ignore[no-untyped-def]
        return self.loop.run_until_complete(work)

    async def _open(self) -> SqliteStore:
        return await SqliteStore.open(str(Path(self.folder.name) / "fuse.db"), POLICY, self.clock.now_ms)

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.folder.cleanup()

    @rule(target=uids, task=st.sampled_from("xyz"), host=st.sampled_from(["h1", "h2"]), owner=st.sampled_from(OWNERS))
    def create(self, task: str, host: str, owner: str) -> object:
        self.number += 1
        identity = Identity(uid=f"u{self.number:04}", task_id=task, machine_id=f"m-{self.number}")
        spec = complete(POLICY)
        step = lifecycle.begin(identity, spec, host, cause="c", now_ms=self.clock.now_ms(), policy=POLICY)
        room = Reservation(host, resources_of(spec), lambda found: can_reserve(found, spec, POLICY))
        is_taken = any(env.task_id == task and not env.is_terminal for env in self.records.values())
        is_full = sum(env.host_id == host and not env.is_terminal for env in self.records.values()) >= 3
        try:
            env = self.run(self.store.create(step, room, Claim(owner, 1000)))
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
        self.leases[env.uid] = (1, owner, self.clock.now_ms() + 1000)
        return env.uid

    @rule(
        uid=uids,
        kind=st.sampled_from(["up", "refused", "unknown", "destroy", "drain", "gone", "lost"]),
        owner=st.sampled_from(OWNERS),
        is_stale=st.booleans(),
    )
    def feed(self, uid: str, kind: str, owner: str, is_stale: bool) -> None:
        env = self.records.get(uid)
        if env is None:
            return  # purged
        try:
            step = lifecycle.step(env, self._event(kind, env), self.clock.now_ms(), POLICY)
        except WrongState:
            return
        revision = env.revision - 1 if is_stale else env.revision
        try:
            saved = self.run(self.store.commit(uid, revision, step, Claim(owner, 1000)))
        except RevisionConflict:
            assert is_stale
            return
        assert not is_stale
        self.records[uid] = saved
        assert saved == msgspec.structs.replace(step.record, revision=env.revision + 1)
        if saved.pending is None:
            self.leases.pop(uid, None)
        elif saved.pending != env.pending:
            self.leases[uid] = (saved.pending.seq, owner, self.clock.now_ms() + 1000)

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
            case _:
                return HostLost(cause="e", host_id=env.host_id)

    @rule(milliseconds=st.sampled_from([1, 400, 1000, 60_000]))
    def wait(self, milliseconds: int) -> None:
        self.clock.advance(milliseconds)

    @rule(uid=uids, owner=st.sampled_from(OWNERS))
    def acquire(self, uid: str, owner: str) -> None:
        env = self.records.get(uid)
        if env is None:
            return  # purged
        seq = env.pending.seq if env.pending is not None else env.action_seq
        held = self.leases.get(uid)
        is_free = env.pending is not None and (held is None or held[2] <= self.clock.now_ms())
        found = self.run(self.store.acquire(uid, seq, Claim(owner, 1000)))
        assert (found == env) is is_free
        if is_free:
            self.leases[uid] = (seq, owner, self.clock.now_ms() + 1000)

    @rule(owner=st.sampled_from(OWNERS))
    def renew(self, owner: str) -> None:
        held = [(uid, seq) for uid, (seq, holder, _) in self.leases.items() if holder == owner]
        assert self.run(self.store.renew(held, Claim(owner, 1000))) == set(held)
        for uid, seq in held:
            self.leases[uid] = (seq, owner, self.clock.now_ms() + 1000)

    @rule(owner=st.sampled_from(OWNERS))
    def release(self, owner: str) -> None:
        self.run(self.store.release(owner))
        self.leases = {uid: held for uid, held in self.leases.items() if held[1] != owner}

    @rule()
    def restart(self) -> None:
        """One process per file: its leases end with it."""
        self.run(self.store.close())
        self.store = self.run(self._open())
        self.leases.clear()

    @rule()
    def purge(self) -> None:
        self.clock.advance(1)
        purged = self.run(self.store.purge(0, 1000))
        assert purged == sum(env.is_terminal for env in self.records.values())
        self.records = {uid: env for uid, env in self.records.items() if not env.is_terminal}

    @invariant()
    def the_store_agrees(self) -> None:
        found = self.run(world(self.store))
        assert found.environments == self.records
        assert violations(found, POLICY) == []
        due = self.run(self.store.due(1000))
        assert {uid for uid, _ in due.actions} == {uid for uid, env in self.records.items() if self._is_due(env)}
        live = sorted(uid for uid, env in self.records.items() if not env.is_terminal)
        assert [env.uid for env in self.run(self.store.list_page(Query(limit=1000)))] == live

    def _is_due(self, env: Environment) -> bool:
        held = self.leases.get(env.uid)
        now_ms = self.clock.now_ms()
        return env.pending is not None and env.pending.not_before_ms <= now_ms and (held is None or held[2] <= now_ms)


StoreMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
TestStoreAgainstItsModel = StoreMachine.TestCase
