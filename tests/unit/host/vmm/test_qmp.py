"""The QMP client against a QEMU that is a coroutine."""

import asyncio
import contextlib
import json
import socket

import pytest

from fusevm.host.vmm.qmp import Event, Qmp, QmpError

GREETING = {"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}


class FakeQemu:
    def __init__(self, ours: socket.socket) -> None:
        self.socket = ours
        self.buffer = b""

    async def say(self, *messages: dict) -> None:
        data = b"".join(json.dumps(m).encode() + b"\r\n" for m in messages)
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def hear(self) -> dict:
        while b"\n" not in self.buffer:
            self.buffer += await asyncio.get_running_loop().sock_recv(self.socket, 65536)
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)


@pytest.fixture
async def pair():
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    events: list[Event] = []
    qmp = await Qmp.start(ours, events.append)
    yield qmp, FakeQemu(theirs), events
    await qmp.close()
    theirs.close()


async def negotiate(qemu: FakeQemu) -> None:
    await qemu.say(GREETING)
    assert (await qemu.hear())["execute"] == "qmp_capabilities"
    await qemu.say({"return": {}})


async def test_commands_are_answered_in_order_and_events_come_in_between(pair):
    qmp, qemu, events = pair
    await negotiate(qemu)
    asking = [asyncio.ensure_future(qmp.execute("one")), asyncio.ensure_future(qmp.execute("two", deep=True))]
    assert await qemu.hear() == {"execute": "one", "arguments": {}}
    assert await qemu.hear() == {"execute": "two", "arguments": {"deep": True}}
    await qemu.say({"return": 1}, {"event": "STOP", "data": {}, "timestamp": {}}, {"return": 2}, {"event": "RESUME"})
    assert await asyncio.gather(*asking) == [1, 2]
    async with asyncio.timeout(60):
        while len(events) < 2:
            await asyncio.sleep(0)
    assert events == [Event("STOP", {}), Event("RESUME", {})]


async def test_a_refused_command_raises(pair):
    qmp, qemu, _ = pair
    await negotiate(qemu)
    asking = asyncio.ensure_future(qmp.execute("nonsense"))
    await qemu.hear()
    await qemu.say({"error": {"class": "CommandNotFound", "desc": "The command nonsense has not been found"}})
    with pytest.raises(QmpError, match="nonsense"):
        await asking


async def test_a_command_before_the_greeting_waits(pair):
    qmp, qemu, _ = pair
    asking = asyncio.ensure_future(qmp.execute("early"))
    await asyncio.sleep(0.01)
    await negotiate(qemu)
    assert (await qemu.hear())["execute"] == "early"
    await qemu.say({"return": "done"})
    assert await asking == "done"


async def test_an_answer_to_a_caller_that_gave_up_does_not_reach_the_next(pair):
    qmp, qemu, _ = pair
    await negotiate(qemu)
    given_up = asyncio.ensure_future(qmp.execute("slow"))
    await qemu.hear()
    given_up.cancel()
    asking = asyncio.ensure_future(qmp.execute("next"))
    await qemu.hear()
    await qemu.say({"return": "slow"}, {"return": "next"})
    assert await asking == "next"


@pytest.mark.parametrize("words", [b"", b"garbage\n", b'{"QMP": {}}\n', b"x" * (2 << 20)])
async def test_a_qemu_that_goes_or_talks_nonsense_fails_everyone(pair, words):
    qmp, qemu, _ = pair
    asking = asyncio.ensure_future(qmp.execute("anything"))
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(qemu.socket, words)
        qemu.socket.close()
        with pytest.raises(ConnectionError):
            await asking
        await qmp.ended


async def test_close_is_idempotent_and_ends_waiters(pair):
    qmp, qemu, _ = pair
    await negotiate(qemu)
    asking = asyncio.ensure_future(qmp.execute("anything"))
    await qemu.hear()
    await qmp.close()
    await qmp.close()
    with pytest.raises(ConnectionError):
        await asking
    with pytest.raises(ConnectionError):
        await qmp.execute("more")
