"""Firecracker's metrics: lines out of pieces, numbers out of lines, and nothing else."""

import json

import pytest

from fusevm.host.vmm.firecracker.readings import READINGS, Lines, parse_line


def line(**sections) -> bytes:
    return json.dumps({"utc_timestamp_ms": 1, **sections}).encode()


def test_every_reading_is_taken():
    sections: dict = {}
    for number, reading in enumerate(READINGS.values(), start=1):
        sections.setdefault(reading.section, {})[reading.field] = number
    assert parse_line(line(**sections)) == {name: number for number, name in enumerate(READINGS, start=1)}


def test_what_has_not_happened_is_left_out():
    assert parse_line(line(block={"read_bytes": 0, "write_bytes": 7}, seccomp={})) == {"disk_written_bytes": 7}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"[" * 100_000,
        line(block=7),
        line(block={"read_bytes": -1}),
        line(block={"read_bytes": 1 << 41}),
        line(block={"read_bytes": "7"}),
        line(block={"read_bytes": True}),
        line(block={"read_bytes": 1.5}),
        line(block={"read_bytes": None}),
        line(block={"read_bytes": [1]}),
    ],
)
def test_what_a_broken_vmm_may_write_adds_nothing(text):
    assert parse_line(text) == {}


def test_lines_come_out_of_pieces_of_any_size():
    whole = b"first\nsecond\n\nlast without an end"
    for size in range(1, len(whole)):
        lines = Lines()
        found = [line for at in range(0, len(whole), size) for line in lines.feed(whole[at : at + size])]
        assert found == [b"first", b"second", b""]


def test_a_line_that_does_not_end_takes_no_memory_and_is_left_out():
    lines = Lines(limit=10)
    assert [lines.feed(b"x" * 7) for _ in range(5)] == [[]] * 5
    assert lines.feed(b"x\nnext\n") == [b"next"]
    assert lines.feed(b"0123456789\n01234567890\nend\n") == [b"0123456789", b"end"]
