"""Actions, leases, superseding, and what survives a death."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from control_harness import FAST, TIMEOUT_S, observed, running, until
from msgspec.structs import replace
from worker_bench import POLICY, Bench, at_work, bench

from fusevm.control import performer as performer_module
from fusevm.control import worker as module
from fusevm.control.clock import DatabaseClock
from fusevm.control.store.protocol import Claim, Due
from fusevm.control.store.statements import Statement
from fusevm.model.environment import Action, Environment, State
from fusevm.model.errors import (
    BadSetting,
    BootFailed,
    HostRejected,
    OrderExpired,
    StaleIncarnation,
    StoreFull,
    WrongCluster,
)
from fusevm.model.event import BootSucceeded, DestroyRequested, MachineExited
from fusevm.model.machine import Phase
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import FakeHost, lose_reply

HOUR_MS = 3_600_000


class WrongClock:
    """A replica's clock that is off by so much. Implements `control.clock.Clock`."""

    def __init__(self, right: FakeClock, off_ms: int) -> None:
        self._right = right
        self._off_ms = off_ms

    def now_ms(self) -> int:
        return self._right.now_ms() + self._off_ms

    def steady_ms(self) -> int:
        return self._right.steady_ms()

    async def sleep_until(self, at_ms: int) -> None:
        await self._right.sleep_until(at_ms - self._off_ms)


def the_action(env: Environment) -> Action:
    assert env.pending is not None
    return env.pending


async def test_the_replica_that_takes_a_create_performs_it() -> None:
    async with bench() as at:
        first = at.replica("first")
        async with at_work(first):
            env = await first.create()
            await until(lambda: at.is_in(env.uid, State.RUNNING))
        order = at.host.calls[0][1][1]
        assert order.machine_id == env.machine_id
        fence = at.host.calls[0][1][0]
        assert (fence.cluster, fence.uid, fence.incarnation, fence.action_seq) == (at.store.cluster, env.uid, 1, 1)


async def test_an_order_is_valid_until_its_action_is_given_up_whoever_sends_it() -> None:
    async with bench() as at:
        wrong = DatabaseClock(WrongClock(at.clock, HOUR_MS))
        dead, heir = at.replica("dead"), at.replica("heir", clock=wrong)
        first, second = await dead.create("t1"), await dead.create("t2")
        at.clock.advance(50_000)
        before_ms = at.host.now().ms
        async with at_work(heir):
            for env in (first, second):
                await until(lambda env=env: at.is_in(env.uid, State.RUNNING))  # type: ignore[misc]
        after_ms = at.host.now().ms
        for name, (fence, _order) in at.host.calls:
            assert (name, fence.valid_until.clock) == ("create", at.host.clock)
            left_ms = POLICY.boot_deadline_ms - 50_000
            assert before_ms + left_ms - 1 <= fence.valid_until.ms <= after_ms + left_ms


async def test_what_holds_an_order_up_before_it_is_sent_makes_it_end_sooner() -> None:
    async with bench() as at:
        replica = at.replica("r")
        env = await replica.create()
        asked = asyncio.Event()

        async def slow_database_ms() -> int:
            now_ms = await at.store.now_ms()
            asked.set()
            await asyncio.sleep(0.2)
            return now_ms

        replica.worker._performer._database_ms = slow_database_ms
        performing = asyncio.create_task(replica.worker._performer.perform(env, the_action(env)))
        await asked.wait()
        asked_ms = at.host.now().ms
        await performing
        ((_name, (fence, _order)),) = at.host.calls
        assert at.host.now().ms >= asked_ms + 190
        assert fence.valid_until.ms <= asked_ms + POLICY.boot_deadline_ms


async def test_an_order_that_the_host_refuses_as_late_is_given_again_while_there_is_time() -> None:
    async with bench() as at:
        replica = at.replica("r")
        at.host.script("create", OrderExpired(uid="u", action_seq=1))
        async with at_work(replica):
            env = await replica.create()
            await until(lambda: at.host.count("create") == 1)

            async def is_waiting() -> bool:
                found = await at.store.get(env.uid)
                return found is not None and found.pending is not None and found.pending.attempt == 1

            await until(is_waiting)
            at.clock.advance(1_000)
            await until(lambda: at.is_in(env.uid, State.RUNNING))
        assert [fence.action_seq for name, (fence, _order) in at.host.calls if name == "create"] == [1, 2]


async def test_two_workers_on_one_store_never_both_act() -> None:
    async with bench() as at:
        taker, first, second = at.replica("taker"), at.replica("first"), at.replica("second")
        envs = [await taker.create(f"t{n}") for n in range(20)]  # taker does not work, so its leases run out
        async with at_work(first, second):
            at.clock.advance(600)
            for env in envs:
                await until(lambda env=env: at.is_in(env.uid, State.RUNNING))  # type: ignore[misc]
        assert at.host.count("create") == 20


async def test_a_dead_holders_action_is_performed_again() -> None:
    async with bench() as at:
        dead, heir = at.replica("dead"), at.replica("heir")
        env = await dead.create()
        async with at_work(heir):
            await until(lambda: heir.metrics.loop_failures is not None)
            assert await at.is_in(env.uid, State.PROVISIONING)
            at.clock.advance(600)
            await until(lambda: at.is_in(env.uid, State.RUNNING))


async def test_a_destroy_takes_over_from_another_replicas_boot() -> None:
    async with bench() as at:
        booting, destroying = at.replica("booting"), at.replica("destroying")
        at.host.hold["create"] = asyncio.Event()
        async with at_work(booting, destroying):
            env = await booting.create()
            await until(lambda: at.host.count("create") == 1)
            await destroying.entry.feed(env.uid, DestroyRequested(cause="test"))
            await until(lambda: at.is_in(env.uid, State.DESTROYED))
            at.host.hold["create"].set()
        assert at.host.table == {}


async def test_an_outcome_that_comes_too_late_changes_nothing() -> None:
    async with bench() as at:
        replica = at.replica("r")
        env = await replica.create()
        ending = await replica.entry.feed(env.uid, DestroyRequested(cause="test"))
        assert await replica.entry.feed(env.uid, BootSucceeded(cause="late", seq=1)) == ending


async def test_a_lost_lease_cancels_the_action() -> None:
    async with bench() as at:
        slow, heir = at.replica("slow", lease_ms=60), at.replica("heir")
        at.host.hold["create"] = asyncio.Event()
        async with at_work(slow):
            env = await slow.create()
            await until(lambda: at.host.count("create") == 1)
            at.clock.advance(60)
            assert await at.store.acquire(env.uid, 1, Claim("heir", 10_000)) is not None
            await until(lambda: not slow.worker._jobs)
        at.host.hold["create"].set()
        async with at_work(heir):
            await at.store.release("heir")
            await until(lambda: at.is_in(env.uid, State.RUNNING))


async def test_a_stopped_worker_gives_its_leases_back() -> None:
    async with bench() as at:
        first, second = at.replica("first"), at.replica("second")
        at.host.hold["create"] = asyncio.Event()
        async with at_work(first):
            env = await first.create()
            await until(lambda: at.host.count("create") == 1)
        assert (await at.store.due(10)).actions == ((env.uid, 1),)
        at.host.hold["create"].set()
        async with at_work(second):
            await until(lambda: at.is_in(env.uid, State.RUNNING))


async def test_attempts_wait_for_their_time() -> None:
    async with bench() as at:
        replica = at.replica("r", lease_ms=10_000_000)
        at.host.script("create", lose_reply)
        async with at_work(replica):
            env = await replica.create()

            async def waits() -> bool:
                found = await at.store.get(env.uid)
                return found is not None and found.pending is not None and found.pending.attempt == 1

            await until(waits)
            assert at.host.count("create") == 1
            at.clock.advance(200)
            await until(lambda: at.is_in(env.uid, State.RUNNING))
        assert at.host.count("create") == 2


async def test_a_boot_is_given_up_at_its_deadline() -> None:
    async with bench() as at:
        replica = at.replica("r", lease_ms=10_000_000)
        at.host.hold["create"] = asyncio.Event()
        async with at_work(replica):
            env = await replica.create()
            await until(lambda: at.host.count("create") == 1)
            at.clock.advance(POLICY.boot_deadline_ms)
            await until(lambda: at.is_in(env.uid, State.FAILED))
        ended = await at.store.get(env.uid)
        assert ended is not None
        assert ended.ending is not None
        assert ended.ending.reason == "boot_timeout"


async def test_the_runtime_limit_ends_an_environment() -> None:
    async with bench() as at:
        replica = at.replica("r", lease_ms=10_000_000)
        async with at_work(replica):
            env = await replica.create()
            await until(lambda: at.is_in(env.uid, State.RUNNING))
            at.clock.advance(env.spec.max_runtime_seconds * 1000)
            await until(lambda: at.is_in(env.uid, State.DESTROYED))


@pytest.mark.parametrize("off_ms", [-HOUR_MS, HOUR_MS])
async def test_a_replica_whose_clock_is_wrong_goes_by_the_databases(off_ms: int) -> None:
    """It ends nothing early or late, and saves nothing in vain."""
    async with bench() as at:
        clock = DatabaseClock(WrongClock(at.clock, off_ms))
        await clock.follow(at.store.now_ms)
        replica = at.replica("r", lease_ms=10_000_000, clock=clock)
        at.host.script("create", lose_reply)
        async with at_work(replica):
            env = await replica.create()
            await until(lambda: at.clock.advance(100) or at.is_in(env.uid, State.RUNNING))
            running = await at.store.get(env.uid)
            assert running is not None
            at.clock.advance(env.created_at_ms + env.spec.max_runtime_seconds * 1000 - at.clock.now_ms() - 1)
            asked = at.host.count("create")
            for _ in range(3):
                await replica.worker._look()
            assert await at.store.get(env.uid) == running
            at.clock.advance(1)
            await until(lambda: at.is_in(env.uid, State.DESTROYED))
        ended = await at.store.get(env.uid)
        assert ended is not None
        assert (asked, ended.revision) == (2, running.revision + 2)


async def test_an_action_begins_when_the_database_says_so() -> None:
    """Of two replicas whose clocks are two hours apart, the one goes on where the other has died."""
    async with bench() as at:
        fast, slow = (
            at.replica(name, clock=DatabaseClock(WrongClock(at.clock, off_ms)))
            for name, off_ms in (("fast", HOUR_MS), ("slow", -HOUR_MS))
        )
        for replica in (fast, slow):
            await replica.worker._clock.follow(at.store.now_ms)
        at.host.script("create", lose_reply)
        async with at_work(fast):
            env = await fast.create()

            async def has_failed() -> bool:
                found = await at.store.get(env.uid)
                return found is not None and found.pending is not None and found.pending.attempt == 1

            await until(has_failed)
        at.clock.advance(1_000)
        async with at_work(slow):
            await until(lambda: at.is_in(env.uid, State.RUNNING))


async def _write(at: Bench, uid: str, doc: str) -> None:
    await at.store._engine.apply(Statement("", (uid, doc), "update environments set doc = $2 where uid = $1"))


async def test_a_record_that_cannot_be_read_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_LIMIT", 1)
    async with bench() as at:
        taker, replica = at.replica("taker"), at.replica("r", lease_ms=10_000_000)
        broken = [await taker.create(f"broken{n}") for n in range(3)]
        env = await taker.create()
        for record in broken:
            await _write(at, record.uid, '{"state":"of a newer program"}')
        at.clock.advance(600)
        async with at_work(replica):
            await until(lambda: at.is_in(env.uid, State.RUNNING))
            at.clock.advance(env.spec.max_runtime_seconds * 1000)
            await until(lambda: at.is_in(env.uid, State.DESTROYED))
            failures = replica.metrics.loop_failures.labels
            assert failures("record")._value.get() == 6  # once per look that was not too soon, not in every one
            assert failures("worker")._value.get() == 0
            for record in broken:
                await _write(at, record.uid, msgspec.json.encode(record).decode())
            at.clock.advance(module.TROUBLE_PAUSE_MS)
            for record in broken:
                await until(lambda uid=record.uid: at.is_in(uid, State.FAILED, State.DESTROYED))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BootFailed(id="m", problem="panic"), "boot_failed"),
        (StaleIncarnation(uid="u", incarnation=1, seen=2), "stale_incarnation"),
        (WrongCluster(cluster="c1", asked="c2"), "wrong_cluster"),
        (HostRejected(id="h1"), "host_rejected"),
    ],
)
async def test_what_a_repetition_cannot_cure_ends_the_environment(error: Exception, reason: str) -> None:
    async with bench() as at:
        replica = at.replica("r")
        at.host.script("create", error)
        async with at_work(replica):
            env = await replica.create()
            await until(lambda: at.is_in(env.uid, State.FAILED))
        ended = await at.store.get(env.uid)
        assert ended is not None
        assert ended.ending is not None
        assert ended.ending.reason == reason


async def test_a_bug_on_the_way_to_a_host_is_an_attempt_that_failed() -> None:
    async with bench() as at:
        replica = at.replica("r", lease_ms=10_000_000)
        at.host.script("create", KeyError("bug"))
        async with at_work(replica):
            env = await replica.create()
            await until(lambda: replica.metrics.loop_failures.labels("action")._value.get() == 1)
            await until(lambda: at.clock.advance(100) or at.is_in(env.uid, State.RUNNING))


async def test_a_key_that_this_replica_lacks_costs_no_environment() -> None:
    async with bench() as at:
        replica = at.replica("r", lease_ms=10_000_000)
        at.host.script("create", BadSetting(setting="encryption_key", problem="the secret was sealed with another key"))
        async with at_work(replica):
            env = await replica.create()
            await until(lambda: at.host.count("create") == 1)
            await until(lambda: at.clock.advance(100) or at.is_in(env.uid, State.RUNNING))


async def test_a_machine_that_is_still_being_made_is_asked_for_again() -> None:
    async with bench() as at:
        replica = at.replica("r", lease_ms=10_000_000)
        at.host.boot_phase = Phase.CREATING
        async with at_work(replica):
            env = await replica.create()
            await until(lambda: at.host.count("create") == 1)
            at.host.table[env.machine_id] = replace(at.host.table[env.machine_id], phase=Phase.RUNNING)
            await until(lambda: at.clock.advance(100) or at.is_in(env.uid, State.RUNNING))


async def test_outcomes_outlive_a_store_that_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPORT_PAUSE_S", 0.01)
    async with bench() as at:
        replica, commit = at.replica("r"), at.store.commit
        failures = [StoreFull(problem="full"), StoreFull(problem="full")]

        async def failing(*args: object, **more: object) -> Environment:
            if failures:
                raise failures.pop()
            return await commit(*args, **more)  # type: ignore[arg-type]

        at.store.commit = failing  # type: ignore[method-assign]
        async with at_work(replica):
            env = await replica.create()
            await until(lambda: at.is_in(env.uid, State.RUNNING))
        assert replica.metrics.loop_failures.labels("report")._value.get() == 2


async def test_pending_actions_survive_a_crash_of_the_process(tmp_path: Path) -> None:
    path = str(tmp_path / "fuse.db")
    async with bench(path) as at:
        crashed = at.replica("crashed")
        booting, ending = await crashed.create("booting"), await crashed.create("ending")
        await crashed.entry.feed(ending.uid, DestroyRequested(cause="test"))
        cluster, host = at.store.cluster, at.host
    async with bench(path) as at:
        assert at.store.cluster == cluster
        at.host = at.hosts["h1"] = host
        heir = at.replica("heir")
        async with at_work(heir):
            await until(lambda: at.is_in(booting.uid, State.RUNNING))
            await until(lambda: at.is_in(ending.uid, State.DESTROYED))
        assert [machine.id for machine in observed(host)] == [booting.machine_id]


async def test_a_server_that_starts_again_goes_on(tmp_path: Path) -> None:
    path = str(tmp_path / "fuse.db")
    host = FakeHost("h1")
    host.hold["create"] = asyncio.Event()
    async with running(host, database=path, wait_s=0.05) as server:
        made = await server.create()
        assert made["state"] == "provisioning"
    host.hold["create"].set()
    async with running(host, database=path) as server:

        async def is_running() -> bool:
            return bool((await server.get()).json()["state"] == "running")

        await until(is_running)
        assert (await server.get()).json()["uid"] == made["uid"]
        assert FAST["lease_s"] > TIMEOUT_S  # the leases were given back, not waited for


async def test_a_look_or_a_renewal_that_fails_is_made_again() -> None:
    async with bench() as at:
        taker, replica = at.replica("taker"), at.replica("r", lease_ms=60)
        env = await taker.create()
        due, renew, failures = at.store.due, at.store.renew, {"due": 2, "renew": 2}

        async def failing_due(limit: int) -> object:
            if failures["due"]:
                failures["due"] -= 1
                raise StoreFull(problem="full")
            return await due(limit)

        async def failing_renew(held: object, claim: Claim) -> object:
            if failures["renew"]:
                failures["renew"] -= 1
                raise StoreFull(problem="full")
            return await renew(held, claim)  # type: ignore[arg-type]

        at.store.due, at.store.renew = failing_due, failing_renew  # type: ignore[method-assign,assignment]
        at.host.hold["create"] = asyncio.Event()
        at.clock.advance(600)
        async with at_work(replica):
            await until(lambda: at.host.count("create") == 1)
            await until(lambda: failures == {"due": 0, "renew": 0})
            at.host.hold["create"].set()
            await until(lambda: at.is_in(env.uid, State.RUNNING))
        assert replica.metrics.loop_failures.labels("worker")._value.get() == 2
        assert replica.metrics.loop_failures.labels("renewal")._value.get() == 2


async def test_a_damaged_snapshot_that_is_due_is_left_alone_for_a_while() -> None:
    async with bench() as at:
        replica = at.replica("r")
        failures = replica.metrics.loop_failures.labels("collector")._value
        row = ("snap-1", "u1", "t1", "", "h1", "deleting", "", "", "", "", 0, 1, 0, "{")
        await at.store._engine.apply(Statement("insert_snapshot", row))
        async with at_work(replica):
            for times in (1, 2):
                await until(lambda times=times: failures.get() == times)
                await asyncio.sleep(0.1)  # ten looks
                assert failures.get() == times
                at.clock.advance(module.TROUBLE_PAUSE_MS)
        await at.store.drop_snapshot("snap-1")


async def _remove_host(at: Bench) -> None:
    """As if somebody had taken the host out of the table."""
    del at.hosts["h1"]
    await at.store._engine.apply(Statement("", (), "delete from hosts"))


async def test_a_destroy_on_a_host_that_is_no_longer_registered_ends() -> None:
    async with bench() as at:
        replica = at.replica("r")
        async with at_work(replica):
            env, given_up = await replica.create("deleted"), await replica.create("exited")
            for record in (env, given_up):
                await until(lambda uid=record.uid: at.is_in(uid, State.RUNNING))  # type: ignore[misc]
            await _remove_host(at)
            await replica.entry.feed(env.uid, DestroyRequested(cause="test"))
            await until(lambda: at.is_in(env.uid, State.DESTROYED))
            exited = MachineExited(cause="test", machine_id=given_up.machine_id, message="gone")
            await replica.entry.feed(given_up.uid, exited)
            await until(lambda: at.is_in(given_up.uid, State.FAILED))
        ended = await at.store.get(env.uid)
        assert ended is not None
        assert (ended.pending, ended.error) == (None, "host h1 was lost")
        assert at.host.count("destroy") == 0
        assert (await at.store.world()).placements == {}
        assert await at.store.due(10) == Due()


async def test_a_boot_on_a_host_that_is_no_longer_registered_ends_as_host_lost() -> None:
    async with bench() as at:
        replica = at.replica("r")
        env = await replica.create()
        await _remove_host(at)
        at.clock.advance(600)
        async with at_work(replica):
            await until(lambda: at.is_in(env.uid, State.FAILED))
        ended = await at.store.get(env.uid)
        assert ended is not None
        assert ended.ending is not None
        assert (ended.ending.reason, ended.pending) == ("host_lost", None)


async def test_a_silent_host_cannot_hold_a_boot_beyond_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performer_module, "GRACE_S", -119.0)
    async with bench() as at:
        replica = at.replica("r", lease_ms=10_000_000)
        at.host.hold["create"] = asyncio.Event()
        async with at_work(replica):
            env = await replica.create()

            async def is_tried_again() -> bool:
                found = await at.store.get(env.uid)
                return found is not None and "took longer than" in found.error

            await until(is_tried_again)
