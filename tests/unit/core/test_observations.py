"""What is seen of the daemon and the health check, and what is merely told."""

import pytest
from making import (
    EVERYTHING,
    MAKERS,
    NOW,
    POLICY,
    SITUATIONS,
    destroyed,
    draining_agent,
    failed,
    restoring,
    running,
    setting_up,
)
from msgspec.structs import replace

from fusevm.core.lifecycle import Step, step
from fusevm.model.environment import Environment, State
from fusevm.model.event import AgentDrained, AgentSeen, CommandEnd, CommandsEnded, HealthSeen, OutputSeen, Reported
from fusevm.model.fact import Kind
from fusevm.model.setup import AgentState, AgentStatus, HealthStatus, Verdict

LATER = NOW + 10_000
UP = AgentStatus(state=AgentState.RUNNING, since_ms=1)
PASSING = HealthStatus(state=Verdict.PASSING, since_ms=1)
#: Where there is a machine to look at.
SEEN_IN = [
    "running",
    "paused",
    "draining",
    "setting_up",
    "rotating",
    "changing_network",
    "snapshotting",
    "draining_agent",
]


def agent(env: Environment, status: AgentStatus) -> Step:
    return step(env, AgentSeen(cause="guest", status=status), LATER, POLICY)


def health(env: Environment, status: HealthStatus) -> Step:
    return step(env, HealthSeen(cause="guest", status=status), LATER, POLICY)


def test_the_first_sight_of_a_daemon_is_told():
    found = agent(running(duties=EVERYTHING), UP)
    assert (found.record.agent, found.record.updated_at_ms) == (UP, LATER)
    (fact,) = found.facts
    assert (fact.kind, fact.reason, fact.data, fact.message) == (Kind.AGENT, "running", {"restarts": "0"}, "")


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (replace(UP, state=AgentState.EXITED), {"restarts": "0"}),
        (replace(UP, restarts=1), {"restarts": "1"}),
        (replace(UP, exit_code=3, message="exit status 3"), {"restarts": "0", "exit_code": "3"}),
    ],
)
def test_a_change_of_the_daemon_is_told(status: AgentStatus, data: dict[str, str]):
    found = agent(replace(running(), agent=UP), status)
    assert found.record.agent == status
    assert [(fact.reason, fact.data, fact.message) for fact in found.facts] == [(status.state, data, status.message)]
    assert agent(found.record, status) == Step(found.record)


def test_a_daemon_that_only_talks_differently_is_no_news():
    env = replace(running(), agent=UP)
    assert agent(env, replace(UP, message="hello", since_ms=2)) == Step(env)


def test_a_drained_daemon_stays_drained_whatever_was_seen_before():
    env = draining_agent()
    env = step(env, AgentDrained(cause="drain", seq=env.action_seq, exit_code=0), LATER, POLICY).record
    assert agent(env, UP) == Step(env)


def test_the_verdict_of_the_health_check_is_told_when_it_changes():
    found = health(running(duties=EVERYTHING), PASSING)
    assert found.record.health == PASSING
    assert [(fact.kind, fact.reason, fact.data) for fact in found.facts] == [
        (Kind.HEALTH, "passing", {"failures": "0"})
    ]
    failing = HealthStatus(state=Verdict.FAILING, since_ms=2, failures=3, message="status 500")
    worse = health(found.record, failing)
    assert [(fact.reason, fact.message, fact.data) for fact in worse.facts] == [
        ("failing", "status 500", {"failures": "3"})
    ]
    assert health(worse.record, failing) == Step(worse.record)
    more = replace(failing, failures=4)
    assert health(worse.record, more) == Step(replace(worse.record, health=more))
    other = health(worse.record, replace(failing, message="connection refused"))
    assert len(other.facts) == 1


@pytest.mark.parametrize("situation", SITUATIONS)
def test_only_a_machine_that_is_there_can_be_seen(situation: str):
    env = SITUATIONS[situation]()
    is_seen = situation in SEEN_IN
    assert (agent(env, UP) != Step(env)) is is_seen
    assert (health(env, PASSING) != Step(env)) is is_seen


@pytest.mark.parametrize("state", MAKERS)
@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.STATE])
def test_what_is_reported_becomes_a_fact_until_the_end(state: State, kind: Kind):
    env = MAKERS[state]()
    event = Reported(cause="req-1", kind=kind, message="hello", reason="why", data={"stream": "stdout"})
    found = step(env, event, LATER, POLICY)
    if env.is_terminal:
        assert found == Step(env)
        return
    assert found.record == replace(env, event_seq=env.event_seq + 1, updated_at_ms=LATER)
    (fact,) = found.facts
    assert (fact.kind, fact.state, fact.message, fact.reason) == (kind, env.state, "hello", "why")
    assert (fact.data, fact.cause, fact.at_ms) == ({"stream": "stdout"}, "req-1", LATER)
    assert (found.actions, found.snapshots) == ((), ())


@pytest.mark.parametrize("maker", [running, setting_up, restoring, destroyed, failed])
def test_a_state_cannot_be_reported(maker):
    with pytest.raises(AssertionError, match="a state is told by entering it"):
        step(maker(), Reported(cause="x", kind=Kind.STATE), LATER, POLICY)


# -- output and commands -------------------------------------------------------------------------------------------


def output(env: Environment, offset: int, text: str, stream: str = "stdout") -> Step:
    event = OutputSeen(cause="action 2", stream=stream, offset=offset, end=offset + len(text), text=text)
    return step(env, event, LATER, POLICY)


def test_output_is_told_and_how_far_it_was_told_is_kept_with_it():
    first = output(setting_up(), 0, "hello")
    assert first.record.startup_told == {"stdout": 5}
    (fact,) = first.facts
    assert (fact.kind, fact.message, fact.data) == (Kind.STARTUP_OUTPUT, "hello", {"stream": "stdout", "offset": "0"})
    assert output(first.record, 0, "hello") == Step(first.record)
    assert output(first.record, 3, "lo, world") == Step(first.record)
    both = output(output(first.record, 5, ", world").record, 0, "oops", "stderr").record
    assert both.startup_told == {"stdout": 12, "stderr": 4}
    assert output(both, 20, "what came after a gap").record.startup_told["stdout"] == 41


def test_commands_are_told_together_and_in_their_order():
    ends = tuple(CommandEnd(cause=f"request {number}", message="it ended", data={"exit_code": "0"}) for number in "ab")
    found = step(running(), CommandsEnded(cause="commands", commands=ends), LATER, POLICY)
    assert [(fact.kind, fact.cause, fact.seq) for fact in found.facts] == [
        (Kind.EXEC, f"request {name}", running().event_seq + number) for number, name in enumerate("ab", 1)
    ]
    assert found.record == replace(running(), event_seq=running().event_seq + 2, updated_at_ms=LATER)
    assert step(running(), CommandsEnded(cause="commands", commands=()), LATER, POLICY) == Step(running())


@pytest.mark.parametrize("maker", [destroyed, failed])
def test_after_the_end_nothing_is_told(maker):
    env = maker()
    assert output(env, 0, "late") == Step(env)
    ends = (CommandEnd(cause="request a", message="late"),)
    assert step(env, CommandsEnded(cause="commands", commands=ends), LATER, POLICY) == Step(env)
