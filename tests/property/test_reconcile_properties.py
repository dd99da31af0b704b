"""Plan then apply comes to rest, and never touches what it must not touch."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fusevm.core.lifecycle import Identity, begin, step
from fusevm.core.policy import Policy
from fusevm.core.reconcile import STRIKES_TO_ACT, ObservedMachine, Plan, Strikes, expectations, plan
from fusevm.core.spec import complete
from fusevm.model.environment import DestroyMachine, Environment
from fusevm.model.event import BootSucceeded, DestroyConfirmed, DestroyRequested, DrainRequested, Event, HostLost
from fusevm.model.machine import Phase

POLICY = Policy()
NOW, LATER = 1_000, 1_000_000
LIVES: list[list[Event]] = [
    [],
    [BootSucceeded(cause="c", seq=1)],
    [BootSucceeded(cause="c", seq=1), DrainRequested(cause="c")],
    [BootSucceeded(cause="c", seq=1), DestroyRequested(cause="c")],
    [BootSucceeded(cause="c", seq=1), DestroyRequested(cause="c"), DestroyConfirmed(cause="c", seq=2)],
    [HostLost(cause="c", host_id="h1")],
]


@st.composite
def environments(draw) -> Environment:
    uid = draw(st.sampled_from(["u1", "u2", "u3", "u4"]))
    host_id = draw(st.sampled_from(["h1", "h1", "h1", "h2"]))
    identity = Identity(uid=uid, task_id=uid, machine_id=f"m-{uid}-1")
    env = begin(identity, complete(POLICY), host_id, cause="c", now_ms=NOW, policy=POLICY).record
    for event in draw(st.sampled_from(LIVES)):
        env = step(env, event, NOW, POLICY).record
    incarnation = draw(st.sampled_from([1, 1, 2]))
    pending = env.pending
    if pending is not None:
        pending = replace(pending, incarnation=incarnation, machine_id=f"m-{uid}-{incarnation}")
    return replace(env, incarnation=incarnation, machine_id=f"m-{uid}-{incarnation}", pending=pending)


@st.composite
def machines(draw) -> ObservedMachine:
    uid = draw(st.sampled_from(["u1", "u2", "u3", "u4", "u5", "u6"]))
    incarnation = draw(st.sampled_from([1, 2, 3]))
    return ObservedMachine(
        id=f"m-{uid}-{incarnation}",
        cluster=draw(st.sampled_from(["c1", "c1", "c1", "c2", ""])),
        uid=uid,
        incarnation=incarnation,
        phase=draw(st.sampled_from(Phase)),
    )


worlds = st.tuples(
    st.lists(environments(), max_size=4, unique_by=lambda env: env.uid),
    st.lists(machines(), max_size=8, unique_by=lambda machine: machine.id),
)


def judge(
    envs: list[Environment], seen: list[ObservedMachine], strikes: Strikes, known: dict[str, int] | None = None
) -> Plan:
    known = expectations(envs) if known is None else known
    return plan("h1", "c1", envs, seen, strikes, known=known, cause="watch")


def carry_out(
    found: Plan, envs: list[Environment], seen: list[ObservedMachine]
) -> tuple[list[Environment], list[ObservedMachine]]:
    """What workers and the host make of a plan: orphans go, events are fed, destroys are done and confirmed."""
    gone = {machine.id for machine in found.destroy}
    by_uid = {env.uid: env for env in envs}
    for uid, event in found.events:
        by_uid[uid] = step(by_uid[uid], event, LATER, POLICY).record
    for uid, env in by_uid.items():
        if isinstance(env.pending, DestroyMachine):
            gone.add(env.machine_id)
            by_uid[uid] = step(env, DestroyConfirmed(cause="c", seq=env.pending.seq), LATER, POLICY).record
    return list(by_uid.values()), [machine for machine in seen if machine.id not in gone or machine.cluster != "c1"]


@given(worlds)
@settings(max_examples=300)
def test_plan_then_apply_comes_to_rest(world):
    envs, seen = world
    strikes = Strikes()
    for _ in range(2 * STRIKES_TO_ACT + 1):
        found = judge(envs, seen, strikes)
        envs, seen = carry_out(found, envs, seen)
        strikes = found.strikes
    assert judge(envs, seen, strikes) == Plan()
    assert judge(envs, seen, Strikes()) == Plan()


@given(worlds, worlds)
def test_one_list_alone_destroys_nothing_and_reports_nothing_missing(first, second):
    found = judge(first[0], first[1], Strikes())
    assert found.destroy == ()
    assert {type(event).__name__ for _, event in found.events} <= {"MachineExited"}
    found = judge(second[0], second[1], found.strikes)
    before = {machine.id for machine in first[1]}
    assert {machine.id for machine in found.destroy} <= before


@given(worlds, st.integers(0, 5))
def test_what_must_not_be_touched_is_not_touched(world, rounds):
    envs, seen = world
    wanted = {(env.uid, env.incarnation) for env in envs if not env.is_terminal and env.host_id == "h1"}
    strikes = Strikes()
    for _ in range(rounds):
        found = judge(envs, seen, strikes)
        strikes = found.strikes
        for machine in found.destroy:
            assert machine.cluster == "c1"
            assert (machine.uid, machine.incarnation) not in wanted
        for uid, _event in found.events:
            (env,) = [env for env in envs if env.uid == uid]
            assert env.host_id == "h1"
            assert env.pending is None
            assert not env.is_terminal


@given(worlds, st.integers(1, 4))
def test_a_list_about_records_that_were_others_before_it_ends_nothing(world, rounds):
    envs, seen = world
    strikes = Strikes()
    for _ in range(rounds):
        found = judge(envs, seen, strikes, known={env.uid: env.action_seq - 1 for env in envs})
        strikes = found.strikes
        assert found.events == ()


@given(worlds, worlds)
def test_hosts_are_judged_apart(world, other):
    """What another host lists or holds changes nothing here."""
    envs, seen = world
    elsewhere = [replace(env, host_id="h2", uid=env.uid + "-x", machine_id=env.machine_id + "-x") for env in other[0]]
    assert judge(envs + elsewhere, seen, Strikes()) == judge(envs, seen, Strikes())
