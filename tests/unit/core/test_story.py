"""The life of an environment as a person reads it."""

from making import NOW, POLICY, destroying, running
from msgspec.structs import replace

from fusevm.core.lifecycle import Identity, begin, step
from fusevm.core.spec import complete
from fusevm.core.story import story
from fusevm.model.environment import (
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    Event,
    OutcomeUnknown,
    State,
)
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
        "+0.000 s: startup output while destroying: down [c].",
    ]
