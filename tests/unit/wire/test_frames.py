"""Exec frames, held to the golden file that the guest agent's tests write."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevm.wire.frames import (
    HEADER,
    MAX_PAYLOAD,
    BadFrame,
    Frame,
    FrameDecoder,
    FrameType,
    decode_message,
    encode_frame,
)

GOLDEN = json.loads((Path(__file__).resolve().parents[2] / "golden/exec_frames.json").read_text())
VALID = pytest.mark.parametrize("case", GOLDEN["frames"], ids=lambda case: case["name"])
INVALID = pytest.mark.parametrize("case", GOLDEN["invalid"], ids=lambda case: case["name"])

frames = st.lists(st.builds(Frame, st.sampled_from(FrameType), st.binary(max_size=300)), max_size=8)


def golden_frame(case: dict[str, str]) -> Frame:
    return Frame(FrameType[case["type_name"]], bytes.fromhex(case["payload_hex"]))


@VALID
def test_the_agents_frames_are_read(case):
    raw = bytes.fromhex(case["hex"])
    assert FrameType(case["type"]).name == case["type_name"]
    assert decode_message(raw) == golden_frame(case)
    assert FrameDecoder().feed(raw) == [golden_frame(case)]


@VALID
def test_the_agents_frames_are_written_alike(case):
    assert encode_frame(golden_frame(case)).hex() == case["hex"]


@INVALID
def test_what_the_agent_refuses_is_refused(case):
    raw = bytes.fromhex(case["hex"])
    with pytest.raises(BadFrame):
        FrameDecoder().feed(raw)
    with pytest.raises(BadFrame):
        decode_message(raw)


def test_every_type_is_in_the_golden_file():
    assert {case["type_name"] for case in GOLDEN["frames"]} == {kind.name for kind in FrameType}


@given(frames, st.lists(st.integers(0, 3000), max_size=6))
def test_a_stream_is_cut_into_the_same_frames_wherever_it_is_broken(sent, cuts):
    raw = b"".join(encode_frame(frame) for frame in sent)
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    decoder, got = FrameDecoder(), []
    for start, end in pairwise(edges):
        got += decoder.feed(raw[start:end])
    assert got == sent
    assert decoder.is_between_frames


def test_half_a_frame_waits():
    decoder = FrameDecoder()
    assert decoder.feed(encode_frame(Frame(FrameType.STDOUT, b"abc"))[:-1]) == []
    assert not decoder.is_between_frames
    assert decoder.feed(b"c") == [Frame(FrameType.STDOUT, b"abc")]
    assert decoder.is_between_frames


def test_the_largest_payload_passes_and_one_byte_more_does_not():
    largest = Frame(FrameType.STDIN, b"x" * MAX_PAYLOAD)
    assert decode_message(encode_frame(largest)) == largest
    with pytest.raises(BadFrame, match="over 1048576"):
        encode_frame(Frame(FrameType.STDIN, b"x" * (MAX_PAYLOAD + 1)))


def test_a_message_is_exactly_one_frame():
    one = encode_frame(Frame(FrameType.STDOUT, b"abc"))
    for message in (b"", one[:7], one[:-1], one + b"x", one + one):
        with pytest.raises(BadFrame):
            decode_message(message)


def test_the_header_has_eight_bytes():
    assert HEADER.size == 8
    assert encode_frame(Frame(FrameType.STDIN_EOF)) == b"\x06" + b"\0" * 7
