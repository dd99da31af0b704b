"""Server-sent events, written and read."""

import pytest

from fusevm.wire.sse import KEEPALIVE, Message, MessageDecoder, encode_message

STREAM = (
    KEEPALIVE
    + encode_message(b'{"state":"running"}', "1-2")
    + KEEPALIVE
    + encode_message('{"m":"\u00e9"}'.encode(), "2")
)
MESSAGES = [Message('{"state":"running"}', "1-2"), Message('{"m":"\u00e9"}', "2")]


def read(*chunks: bytes) -> list[Message]:
    decoder = MessageDecoder()
    return [message for chunk in chunks for message in decoder.feed(chunk)]


def test_what_is_written_is_read():
    assert read(STREAM) == MESSAGES


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_it_does_not_matter_where_the_stream_is_cut(size: int):
    assert read(*(STREAM[at : at + size] for at in range(0, len(STREAM), size))) == MESSAGES


def test_lines_may_end_with_carriage_return_and_line_feed():
    assert read(STREAM.replace(b"\n", b"\r\n")) == MESSAGES


def test_a_keepalive_is_no_message():
    assert read(KEEPALIVE * 3) == []


def test_a_message_without_an_id_keeps_the_last_one_and_carries_none_at_first():
    assert read(encode_message(b"a"), encode_message(b"b", "7"), encode_message(b"c")) == [
        Message("a", ""),
        Message("b", "7"),
        Message("c", "7"),
    ]


def test_several_data_lines_are_one_message():
    assert read(b"event: log\ndata: one\ndata:two\ndata\n\n") == [Message("one\ntwo\n", "", "log")]


def test_an_event_name_belongs_to_one_message_only():
    assert read(b"event: a\ndata: 1\n\ndata: 2\n\nevent: lost\n\ndata: 3\n\n") == [
        Message("1", "", "a"),
        Message("2", "", ""),
        Message("3", "", ""),
    ]


def test_unknown_fields_and_an_unfinished_message_are_skipped():
    assert read(b"retry: 100\nwhatever: 1\ndata: 1\n\ndata: not finished\n") == [Message("1")]
