"""A checker must be seen to fail: each mistake, planted one at a time, is found by the search."""

from typing import Any

import pytest
from msgspec.structs import replace
from search import explore, stuck
from small_world import CLUSTER, NOW, Cluster

from fusevm.core.lifecycle import Step
from fusevm.core.reconcile import Strikes
from fusevm.model.environment import (
    BootMachine,
    BootSucceeded,
    Desired,
    DestroyConfirmed,
    DestroyMachine,
    DestroyRequested,
    HostLost,
    MachineMissing,
    OutcomeUnknown,
    State,
)

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
    (DestroysAreGivenUp, "answers are lost", "destroying has no pending DestroyMachine"),
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
    (ClustersAreConfused, "machines end by themselves", "a machine of another cluster is touched"),
]
#: These break no rule at any moment, but the system does not come to rest by itself.
STUCK = [
    (DeafToLostHosts, "a host is lost for ever"),
    (OrphansAreLeftAlone, "a host is lost"),
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
