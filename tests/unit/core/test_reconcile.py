"""What a host's machine list leads to."""

from collections.abc import Sequence

import pytest
from making import (
    POLICY,
    destroyed,
    destroying,
    draining,
    draining_agent,
    failed,
    paused,
    provisioning,
    restoring,
    rotating,
    running,
    setting_up,
    snapshotting,
)
from msgspec.structs import replace

from fusevm.core.reconcile import (
    STRIKES_TO_ACT,
    STUCK_ATTEMPTS,
    Heartbeat,
    ObservedMachine,
    Plan,
    Silence,
    Strikes,
    expectations,
    heard,
    host_health,
    observe_host,
    plan,
)
from fusevm.model.environment import Environment
from fusevm.model.event import MachineExited, MachineMissing
from fusevm.model.host import Host, HostHealth, Resources
from fusevm.model.machine import Phase

HOST = Host(id="h1", url="u", capacity=Resources(), created_at_ms=1, updated_at_ms=1)
ANSWERED, REFUSED, SILENT = Heartbeat.ANSWERED, Heartbeat.REFUSED, Heartbeat.SILENT


def machine(uid: str = "u1", **fields: object) -> ObservedMachine:
    made = ObservedMachine(id=f"m-{uid}", cluster="c1", uid=uid, incarnation=1, phase=Phase.RUNNING)
    return replace(made, **fields)


def lists(
    expected: Sequence[Environment], *observed: Sequence[ObservedMachine], known: dict[str, int] | None = None
) -> list[Plan]:
    """The plans of several lists in a row."""
    plans: list[Plan] = []
    for machines in observed:
        strikes = plans[-1].strikes if plans else Strikes()
        before = expectations(expected) if known is None else known
        plans.append(plan("h1", "c1", expected, machines, strikes, known=before, cause="watch"))
    return plans


def test_a_world_as_expected_needs_nothing():
    assert lists([running()], [machine()]) == [Plan()]


@pytest.mark.parametrize("known", [[], [destroyed()], [failed()]])
def test_a_machine_nobody_wants_is_destroyed_at_the_second_strike(known: list[Environment]):
    first, second, third = lists(known, [machine()], [machine()], [machine()])
    assert first.destroy == ()
    assert second.destroy == third.destroy == (machine(),)
    assert first.events == second.events == ()


def test_a_machine_that_was_wanted_in_between_starts_anew():
    orphan = [machine()]
    first = plan("h1", "c1", [], orphan, Strikes(), known={}, cause="watch")
    second = plan("h1", "c1", [running()], orphan, first.strikes, known={}, cause="watch")
    third = plan("h1", "c1", [], orphan, second.strikes, known={}, cause="watch")
    assert [found.destroy for found in (first, second, third)] == [(), (), ()]


def test_an_earlier_incarnation_is_an_orphan_in_every_state():
    for maker in (provisioning, running, draining, destroying):
        env = replace(maker(), incarnation=2, machine_id="m-new")
        seen = [machine(), machine(id="m-new", incarnation=2)]
        assert lists([env], seen, seen)[1] == Plan(destroy=(machine(),), strikes=Strikes(counts={"orphan m-u1": 2}))


def test_a_later_incarnation_than_the_record_is_left_alone():
    seen = [machine(), machine(id="m-new", incarnation=2)]
    assert lists([running()], seen, seen)[1] == Plan()


def test_a_machine_that_moved_to_another_host_is_an_orphan_here():
    seen = [machine()]
    assert lists([running(host_id="h2")], seen, seen)[1].destroy == (machine(),)


def test_an_environment_of_another_host_is_not_missing_here():
    assert lists([running(host_id="h2")], [], []) == [Plan(), Plan()]


@pytest.mark.parametrize("cluster", ["c2", ""])
def test_machines_of_another_cluster_are_never_touched(cluster: str):
    foreign = [machine("stranger", cluster=cluster), machine("stranger-2", cluster=cluster, phase=Phase.FAILED)]
    assert lists([], foreign, foreign, foreign) == [Plan()] * 3


@pytest.mark.parametrize("maker", [running, paused, draining])
def test_a_missing_machine_is_reported_at_the_second_strike(maker):
    first, second = lists([maker()], [], [])
    assert first.events == ()
    assert second.events == (("u1", MachineMissing(cause="watch", machine_id="m-u1")),)


def test_a_machine_that_was_seen_in_between_is_not_missing():
    plans = lists([running()], [], [machine()], [])
    assert [found.events for found in plans] == [(), (), ()]


@pytest.mark.parametrize("maker", [provisioning, destroying, destroyed, failed])
def test_a_missing_machine_of_an_action_under_way_is_left_to_the_action(maker):
    assert lists([maker()], [], [], []) == [Plan()] * 3


@pytest.mark.parametrize("maker", [provisioning, destroying])
def test_the_machine_of_an_action_under_way_is_left_to_the_action(maker):
    for phase in Phase:
        assert lists([maker()], [machine(phase=phase)], [machine(phase=phase)]) == [Plan()] * 2


def test_a_list_that_is_older_than_the_record_proves_nothing():
    env = running()
    gone = [machine(phase=Phase.FAILED)]
    for known in ({}, {"u1": env.action_seq - 1}):
        assert lists([env], [], [], [], known=known) == [Plan(is_unsure=True)] * 3
        assert lists([env], gone, known=known) == [Plan(is_unsure=True)]
    assert lists([env], gone, known={"u1": env.action_seq})[0].events != ()


def test_only_machines_that_must_run_are_expected():
    assert expectations([running(), replace(provisioning(), uid="u2")]) == {"u1": running().action_seq}


@pytest.mark.parametrize("maker", [running, paused, draining])
def test_a_machine_that_reports_its_end_counts_at_once(maker):
    (crashed,) = lists([maker()], [machine(phase=Phase.FAILED, error="kernel panic")])
    (stopped,) = lists([maker()], [machine(phase=Phase.STOPPED)])
    assert crashed.events == (("u1", MachineExited(cause="watch", machine_id="m-u1", message="kernel panic")),)
    assert stopped.events[0][1] == MachineExited(
        cause="watch", machine_id="m-u1", message="the host reports the machine as stopped"
    )


UP = [running, paused, draining, setting_up, rotating, snapshotting, draining_agent]
STUCK = [(maker, phase) for maker in UP for phase in (Phase.CREATING, Phase.DELETING)]
STUCK += [(maker, Phase.PAUSED) for maker in UP if maker not in (paused, snapshotting)]


@pytest.mark.parametrize(("maker", "phase"), STUCK)
def test_a_machine_that_is_stuck_in_a_phase_is_given_up_at_the_second_list(maker, phase: Phase):
    stuck = [machine(phase=phase)]
    first, second = lists([maker()], stuck, stuck)
    message = f"the host reports the machine as {phase} again and again, and nobody has asked for that here"
    assert first.events == ()
    assert second.events == (("u1", MachineExited(cause="watch", machine_id="m-u1", message=message)),)
    assert lists([maker()], stuck, [machine()], stuck)[-1].events == ()


def test_a_machine_that_goes_from_phase_to_phase_is_not_stuck():
    seen = [[machine(phase=phase)] for phase in (Phase.PAUSED, Phase.CREATING, Phase.PAUSED)]
    assert [found.events for found in lists([running()], *seen)] == [(), (), ()]


@pytest.mark.parametrize("maker", [paused, snapshotting])
def test_a_pause_that_was_asked_for_or_belongs_to_a_snapshot_is_no_suspicion(maker):
    assert lists([maker()], *[[machine(phase=Phase.PAUSED)]] * 3) == [Plan()] * 3


def test_a_pause_that_outlasts_its_snapshot_is_counted_from_its_end():
    pause, taking = [machine(phase=Phase.PAUSED)], snapshotting()
    during = plan("h1", "c1", [taking], pause, Strikes(), known=expectations([taking]), cause="watch")
    over = replace(running(), action_seq=taking.action_seq + 1)
    first = plan("h1", "c1", [over], pause, during.strikes, known=expectations([taking]), cause="watch")
    assert (first.events, first.is_unsure, first.strikes) == ((), True, Strikes())
    assert [len(found.events) for found in lists([over], pause, pause)] == [0, 1]


@pytest.mark.parametrize("maker", [setting_up, rotating, snapshotting, draining_agent])
def test_a_machine_must_be_there_while_something_is_done_to_it(maker):
    assert [type(event) for _, event in lists([maker()], [], [])[1].events] == [MachineMissing]
    assert [type(event) for _, event in lists([maker()], [machine(phase=Phase.FAILED)])[0].events] == [MachineExited]


def test_a_machine_that_is_put_back_to_a_snapshot_is_left_to_that():
    for phase in Phase:
        assert lists([restoring()], [machine(phase=phase)], [machine(phase=phase)]) == [Plan()] * 2
    assert lists([restoring()], [], []) == [Plan()] * 2


def test_an_orphan_that_stays_is_a_case_for_a_person_once():
    rounds = STRIKES_TO_ACT + STUCK_ATTEMPTS
    found = lists([], *[[machine("u9")]] * (rounds + 2))
    assert [len(plan.destroy) for plan in found] == [0] + [1] * (rounds + 1)
    assert [plan.stuck for plan in found] == [()] * (rounds - 1) + [(machine("u9"),)] + [()] * 2


def test_a_machine_whose_record_cannot_be_read_is_nobodys_orphan():
    strikes = Strikes()
    for _ in range(STRIKES_TO_ACT + 1):
        seen = [machine("u1"), machine("u9")]
        found = plan("h1", "c1", [], seen, strikes, known={}, unreadable={"u1"}, cause="watch")
        strikes = found.strikes
    assert found.destroy == (machine("u9"),)


def test_one_bad_machine_does_not_hide_another():
    expected = [running("u1"), running("u2"), running("u3")]
    seen = [machine("u1"), machine("u2", phase=Phase.FAILED, error="x"), machine("u9")]
    found = lists(expected, seen, seen)[1]
    assert [(uid, type(event)) for uid, event in found.events] == [("u2", MachineExited), ("u3", MachineMissing)]
    assert found.destroy == (machine("u9"),)


@pytest.mark.parametrize(
    ("silent_ms", "health"),
    [
        (0, HostHealth.OK),
        (POLICY.host_unreachable_ms - 1, HostHealth.OK),
        (POLICY.host_unreachable_ms, HostHealth.UNREACHABLE),
        (POLICY.host_lost_ms - 1, HostHealth.UNREACHABLE),
        (POLICY.host_lost_ms, HostHealth.LOST),
    ],
)
def test_the_silence_of_a_host_is_named(silent_ms: int, health: HostHealth):
    assert host_health(Silence(unwell_ms=silent_ms, silent_ms=silent_ms), POLICY) is health


GAP_MS = 20_000


def beats(*found: tuple[int, Heartbeat]) -> Silence:
    """What heartbeats at these times come to."""
    silence = Silence()
    for at_ms, beat in found:
        silence = heard(silence, beat, at_ms, GAP_MS)
    return silence


def test_silence_is_counted_from_the_first_heartbeat_without_an_answer_to_the_last():
    one = beats((0, ANSWERED), (5_000, SILENT))
    assert (one.unwell_ms, one.silent_ms) == (0, 0)
    more = beats((0, ANSWERED), (5_000, SILENT), (10_000, SILENT), (15_000, SILENT))
    assert (more.unwell_ms, more.silent_ms) == (10_000, 10_000)
    assert heard(more, ANSWERED, 20_000, GAP_MS) == Silence(asked_ms=20_000)


def test_a_host_that_refuses_is_unreachable_however_long_and_never_lost():
    refusing = beats(*((at_s * 1000, REFUSED) for at_s in range(0, 3_600, 10)))
    assert refusing.silent_ms == 0
    assert host_health(refusing, POLICY) is HostHealth.UNREACHABLE


def test_a_refusal_among_silences_shows_that_the_host_is_there():
    found = beats(*((at_s * 1000, SILENT) for at_s in range(0, 110, 10)), (110_000, REFUSED), (120_000, SILENT))
    assert (found.unwell_ms, found.silent_ms) == (120_000, 0)
    assert host_health(found, POLICY) is HostHealth.UNREACHABLE


def test_the_time_in_which_nobody_asked_is_not_the_hosts_silence():
    found = beats((0, SILENT), (3_600_000, SILENT))
    assert (found.unwell_ms, found.silent_ms) == (GAP_MS, GAP_MS)


@pytest.mark.parametrize("before", HostHealth)
@pytest.mark.parametrize("beat", [REFUSED, SILENT])
def test_without_a_good_answer_a_host_is_never_better_than_before(before: HostHealth, beat: Heartbeat):
    host = replace(HOST, health=before)
    first = observe_host(host, beats((0, beat)), "no", POLICY)
    assert first.health is before
    later = observe_host(host, beats((0, beat), (15_000, beat)), "no", POLICY)
    assert later.health is (HostHealth.LOST if before is HostHealth.LOST else HostHealth.UNREACHABLE)
    assert (later.problem, later.is_refusing) == ("no", beat is REFUSED)
