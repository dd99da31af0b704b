"""The life of an environment as a person reads it."""

import pytest
from making import (
    NOW,
    POLICY,
    destroying,
    draining_agent,
    queued,
    restoring,
    rotating,
    running,
    setting_up,
    snapshotting,
)
from msgspec.structs import replace

from fusevm.core.lifecycle import Identity, begin, step
from fusevm.core.spec import complete
from fusevm.core.story import story
from fusevm.model.environment import State
from fusevm.model.event import BootSucceeded, DestroyConfirmed, DestroyRequested, Event, OutcomeUnknown
from fusevm.model.fact import Fact, Kind


def test_a_life_from_create_to_delete():
    identity = Identity(uid="u1", task_id="train", machine_id="m-1", tenant="acme")
    found = begin(identity, complete(POLICY), "h1", cause="req-1", now_ms=NOW, policy=POLICY)
    env, facts = found.record, list(found.facts)
    life: list[tuple[int, Event]] = [
        (1_250, BootSucceeded(cause="req-1", seq=1)),
        (60_000, DestroyRequested(cause="req-2")),
        (61_500, DestroyConfirmed(cause="req-2", seq=2)),
    ]
    for at, event in life:
        found = step(env, event, NOW + at, POLICY)
        env, facts = found.record, facts + list(found.facts)
    introduction, *sentences = story(env, facts)
    assert introduction == (
        "fuse-train (u1 for tenant acme) is a machine of 1 vCPU, 512 MiB, 4 GiB with image debian-12, "
        "placed on host h1."
    )
    assert sentences == [
        "+0.000 s: provisioning began [req-1].",
        "+1.250 s: the machine came up [req-1].",
        "+60.000 s: its end began (deleted) [req-2].",
        "+61.500 s: it was destroyed (deleted) [req-2].",
        "It is destroyed; nothing is under way.",
    ]


def test_what_is_under_way_and_its_trouble_come_last():
    env = destroying()
    assert story(env, ())[-1] == "It is destroying; action 2 is to destroy m-u1 on host h1 [delete]."
    env = step(env, OutcomeUnknown(cause="c", seq=2, message="connection refused"), NOW + 9_000, POLICY).record
    assert story(env, ())[-1] == (
        "It is destroying; action 3 is to destroy m-u1 on host h1 (attempt 2); "
        "last problem: connection refused [delete]."
    )


@pytest.mark.parametrize(
    ("maker", "sentence"),
    [
        (queued, "It is provisioning; it waits for a place, at most 60 s."),
        (setting_up, "It is provisioning; action 2 is to set up m-u1 on host h1 [boot]."),
        (rotating, "It is running; action 2 is to give a new token to m-u1 on host h1 [rotate]."),
        (snapshotting, "It is running; action 2 is to take a snapshot of m-u1 on host h1 [snapshot]."),
        (restoring, "It is running; action 2 is to put m-u1 back to a snapshot on host h1 [restore]."),
        (draining_agent, "It is draining; action 3 is to drain the daemon of m-u1 on host h1 [drain]."),
    ],
)
def test_every_action_under_way_has_its_words(maker, sentence: str):
    assert story(maker(), ())[-1] == sentence


def test_where_it_comes_from_and_where_it_is_come_first():
    env = queued()
    assert story(env, ())[0].endswith("with image debian-12, without a place.")
    seeded = replace(env, spec=replace(env.spec, seed_snapshot_id="snap-1"))
    assert story(seeded, ())[0].endswith("with image debian-12 from snapshot snap-1, without a place.")


def test_what_a_fact_is_about_and_what_was_said_fit_on_one_line():
    data = {"stream": "stdout", "exit_code": "3"}
    fact = Fact(
        uid="u1", seq=1, kind=Kind.AGENT, state=State.RUNNING, at_ms=NOW, cause="c", message="a\n  b", data=data
    )
    assert story(running(), [fact])[1] == (
        "+0.000 s: news of the daemon while running, exit code 3, stream stdout: a b [c]."
    )


def test_a_boot_under_way_is_called_a_boot():
    identity = Identity(uid="u1", task_id="t", machine_id="m-1")
    env = begin(identity, complete(POLICY), "h1", cause="req-1", now_ms=NOW, policy=POLICY).record
    assert story(env, ())[-1] == "It is provisioning; action 1 is to boot m-1 on host h1 [req-1]."


def test_every_kind_of_fact_has_a_sentence():
    env = running()
    for kind in Kind:
        for state in State:
            fact = Fact(uid="u1", seq=1, kind=kind, state=state, at_ms=NOW, cause="c", message="text", reason="why")
            sentence = story(env, [fact])[1]
            assert sentence.startswith("+0.000 s: ")
            assert sentence.endswith(" (why): text [c].")
    letter = Fact(uid="u1", seq=1, kind=Kind.DEAD_LETTER, state=State.DESTROYING, at_ms=NOW, cause="c", message="down")
    told = story(env, [letter, replace(letter, kind=Kind.STARTUP_OUTPUT)])
    assert told[1:3] == [
        "+0.000 s: destroying needs a person: attempts keep failing: down [c].",
        "+0.000 s: the startup script said something while destroying: down [c].",
    ]
