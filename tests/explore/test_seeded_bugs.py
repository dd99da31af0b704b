"""A checker must be seen to fail: each mistake, planted one at a time, is found by the search."""

from typing import Any

import pytest
from msgspec.structs import replace
from search import explore, stuck
from small_world import Cluster
from worlds import CLUSTER, NOW, PATIENT, Move

from fusevm.core.endings import PUT_BACK
from fusevm.core.lifecycle import Step
from fusevm.core.reconcile import Strikes
from fusevm.core.snapshots import begin_snapshot
from fusevm.model.environment import (
    BootMachine,
    ChangeNetwork,
    Desired,
    DestroyMachine,
    DrainAgent,
    SetUpMachine,
    SnapshotMachine,
    State,
)
from fusevm.model.event import (
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    HostLost,
    MachineMissing,
    OutcomeUnknown,
    Placed,
    RotateRequested,
    SnapshotTaken,
)
from fusevm.model.setup import Duties
from fusevm.model.snapshot import SnapshotState

DAEMON = Duties(setup=True, agent=True)

# -- mistakes of the store -----------------------------------------------------------------------------------------


class NoCheckWhenBooking(Cluster):
    def has_room(self, world, host_id):
        return True


class TasksAreNotUnique(Cluster):
    def is_free(self, world, task):
        return True


class BookingsAreKept(Cluster):
    def placement(self, env, slot):
        return slot.placement


class BookingsAreLostAtOnce(Cluster):
    def placement(self, env, slot):
        return "" if env.desired is Desired.DESTROYED else slot.placement


class TotalsAreForgotten(Cluster):
    def total(self, world):
        return world


class AFactIsNotWritten(Cluster):
    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        return Step(found.record, found.actions, found.facts[:-1])


class AFactIsNotNumbered(Cluster):
    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        return Step(replace(found.record, event_seq=env.event_seq), found.actions, ())


# -- mistakes of the state machine ---------------------------------------------------------------------------------


class LateOutcomesCount(Cluster):
    def step(self, env, event, now_ms):
        if not isinstance(event, BootSucceeded) or env.state is not State.DESTROYING:
            return super().step(env, event, now_ms)
        started = replace(env, state=State.PROVISIONING, pending=BOOT, action_seq=BOOT.seq)
        found = super().step(started, replace(event, seq=BOOT.seq), now_ms)
        return Step(replace(found.record, running_at_ms=now_ms), found.actions, found.facts)


BOOT = BootMachine(seq=99, cause="x", host_id="h0", machine_id="m-0", incarnation=1, deadline_ms=NOW)


class EndsAreUndone(Cluster):
    def step(self, env, event, now_ms):
        if env.is_terminal and isinstance(event, DestroyRequested | DestroyConfirmed | BootSucceeded):
            env = replace(env, state=State.RUNNING, desired=Desired.RUNNING)
            return super().step(env, DestroyRequested(cause="x"), now_ms)
        return super().step(env, event, now_ms)


class DestroysAreGivenUp(Cluster):
    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        if isinstance(event, OutcomeUnknown) and isinstance(found.record.pending, DestroyMachine):
            return Step(replace(found.record, pending=None))
        return found


class AfterADelete(Cluster):
    """The record of a delete is changed by a mistake."""

    changed: dict[str, Any] = {}

    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        if not isinstance(event, DestroyRequested) or found.record == env:
            return found
        return Step(replace(found.record, **self.changed), found.actions, found.facts)


class TheWishIsNotNoted(AfterADelete):
    changed = {"desired": Desired.RUNNING}


class TheReasonIsNotNoted(AfterADelete):
    changed = {"ending": None}


class AClockRunsBehind(AfterADelete):
    changed = {"updated_at_ms": NOW - 1}


class TheNumberIsNotNoted(AfterADelete):
    changed = {"action_seq": 0}


class TheWrongMachineIsDestroyed(AfterADelete):
    changed = {"machine_id": "m-other"}


class TheEndIsNoEnd(Cluster):
    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        record = replace(found.record, ended_at_ms=None) if found.record.is_terminal else found.record
        return Step(record, found.actions, found.facts)


class DestroyWithoutConfirmation(Cluster):
    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        if not isinstance(event, DestroyRequested) or found.record.state is not State.DESTROYING:
            return found
        confirmed = DestroyConfirmed(cause="x", seq=found.record.action_seq)
        ended = super().step(found.record, confirmed, now_ms)
        return Step(ended.record, (), found.facts + ended.facts)

    def apply(self, world, uid, event, now_ms=NOW):
        after = super().apply(world, uid, event, now_ms)
        slots = tuple(replace(slot, is_confirmed=slot.env is not None and slot.env.is_terminal) for slot in after.slots)
        return after if slots == after.slots else replace(after, slots=slots)


class NaiveFailover(Cluster):
    """No answer to a boot: tries another host under the same incarnation, without a word to the first one."""

    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        pending = found.record.pending
        if not isinstance(event, OutcomeUnknown) or not isinstance(pending, BootMachine):
            return found
        moved = replace(pending, host_id="h1" if env.host_id == "h0" else "h0")
        return Step(replace(found.record, host_id=moved.host_id, pending=moved), (moved,), found.facts)

    def placement(self, env, slot):
        return "" if env.is_terminal else env.host_id


# -- mistakes about the queue, setups and snapshots ----------------------------------------------------------------


class PlacesAreNotBooked(Cluster):
    def placement(self, env, slot):
        return "" if env.spec == PATIENT and env.timings.schedule_ms == WAITED else super().placement(env, slot)

    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        if not isinstance(event, Placed) or found.record is env:
            return found
        timings = replace(found.record.timings, schedule_ms=WAITED)
        return Step(replace(found.record, timings=timings), found.actions, found.facts)


WAITED = 1.0


class WaitingIsBooked(Cluster):
    def placement(self, env, slot):
        return "h0" if env.is_queued else super().placement(env, slot)

    def _begin(self, world, index, host_id):
        after = super()._begin(world, index, host_id)
        slots = [replace(slot, placement="h0") if slot.env and slot.env.is_queued else slot for slot in after.slots]
        return self.total(replace(after, slots=tuple(slots)))


class WhoWaitsBootsAtOnce(Cluster):
    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        if not isinstance(event, Placed) or found.record is env:
            return found
        return Step(replace(found.record, queued_until_ms=env.queued_until_ms), found.actions, found.facts)


class TheQueueIsForgotten(Cluster):
    def plan_queue(self, envs, hosts):
        return ()


class PlacesAreGivenBlindly(Cluster):
    """Planned without a look at the hosts, and booked without one."""

    def plan_queue(self, envs, hosts):
        return tuple((env.uid, hosts[0].id) for env in envs)

    def has_room(self, world, host_id):
        return True


class SetupsAreSkipped(Cluster):
    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        if not isinstance(found.record.pending, SetUpMachine):
            return found
        return Step(replace(found.record, pending=None), (), found.facts)


class SnapshotsAreForgottenAtTheEnd(Cluster):
    def snapshots(self, slot, found):
        return slot.snapshots if found.record.desired is Desired.DESTROYED else super().snapshots(slot, found)


class SnapshotsAreSavedTooLate(Cluster):
    def snapshots(self, slot, found):
        return super().snapshots(slot, found) if slot.snapshots or not found.actions else slot.snapshots


class LateSnapshotsCount(Cluster):
    """A snapshot that was given up becomes ready when the answer comes at last."""

    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        if not isinstance(event, SnapshotTaken) or found.record != env or env.state is not State.DESTROYING:
            return found
        taken = begin_snapshot(env, f"{env.uid}-0", now_ms=now_ms)
        record = replace(env, revision=env.revision + 1)
        return Step(record, (), (), (replace(taken, state=SnapshotState.READY),))

    def _is_spent(self, world, uid, event):
        return not isinstance(event, SnapshotTaken) and super()._is_spent(world, uid, event)


class SnapshotsAreReadOnce(Cluster):
    """Who orders a restore tries again and again with the snapshot as it was."""

    def read_again(self, slot, read):
        return read


class TwoAtATime(Cluster):
    """A new token is given while a snapshot is being taken."""

    def step(self, env, event, now_ms):
        if isinstance(event, RotateRequested):
            env = replace(env, pending=None)
        return super().step(env, event, now_ms)

    def _environment(self, world, index, env):
        yield from super()._environment(world, index, env)
        if isinstance(env.pending, SnapshotMachine):
            yield Move("user", "rotate meanwhile", self.apply(world, env.uid, RotateRequested(cause="x")))


class PoliciesAreNotPutBack(Cluster):
    """A change that was given up may have reached its host."""

    def step(self, env, event, now_ms):
        found = super().step(env, event, now_ms)
        pending = found.record.pending
        if isinstance(pending, ChangeNetwork) and pending.cause == PUT_BACK:
            return replace(found, record=replace(found.record, pending=None), actions=())
        return found


class DrainsHaveNoEnd(Cluster):
    def orders(self, actions):
        return tuple(action for action in actions if not isinstance(action, DrainAgent))


class NothingIsDrained(Cluster):
    """A machine without a daemon is asked to drain it."""

    def step(self, env, event, now_ms):
        if not isinstance(event, DrainRequested):
            return super().step(env, event, now_ms)
        found = super().step(replace(env, duties=DAEMON), event, now_ms)
        return Step(replace(found.record, duties=env.duties), found.actions, found.facts)


# -- mistakes of the hosts and of those who call them --------------------------------------------------------------


class NoFence(Cluster):
    def is_fenced(self, server, order):
        return False


class BootsAreNotIdempotent(Cluster):
    def machine_of(self, server, action):
        return None

    def make(self, uid, action):
        return replace(super().make(uid, action), id=f"{action.machine_id}-{action.seq}")


class IncarnationsAreConfused(Cluster):
    def make(self, uid, action):
        return replace(super().make(uid, action), incarnation=2)


class ActionsDieWithTheirWorker(Cluster):
    def orders(self, actions):
        return ()


class DeafToLostHosts(Cluster):
    def step(self, env, event, now_ms):
        return Step(env) if isinstance(event, HostLost) else super().step(env, event, now_ms)


# -- mistakes of reconcile -----------------------------------------------------------------------------------------


class OneStrike(Cluster):
    def plan(self, host_id, envs, listed, changed, strikes):
        first = super().plan(host_id, envs, listed, changed, Strikes())
        return super().plan(host_id, envs, listed, changed, first.strikes)


class OldListsCount(Cluster):
    def plan(self, host_id, envs, listed, changed, strikes):
        return super().plan(host_id, envs, listed, (), strikes)


class RecordsAreReadFirst(Cluster):
    def plan(self, host_id, envs, listed, changed, strikes):
        return super().plan(host_id, tuple(env for env in envs if env.uid not in changed), listed, changed, strikes)


class ClustersAreConfused(Cluster):
    def plan(self, host_id, envs, listed, changed, strikes):
        ours = tuple(replace(machine, cluster=CLUSTER) for machine in listed)
        return super().plan(host_id, envs, ours, changed, strikes)


class OrphansAreLeftAlone(Cluster):
    def plan(self, host_id, envs, listed, changed, strikes):
        return replace(super().plan(host_id, envs, listed, changed, strikes), destroy=())


class MissingMachinesAreLeftAlone(Cluster):
    def plan(self, host_id, envs, listed, changed, strikes):
        found = super().plan(host_id, envs, listed, changed, strikes)
        return replace(found, events=tuple(item for item in found.events if not isinstance(item[1], MachineMissing)))


# -- the tests -----------------------------------------------------------------------------------------------------

WORLDS: dict[str, dict[str, Any]] = {
    "a machine whose snapshots are dropped": {
        "tasks": ("a",),
        "hosts": 1,
        "wishes": frozenset({"snapshot", "restore", "drop"}),
        "most_wishes": 2,
    },
    "one environment": {"tasks": ("a",)},
    "two environments": {},
    "two of the same task": {"tasks": ("a", "a"), "hosts": 1, "room": 2},
    "answers are lost": {"tasks": ("a",), "faults": frozenset({"boot", "unknown"})},
    "machines end by themselves": {
        "tasks": ("a",),
        "hosts": 1,
        "faults": frozenset({"delete", "exit", "drain", "glitch", "reconcile"}),
    },
    "a host is lost": {"tasks": ("a",), "faults": frozenset({"host", "reconcile"})},
    "one place for two": {"hosts": 1, "faults": frozenset({"queue"})},
    "two places for three": {"tasks": ("a", "b", "c"), "faults": frozenset({"queue"}), "is_symmetric": True},
    "a machine with everything": {
        "tasks": ("a",),
        "hosts": 1,
        "duties": DAEMON,
        "wishes": frozenset({"rotate", "snapshot", "restore"}),
        "most_wishes": 2,
        "faults": frozenset({"drain", "refuse"}),
    },
    "a machine with nothing": {"tasks": ("a",), "hosts": 1, "faults": frozenset({"drain"})},
    "a machine whose network is changed": {
        "tasks": ("a",),
        "hosts": 1,
        "wishes": frozenset({"network"}),
        "faults": frozenset({"time", "unknown", "refuse"}),
    },
    "a host is lost for ever": {"tasks": ("a",), "comes_back": False, "faults": frozenset({"host"})},
}
#: The mistake, the world in which it is planted, what the checker says.
BROKEN = [
    (NoCheckWhenBooking, "two environments", "vm_count is booked beyond its limit of 1"),
    (TasksAreNotUnique, "two of the same task", "task a has 2 live environments"),
    (BookingsAreKept, "one environment", "destroyed and still placed on h0"),
    (BookingsAreLostAtOnce, "one environment", "lives on h0 but is placed as None"),
    (TotalsAreForgotten, "one environment", "its placements are"),
    (AFactIsNotWritten, "one environment", "have a gap before 2"),
    (AFactIsNotNumbered, "one environment", "its facts end with provisioning"),
    (LateOutcomesCount, "one environment", "facts go from destroying to running"),
    (EndsAreUndone, "one environment", "comes after the end"),
    (DestroysAreGivenUp, "answers are lost", "destroying with nothing pending instead of DestroyMachine"),
    (TheWishIsNotNoted, "one environment", "destroying but running is desired"),
    (TheReasonIsNotNoted, "one environment", "destroying and ending None do not fit"),
    (AClockRunsBehind, "one environment", "times out of order"),
    (TheNumberIsNotNoted, "one environment", "is beyond action_seq 0"),
    (TheWrongMachineIsDestroyed, "one environment", "the pending action is about another machine"),
    (TheEndIsNoEnd, "one environment", "destroyed and ended_at None do not fit"),
    (DestroyWithoutConfirmation, "one environment", "a machine runs after its end was confirmed"),
    (NoFence, "one environment", "a machine runs after its end was confirmed"),
    (NaiveFailover, "answers are lost", "2 machines run at once"),
    (BootsAreNotIdempotent, "answers are lost", "2 machines run at once"),
    (IncarnationsAreConfused, "one environment", "incarnation 2 runs, the record knows 1"),
    (OneStrike, "machines end by themselves", "m-0 lives and is given up"),
    (OldListsCount, "machines end by themselves", "m-0 lives and is given up"),
    (RecordsAreReadFirst, "machines end by themselves", "a live environment is destroyed as an orphan"),
    (PlacesAreNotBooked, "one place for two", "lives on h0 but is placed as None"),
    (WaitingIsBooked, "one place for two", "waits for a place and is booked on h0"),
    (WhoWaitsBootsAtOnce, "one place for two", "waits for a place and has one on h0"),
    (PlacesAreGivenBlindly, "one place for two", "is booked beyond its limit of 1"),
    (PlacesAreGivenBlindly, "two places for three", "is booked beyond its limit of 1"),
    (
        SetupsAreSkipped,
        "a machine with everything",
        "provisioning with nothing pending instead of BootMachine or SetUp",
    ),
    (SnapshotsAreForgottenAtTheEnd, "a machine with everything", "creating, and nobody is at it"),
    (SnapshotsAreSavedTooLate, "a machine with everything", "snapshot snap-u0-0, which is unknown"),
    (LateSnapshotsCount, "a machine with everything", "snapshot snap-u0-0 goes from error to ready"),
    (TwoAtATime, "a machine with everything", "creating, and nobody is at it"),
    (PoliciesAreNotPutBack, "a machine whose network is changed", "held to another policy than its record has"),
    (NothingIsDrained, "a machine with nothing", "draining with drain_agent pending instead of nothing"),
    (ClustersAreConfused, "machines end by themselves", "a machine of another cluster is touched"),
]
#: These break no rule at any moment, but the system does not come to rest by itself.
STUCK = [
    (DeafToLostHosts, "a host is lost for ever"),
    (OrphansAreLeftAlone, "a host is lost"),
    (TheQueueIsForgotten, "one place for two"),
    (DrainsHaveNoEnd, "a machine with everything"),
    (SnapshotsAreReadOnce, "a machine whose snapshots are dropped"),
    (ActionsDieWithTheirWorker, "one environment"),
    (MissingMachinesAreLeftAlone, "machines end by themselves"),
]


@pytest.mark.parametrize("world", WORLDS)
def test_without_a_mistake_nothing_is_found(world: str):
    cluster = Cluster(**WORLDS[world])
    found = explore(cluster)
    assert found.problem == ""
    assert stuck(found, cluster.is_settled, {"progress"}) == []


@pytest.mark.parametrize(("mistake", "world", "sentence"), BROKEN)
def test_a_planted_mistake_is_found(mistake: type[Cluster], world: str, sentence: str):
    found = explore(mistake(**WORLDS[world]))
    assert sentence in found.problem, found.path
    assert found.path


@pytest.mark.parametrize(("mistake", "world"), STUCK)
def test_a_mistake_that_leaves_something_for_ever_is_found(mistake: type[Cluster], world: str):
    cluster = mistake(**WORLDS[world])
    found = explore(cluster)
    assert found.problem == ""
    assert stuck(found, cluster.is_settled, {"progress"}) != []
