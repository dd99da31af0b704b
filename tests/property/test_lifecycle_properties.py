"""Whatever happens, in whatever order and however often: what `step` promises."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fusevm.core.invariants import World, violations
from fusevm.core.lifecycle import Identity, Step, begin, next_deadline_ms, step
from fusevm.core.policy import Policy
from fusevm.core.spec import complete, resources_of
from fusevm.core.story import story
from fusevm.model.environment import (
    ActivitySeen,
    BootRefused,
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    Environment,
    Event,
    HostLost,
    MachineExited,
    MachineMissing,
    OutcomeUnknown,
    State,
    Tick,
    Timings,
)
from fusevm.model.errors import WrongState
from fusevm.model.fact import Fact
from fusevm.model.host import Host, Resources

POLICY = Policy()
NOW = 1_000_000
AMPLE = Resources(cpus=32, ram_mb=65536, storage_gb=1000, vm_count=10)

seqs = st.integers(min_value=0, max_value=12)
machine_ids = st.sampled_from(["m-1", "m-other"])
outcomes: st.SearchStrategy[Event] = st.one_of(
    st.builds(BootSucceeded, cause=st.just("boot"), seq=seqs, timings=st.just(Timings(boot_ms=1.0))),
    st.builds(BootRefused, cause=st.just("boot"), seq=seqs, reason=st.just("no_space"), message=st.just("full")),
    st.builds(DestroyConfirmed, cause=st.just("destroy"), seq=seqs),
    st.builds(OutcomeUnknown, cause=st.just("call"), seq=seqs, message=st.just("no answer")),
)
events: st.SearchStrategy[Event] = st.one_of(
    outcomes,
    outcomes,
    st.just(DestroyRequested(cause="delete")),
    st.just(DrainRequested(cause="drain")),
    st.builds(MachineExited, cause=st.just("watch"), machine_id=machine_ids, message=st.just("killed")),
    st.builds(MachineMissing, cause=st.just("watch"), machine_id=machine_ids),
    st.builds(HostLost, cause=st.just("watch"), host_id=st.sampled_from(["h1", "h2"])),
    st.just(ActivitySeen(cause="exec")),
    st.just(Tick(cause="tick")),
)
#: Clocks of replicas differ: time may also go back.
moments = st.integers(min_value=NOW - 10_000, max_value=NOW + 8_000_000)
lives = st.lists(st.tuples(events, moments), max_size=25)
specs = st.builds(
    complete,
    st.just(POLICY),
    max_runtime_seconds=st.sampled_from([0, -1, 1, 60, 7200]),
    idle_timeout_seconds=st.sampled_from([0, 60, 3600]),
)


def born(spec) -> Step:
    identity = Identity(uid="u1", task_id="t", machine_id="m-1")
    return begin(identity, spec, "h1", cause="create", now_ms=NOW, policy=POLICY)


def feed(env: Environment, event: Event, now_ms: int) -> Step:
    """Step, where a request that the state forbids changes nothing."""
    try:
        return step(env, event, now_ms, POLICY)
    except WrongState:
        assert isinstance(event, DrainRequested)
        return Step(env)


def live(spec, life) -> tuple[Environment, list[Fact]]:
    found = born(spec)
    env, facts = found.record, list(found.facts)
    for event, now_ms in life:
        found = feed(env, event, now_ms)
        env, facts = found.record, facts + list(found.facts)
    return env, facts


@given(specs, lives)
@settings(max_examples=400)
def test_no_rule_is_broken_after_any_life(spec, life):
    env, facts = live(spec, life)
    booked = {} if env.is_terminal else {env.uid: ("h1", resources_of(spec))}
    allocated = Resources() if env.is_terminal else resources_of(spec)
    host = Host(id="h1", url="", capacity=AMPLE, allocated=allocated, created_at_ms=NOW, updated_at_ms=NOW)
    world = World(environments={env.uid: env}, hosts={"h1": host}, placements=booked, facts={env.uid: tuple(facts)})
    assert violations(world, POLICY) == []


@given(specs, lives, events, moments)
def test_the_same_event_again_changes_nothing(spec, life, event, now_ms):
    env, _ = live(spec, life)
    after = feed(env, event, now_ms).record
    assert feed(after, event, now_ms) == Step(after)


@given(specs, lives, st.data())
def test_an_outcome_counts_at_most_once_however_late_it_comes_again(spec, life, data):
    env, _ = live(spec, [])
    for number, (event, now_ms) in enumerate(life):
        env = feed(env, event, now_ms).record
        heard = [old for old, _ in life[: number + 1] if hasattr(old, "seq")]
        for old in heard:
            if old.seq < env.action_seq or env.pending is None:
                assert feed(env, old, data.draw(moments)) == Step(env)


@given(specs, lives, st.randoms(use_true_random=False))
def test_outcomes_in_another_order_never_revive_what_has_ended(spec, life, dice):
    env, _ = live(spec, life)
    if not env.is_terminal:
        return
    again = list(life)
    dice.shuffle(again)
    for event, now_ms in again:
        assert feed(env, event, now_ms) == Step(env)


@given(specs, lives, st.tuples(events, moments))
def test_numbers_and_times_only_grow(spec, life, last):
    env, _ = live(spec, life)
    after = feed(env, *last).record
    assert after.action_seq >= env.action_seq
    assert after.event_seq >= env.event_seq
    assert after.updated_at_ms >= env.updated_at_ms
    assert after.last_activity_ms >= env.last_activity_ms
    assert (after.uid, after.spec, after.created_at_ms) == (env.uid, env.spec, env.created_at_ms)


@given(specs, lives, st.tuples(events, moments))
def test_a_new_action_always_has_a_new_number_and_is_the_pending_one(spec, life, last):
    env, _ = live(spec, life)
    found = feed(env, *last)
    for action in found.actions:
        assert action == found.record.pending
        assert action.seq == found.record.action_seq > env.action_seq


@given(specs, lives)
def test_every_life_can_end(spec, life):
    env, _ = live(spec, life)
    env = feed(env, DestroyRequested(cause="delete"), NOW).record
    if not env.is_terminal:
        assert env.pending is not None
        env = feed(env, DestroyConfirmed(cause="destroy", seq=env.pending.seq), NOW).record
    assert env.state in {State.DESTROYED, State.FAILED}


@given(specs, lives)
def test_a_tick_acts_at_its_deadline_and_never_before(spec, life):
    env, _ = live(spec, life)
    due = next_deadline_ms(env, POLICY)
    if due is None:
        assert feed(env, Tick(cause="tick"), NOW * 10**6) == Step(env)
        return
    if due > env.updated_at_ms:
        assert feed(env, Tick(cause="tick"), due - 1) == Step(env)
    after = feed(env, Tick(cause="tick"), due).record
    assert after.state is State.DESTROYING
    assert next_deadline_ms(after, POLICY) is None


@given(specs, lives)
def test_every_life_can_be_told(spec, life):
    env, facts = live(spec, life)
    told = story(env, facts)
    assert len(told) == len(facts) + 2
    assert all(line.endswith(".") for line in told)
