"""Logs of the startup script and of the user's daemon."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from control_harness import Running, running, until

from fusevm.control.handlers.logs import MAX_LINE, mixed
from fusevm.control.pretended_guest import PretendedGuest
from fusevm.model.errors import HostUnreachable
from fusevm.model.host import Resources
from fusevm.testing.fake_host import FakeHost

URL = "/v1/environments/fuse-t1/logs?source="
AGENT = {"command": ["/opt/run", "--serve"]}


async def guest_of(server: Running) -> PretendedGuest:
    record = await server.record((await server.get()).json()["uid"])
    return server.host.guests[record.machine_id]


@pytest.mark.parametrize(("source", "text"), [("startup", "fake: echo ready\n"), ("agent", "fake: /opt/run --serve\n")])
@pytest.mark.parametrize("follow", ["false", "true"])
async def test_both_streams_are_one_text(source: str, text: str, follow: str) -> None:
    async with running() as server:
        await server.create(startup_script="echo ready", agent=AGENT)
        (await guest_of(server)).stderr = b"warning\n"
        answer = await server.http.get(f"{URL}{source}&follow={follow}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert sorted(answer.text.splitlines(keepends=True)) == sorted([text, "warning\n"])
        assert answer.headers["x-fuse-lost"] == "0"


@pytest.mark.parametrize(("source", "word"), [("startup", "startup script"), ("agent", "daemon")])
async def test_an_environment_without_one_says_so(source: str, word: str) -> None:
    async with running() as server:
        await server.create(secrets={"A": "b"})
        answer = await server.http.get(URL + source)
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (404, "log_not_found")
        assert word in answer.json()["error"]["message"]
        assert server.host.count("relay") == 1, "only the setup was sent"


async def test_a_script_that_has_not_begun_has_no_log_yet() -> None:
    host = FakeHost("h1")
    async with running(host) as server:
        host.hold["relay"] = asyncio.Event()
        creating = asyncio.create_task(server.create(startup_script="true"))
        await until(lambda: host.count("relay"))
        asking = asyncio.create_task(server.http.get(URL + "startup"))
        await until(lambda: host.count("relay") == 2)
        guest = next(iter(host.guests.values()))
        assert guest.processes == {}
        host.script("relay", HostUnreachable(id="h1", problem="the setup is to come later"))
        host.hold.pop("relay").set()
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (404, "log_not_found")
        assert "not been started" in answer.json()["error"]["message"]
        await creating


async def test_who_waits_for_a_place_has_no_log() -> None:
    host = FakeHost("h1", capacity=Resources(cpus=9, ram_mb=1 << 20, storage_gb=900, vm_count=1))
    async with running(host) as server:
        await server.create("a")
        body = {"task_id": "t1", "queue_seconds": 600, "agent": AGENT}
        answer = await server.http.post("/v1/environments", json=body, headers={"prefer": "respond-async"})
        assert answer.status_code == 202
        answer = await server.http.get(URL + "agent")
        assert answer.status_code == 404
        assert "waits for a place" in answer.json()["error"]["message"]
        await server.delete()


async def test_a_log_of_an_ended_environment_is_gone_with_its_machine() -> None:
    async with running() as server:
        await server.create(agent=AGENT)
        await server.delete()
        answer = await server.http.get(URL + "agent")
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (404, "ended")


async def test_following_keeps_lines_whole_and_in_the_order_of_their_ends() -> None:
    first, second = asyncio.Event(), asyncio.Event()

    async def out() -> AsyncIterator[bytes]:
        yield b"one\nhal"
        await first.wait()
        yield b"f\n"
        second.set()

    async def err() -> AsyncIterator[bytes]:
        yield b"problem\n"
        first.set()
        await second.wait()
        yield b"no newline at the end"

    told = [piece async for piece in mixed([out(), err()])]
    assert sorted(told[:2]) == [b"one\n", b"problem\n"]
    assert told[2:] == [b"half\n", b"no newline at the end"]


async def test_a_line_without_end_is_passed_on_in_pieces() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * MAX_LINE

    pieces = [piece async for piece in mixed([endless()])]
    assert [len(piece) for piece in pieces] == [2 * MAX_LINE, MAX_LINE]


async def test_a_stream_that_breaks_breaks_the_log_and_leaves_nothing_behind() -> None:
    closed = asyncio.Event()

    async def broken() -> AsyncIterator[bytes]:
        yield b"begin\n"
        raise HostUnreachable(id="h1", problem="gone")

    async def endless() -> AsyncIterator[bytes]:
        try:
            yield b"x\n"
            await asyncio.Event().wait()
        finally:
            closed.set()

    with pytest.raises(HostUnreachable):
        async for _ in mixed([broken(), endless()]):
            pass
    assert closed.is_set()
