"""Grammars of identifiers, and how they are made."""

from collections.abc import Callable

import pytest

from fusevm.model.errors import BadField, BadTaskId
from fusevm.model.ids import (
    MACHINE_ID,
    environment_id,
    make_machine_id,
    make_uid,
    parse_machine_id,
    parse_published_port_id,
    parse_snapshot_id,
    parse_task_id,
    task_id_of,
)

TASK_IDS = ["a", "A_b", "9", "My.Task-1_x", "x" * 128]
NO_TASK_IDS = ["", ".a", "-a", "_a", "a b", "a/b", "ä", "x" * 129, "a\n", "a\0"]


@pytest.mark.parametrize("text", TASK_IDS)
def test_a_task_id_is_kept_as_given(text: str):
    assert parse_task_id(text) == text
    assert task_id_of(environment_id(text)) == text


@pytest.mark.parametrize("text", NO_TASK_IDS)
def test_a_bad_task_id_is_refused_with_the_rule(text: str):
    with pytest.raises(BadTaskId, match="1 to 128 letters"):
        parse_task_id(text)
    assert task_id_of(environment_id(text)) is None


def test_a_huge_bad_id_is_quoted_in_part():
    with pytest.raises(BadTaskId) as caught:
        parse_task_id("/" * 100_000)
    assert len(caught.value.message) < 500


def test_an_id_without_the_prefix_is_no_public_id():
    assert task_id_of("task") is None


@pytest.mark.parametrize("text", ["m-1", "a", "0" * 63])
def test_a_machine_id_is_kept_as_given(text: str):
    assert parse_machine_id(text) == text


@pytest.mark.parametrize("text", ["", "-m", "M", "a_b", "a.b", "a" * 64, "a/../b", "a\n"])
def test_a_bad_machine_id_is_refused(text: str):
    with pytest.raises(BadField, match="machine_id"):
        parse_machine_id(text)


@pytest.mark.parametrize("parse", [parse_published_port_id, parse_snapshot_id])
def test_what_callers_name_on_a_host_is_kept_as_given_and_is_no_path(parse: Callable[[str], str]):
    assert parse("web-1") == "web-1"
    for text in ("", "..", "-a", "a/b", "../a", "a\n", "x" * 129):
        with pytest.raises(BadField, match="letter"):
            parse(text)


def test_uids_are_ordered_by_time_and_differ_by_entropy():
    early, late = make_uid(1_000, b"\xff" * 10), make_uid(1_001, b"\0" * 10)
    assert early < late
    assert make_uid(1_000, b"\0" * 10) < early
    assert len(early) == len(late) == 26
    assert make_uid((1 << 48) - 1, b"\xff" * 10) == "7" + "z" * 25


def test_a_uid_is_legal_wherever_a_machine_id_is():
    assert MACHINE_ID.fullmatch(make_uid(1_700_000_000_000, bytes(range(10))))


def test_a_machine_id_is_made_within_its_grammar():
    made = make_machine_id(bytes(range(16)))
    assert made == "m-aaaqeayeaudaocajbifqydiob4"
    assert parse_machine_id(made) == made
    assert make_machine_id(b"\1" * 16) != make_machine_id(b"\2" * 16)


def test_too_little_entropy_is_a_bug():
    with pytest.raises(ValueError, match="10 random bytes"):
        make_uid(0, b"short")
    with pytest.raises(ValueError, match="16 random bytes"):
        make_machine_id(b"short")
