"""A guest that means harm: it closes, floods, lies about lengths, answers nothing or something else. What comes of it
is an error of that machine; nothing grows without bound, nothing else is raised, and the next epoch is whole again."""

import asyncio
import contextlib
import json
import os
import random
import socket
from pathlib import Path

import pytest

from fusevm.host.agent import ask_health, run_command
from fusevm.host.channel import AgentClient, GuestChannel
from fusevm.host.vmm.qmp import Qmp, QmpError
from fusevm.model.errors import Error
from fusevm.testing.fake_agent import memory_pair
from fusevm.wire.frames import BadFrame, FrameDecoder, decode_message
from fusevm.wire.guest import ExecRequest
from fusevm.wire.http1 import Connection
from fusevm.wire.mux import (
    EPOCH_SIZE,
    INITIAL_CREDIT,
    MAX_STREAMS,
    PREAMBLE_SIZE,
    Frame,
    FrameType,
    MuxViolation,
    Session,
    encode_frame,
)
from hostile import ANSWERS, golden_exec_frames, golden_frames, mutants, pieces

# -- the multiplexer --------------------------------------------------------------------------------------------------


def synced() -> Session:
    session = Session(os.urandom(EPOCH_SIZE))
    session.receive(encode_frame(Frame(FrameType.HELLO, 0, session._epoch)))
    return session


def held(session: Session) -> int:
    """Bytes that a guest has made the session keep."""
    inboxes = sum(len(chunk) for stream in session._streams.values() for chunk in stream._inbox)
    return len(session._decoder._buffer) + inboxes + 4 * len(session._refusals)


def test_no_bytes_break_a_session():
    for name, data in mutants(golden_frames()):
        chance, session = random.Random(name), synced()
        streams = [session.open() for _ in range(3)]
        with contextlib.suppress(MuxViolation):
            for piece in pieces(chance, data):
                session.receive(piece)
                session.output(1 << 16)
        assert held(session) <= PREAMBLE_SIZE + len(streams) * INITIAL_CREDIT + 4 * MAX_STREAMS, name


def test_a_guest_that_never_agrees_is_not_remembered():
    """Before the echo of the epoch everything is dropped, however much it is."""
    session = Session(os.urandom(EPOCH_SIZE))
    for name, data in mutants(golden_frames(), 50):
        for _again in range(20):
            session.receive(data)
        assert held(session) <= PREAMBLE_SIZE, name


@pytest.mark.parametrize("kind", [FrameType.DATA, FrameType.WINDOW, FrameType.CLOSE, FrameType.RESET])
def test_a_flood_of_one_kind_of_frame_is_bounded(kind: FrameType):
    session = synced()
    session.open()
    payload = {FrameType.DATA: bytes(1000), FrameType.WINDOW: b"\x7f\xff\xff\xff"}.get(kind, b"")
    flood = b"".join(encode_frame(Frame(kind, 1 + number % 5000, payload)) for number in range(20_000))
    with contextlib.suppress(MuxViolation):
        session.receive(flood)
    assert held(session) <= PREAMBLE_SIZE + INITIAL_CREDIT + 4 * MAX_STREAMS
    batch, _done = session.output(1 << 30)
    assert len(batch) <= 64 * (MAX_STREAMS + 10)


# -- frames of interactive commands -----------------------------------------------------------------------------------


def test_no_bytes_break_the_frames_of_commands():
    for name, data in mutants(golden_exec_frames()):
        decoder = FrameDecoder()
        with contextlib.suppress(BadFrame):
            for piece in pieces(random.Random(name), data):
                decoder.feed(piece)
        assert len(decoder._buffer) <= 2 << 20, name
        with contextlib.suppress(BadFrame):
            decode_message(data)


# -- HTTP -------------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Lying:
    """A guest whose every stream says the same, and then ends."""

    def __init__(self, answer: bytes, seed: str) -> None:
        self._answer = answer
        self._seed = seed
        self.saying: set[asyncio.Task[None]] = set()

    async def open_stream(self):
        ours, theirs = memory_pair()

        async def say() -> None:
            with contextlib.suppress(ConnectionError):
                for piece in pieces(random.Random(self._seed), self._answer):
                    await theirs.write(piece)
                await theirs.close_write()

        task = asyncio.ensure_future(say())
        self.saying.add(task)
        task.add_done_callback(self.saying.discard)
        return ours


async def test_whatever_an_agent_answers_is_an_answer_or_an_error_of_ours():
    for name, answer in mutants(ANSWERS):
        guest = Lying(answer, name)
        for ask in (ask_health(guest), run_command(guest, ExecRequest(cmd=["x"], timeout_ms=1000))):
            async with asyncio.timeout(60):
                with contextlib.suppress(Error, ConnectionError):
                    await ask
        connection = Connection(await guest.open_stream())
        with contextlib.suppress(ConnectionError):
            response = await connection.request("GET", "/health")
            await response.read(1 << 20)
        await connection.close()
        if guest.saying:
            await asyncio.wait(guest.saying)


# -- the channel as a whole -------------------------------------------------------------------------------------------


async def test_after_any_lie_the_next_epoch_is_whole(make_guest, http_handler, tmp_path):
    """The guest is honest, then says something else in the middle of an epoch, then is honest again.

    Half a frame swallows what follows: whoever waits has a deadline, and whoever gives up begins another epoch.
    """
    guest = await make_guest(http_handler)
    channel = GuestChannel(tmp_path / "agent.sock")
    client = AgentClient(channel.open_stream)

    async def ask() -> None:
        response = await client.request("GET", "/honest")
        assert (await response.read())[:1] == b"{"

    try:
        for _name, data in mutants(golden_frames(), 60):
            guest.send_raw(data)
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(0.05):
                    await ask()
            await channel.disconnect()
            async with asyncio.timeout(60):
                await ask()
    finally:
        await client.close()
        await channel.close()


async def test_a_guest_that_closes_again_and_again_costs_no_descriptor(make_guest, tmp_path):
    async def slam(stream) -> None:
        stream.guest.drop()

    await make_guest(slam)
    channel = GuestChannel(tmp_path / "agent.sock")
    try:
        before = descriptors()
        for _ in range(50):
            with contextlib.suppress(ConnectionError):
                stream = await channel.open_stream()
                await stream.read(1)
        assert descriptors() <= before + 3
    finally:
        await channel.close()


# -- QMP --------------------------------------------------------------------------------------------------------------

_LINES = (
    b'{"QMP":{"version":{}}}\n',
    b'{"return":{}}\n',
    b'{"event":"SHUTDOWN","data":{"reason":"guest-reset"}}\n',
    b'{"event":1,"data":[]}\n',
    b'{"error":"no object"}\n',
    b"[1,2,3]\n",
    b"null\n",
    b'["QMP"]\n',
    b'{"event":"STOP"}\n' * 100,
    b'{"a":' * 50_000 + b"\n",
    b"x" * 300_000,
)


async def test_a_qemu_that_was_broken_into_may_say_anything_on_its_control_socket():
    for _name, data in mutants(_LINES):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        qmp = await Qmp.start(ours, lambda _event: None)
        asking = asyncio.ensure_future(qmp.execute("query-status"))
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(60):
                await loop.sock_sendall(theirs, data)
        theirs.close()
        async with asyncio.timeout(60):
            with contextlib.suppress(ConnectionError, QmpError):
                await asking
            await qmp.ended
        await qmp.close()


def test_the_corpus_has_what_the_documents_have():
    assert len(golden_frames()) > 5
    assert json.dumps([len(frame) for frame in golden_exec_frames()])
