"""What a host's list says about the use of published ports, and who may call an environment idle."""

import pytest
from making import NOW, POLICY, destroying, draining, provisioning, running, snapshotting
from msgspec.structs import replace

from fusevm.core.lifecycle import next_deadline_ms, step
from fusevm.core.reconcile import ObservedMachine
from fusevm.core.use import NOTES_PER_TIMEOUT, uses, waits_for_list
from fusevm.model.environment import Environment
from fusevm.model.event import ActivitySeen
from fusevm.model.machine import Phase
from fusevm.model.network import PublishedPort

PORT = PublishedPort(id="p", port=80, host_port=20_000, created_at_ms=NOW)
IDLE_S = 600


def web(maker=running, **spec: object) -> Environment:
    """An environment with a published port."""
    return replace(maker(**{"idle_timeout_seconds": IDLE_S, **spec}), ports=(PORT,))


def machine(ports_used_s_ago: int | None, **fields: object) -> ObservedMachine:
    made = ObservedMachine(
        id="m-u1", cluster="c1", uid="u1", incarnation=1, phase=Phase.RUNNING, ports_used_s_ago=ports_used_s_ago
    )
    return replace(made, **fields)


def noted(env: Environment, seen: ObservedMachine | None, heard_ms: int) -> list[int | None]:
    """When the use was that is worth a note."""
    found = uses([env], [seen] if seen else [], cause="list", heard_ms=heard_ms, policy=POLICY)
    assert all(uid == env.uid and event.cause == "list" for uid, event in found)
    return [event.at_ms for _, event in found]


def test_use_is_noted_with_its_own_time_and_moves_the_end_by_as_much():
    env, heard_ms = web(), NOW + 400_000
    assert noted(env, machine(30), heard_ms) == [heard_ms - 30_000]
    after = step(env, ActivitySeen(cause="list", at_ms=heard_ms - 30_000), heard_ms, POLICY).record
    assert after.last_activity_ms == heard_ms - 30_000
    assert next_deadline_ms(after, POLICY) == heard_ms - 30_000 + IDLE_S * 1000 + POLICY.activity_grain_ms


def test_no_use_lies_in_the_future():
    env, now_ms = web(), NOW + 400_000
    assert step(env, ActivitySeen(cause="list", at_ms=now_ms + 99), now_ms, POLICY).record.last_activity_ms == now_ms


def test_lasting_use_is_written_a_few_times_per_timeout():
    env, written = web(), []
    for heard_ms in range(NOW, NOW + 10 * IDLE_S * 1000, 10_000):
        for at_ms in noted(env, machine(1), heard_ms):
            env = step(env, ActivitySeen(cause="list", at_ms=at_ms), heard_ms, POLICY).record
            written.append(at_ms)
            assert env.last_activity_ms == at_ms
    assert 9 * NOTES_PER_TIMEOUT < len(written) <= 10 * NOTES_PER_TIMEOUT


def test_what_was_before_the_last_known_use_is_no_news():
    env = web()
    heard_ms = env.last_activity_ms + 400_000
    assert noted(env, machine(400), heard_ms) == []
    assert noted(env, machine(396), heard_ms) == [], "within the grain"
    assert noted(env, machine(395), heard_ms) == [env.last_activity_ms + POLICY.activity_grain_ms]


@pytest.mark.parametrize(
    "env",
    [
        web(idle_timeout_seconds=0),
        web(provisioning),
        web(draining),
        web(destroying),
        replace(web(), incarnation=2),
        replace(web(), uid="u2"),
    ],
)
def test_only_what_can_become_idle_is_noted_and_only_its_own_machine_countss(env: Environment):
    assert noted(env, machine(1), NOW + 400_000) == []


def test_a_host_that_does_not_tell_has_no_uses():
    assert noted(web(), machine(None), NOW + 400_000) == []
    assert noted(web(), None, NOW + 400_000) == []


def test_an_idle_environment_with_ports_waits_for_a_list():
    env = web()
    due_ms = next_deadline_ms(env, POLICY)
    assert due_ms is not None
    assert not waits_for_list(env, due_ms - 1, POLICY)
    assert waits_for_list(env, due_ms, POLICY)
    assert not waits_for_list(replace(env, ports=()), due_ms, POLICY), "nobody reaches it without us"
    assert not waits_for_list(web(idle_timeout_seconds=0), due_ms, POLICY)
    assert not waits_for_list(web(snapshotting), due_ms, POLICY), "an action is under way"


def test_a_limit_of_the_runtime_waits_for_nobody():
    env = web(max_runtime_seconds=IDLE_S + 100)
    due_ms = next_deadline_ms(env, POLICY)
    assert due_ms is not None
    assert waits_for_list(env, due_ms, POLICY)
    assert not waits_for_list(env, NOW + (IDLE_S + 100) * 1000, POLICY)
