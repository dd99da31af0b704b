"""Single faults, one after the other: what simulations found, as small as it can be told."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec.structs import replace

from fusevm.control.idempotency import STALE_MS, fingerprint_of
from fusevm.control.store import host_rows
from fusevm.control.store.protocol import RequestKey
from fusevm.control.store.sqlite import drive
from fusevm.model.environment import State
from fusevm.model.errors import MachineNotFound, SnapshotNotFound, StaleAction, StaleIncarnation
from fusevm.model.host import Host, HostHealth
from fusevm.model.machine import Fence, MachineSpec
from fusevm.testing.simulation import Safeguards, Scale
from fusevm.testing.simulation.cluster import Cluster
from fusevm.testing.simulation.database import Fate
from fusevm.testing.simulation.loop import run
from fusevm.testing.simulation.replica import Answer
from fusevm.testing.simulation.scale import NO_FAULTS, POLICY
from fusevm.wire.host_api import CreateMachine
from fusevm.wire.host_snapshots import TakeSnapshot

LOST_S = POLICY.host_lost_ms / 1000
Scenario = Callable[[Cluster], Awaitable[None]]


def play(scenario: Scenario, *, hosts: int = 1, replicas: int = 2) -> None:
    """Run one scenario in a cluster without users. Its pauses are the same every time."""
    random.seed(1)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            scale = Scale(hosts=hosts, environments=0, replicas=replicas)
            cluster = Cluster(group, 1, scale, Safeguards())
            for replica in cluster.replicas:
                replica.start()
            await asyncio.sleep(20)
            await scenario(cluster)
            cluster.end()
        cluster.database.inline.close()
        assert cluster.checker.violations == []

    run(main())


def record_of(cluster: Cluster, host_id: str = "h00") -> Host:
    found = drive(cluster.database.inline.connection, host_rows.get(host_id))
    assert found is not None
    return found


async def create(cluster: Cluster, task_id: str = "t1") -> str:
    answer = await cluster.replicas[0].ask("POST", "/v1/environments", body={"task_id": task_id})
    assert answer.status == 201, answer
    return str(answer.body["uid"])


def test_a_silent_host_is_lost_in_time_however_many_replicas_could_watch_it():
    """A heartbeat to it takes longer than half a lease: the lease must be prolonged meanwhile, or replicas take the
    watch from each other, and each begins to count the silence anew."""

    async def scenario(cluster: Cluster) -> None:
        uid = await create(cluster)
        cluster.hosts[0].is_gone = True
        await asyncio.sleep(2 * LOST_S)
        assert record_of(cluster).health is HostHealth.LOST
        ending = cluster.checker.records[uid].ending
        assert ending is not None
        assert ending.reason == "host_lost"

    play(scenario, replicas=3)


def test_a_clock_that_jumps_makes_no_host_lost():
    async def scenario(cluster: Cluster) -> None:
        uid = await create(cluster)
        for replica in cluster.replicas:
            cluster.network.cuts[replica.name, "h00"] = None
        async with asyncio.timeout(LOST_S):
            while record_of(cluster).health is HostHealth.OK:
                await asyncio.sleep(1)
        for replica in cluster.replicas:
            replica.clock.offset_ms += 3_600_000
        await asyncio.sleep(LOST_S / 4)
        assert record_of(cluster).health is HostHealth.UNREACHABLE
        cluster.network.cuts.clear()
        await asyncio.sleep(30)
        assert record_of(cluster).health is HostHealth.OK
        assert not cluster.checker.records[uid].is_terminal

    play(scenario)


@pytest.mark.parametrize("is_up", [True, False])
def test_a_database_that_was_away_makes_no_host_lost(is_up: bool):
    """However long: silence is counted from its return on, or from zero where the host was silent before."""

    async def scenario(cluster: Cluster) -> None:
        uid = await create(cluster)
        loop = asyncio.get_running_loop()
        if not is_up:
            cluster.hosts[0].die()
            await asyncio.sleep(LOST_S / 2)
        cluster.database.away_until_s = loop.time() + 3 * LOST_S
        await asyncio.sleep(3 * LOST_S + LOST_S / 2)
        assert record_of(cluster).health is (HostHealth.OK if is_up else HostHealth.UNREACHABLE)
        cluster.hosts[0].start()
        await asyncio.sleep(30)
        assert record_of(cluster).health is HostHealth.OK
        assert not cluster.checker.records[uid].is_terminal

    play(scenario)


def test_a_host_that_takes_our_token_no_more_is_unreachable_and_keeps_what_runs_there():
    async def scenario(cluster: Cluster) -> None:
        uid = await create(cluster)
        cluster.hosts[0].refusing = 1
        await asyncio.sleep(5 * LOST_S)
        host = record_of(cluster)
        assert (host.health, host.is_refusing) == (HostHealth.UNREACHABLE, True)
        cluster.hosts[0].refusing = 0
        await asyncio.sleep(30)
        assert record_of(cluster).health is HostHealth.OK
        assert not cluster.checker.records[uid].is_terminal

    play(scenario)


def test_a_replica_whose_clock_is_an_hour_ahead_hides_no_crash_from_the_others():
    async def scenario(cluster: Cluster) -> None:
        cluster.replicas[0].clock.offset_ms = 3_600_000
        uid = await create(cluster)
        cluster.replicas[0].kill()
        await asyncio.sleep(30)
        cluster.hosts[0].break_machine()
        await asyncio.sleep(30)
        assert cluster.checker.records[uid].is_terminal

    play(scenario)


def test_a_create_survives_the_replica_that_began_it():
    async def scenario(cluster: Cluster) -> None:
        asking = asyncio.ensure_future(create(cluster))
        await asyncio.sleep(0.5)
        (record,) = cluster.checker.records.values()
        cluster.replicas[0].kill()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(60)
        assert cluster.checker.records[record.uid].state == "running"
        assert len(cluster.hosts[0].table) == 1

    play(scenario)


def fence(action_seq: int) -> Fence:
    return Fence(cluster="c1", uid="u1", incarnation=1, action_seq=action_seq)


def order(machine_id: str = "m-1") -> CreateMachine:
    return CreateMachine(machine_id=machine_id, spec=MachineSpec(image="debian-12"))


def test_a_host_takes_no_order_that_is_older_than_one_before():
    async def scenario(cluster: Cluster) -> None:
        host = cluster.hosts[0]
        host.cluster = "c1"
        await host.create(fence(1), order())
        await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="s-1"))
        await host.restore_snapshot(fence(4), "m-1", "s-1")
        with pytest.raises(StaleAction):
            await host.restore_snapshot(fence(3), "m-1", "s-1")
        await host.destroy(fence(5), "m-1")
        with pytest.raises(StaleIncarnation):
            await host.create(fence(1), order())
        with pytest.raises(MachineNotFound):
            await host.destroy(fence(5), "m-1")

    play(scenario, replicas=0)


@pytest.mark.parametrize("has_deadlines", [True, False])
def test_a_restore_that_arrives_after_it_was_given_up_is_refused(has_deadlines: bool):
    async def scenario(cluster: Cluster) -> None:
        host, replica = cluster.hosts[0], cluster.replicas[0]
        host._safeguards = Safeguards(deadlines=has_deadlines)
        uid = await create(cluster)
        taken = await replica.ask("POST", "/v1/environments/fuse-t1/snapshots", body={})
        assert taken.status == 201, taken
        given_up_s = POLICY.restore_deadline_ms / 1000 + 3
        until_s = asyncio.get_running_loop().time() + given_up_s + 5
        for one in cluster.replicas:
            cluster.network.stuck_until_s[one.name, host.id] = until_s
        path = f"/v1/snapshots/{taken.body['id']}"
        asked = asyncio.create_task(replica.ask("POST", path, query={"action": "restore"}))
        await asyncio.sleep(given_up_s)
        record = cluster.checker.records[uid]
        assert (record.state, record.pending) == (State.RUNNING, None)
        await asyncio.sleep(30)
        await asked
        assert cluster.checker.records[uid].state is State.RUNNING
        # Without the safeguard the disk is changed under its user, and nobody is told.
        rules = [violation.rule for violation in cluster.checker.violations]
        assert [rule for rule in rules if "which was over" in rule] == rules
        assert bool(rules) is not has_deadlines
        cluster.checker.violations.clear()

    play(scenario)


def test_a_snapshot_that_was_freed_is_not_taken_by_an_order_that_comes_late():
    async def scenario(cluster: Cluster) -> None:
        host = cluster.hosts[0]
        host.cluster = "c1"
        await host.create(fence(1), order())
        await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="s-1"))
        await host.delete_snapshot("c1", "s-1")
        with pytest.raises(SnapshotNotFound):
            await host.take_snapshot(fence(2), "m-1", TakeSnapshot(snapshot_id="s-1"))
        assert host.snapshots == {}

    play(scenario, replicas=0)


# -- under an Idempotency-Key, with a database that fails at the worst moment ------------------------------------------

KEY = {"idempotency-key": "k"}
WISH = {"task_id": "t1"}


async def ask(cluster: Cluster, path: str = "/v1/environments", replica: int = 0, **options: Any) -> Answer:
    return await cluster.replicas[replica].ask("POST", path, headers=KEY, **options)


async def slow_create(cluster: Cluster, replica: int = 0) -> Answer:
    """Of an environment that takes 20 s to boot."""
    cluster.hosts[0].luck = replace(NO_FAULTS, slow_boot=1.0)
    return await ask(cluster, replica=replica, body=WISH)


@pytest.mark.parametrize("fates", [[Fate.SILENT], [Fate.UNDONE], [Fate.SILENT, Fate.DONE]])
@pytest.mark.parametrize("method", ["claim_request", "create", "forget_request", "finish_request"])
def test_a_create_under_a_key_is_made_once_whatever_the_database_does(method: str, fates: list[Fate]):
    async def scenario(cluster: Cluster) -> None:
        cluster.database.fates_of[method] = list(fates)
        answers = [await ask(cluster, body=WISH)]
        while answers[-1].status != 201 and len(answers) < 5:
            assert answers[-1].reason in ("store_unreachable", "idempotency_in_progress")
            await asyncio.sleep(15)
            answers.append(await ask(cluster, replica=1, body=WISH))
        again = await ask(cluster, replica=1, body=WISH)
        assert (again.status, again.body["uid"]) == (201, answers[-1].body["uid"])
        assert len(cluster.checker.records) == 1

    play(scenario)


def test_a_create_whose_commit_was_not_answered_goes_on_and_answers():
    async def scenario(cluster: Cluster) -> None:
        cluster.database.fates_of["create"] = [Fate.SILENT]
        assert (await ask(cluster, body=WISH)).status == 201

    play(scenario)


def test_a_repetition_waits_for_a_create_whose_first_request_met_an_outage_while_it_waited():
    async def scenario(cluster: Cluster) -> None:
        first = asyncio.ensure_future(slow_create(cluster))
        await asyncio.sleep(3)
        cluster.database.away_until_s = asyncio.get_running_loop().time() + 2
        assert (await first).reason == "store_unreachable"
        (uid,) = cluster.checker.records
        await asyncio.sleep(2)
        again = await ask(cluster, replica=1, body=WISH)
        assert (again.status, again.body["uid"]) == (201, uid)

    play(scenario)


def test_of_two_equal_creates_the_one_that_was_held_up_joins_the_one_that_took_its_key_over():
    async def scenario(cluster: Cluster) -> None:
        store = cluster.database.view("operator")
        stale = RequestKey("", "create_environment", "k", fingerprint_of({}, [], b'{"task_id":"t1"}'), "held up")
        assert await store.claim_request(stale, 86_400_000, STALE_MS) is None
        assert (await ask(cluster, body=WISH)).reason == "idempotency_in_progress"
        await asyncio.sleep(STALE_MS / 1000)
        taken_over = await ask(cluster, replica=1, body=WISH)
        assert taken_over.status == 201
        assert await store.forget_request(stale) == taken_over.body["uid"]

    play(scenario)


def test_a_snapshot_whose_commit_was_not_answered_is_not_taken_again():
    async def scenario(cluster: Cluster) -> None:
        await create(cluster)
        path = "/v1/environments/fuse-t1/snapshots"
        cluster.database.fates_of["commit"] = [Fate.SILENT]
        assert (await ask(cluster, path, body={})).reason == "store_unreachable"
        await asyncio.sleep(20)
        assert (await ask(cluster, path, replica=1, body={})).reason == "idempotency_in_progress"
        assert len(cluster.checker.world().snapshots) == 1

    play(scenario)


def test_a_create_that_ends_before_it_runs_has_its_answer_kept():
    async def scenario(cluster: Cluster) -> None:
        cluster.hosts[0].luck = replace(NO_FAULTS, failed_boot=1.0)
        first = await ask(cluster, body=WISH)
        cluster.hosts[0].luck = NO_FAULTS
        await asyncio.sleep(30)
        again = await ask(cluster, replica=1, body=WISH)
        assert (again.status, again.body) == (first.status, first.body)
        assert again.status >= 500
        assert len(cluster.checker.records) == 1

    play(scenario)


# -- use that only the host sees ---------------------------------------------------------------------------------------

IDLE_S = 60
WEB = {"task_id": "t1", "spec": {"idle_timeout_seconds": IDLE_S}, "expose": [{"port": 80}]}
#: The pace of lists and what they take, and the grain of the note.
LATE_S = 30


async def create_web(cluster: Cluster) -> tuple[str, str]:
    """An environment that clients reach by a port; with its machine."""
    answer = await cluster.replicas[0].ask("POST", "/v1/environments", body=WEB)
    assert answer.status == 201, answer
    (machine,) = cluster.hosts[0].table
    return str(answer.body["uid"]), machine


async def be_used(cluster: Cluster, machine: str, seconds: float, pause_s: float = 7) -> None:
    loop = asyncio.get_running_loop()
    until_s = loop.time() + seconds
    while loop.time() < until_s:
        cluster.hosts[0].use(machine)
        await asyncio.sleep(pause_s)


def end_of(cluster: Cluster, uid: str) -> str:
    ending = cluster.checker.records[uid].ending
    return "" if ending is None else ending.reason


@pytest.mark.parametrize("pause_s", [1, 55])
def test_an_environment_that_is_used_only_by_its_port_lives_and_ends_when_nobody_uses_it_any_more(pause_s: float):
    async def scenario(cluster: Cluster) -> None:
        uid, machine = await create_web(cluster)
        before = cluster.checker.records[uid].revision
        await be_used(cluster, machine, 20 * IDLE_S, pause_s)
        assert end_of(cluster, uid) == ""
        # Written a few times per timeout, and not with every list.
        assert 20 <= cluster.checker.records[uid].revision - before <= 80
        await asyncio.sleep(IDLE_S - pause_s - 1)
        assert end_of(cluster, uid) == "", "its timeout counts from the last use"
        await asyncio.sleep(LATE_S + pause_s)
        assert end_of(cluster, uid) == "idle"

    play(scenario)


def test_what_a_host_does_not_tell_of_is_no_use():
    async def scenario(cluster: Cluster) -> None:
        uid, _ = await create_web(cluster)
        revision = cluster.checker.records[uid].revision
        await asyncio.sleep(IDLE_S - 1)
        assert (end_of(cluster, uid), cluster.checker.records[uid].revision) == ("", revision), "and nothing is written"
        await asyncio.sleep(LATE_S)
        assert end_of(cluster, uid) == "idle"

    play(scenario)


def test_a_control_plane_that_was_down_ends_nothing_that_was_used_meanwhile():
    async def scenario(cluster: Cluster) -> None:
        uid, machine = await create_web(cluster)
        for replica in cluster.replicas:
            replica.kill()
        await be_used(cluster, machine, 10 * IDLE_S)
        for replica in cluster.replicas:
            replica.start()
        await be_used(cluster, machine, 5 * IDLE_S)
        assert end_of(cluster, uid) == ""
        await asyncio.sleep(IDLE_S + LATE_S)
        assert end_of(cluster, uid) == "idle"

    play(scenario)


def test_what_a_host_out_of_reach_could_tell_is_unknown_and_not_idle():
    async def scenario(cluster: Cluster) -> None:
        uid, machine = await create_web(cluster)
        cluster.hosts[0].refusing = 1
        await be_used(cluster, machine, 5 * IDLE_S)
        assert end_of(cluster, uid) == ""
        cluster.hosts[0].refusing = 0
        await be_used(cluster, machine, IDLE_S)
        assert end_of(cluster, uid) == ""
        cluster.hosts[0].refusing = 1
        await asyncio.sleep(10 * IDLE_S)
        assert end_of(cluster, uid) == ""
        cluster.hosts[0].refusing = 0
        await asyncio.sleep(LATE_S)
        assert end_of(cluster, uid) == "idle"

    play(scenario)


def test_whoever_watches_the_host_tells_of_its_uses():
    async def scenario(cluster: Cluster) -> None:
        uid, machine = await create_web(cluster)
        using = asyncio.ensure_future(be_used(cluster, machine, 20 * IDLE_S))
        for number in range(10):
            await asyncio.sleep(2 * IDLE_S)
            cluster.replicas[number % 2].kill()
            cluster.replicas[1 - number % 2].start()
        await using
        assert end_of(cluster, uid) == ""
        await asyncio.sleep(IDLE_S + LATE_S)
        assert end_of(cluster, uid) == "idle"

    play(scenario)
