"""Whatever happens, in whatever order and however often: what `step` promises."""

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fusevm.core.invariants import World, violations
from fusevm.core.lifecycle import Identity, Step, begin, next_deadline_ms, step
from fusevm.core.policy import Policy
from fusevm.core.snapshots import begin_snapshot
from fusevm.core.spec import complete, resources_of
from fusevm.core.story import story
from fusevm.model import snapshot as snapshot_model
from fusevm.model.environment import Environment, Spec, State, Timings
from fusevm.model.errors import ActionUnderWay, SnapshotNotReady, WrongState
from fusevm.model.event import (
    ActionRefused,
    ActivitySeen,
    AgentDrained,
    AgentSeen,
    BootRefused,
    BootSucceeded,
    CommandEnd,
    CommandsEnded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    Event,
    HealthSeen,
    HostLost,
    MachineExited,
    MachineMissing,
    OutcomeUnknown,
    OutputSeen,
    Placed,
    Reported,
    RestoreRequested,
    RotateRequested,
    SetUpSucceeded,
    SnapshotRequested,
    SnapshotRestored,
    SnapshotTaken,
    Tick,
    TokenRotated,
)
from fusevm.model.fact import Fact, Kind
from fusevm.model.host import Host, Resources
from fusevm.model.setup import AgentState, AgentStatus, Duties, HealthStatus, Verdict
from fusevm.model.snapshot import Snapshot, SnapshotState

POLICY = Policy()
NOW = 1_000_000
AMPLE = Resources(cpus=32, ram_mb=65536, storage_gb=1000, vm_count=10)
#: Stands for the number of the pending action.
HIT = 99
REQUESTS = DrainRequested | RotateRequested | SnapshotRequested | RestoreRequested

seqs = st.one_of(st.just(HIT), st.just(HIT), st.integers(min_value=0, max_value=12))
machine_ids = st.sampled_from(["m-1", "m-other"])
texts = st.sampled_from(["", "full", "no answer"])
booted: st.SearchStrategy[Event] = st.builds(
    BootSucceeded, cause=st.just("boot"), seq=seqs, timings=st.just(Timings(boot_ms=1.0))
)
outcomes: st.SearchStrategy[Event] = st.one_of(
    booted,
    st.builds(SetUpSucceeded, cause=st.just("setup"), seq=seqs, setup_ms=st.just(2.0)),
    st.builds(BootRefused, cause=st.just("boot"), seq=seqs, reason=st.just("no_space"), message=texts),
    st.builds(ActionRefused, cause=st.just("host"), seq=seqs, reason=st.just("no_space"), message=texts),
    st.builds(AgentDrained, cause=st.just("drain"), seq=seqs, exit_code=st.sampled_from([None, 0, 1]), message=texts),
    st.builds(TokenRotated, cause=st.just("rotate"), seq=seqs),
    st.builds(SnapshotTaken, cause=st.just("snapshot"), seq=seqs, size_bytes=st.just(9), digest=st.just("sha256:1")),
    st.builds(SnapshotRestored, cause=st.just("restore"), seq=seqs),
    st.builds(DestroyConfirmed, cause=st.just("destroy"), seq=seqs),
    st.builds(OutcomeUnknown, cause=st.just("call"), seq=seqs, message=texts),
)


def some_snapshot(number: int) -> Snapshot:
    return Snapshot(
        id=f"snap-{number}",
        uid="u1",
        task_id="t",
        host_id="h1",
        machine_id="m-1",
        state=SnapshotState.READY,
        created_at_ms=NOW,
        updated_at_ms=NOW,
    )


snapshots = st.builds(some_snapshot, st.integers(0, 3))
requests: st.SearchStrategy[Event] = st.one_of(
    st.just(DrainRequested(cause="drain")),
    st.just(RotateRequested(cause="rotate")),
    st.builds(SnapshotRequested, cause=st.just("snapshot"), snapshot=snapshots),
    st.builds(RestoreRequested, cause=st.just("restore"), snapshot=snapshots),
)
daemons = st.builds(
    AgentStatus, state=st.sampled_from(AgentState), restarts=st.integers(0, 2), exit_code=st.sampled_from([None, 3])
)
verdicts = st.builds(HealthStatus, state=st.sampled_from(Verdict), message=texts, failures=st.integers(0, 3))
reported: st.SearchStrategy[Event] = st.builds(
    Reported, cause=st.just("exec"), kind=st.sampled_from([kind for kind in Kind if kind is not Kind.STATE])
)
written = st.builds(
    lambda stream, offset: OutputSeen(cause="setup", stream=stream, offset=offset, end=offset + 2, text="hi"),
    st.sampled_from(["stdout", "stderr"]),
    st.integers(0, 5),
)
ended = CommandsEnded(cause="commands", commands=(CommandEnd(cause="a", message="it ended"),) * 2)
idempotent: st.SearchStrategy[Event] = st.one_of(
    written,
    outcomes,
    outcomes,
    requests,
    st.builds(Placed, cause=st.just("queue"), host_id=st.just("h1")),
    st.just(DestroyRequested(cause="delete")),
    st.builds(MachineExited, cause=st.just("watch"), machine_id=machine_ids, message=st.just("killed")),
    st.builds(MachineMissing, cause=st.just("watch"), machine_id=machine_ids),
    st.builds(HostLost, cause=st.just("watch"), host_id=st.sampled_from(["h1", "h2"])),
    st.builds(AgentSeen, cause=st.just("guest"), status=daemons),
    st.builds(HealthSeen, cause=st.just("guest"), status=verdicts),
    st.just(ActivitySeen(cause="exec")),
)
events: st.SearchStrategy[Event] = st.one_of(
    idempotent, idempotent, idempotent, reported, st.just(ended), st.just(Tick(cause="tick"))
)
#: Clocks of replicas differ: time may also go back.
moments = st.integers(min_value=NOW - 10_000, max_value=NOW + 8_000_000)
soon = st.integers(min_value=NOW, max_value=NOW + 20_000)
lives = st.lists(st.tuples(events, st.one_of(soon, soon, moments)), max_size=30)
duties = st.sampled_from(
    [Duties(), Duties(setup=True), Duties(setup=True, agent=True, healthcheck=True, startup_timeout_s=30)]
)
specs = st.builds(
    complete,
    st.just(POLICY),
    max_runtime_seconds=st.sampled_from([0, -1, 1, 60, 7200]),
    idle_timeout_seconds=st.sampled_from([0, 60, 3600]),
    queue_seconds=st.just(60),
)


class Birth(NamedTuple):
    spec: Spec
    duties: Duties
    #: Empty: it waits for a place.
    host_id: str
    #: Begins its life with a boot (and a setup) that succeed, so that most lives are about what comes after.
    is_easy: bool


births = st.builds(Birth, specs, duties, st.sampled_from(["h1", "h1", ""]), st.booleans())


class Life:
    """One environment with everything that was saved about it."""

    def __init__(self, birth: Birth) -> None:
        identity = Identity(uid="u1", task_id="t", machine_id="m-1")
        found = begin(identity, birth.spec, birth.host_id, cause="c", now_ms=NOW, policy=POLICY, duties=birth.duties)
        self.env: Environment = found.record
        self.facts: list[Fact] = list(found.facts)
        self.snapshots = {one.id: one for one in (some_snapshot(0), replace(some_snapshot(1), uid="u2"))}
        if birth.is_easy:
            self.feed(Placed(cause="queue", host_id="h1"), NOW)
            self.feed(BootSucceeded(cause="boot", seq=HIT), NOW)
            self.feed(SetUpSucceeded(cause="setup", seq=HIT), NOW)

    def aim(self, event: Event) -> Event:
        """The event as it would come: about the pending action, or about a snapshot as it is in the store."""
        if getattr(event, "seq", 0) == HIT:
            return replace(event, seq=self.env.action_seq)  # type: ignore[type-var]
        if isinstance(event, SnapshotRequested):
            fresh = begin_snapshot(self.env, f"{self.env.event_seq}-{event.snapshot.id}", now_ms=NOW)
            return replace(event, snapshot=fresh)
        if isinstance(event, RestoreRequested):
            known = sorted(self.snapshots)
            return replace(event, snapshot=self.snapshots[known[int(event.snapshot.id[5:]) % len(known)]])
        return event

    def decide(self, event: Event, now_ms: int) -> Step:
        """What an aimed event would lead to; a request that the state forbids changes nothing."""
        try:
            return step(self.env, event, now_ms, POLICY)
        except (WrongState, ActionUnderWay, SnapshotNotReady):
            assert isinstance(event, REQUESTS)
            return Step(self.env)

    def feed(self, event: Event, now_ms: int) -> Step:
        """Save what comes of an event."""
        found = self.decide(self.aim(event), now_ms)
        self.save(found)
        return found

    def save(self, found: Step) -> None:
        for snapshot in found.snapshots:
            before = self.snapshots.get(snapshot.id)
            if before is None:
                assert snapshot.state is SnapshotState.CREATING
            else:
                assert snapshot.state in snapshot_model.ALLOWED[before.state]
                assert snapshot.updated_at_ms >= before.updated_at_ms
            self.snapshots[snapshot.id] = snapshot
        self.env = found.record
        self.facts += found.facts

    def world(self) -> World:
        env = self.env
        is_booked = not env.is_terminal and not env.is_queued
        booked = {env.uid: ("h1", resources_of(env.spec))} if is_booked else {}
        allocated = resources_of(env.spec) if is_booked else Resources()
        host = Host(id="h1", url="", capacity=AMPLE, allocated=allocated, created_at_ms=NOW, updated_at_ms=NOW)
        return World(
            environments={env.uid: env},
            hosts={"h1": host},
            placements=booked,
            facts={env.uid: tuple(self.facts)},
            snapshots=self.snapshots,
        )


def live(birth: Birth, life: list[tuple[Event, int]]) -> Life:
    found = Life(birth)
    for event, now_ms in life:
        found.feed(event, now_ms)
    return found


@given(births, lives)
@settings(max_examples=600)
def test_no_rule_is_broken_after_any_life(birth, life):
    assert violations(live(birth, life).world(), POLICY) == []


@given(births, lives, idempotent, moments)
@settings(max_examples=600)
def test_the_same_event_again_changes_nothing(birth, life, event, now_ms):
    lived = live(birth, life)
    event = lived.aim(event)
    lived.save(lived.decide(event, now_ms))
    assert lived.decide(event, now_ms) == Step(lived.env)


@given(births, lives, st.data())
def test_an_outcome_counts_at_most_once_however_late_it_comes_again(birth, life, data):
    lived, heard = Life(birth), []
    for template, now_ms in life:
        event = lived.aim(template)
        heard += [event] if hasattr(event, "seq") else []
        lived.save(lived.decide(event, now_ms))
        for old in heard:
            if lived.env.pending is None or old.seq != lived.env.pending.seq:
                assert lived.decide(old, data.draw(moments)) == Step(lived.env)


@given(births, lives, st.randoms(use_true_random=False))
def test_nothing_revives_what_has_ended(birth, life, dice):
    lived = live(birth, [*life, (HostLost(cause="watch", host_id="h1"), NOW), (DestroyRequested(cause="x"), NOW)])
    assert lived.env.is_terminal
    again = list(life)
    dice.shuffle(again)
    for event, now_ms in again:
        assert lived.decide(lived.aim(event), now_ms) == Step(lived.env)


@given(births, lives, st.tuples(events, moments))
def test_numbers_and_times_only_grow(birth, life, last):
    lived = live(birth, life)
    env = lived.env
    after = lived.feed(*last).record
    assert after.action_seq >= env.action_seq
    assert after.event_seq >= env.event_seq
    assert after.updated_at_ms >= env.updated_at_ms
    assert after.last_activity_ms >= env.last_activity_ms
    assert (after.uid, after.spec, after.created_at_ms) == (env.uid, env.spec, env.created_at_ms)
    for name in ("placed_at_ms", "running_at_ms", "draining_at_ms", "ended_at_ms"):
        assert getattr(env, name) in (None, getattr(after, name))
    assert after.machine_id == env.machine_id
    assert env.host_id in ("", after.host_id)


@given(births, lives, st.tuples(events, moments))
def test_a_new_action_always_has_a_new_number_and_is_the_pending_one(birth, life, last):
    lived = live(birth, life)
    before = lived.env
    found = lived.feed(*last)
    assert len(found.actions) <= 1
    for action in found.actions:
        assert action == found.record.pending
        assert action.seq == found.record.action_seq > before.action_seq
    if found.record.pending != before.pending:
        assert found.record.action_seq > before.action_seq or found.record.state is not before.state


@given(births, lives)
def test_every_life_can_end(birth, life):
    lived = live(birth, life)
    lived.feed(DestroyRequested(cause="delete"), NOW)
    if not lived.env.is_terminal:
        assert lived.env.pending is not None
        lived.feed(DestroyConfirmed(cause="destroy", seq=HIT), NOW)
    assert lived.env.state in {State.DESTROYED, State.FAILED}
    assert {one.state for one in lived.snapshots.values()} <= {SnapshotState.READY, SnapshotState.ERROR}


@given(births, lives)
@settings(max_examples=300)
def test_a_tick_acts_at_its_deadline_and_never_before(birth, life):
    lived = live(birth, life)
    due = next_deadline_ms(lived.env, POLICY)
    if due is None:
        assert lived.decide(Tick(cause="tick"), NOW * 10**6) == Step(lived.env)
        return
    if due > lived.env.updated_at_ms:
        assert lived.decide(Tick(cause="tick"), due - 1) == Step(lived.env)
    after = lived.feed(Tick(cause="tick"), due).record
    assert after.state in {State.DESTROYING, State.FAILED} or after.pending is None


@given(births, lives)
def test_time_alone_ends_what_has_a_limit_and_leaves_nothing_else_under_way(birth, life):
    lived = live(birth, life)
    for number in range(1, 5):
        # An action that was given up counts as activity, so each tick comes long after the one before.
        lived.feed(Tick(cause="tick"), NOW + number * 10**12)
    assert next_deadline_ms(lived.env, POLICY) is None
    env = lived.env
    if env.spec.max_runtime_seconds > 0 or env.state is not State.RUNNING:
        assert env.is_terminal or env.state is State.DESTROYING
    else:
        assert env.pending is None


@given(births, lives)
def test_every_life_can_be_told(birth, life):
    lived = live(birth, life)
    told = story(lived.env, lived.facts)
    assert len(told) == len(lived.facts) + 2
    assert all(line.endswith(".") for line in told)
