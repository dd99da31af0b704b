"""The multiplexer without any I/O: frames, resynchronisation, credit, turns, violations."""

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevm.wire.mux import (
    HEADER_SIZE,
    INITIAL_CREDIT,
    MAX_PAYLOAD,
    MAX_STREAMS,
    PREAMBLE_SIZE,
    Decoder,
    Frame,
    FrameType,
    MuxViolation,
    Session,
    StreamsExhausted,
    encode_frame,
)

EPOCH = bytes(range(16))
HELLO = encode_frame(Frame(FrameType.HELLO, 0, EPOCH))


def synced_decoder() -> Decoder:
    decoder = Decoder()
    decoder.feed(HELLO)
    return decoder


def synced_session() -> Session:
    session = Session(EPOCH)
    session.receive(HELLO)
    assert session.is_synced
    return session


def sent_by(session: Session, limit: int = 1 << 30) -> list[Frame]:
    """Take the session's output and decode it as the guest would."""
    return synced_decoder().feed(session.output(limit)[0])


def data(stream: int, payload: bytes) -> bytes:
    return encode_frame(Frame(FrameType.DATA, stream, payload))


def window(stream: int, amount: int) -> bytes:
    return encode_frame(Frame(FrameType.WINDOW, stream, amount.to_bytes(4, "big")))


def crc32_bit_by_bit(data: bytes) -> int:
    """IEEE 802.3 by its definition: reflected polynomial 0xEDB88320."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# -- frames ----------------------------------------------------------------------------------------------------------


def test_a_frame_has_the_documented_layout():
    frame = encode_frame(Frame(FrameType.DATA, 3, b"hi"))
    assert frame[:12] == bytes.fromhex("465501020000000300000002")
    assert int.from_bytes(frame[12:16], "big") == crc32_bit_by_bit(frame[:12] + b"hi")
    assert frame[16:] == b"hi"


@given(st.lists(st.tuples(st.integers(1, 2**32 - 1), st.binary(min_size=1, max_size=200)), max_size=20), st.data())
def test_frames_survive_any_cutting(items, draw):
    frames = [Frame(FrameType.DATA, stream, payload) for stream, payload in items]
    stream = b"".join(map(encode_frame, frames))
    decoder, found, at = synced_decoder(), [], 0
    while at < len(stream):
        step = draw.draw(st.integers(1, len(stream) - at))
        found += decoder.feed(stream[at : at + step])
        at += step
    assert found == frames
    assert decoder.losses == 0


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"XU" + HELLO[2:], "magic"),
        (b"FU\x02" + HELLO[3:], "version"),
        (encode_frame(Frame(FrameType.DATA, 1, b"")), "empty data"),
        (encode_frame(Frame(FrameType.DATA, 1, bytes(MAX_PAYLOAD + 1))), "too long"),
        (encode_frame(Frame(FrameType.OPEN, 1, b"x")), "open with payload"),
        (encode_frame(Frame(FrameType.WINDOW, 1, b"abc")), "short window"),
        (encode_frame(Frame(FrameType.DATA, 0, b"x")), "data on stream 0"),
        (encode_frame(Frame(FrameType.HELLO, 1, EPOCH)), "hello on a stream"),
        (encode_frame(Frame(6, 1, b"")), "unknown type"),
        (data(1, b"x")[:-1] + b"y", "checksum"),
    ],
)
def test_a_bad_frame_loses_sync_until_the_next_hello(frame, why):
    decoder = synced_decoder()
    assert decoder.feed(frame + data(1, b"lost")) == [], why
    assert not decoder.is_synced
    assert decoder.losses == 1
    assert [f.payload for f in decoder.feed(HELLO + data(1, b"found"))] == [EPOCH, b"found"]


def test_a_hello_inside_a_rejected_frame_is_found():
    torn = data(9, b"a" * 100 + HELLO + b"b" * 50)
    broken = torn[:-1] + bytes([torn[-1] ^ 1])
    assert [f.type for f in synced_decoder().feed(broken)] == [FrameType.HELLO]


@pytest.mark.parametrize("cut", [1, 11, 12, 16, 31])
def test_a_hello_within_a_torn_hello_is_found(cut):
    decoder = Decoder()
    assert [f.payload for f in decoder.feed(HELLO[:cut] + HELLO)] == [EPOCH]
    assert decoder.is_synced


def test_a_decoder_starts_out_of_sync():
    decoder = Decoder()
    assert decoder.feed(data(1, b"early")) == []
    assert decoder.losses == 0


@given(st.integers(0, HEADER_SIZE + MAX_PAYLOAD - 1), st.integers(0, 2**32))
def test_the_greeting_ends_any_half_frame(cut, seed):
    payload = random.Random(seed).randbytes(MAX_PAYLOAD)
    guest = synced_decoder()
    guest.feed(data(7, payload)[:cut])
    found = guest.feed(Session(EPOCH).greeting)
    assert found[-1:] == [Frame(FrameType.HELLO, 0, EPOCH)]
    assert guest.is_synced


def test_the_preamble_is_the_largest_frame():
    assert Session(EPOCH).greeting[:-32] == bytes(32784)
    assert PREAMBLE_SIZE == 32784


def test_noise_is_not_kept():
    decoder = Decoder()
    for _ in range(100):
        decoder.feed(os.urandom(65536))
    assert len(decoder._buffer) < HEADER_SIZE + MAX_PAYLOAD


# -- session: epoch ----------------------------------------------------------------------------------------------------


def test_everything_before_our_own_hello_is_discarded():
    session = Session(EPOCH)
    stale = encode_frame(Frame(FrameType.HELLO, 0, bytes(16)))
    assert session.receive(b"noise" + stale + data(1, b"old") + b"torn") == []
    assert not session.is_synced
    assert session.receive(HELLO) == []
    assert session.is_synced


@pytest.mark.parametrize(
    "noise",
    [
        HELLO,
        encode_frame(Frame(FrameType.HELLO, 0, bytes(16))),
        encode_frame(Frame(FrameType.OPEN, 1)),
        b"x" * 16,
        data(1, b"x")[:-1] + b"y",
        b"x" * 16 + HELLO,
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_guest_that_breaks_the_protocol_is_noticed(noise, together):
    session = Session(EPOCH)
    if not together:
        session.receive(HELLO)
    with pytest.raises(MuxViolation):
        session.receive(HELLO + noise if together else noise)


def test_nothing_is_sent_for_streams_before_the_greeting_is_answered_but_they_may_be_opened():
    session = Session(EPOCH)
    session.open()
    session.receive(HELLO)
    assert [f.type for f in sent_by(session)] == [FrameType.OPEN]


def test_the_end_of_an_epoch_ends_every_stream():
    session = synced_session()
    streams = [session.open() for _ in range(3)]
    assert session.fail() == streams
    assert all(s.is_gone for s in streams)
    assert not session.has_output


# -- session: streams --------------------------------------------------------------------------------------------------


def test_ids_start_at_one_and_grow_by_one():
    session = synced_session()
    assert [session.open().id for _ in range(3)] == [1, 2, 3]
    assert [f.stream for f in sent_by(session)] == [1, 2, 3]


def test_a_session_has_at_most_1024_streams_at_once():
    session = synced_session()
    streams = [session.open() for _ in range(MAX_STREAMS)]
    with pytest.raises(StreamsExhausted):
        session.open()
    streams[0].reset()
    session.output(1 << 20)
    assert session.open().id == MAX_STREAMS + 1


def test_a_write_is_cut_into_frames_and_stops_at_the_credit():
    session = synced_session()
    stream = session.open()
    stream.write(b"z" * (INITIAL_CREDIT + 10))
    frames = [f for f in sent_by(session) if f.type == FrameType.DATA]
    assert [len(f.payload) for f in frames] == [MAX_PAYLOAD] * 8
    assert stream.is_sending
    assert not session.has_output
    session.receive(window(1, 4))
    assert [len(f.payload) for f in sent_by(session)] == [4]
    session.receive(window(1, 100))
    batch, done = session.output(1 << 20)
    assert len(batch) == HEADER_SIZE + 6
    assert done == [stream]
    assert not stream.is_sending


def test_streams_take_turns():
    session = synced_session()
    bulk, small = session.open(), session.open()
    session.output(1 << 20)
    bulk.write(b"b" * (4 * MAX_PAYLOAD))
    small.write(b"s")
    order = [(f.stream, len(f.payload)) for f in sent_by(session)]
    assert order == [(1, MAX_PAYLOAD), (2, 1), (1, MAX_PAYLOAD), (1, MAX_PAYLOAD), (1, MAX_PAYLOAD)]


def test_output_comes_in_batches_of_about_the_limit():
    session = synced_session()
    session.open().write(b"b" * (4 * MAX_PAYLOAD))
    sizes = []
    while session.has_output:
        sizes.append(len(session.output(MAX_PAYLOAD)[0]))
    assert max(sizes) <= 2 * (MAX_PAYLOAD + HEADER_SIZE)
    assert len(sizes) >= 3


def test_reading_returns_credit_after_a_quarter_of_the_window():
    session = synced_session()
    stream = session.open()
    session.output(1 << 20)
    for _ in range(8):
        session.receive(data(1, bytes(MAX_PAYLOAD)))
    stream.read(65535)
    assert not session.has_output
    stream.read(1)
    assert sent_by(session) == [Frame(FrameType.WINDOW, 1, (65536).to_bytes(4, "big"))]
    stream.read(1 << 20)
    assert sent_by(session) == [Frame(FrameType.WINDOW, 1, (INITIAL_CREDIT - 65536).to_bytes(4, "big"))]


def test_a_guest_that_sends_beyond_its_credit_loses_that_stream_only():
    session = synced_session()
    greedy, other = session.open(), session.open()
    session.output(1 << 20)
    for _ in range(8):
        session.receive(data(1, bytes(MAX_PAYLOAD)))
    assert session.receive(data(1, b"x")) == [greedy]
    assert greedy.is_gone
    assert sent_by(session) == [Frame(FrameType.RESET, 1)]
    session.receive(data(2, b"fine"))
    assert other.read(10) == b"fine"


def test_a_window_full_of_tiny_frames_takes_little_more_than_its_bytes():
    session = synced_session()
    stream = session.open()
    session.receive(b"".join(data(1, b"abc") for _ in range(20000)))
    assert len(stream._inbox) < 10
    assert stream.read(1 << 20) == b"abc" * 20000


@given(st.lists(st.integers(1, 9000), max_size=30), st.lists(st.integers(1, 20000), min_size=1, max_size=30))
def test_reads_of_any_size_give_the_bytes_in_order(sizes, limits):
    session = synced_session()
    stream = session.open()
    sent = b""
    for i, size in enumerate(sizes):
        if len(sent) + size > INITIAL_CREDIT:
            break
        payload = bytes([i]) * size
        sent += payload
        session.receive(data(1, payload))
    got, turn = b"", 0
    while stream.has_data:
        piece = stream.read(limits[turn % len(limits)])
        assert 1 <= len(piece) <= limits[turn % len(limits)]
        got, turn = got + piece, turn + 1
    assert got == sent
    assert stream.read(5) == b""


def test_close_write_waits_for_the_bytes_before_it():
    session = synced_session()
    stream = session.open()
    stream.write(b"z" * (INITIAL_CREDIT + 1))
    stream.close_write()
    assert FrameType.CLOSE not in [f.type for f in sent_by(session)]
    session.receive(window(1, 1))
    assert [f.type for f in sent_by(session)] == [FrameType.DATA, FrameType.CLOSE]
    assert session.stream_count == 1
    session.receive(encode_frame(Frame(FrameType.CLOSE, 1)))
    assert stream.is_over
    assert session.stream_count == 0


def test_what_arrived_before_close_or_reset_can_still_be_read():
    session = synced_session()
    first, second = session.open(), session.open()
    session.receive(data(1, b"all") + encode_frame(Frame(FrameType.CLOSE, 1)))
    session.receive(data(2, b"part") + encode_frame(Frame(FrameType.RESET, 2)))
    assert (first.read(9), first.is_ended) == (b"all", True)
    assert (second.read(9), second.is_gone) == (b"part", True)


def test_data_after_close_is_answered_by_reset():
    session = synced_session()
    session.open()
    session.output(1 << 20)
    session.receive(encode_frame(Frame(FrameType.CLOSE, 1)) + data(1, b"more"))
    assert [f.type for f in sent_by(session)] == [FrameType.RESET]


def test_data_for_an_unknown_stream_is_answered_by_one_reset_and_other_frames_are_ignored():
    session = synced_session()
    unknown = window(77, 1) + encode_frame(Frame(FrameType.CLOSE, 77)) + encode_frame(Frame(FrameType.RESET, 77))
    assert session.receive(unknown + data(77, b"x") + data(77, b"y")) == []
    assert sent_by(session) == [Frame(FrameType.RESET, 77)]


def test_a_reset_stream_sends_one_reset_and_ignores_what_is_under_way():
    session = synced_session()
    stream = session.open()
    session.output(1 << 20)
    stream.write(b"never sent")
    stream.reset()
    stream.reset()
    assert session.receive(data(1, b"late")) == []
    assert sent_by(session) == [Frame(FrameType.RESET, 1)]
    assert session.stream_count == 0


def test_absurd_credit_resets_the_stream():
    session = synced_session()
    stream = session.open()
    session.output(1 << 20)
    session.receive(window(1, 2**31))
    assert stream.is_gone
    assert sent_by(session) == [Frame(FrameType.RESET, 1)]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 100_000)), max_size=30), st.randoms())
def test_a_fair_guest_gets_every_byte_and_credit_is_never_exceeded(writes, rng):
    session = synced_session()
    streams = {s.id: s for s in (session.open() for _ in range(5))}
    guest = synced_decoder()
    queued: dict[int, list[bytes]] = {i: [] for i in streams}
    for i, size in writes:
        queued[i].append(rng.randbytes(size))
    wanted = {i: b"".join(parts) for i, parts in queued.items()}
    received = {i: bytearray() for i in streams}
    room = dict.fromkeys(streams, INITIAL_CREDIT)
    while any(queued.values()) or any(s.is_sending for s in streams.values()) or session.has_output:
        for i, stream in streams.items():
            if queued[i] and not stream.is_sending:
                stream.write(queued[i].pop(0))
        for frame in guest.feed(session.output(rng.randrange(1, 200_000))[0]):
            if frame.type == FrameType.DATA:
                received[frame.stream] += frame.payload
                room[frame.stream] -= len(frame.payload)
                assert room[frame.stream] >= 0
        for i in streams:
            if room[i] < INITIAL_CREDIT // 2:
                session.receive(window(i, INITIAL_CREDIT - room[i]))
                room[i] = INITIAL_CREDIT
    assert received == wanted


# -- the file that the agent is tested against, too --------------------------------------------------------------------


GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "mux_frames.json").read_text())


def by_name(case: dict) -> str:
    return case["name"].replace(" ", "-")


def as_frame(case: dict) -> Frame:
    return Frame(case["type"], case["stream"], bytes.fromhex(case["payload_hex"]))


@pytest.mark.parametrize("case", GOLDEN["frames"], ids=by_name)
def test_golden_frames_are_encoded_and_decoded_the_same(case):
    assert encode_frame(as_frame(case)).hex() == case["hex"]
    assert synced_decoder().feed(bytes.fromhex(case["hex"])) == [as_frame(case)]
    assert FrameType(case["type"]).name == case["type_name"]


@pytest.mark.parametrize("case", GOLDEN["invalid"], ids=by_name)
def test_golden_invalid_bytes_lose_sync(case):
    decoder = synced_decoder()
    assert decoder.feed(bytes.fromhex(case["hex"])) == []
    assert not decoder.is_synced


@pytest.mark.parametrize("step", [1, 1000, 1 << 20])
@pytest.mark.parametrize("case", GOLDEN["resync"], ids=by_name)
def test_golden_resynchronisation(case, step):
    stream, epoch = bytes.fromhex(case["input_hex"]), bytes.fromhex(case["epoch_hex"])
    decoder, frames = Decoder(), []
    for at in range(0, len(stream), step):
        frames += decoder.feed(stream[at : at + step])
    last = max(i for i, frame in enumerate(frames) if frame.type == FrameType.HELLO)
    assert frames[last].payload == epoch
    assert frames[last + 1 :] == [as_frame(after) for after in case["frames_after"]]


@pytest.mark.parametrize("case", [c for c in GOLDEN["resync"] if "host" in c["roles"]], ids=by_name)
def test_golden_resynchronisation_of_the_host(case):
    epoch = bytes.fromhex(case["epoch_hex"])
    session = Session(epoch)
    stream = bytes.fromhex(case["input_hex"])
    end = stream.rindex(encode_frame(Frame(FrameType.HELLO, 0, epoch))) + HEADER_SIZE + len(epoch)
    assert session.receive(stream[:end]) == []
    assert session.is_synced
