"""The guest channel against a guest that is a coroutine: streams, back-pressure, breaks, reconnects, HTTP reuse."""

import asyncio
import os
import socket

import pytest

from fusevm.host.channel import AgentClient, GuestChannel, TooManyStreams, connect_now, connect_unix
from fusevm.wire.mux import INITIAL_CREDIT, MAX_STREAMS, Frame, FrameType, Session, encode_frame


@pytest.fixture
async def channel(tmp_path):
    channel = GuestChannel(tmp_path / "agent.sock")
    yield channel
    await channel.close()


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def cancel(task) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def read_all(stream) -> bytes:
    parts = []
    while data := await stream.read(1 << 16):
        parts.append(data)
    return b"".join(parts)


async def test_bytes_go_there_and_back(make_guest, channel):
    await make_guest()
    stream = await channel.open_stream()
    await stream.write(b"hello")
    assert await stream.read(3) == b"hel"
    assert await stream.read(10) == b"lo"
    await stream.close_write()
    assert await stream.read(10) == b""
    await stream.close()


async def test_two_hundred_streams_at_once_keep_apart(make_guest, channel):
    await make_guest()

    async def talk(i: int) -> None:
        payload = bytes([i]) * (1000 + 300 * i)
        stream = await channel.open_stream()
        writing = asyncio.ensure_future(stream.write(payload))
        got = b""
        while len(got) < len(payload):
            got += await stream.read(1 << 16)
        await writing
        await stream.close_write()
        assert got + await read_all(stream) == payload
        await stream.close()

    await asyncio.gather(*(talk(i) for i in range(200)))
    assert channel.stats.epochs == 1
    assert channel.stats.streams_opened == 200


async def test_ten_megabytes_survive(make_guest, channel):
    await make_guest()
    payload = os.urandom(10 << 20)
    stream = await channel.open_stream()

    async def send() -> None:
        for at in range(0, len(payload), 1 << 18):
            await stream.write(payload[at : at + (1 << 18)])
        await stream.close_write()

    sending = asyncio.ensure_future(send())
    assert await read_all(stream) == payload
    await sending


async def test_a_reader_that_stops_stops_the_guest_and_only_that_stream(make_guest, channel):
    async def flood(stream):
        while True:
            await stream.write(bytes(1 << 16))

    guest = await make_guest(flood)
    lazy, other = await channel.open_stream(), await channel.open_stream()
    for _ in range(100):
        assert await other.read(1 << 16)
    sent = INITIAL_CREDIT - guest.streams[1].credit
    assert sent == INITIAL_CREDIT
    assert len(await lazy.read(1 << 20)) == INITIAL_CREDIT


async def test_a_writer_waits_for_a_guest_that_does_not_read(make_guest, channel):
    async def sleep(_stream):
        await asyncio.Event().wait()

    guest = await make_guest(sleep)
    stream = await channel.open_stream()
    writing = asyncio.ensure_future(stream.write(bytes(INITIAL_CREDIT + 1)))
    await asyncio.sleep(0.05)
    assert not writing.done()
    guest.send(Frame(FrameType.WINDOW, 1, (1).to_bytes(4, "big")))
    await writing


async def test_a_cancelled_write_does_not_tear_the_next_one(make_guest, channel):
    received = bytearray()
    go_on = asyncio.Event()

    async def collect(stream):
        await go_on.wait()
        while data := await stream.read():
            received.extend(data)
        stream.close_write()

    guest = await make_guest(collect)
    stream = await channel.open_stream()
    writing = asyncio.ensure_future(stream.write(b"a" * (INITIAL_CREDIT + 5)))
    await until(lambda: 1 in guest.streams and len(guest.streams[1].received) == INITIAL_CREDIT)
    await cancel(writing)
    go_on.set()
    await stream.write(b"b")
    await stream.close_write()
    assert await stream.read(1) == b""
    assert bytes(received) == b"a" * (INITIAL_CREDIT + 5) + b"b"


async def test_a_reset_by_the_guest_fails_reads_and_writes(make_guest, channel):
    async def refuse(stream):
        await stream.read()
        stream.reset()

    await make_guest(refuse)
    stream = await channel.open_stream()
    await stream.write(b"x")
    with pytest.raises(ConnectionError):
        await stream.read(1)
    with pytest.raises(ConnectionError):
        await stream.write(b"y")
    assert not stream.is_usable


async def test_close_wakes_a_reader_and_tells_the_guest(make_guest, channel):
    guest = await make_guest()
    stream = await channel.open_stream()
    reading = asyncio.ensure_future(stream.read(1))
    await asyncio.sleep(0)
    await stream.close()
    await stream.close()
    with pytest.raises(ConnectionError):
        await reading
    other = await channel.open_stream()
    await other.write(b"x")
    await other.read(1)
    assert Frame(FrameType.RESET, 1) in guest.frames


async def test_the_stream_limit_is_an_error_of_its_own(make_guest, channel):
    await make_guest()
    for _ in range(MAX_STREAMS):
        stream = await channel.open_stream()
    with pytest.raises(TooManyStreams):
        await channel.open_stream()
    await stream.close()
    await channel.open_stream()


async def test_open_stream_waits_for_a_guest_that_is_not_up_yet(make_guest, channel):
    guest = await make_guest()
    guest.is_mute = True
    opening = asyncio.ensure_future(channel.open_stream())
    await until(lambda: guest.epochs)
    assert not opening.done()
    guest.send(Frame(FrameType.HELLO, 0, guest.epochs[0]))
    await opening


async def test_a_greeting_that_the_guest_lost_is_repeated(make_guest, tmp_path):
    guest = await make_guest()
    guest.is_mute = True
    channel = GuestChannel(tmp_path / "agent.sock", answer_s=0.02)
    opening = asyncio.ensure_future(channel.open_stream())
    await until(lambda: len(guest.epochs) >= 3)
    guest.send(Frame(FrameType.HELLO, 0, guest.epochs[0]))  # too late: a newer one is under way
    await asyncio.sleep(0.01)
    assert not opening.done()
    guest.is_mute = False
    stream = await opening
    await stream.write(b"x")
    assert await stream.read(1) == b"x"
    assert len(set(guest.epochs)) == len(guest.epochs)
    assert guest.connections == 1
    await channel.close()


async def test_a_greeting_that_the_guest_has_not_read_is_not_repeated(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "agent.sock"))
    listener.listen()
    channel = GuestChannel(tmp_path / "agent.sock", answer_s=0.01)
    await channel.connect()
    await asyncio.sleep(0.1)
    assert channel.stats.bytes_out == len(Session(bytes(16)).greeting)
    await channel.close()
    listener.close()


async def test_a_full_backlog_is_waited_for(tmp_path):
    path = tmp_path / "agent.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(0)
    first = connect_now(path)
    with pytest.raises(BlockingIOError):
        connect_now(path)
    waiting = asyncio.ensure_future(connect_unix(path))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    accepted, _ = listener.accept()
    second = await waiting
    for end in (first, second, accepted, listener):
        end.close()


async def test_a_cancelled_open_does_not_break_the_others(make_guest, channel):
    guest = await make_guest()
    guest.is_mute = True
    opening = asyncio.ensure_future(channel.open_stream())
    await until(lambda: guest.epochs)
    await cancel(opening)
    guest.send(Frame(FrameType.HELLO, 0, guest.epochs[0]))
    await channel.open_stream()
    assert channel.stats.epochs == 1


async def test_a_break_fails_every_stream_and_the_next_open_starts_a_new_epoch(make_guest, channel):
    guest = await make_guest()
    streams = [await channel.open_stream() for _ in range(3)]
    reading = [asyncio.ensure_future(s.read(1)) for s in streams]
    await asyncio.sleep(0.01)
    guest.drop()
    for outcome in await asyncio.gather(*reading, return_exceptions=True):
        assert isinstance(outcome, ConnectionError)
    assert not channel.is_connected
    stream = await channel.open_stream()
    await stream.write(b"again")
    assert await stream.read(10) == b"again"
    assert len(set(guest.epochs)) == 2
    assert guest.frames[-2:][0].stream == 1


async def test_fifty_reconnects(make_guest, channel):
    guest = await make_guest()
    for i in range(50):
        stream = await channel.open_stream()
        await stream.write(b"%d" % i)
        assert await stream.read(10) == b"%d" % i
        await channel.disconnect()
    assert len(set(guest.epochs)) == 50


@pytest.mark.parametrize(
    "noise",
    [
        b"garbage garbage garbage",
        encode_frame(Frame(FrameType.OPEN, 5)),
        encode_frame(Frame(FrameType.HELLO, 0, bytes(16))),
        encode_frame(Frame(FrameType.DATA, 1, b"x"))[:-1] + b"y",
    ],
)
async def test_a_guest_that_breaks_the_protocol_is_disconnected(make_guest, channel, noise):
    async def misbehave(stream):
        await stream.read()
        stream.guest.send_raw(noise)

    guest = await make_guest(misbehave)
    stream = await channel.open_stream()
    await stream.write(b"x")
    with pytest.raises(ConnectionError, match="protocol"):
        await stream.read(1)
    assert channel.stats.violations == 1
    await channel.open_stream()
    assert guest.connections == 2


async def test_a_connection_made_before_the_guest_existed_is_used(tmp_path, make_guest, channel):
    guest = await make_guest()
    await channel.connect(connect_now(guest.path))
    await channel.open_stream()
    assert guest.connections == 1


async def test_without_a_socket_there_is_a_connection_error(channel):
    with pytest.raises(ConnectionError):
        await channel.open_stream()


async def test_a_closed_channel_stays_closed(make_guest, channel):
    await make_guest()
    stream = await channel.open_stream()
    await channel.close()
    await channel.close()
    for refused in (stream.read(1), stream.write(b"x"), channel.open_stream()):
        with pytest.raises(ConnectionError):
            await refused


async def test_an_interactive_stream_is_not_starved_by_a_bulk_one(make_guest, channel):
    await make_guest()
    bulk, shell = await channel.open_stream(), await channel.open_stream()

    async def flood() -> None:
        while True:
            await bulk.write(bytes(1 << 18))

    async def drain() -> None:
        while True:
            await bulk.read(1 << 16)

    tasks = [asyncio.ensure_future(flood()), asyncio.ensure_future(drain())]
    for _ in range(20):
        before = channel.stats.bytes_out
        await shell.write(b"k")
        assert await shell.read(1) == b"k"
        # What goes ahead of a keystroke is what the sockets hold, not the bulk transfer.
        assert channel.stats.bytes_out - before < 4 << 20
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# -- HTTP --------------------------------------------------------------------------------------------------------------


async def ask(client: AgentClient, target: str = "/", body: bytes | None = None) -> str:
    async with await client.request("POST", target, body=body) as response:
        return (await response.read()).decode()


async def test_connections_are_reused(make_guest, channel, http_handler):
    await make_guest(http_handler)
    client = AgentClient(channel.open_stream)
    answers = [await ask(client, body=b"%d" % i) for i in range(5)]
    assert '"count": 5' in answers[-1]
    assert channel.stats.streams_opened == 1


async def test_requests_at_once_get_connections_of_their_own_which_are_kept_up_to_a_limit(
    make_guest, channel, http_handler
):
    guest = await make_guest(http_handler)
    client = AgentClient(channel.open_stream, max_idle=4)
    await asyncio.gather(*(ask(client) for _ in range(50)))
    assert channel.stats.streams_opened == 50
    await ask(client)
    await ask(client)
    assert channel.stats.streams_opened == 50
    assert len(guest.streams) <= 5


async def test_a_connection_whose_answer_was_not_read_is_not_reused(make_guest, channel, http_handler):
    guest = await make_guest(http_handler)
    client = AgentClient(channel.open_stream)
    async with await client.request("GET", "/"):
        pass
    await ask(client)
    assert channel.stats.streams_opened == 2
    assert len(guest.streams) == 1


async def test_a_connection_that_the_guest_ends_is_not_reused_and_does_not_stay(make_guest, channel, http_handler):
    guest = await make_guest(http_handler)
    client = AgentClient(channel.open_stream)
    response = await client.request("GET", "/close")
    await response.read()
    await ask(client)
    await ask(client)
    assert channel.stats.streams_opened == 2
    assert guest.streams[1].is_ended


async def test_after_a_break_no_old_connection_is_used(make_guest, channel, http_handler):
    guest = await make_guest(http_handler)
    client = AgentClient(channel.open_stream)
    await asyncio.gather(*(ask(client) for _ in range(3)))
    guest.drop()
    await until(lambda: not channel.is_connected)
    assert '"stream": 1' in await ask(client)


async def test_a_cancelled_request_closes_its_stream(make_guest, channel, http_handler):
    guest = await make_guest(http_handler)
    client = AgentClient(channel.open_stream)
    asking = asyncio.ensure_future(client.request("GET", "/hang"))
    await until(lambda: 1 in guest.streams)
    await cancel(asking)
    await ask(client)
    assert list(guest.streams) == [2]


async def test_close_ends_all_connections(make_guest, channel, http_handler):
    guest = await make_guest(http_handler)
    client = AgentClient(channel.open_stream)
    await asyncio.gather(*(ask(client) for _ in range(3)))
    await client.close()
    stream = await channel.open_stream()
    await stream.write(b"GET / HTTP/1.1\r\n\r\n")
    await stream.read(10)
    assert list(guest.streams) == [4]
