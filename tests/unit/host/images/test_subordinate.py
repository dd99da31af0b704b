"""Subordinate ids: what counts, and which range is advised."""

from pathlib import Path

import pytest

from fusevm.host.images.subordinate import NEEDED, Grant, find_free, judge, parse_grants

UID, GID = Path("/etc/subuid"), Path("/etc/subgid")
ENOUGH = "ann:100000:65536\n"


def tables(subuid: str, subgid: str) -> dict[Path, list[Grant]]:
    return {UID: parse_grants(subuid), GID: parse_grants(subgid)}


def test_a_user_with_a_line_in_both_tables_lacks_nothing():
    assert judge("ann", tables(ENOUGH, ENOUGH), []) is None


def test_a_user_without_lines_is_advised_a_range_that_nobody_has():
    short = judge("bob", tables(ENOUGH, "eve:165536:65536\n"), [])
    assert short is not None
    assert (short.table, short.problem) == (
        "/etc/subuid",
        "no line for bob, which building an image without root needs",
    )
    assert short.command == "usermod --add-subuids 231072-296607 --add-subgids 231072-296607 bob"


def test_only_the_table_that_lacks_a_line_is_changed():
    short = judge("ann", tables(ENOUGH, ""), [])
    assert short is not None
    assert (short.table, short.command) == ("/etc/subgid", "usermod --add-subgids 165536-231071 ann")


def test_a_line_for_the_number_of_a_user_does_not_count_because_mmdebstrap_does_not_see_it():
    assert judge("ann", tables("1000:100000:65536\n", ENOUGH), []) is not None


def test_the_first_line_of_a_user_counts_and_too_small_a_one_is_named():
    short = judge("ann", tables("ann:100000:1000\nann:200000:65536\n", ENOUGH), [])
    assert short is not None
    assert short.problem.startswith("the first line for ann gives 1000 ids of the 65536")
    assert short.command == ""


@pytest.mark.parametrize(
    ("taken", "first"),
    [
        ([], 100_000),
        ([range(65_536)], 100_000),
        ([range(99_999, 100_001)], 100_001),
        ([range(165_535, 165_536)], 165_536),
        ([range(165_536, 170_000)], 100_000),
        # The wide one ends after the narrow one that begins later.
        ([range(100_000, 300_000), range(150_000, 160_000)], 300_000),
        ([range(100_000, 165_536), range(170_000, 170_001)], 170_001),
    ],
)
def test_the_advised_range_overlaps_nothing(taken: list[range], first: int):
    assert find_free(taken) == first
    assert not any(set(ids) & set(range(first, first + NEEDED)) for ids in taken)


def test_lines_that_are_no_grants_are_left_out():
    assert parse_grants("# a comment\nann:1\nann:x:5\n\nann:7:2\n") == [Grant(user="ann", ids=range(7, 9))]
