"""The checker itself: every broken rule is seen, and a sound world has none."""

import pytest
from making import (
    EVERYTHING,
    NONE,
    NOW,
    POLICY,
    SITUATIONS,
    destroyed,
    destroying,
    draining,
    draining_agent,
    failed,
    host,
    provisioning,
    queued,
    ready,
    restoring,
    rotating,
    running,
    setting_up,
    snapshots_of,
    snapshotting,
)
from msgspec.structs import replace

from fusevm.core.invariants import World, violations
from fusevm.core.reconcile import ObservedMachine
from fusevm.core.spec import resources_of
from fusevm.model.environment import Desired, Ending, Environment, State
from fusevm.model.fact import Fact, Kind
from fusevm.model.host import Host, HostHealth, Resources
from fusevm.model.machine import Phase
from fusevm.model.snapshot import SnapshotState


def told(env: Environment, *states: State) -> tuple[Fact, ...]:
    return tuple(
        Fact(uid=env.uid, seq=seq, kind=Kind.STATE, state=state, at_ms=NOW + seq, cause="c")
        for seq, state in enumerate(states, 1)
    )


def machine(uid: str = "u1", **fields: object) -> ObservedMachine:
    made = ObservedMachine(id=f"m-{uid}", cluster="c1", uid=uid, incarnation=1, phase=Phase.RUNNING)
    return replace(made, **fields)


def world(*environments: Environment, **parts: object) -> World:
    """A sound world around these environments: booked where they live."""
    live = [env for env in environments if not env.is_terminal and not env.is_queued]
    hosts: dict[str, Host] = {}
    for id_ in ("h1", "h2"):
        booked = Resources()
        for env in live:
            booked = booked.plus(resources_of(env.spec)) if env.host_id == id_ else booked
        hosts[id_] = host(id_, allocated=booked)
    sound = World(
        environments={env.uid: env for env in environments},
        hosts=hosts,
        placements={env.uid: (env.host_id, resources_of(env.spec)) for env in live},
        snapshots={id_: snapshot for env in environments for id_, snapshot in snapshots_of(env).items()},
    )
    return replace(sound, **parts)


def broken(found: World) -> str:
    """The one violation of a world."""
    (sentence,) = violations(found, POLICY)
    return sentence


#: What may be under way in a running environment.
IDLE = "ChangeNetwork or RestoreMachine or RotateToken or SnapshotMachine or nothing"


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_sound_world_breaks_no_rule(situation: str):
    assert violations(world(SITUATIONS[situation]()), POLICY) == []
    assert violations(world(), POLICY) == []


def test_a_whole_life_of_facts_breaks_no_rule():
    env = destroyed()
    facts = told(env, State.PROVISIONING, State.RUNNING, State.DESTROYING, State.DESTROYED)
    letter = Fact(uid="u1", seq=4, kind=Kind.DEAD_LETTER, state=State.DESTROYING, at_ms=NOW + 4, cause="c")
    assert violations(world(env, facts={"u1": facts}), POLICY) == []
    longer = (*facts[:3], letter, replace(facts[3], seq=5, at_ms=NOW + 5))
    assert violations(world(replace(env, event_seq=5), facts={"u1": longer}), POLICY) == []


def test_the_first_facts_may_be_kept_no_more():
    env = destroyed()
    facts = told(env, P, R, D, E)
    for first in range(4):
        assert violations(world(env, facts={"u1": facts[first:]}), POLICY) == []
    command = Fact(uid="u1", seq=3, kind=Kind.EXEC, state=R, at_ms=NOW + 3, cause="c")
    assert violations(world(replace(running(), event_seq=3), facts={"u1": (command,)}), POLICY) == []


def test_facts_of_the_same_millisecond_break_no_rule():
    env = running()
    facts = tuple(replace(fact, at_ms=NOW) for fact in told(env, State.PROVISIONING, State.RUNNING))
    assert violations(world(env, facts={"u1": facts}), POLICY) == []


def test_a_host_that_is_exactly_full_breaks_no_rule():
    assert violations(world(running(cpus=16, ram_mb=4096, storage_gb=400)), POLICY) == []
    assert violations(world(*[running(f"u{n}", ram_mb=128) for n in range(10)]), POLICY) == []


# -- identities ----------------------------------------------------------------------------------------------------


def test_two_live_environments_of_one_task_are_seen():
    twin = replace(running("u2"), task_id="task-u1")
    assert broken(world(running(), twin)) == "task task-u1 has 2 live environments"
    assert violations(world(running(), replace(destroyed("u2"), task_id="task-u1")), POLICY) == []


def test_one_machine_of_two_environments_is_seen():
    assert (
        broken(world(running(), replace(running("u2"), machine_id="m-u1")))
        == "machine id m-u1 belongs to 2 environments"
    )


# -- one record ----------------------------------------------------------------------------------------------------

BOOT, DESTROY = provisioning().pending, destroying().pending
ENDING = Ending(state=State.DESTROYED, reason="deleted")


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        (
            replace(running(), pending=BOOT),
            f"running with boot_machine pending instead of {IDLE}",
        ),
        (replace(destroyed(), pending=DESTROY), "destroyed with destroy_machine pending instead of nothing"),
        (replace(provisioning(), pending=None), "provisioning with nothing pending instead of BootMachine"),
        (
            replace(provisioning(duties=EVERYTHING), pending=None),
            "provisioning with nothing pending instead of BootMachine or SetUpMachine",
        ),
        (
            replace(provisioning(), pending=DESTROY, action_seq=2),
            "provisioning with destroy_machine pending instead of BootMachine",
        ),
        (replace(setting_up(), duties=NONE), "provisioning with set_up_machine pending instead of BootMachine"),
        (replace(draining_agent(), duties=NONE), "draining with drain_agent pending instead of nothing"),
        (
            replace(draining(), pending=DESTROY, action_seq=2),
            "draining with destroy_machine pending instead of nothing",
        ),
        (
            replace(rotating(), state=State.PAUSED),
            "paused with rotate_token pending instead of nothing",
        ),
        (
            replace(queued(), pending=replace(BOOT, host_id=""), action_seq=1),
            "provisioning with boot_machine pending instead of nothing",
        ),
        (replace(destroying(), pending=None), "destroying with nothing pending instead of DestroyMachine"),
        (replace(destroying(), action_seq=1), "pending action 2 is beyond action_seq 1"),
        (replace(destroying(), incarnation=2), "the pending action is about another machine"),
        (replace(destroying(), machine_id="m-2"), "the pending action is about another machine"),
        (replace(running(), ending=ENDING), "running and ending"),
        (replace(destroying(), ending=None), "destroying and ending None do not fit"),
        (replace(running(), desired=Desired.DESTROYED), "running but destroyed is desired"),
        (replace(running(), desired=Desired.DRAINED), "running but drained is desired"),
        (replace(draining(), desired=Desired.RUNNING), "draining but running is desired"),
        (replace(destroying(), desired=Desired.RUNNING), "destroying but running is desired"),
        (replace(destroying(), ending=Ending(state=State.RUNNING, reason="x")), "is to end as running"),
        (replace(failed(), state=State.DESTROYED), "ended as destroyed instead of failed"),
        (replace(running(), running_at_ms=NOW - 1), "times out of order"),
        (replace(draining(), draining_at_ms=NOW), "times out of order"),
        (replace(destroyed(), updated_at_ms=NOW), "times out of order"),
        (replace(running(), last_activity_ms=NOW - 1), "active before it was created"),
        (replace(destroyed(), ended_at_ms=None), "destroyed and ended_at None do not fit"),
        (replace(running(), ended_at_ms=NOW + 1_000), f"running and ended_at {NOW + 1_000} do not fit"),
        (replace(running(), running_at_ms=None), "running but never came up"),
        (replace(draining(), draining_at_ms=None), "draining since never"),
    ],
)
def test_a_record_that_contradicts_itself_is_seen(env: Environment, sentence: str):
    assert broken(world(env)).startswith(f"u1: {sentence}")


def test_an_action_for_another_host_is_seen():
    env = replace(destroying(), pending=replace(destroying("u1", "h2").pending))
    assert broken(world(env)) == "u1: the pending action is about another machine"


# -- waiting for a place -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        (replace(queued(), host_id="h1"), "waits for a place and has one on h1"),
        (replace(queued(), placed_at_ms=NOW), "waits for a place and has one on "),
        (replace(running(), queued_until_ms=NOW), "running while it waits for a place"),
        (replace(running(), host_id=""), "running on no host"),
    ],
)
def test_an_environment_that_waits_and_does_not_is_seen(env: Environment, sentence: str):
    found = violations(world(env), POLICY)
    assert f"u1: {sentence}" in found, found


def test_an_environment_that_waits_and_is_booked_is_seen():
    env = queued()
    booked = resources_of(env.spec)
    kept = world(env, placements={"u1": ("h1", booked)}, hosts={"h1": host(allocated=booked)})
    assert broken(kept) == "u1: waits for a place and is booked on h1"


# -- snapshots -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [snapshotting, restoring])
def test_an_action_about_a_snapshot_that_is_not_there_is_seen(maker):
    env = maker()
    found = violations(world(env, snapshots={}), POLICY)
    assert len(found) == 1
    assert found[0].endswith("is pending for snapshot snap-0u1, which is unknown")


@pytest.mark.parametrize("maker", [snapshotting, restoring])
def test_an_action_about_a_snapshot_in_another_state_is_seen(maker):
    env = maker()
    kept = world(env, snapshots={"snap-0u1": ready(env)})
    assert broken(kept).endswith("is pending for snapshot snap-0u1, which is ready")


@pytest.mark.parametrize("maker", [snapshotting, restoring])
@pytest.mark.parametrize("owner", [running, destroying, destroyed, failed, rotating])
def test_a_snapshot_that_nobody_is_at_is_seen(maker, owner):
    (snapshot,) = snapshots_of(maker()).values()
    kept = world(owner(), snapshots={snapshot.id: snapshot})
    assert broken(kept) == f"snapshot snap-0u1: {snapshot.state}, and nobody is at it"
    assert (
        broken(world(snapshots={snapshot.id: snapshot})) == f"snapshot snap-0u1: {snapshot.state}, and nobody is at it"
    )


def test_another_snapshot_than_the_one_of_the_action_is_seen():
    env = snapshotting()
    (own,) = snapshots_of(env).values()
    other = replace(own, id="snap-other")
    kept = world(env, snapshots={own.id: own, other.id: other})
    assert broken(kept) == "snapshot snap-other: creating, and nobody is at it"


def test_a_snapshot_that_is_at_rest_breaks_no_rule():
    for state in (SnapshotState.READY, SnapshotState.ERROR, SnapshotState.DELETING):
        snapshot = ready(running(), state=state)
        assert violations(world(snapshots={snapshot.id: snapshot}), POLICY) == []


# -- facts ---------------------------------------------------------------------------------------------------------

P, R, D, E, F = State.PROVISIONING, State.RUNNING, State.DESTROYING, State.DESTROYED, State.FAILED


@pytest.mark.parametrize(
    ("env", "facts", "sentence"),
    [
        (destroyed(), (), "have a gap before 4"),
        (destroyed(), told(destroyed(), P, R, D, E)[1:3], "have a gap before 4"),
        (destroyed(), told(destroyed(), P, R, D, E)[1::2], "have a gap before 4"),
        (destroyed(), told(destroyed(), P, P, R, E)[1:], "facts go from running to destroyed"),
        (running(), (*told(running(), P), replace(told(running(), P, R)[1], seq=3)), "have a gap before 2"),
        (replace(running(), event_seq=3), told(running(), P, R), "have a gap before 3"),
        (running(), (told(running(), P)[0], told(running("u2"), P, R)[1]), "has a fact of another environment"),
        (
            running(),
            (told(running(), P)[0], replace(told(running(), P, R)[1], at_ms=NOW)),
            "fact 2 is older than fact 1",
        ),
        (
            replace(destroyed(), event_seq=5),
            (*told(destroyed(), P, R, D, E), replace(told(destroyed(), P, R, D, E, E)[4], kind=Kind.EXEC)),
            "fact 5 comes after the end",
        ),
        (replace(running(), event_seq=1), told(running(), R), "its first state is not told"),
        (destroyed(), told(destroyed(), P, R, D, R), "is destroyed, its facts end with running"),
        (
            replace(draining(), event_seq=2),
            told(draining(), P, State.DRAINING),
            "facts go from provisioning to draining",
        ),
        (running(), told(running(), P, F), "is running, its facts end with failed"),
        (replace(running(), event_seq=0), (), "its first state is not told"),
    ],
)
def test_facts_that_contradict_the_record_are_seen(env: Environment, facts: tuple[Fact, ...], sentence: str):
    found = violations(world(env, facts={"u1": facts}), POLICY)
    assert [line for line in found if line.startswith("u1: ") and sentence in line], found


# -- books ---------------------------------------------------------------------------------------------------------


def test_a_live_environment_without_its_placement_is_seen():
    env = running()
    assert "u1: lives on h1 but is placed as None" in violations(world(env, placements={}), POLICY)
    elsewhere = {"u1": ("h2", resources_of(env.spec))}
    assert "u1: lives on h1 but is placed as ('h2'," in violations(world(env, placements=elsewhere), POLICY)[0]
    too_small = {"u1": ("h1", Resources(vm_count=1))}
    assert violations(world(env, placements=too_small), POLICY)[0].startswith("u1: lives on h1 but is placed as ('h1',")


def test_an_ended_environment_that_still_holds_its_placement_is_seen():
    env = destroyed()
    booked = resources_of(env.spec)
    kept = world(env, placements={"u1": ("h1", booked)}, hosts={"h1": host(allocated=booked)})
    assert broken(kept) == "u1: destroyed and still placed on h1"


def test_a_placement_of_nobody_is_seen():
    booked = Resources(cpus=1, vm_count=1)
    kept = world(placements={"u9": ("h1", booked)}, hosts={"h1": host(allocated=booked)})
    assert broken(kept) == "u9: placed, but there is no such environment"


def test_a_placement_on_an_unknown_host_is_seen():
    found = violations(world(running(host_id="h9")), POLICY)
    assert found == ["host h9: has placements and does not exist"]


def test_totals_that_are_not_the_sum_of_placements_are_seen():
    assert broken(world(running(), hosts={"h1": host()})).startswith("host h1: allocated is ")


@pytest.mark.parametrize(
    ("spec", "name", "limit"),
    [
        ({"cpus": 17}, "cpus", 16),
        ({"ram_mb": 4097}, "ram_mb", 4096),
        ({"storage_gb": 401}, "storage_gb", 400),
    ],
)
def test_a_host_booked_beyond_its_limit_is_seen(spec: dict[str, int], name: str, limit: int):
    assert broken(world(running(**spec))) == f"host h1: {name} is booked beyond its limit of {limit}"


def test_more_machines_than_a_host_takes_are_seen():
    crowd = [running(f"u{n}", ram_mb=128) for n in range(11)]
    assert broken(world(*crowd)) == "host h1: vm_count is booked beyond its limit of 10"


def test_limits_are_not_judged_without_a_policy():
    crowd = [running(f"u{n}", ram_mb=128) for n in range(11)]
    assert violations(world(*crowd), POLICY) != []
    assert violations(world(*crowd), None) == []


# -- machines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("incarnation", [1, 0])
def test_two_machines_of_one_environment_are_seen(incarnation: int):
    twice = {"h1": (machine(),), "h2": (machine(id="m-2", incarnation=incarnation, phase=Phase.CREATING),)}
    assert broken(world(running(), machines=twice)) == "u1: 2 machines run at once"
    same_host = {"h1": (machine(), machine(id="m-2", incarnation=incarnation))}
    assert broken(world(running(), machines=same_host)) == "u1: 2 machines run at once"


@pytest.mark.parametrize("phase", [Phase.STOPPED, Phase.FAILED, Phase.DELETING])
def test_a_machine_that_is_over_does_not_count_as_a_second_one(phase: Phase):
    machines = {"h1": (machine(),), "h2": (machine(id="m-2", phase=phase),)}
    assert violations(world(running(), machines=machines), POLICY) == []


def test_the_machines_of_a_lost_host_and_those_of_nobody_do_not_count():
    one = world(running(), machines={"h1": (machine(),), "h2": (machine(id="m-2"),)})
    lost = replace(one, hosts={**one.hosts, "h2": replace(one.hosts["h2"], health=HostHealth.LOST)})
    assert violations(lost, POLICY) == []
    by_hand = {"h1": (machine("", id="m-a"), machine("", id="m-b"))}
    assert violations(world(running(), machines=by_hand), POLICY) == []


def test_a_machine_from_the_future_is_seen():
    ahead = {"h1": (machine(incarnation=2),)}
    assert broken(world(running(), machines=ahead)) == "u1: incarnation 2 runs, the record knows 1"
