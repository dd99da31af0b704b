"""Event streams: what comes first, what is replayed, how they end, and that nothing is ever missing."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from control_harness import Running, next_message, rest_of, running, stream, until

from fusevm.control import main
from fusevm.core.policy import Policy
from fusevm.model.environment import State
from fusevm.model.errors import BootFailed
from fusevm.testing.fake_host import FakeHost

URL = "/v1/environments/fuse-t1/events"


async def test_a_stream_begins_with_the_present_state_without_an_id() -> None:
    async with running() as server:
        made = await server.create()
        async with stream(server, URL) as source:
            id_, first = await next_message(source)
            assert (id_, first.get("id", "")) == ("", "")
            assert (first["event"], first["vm_id"], first["state"]) == ("state", "fuse-t1", "running")
            await server.delete()
            later = await rest_of(source)
        assert [event["state"] for event in later] == ["destroying", "destroyed"]
        assert [event["id"] for event in later] == [f"{made['uid']}.{seq}" for seq in (3, 4)]
        assert later[-1]["reason"] == "deleted"
        assert later[-1]["updated_at"].endswith("Z")


async def test_a_stream_opened_after_the_end_replays_and_closes() -> None:
    async with running() as server:
        await server.create()
        await server.delete()
        async with stream(server, URL) as source:
            states = [event["state"] for event in await rest_of(source)]
        assert states == ["provisioning", "running", "destroying", "destroyed"]


async def test_an_event_id_replays_what_came_after_it() -> None:
    async with running() as server:
        made = await server.create()
        last = f"{made['uid']}.1"
        for options in ({"headers": {"Last-Event-ID": last}}, {"params": {"last_event_id": last}}):
            async with stream(server, URL, **options) as source:
                id_, event = await next_message(source)
                assert (id_, event["state"]) == (f"{made['uid']}.2", "running")
        await server.delete()
        async with stream(server, URL, headers={"Last-Event-ID": f"{made['uid']}.3"}) as source:
            assert [event["state"] for event in await rest_of(source)] == ["destroyed"]


async def test_a_replay_begins_with_the_first_event_that_is_kept() -> None:
    async with running() as server:
        made = await server.create()
        await server.delete()
        assert await server.plane.store.prune_events(-1000, 2) == 2
        for options in ({}, {"headers": {"Last-Event-ID": f"{made['uid']}.1"}}):
            async with stream(server, URL, **options) as source:
                assert [event["id"] for event in await rest_of(source)] == [f"{made['uid']}.{seq}" for seq in (3, 4)]
        answer = await server.http.get("/v1/events", headers={"Last-Event-ID": f"{made['uid']}.2"})
        assert (answer.status_code, "is not kept" in answer.text) == (400, True)


async def test_old_events_of_one_that_lives_are_deleted_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "UPKEEP_S", 0.01)
    async with running(lease_s=0.2, retention_s=2.0) as server:
        made = await server.create()

        async def kept() -> list[int]:
            return [stored.fact.seq for stored in await server.plane.store.facts_of(made["uid"], 0, 10)]

        await until(lambda: _is(kept, [2]))
        assert (await server.get()).json()["state"] == "running"


async def _is(read: Callable[[], Awaitable[object]], wanted: object) -> bool:
    return await read() == wanted


async def test_a_reader_that_has_seen_the_end_learns_of_it_again() -> None:
    async with running() as server:
        made = await server.create()
        await server.delete()
        async with stream(server, URL, headers={"Last-Event-ID": f"{made['uid']}.4"}) as source:
            (event,) = await rest_of(source)
        assert (event["state"], event.get("id", "")) == ("destroyed", "")


async def test_an_event_id_finds_its_environment_after_the_task_id_was_used_again() -> None:
    async with running() as server:
        first = await server.create()
        await server.delete()
        second = await server.create()
        async with stream(server, URL, headers={"Last-Event-ID": f"{first['uid']}.2"}) as source:
            assert [event["uid"] for event in await rest_of(source)] == [first["uid"]] * 2
        async with stream(server, URL, params={"uid": second["uid"]}) as source:
            assert (await next_message(source))[1]["uid"] == second["uid"]


async def test_a_failed_environment_ends_its_stream_with_the_reason() -> None:
    async with running() as server:
        server.host.script("create", BootFailed(id="m", problem="kernel panic"))
        await server.create_ends()
        async with stream(server, URL) as source:
            events = await rest_of(source)
        assert events[-1]["state"] == "failed"
        assert (events[-1]["reason"], "kernel panic" in events[-1]["error"]) == ("boot_failed", True)


async def test_silent_streams_are_kept_alive() -> None:
    async with running(keepalive_s=0.05) as server:
        await server.create()
        async with server.http.stream("GET", URL) as response:
            assert response.headers["cache-control"] == "no-cache"
            assert response.headers["x-accel-buffering"] == "no"
            async with asyncio.timeout(60):
                async for chunk in response.aiter_bytes():
                    if b": keepalive\n\n" in chunk:
                        break


async def test_a_stream_of_everything_misses_nothing() -> None:
    async with running() as server:
        made = await server.create("t0")
        async with stream(server, "/v1/events", headers={"Last-Event-ID": f"{made['uid']}.1"}) as source:
            assert (await next_message(source))[1]["state"] == "running"
            posts = (server.http.post("/v1/environments", json={"task_id": f"t{n}"}) for n in range(1, 30))
            await asyncio.gather(*posts)
            seen: dict[str, list[str]] = {}
            while len(seen) < 29 or any(len(states) < 2 for states in seen.values()):
                _, event = await next_message(source)
                seen.setdefault(event["vm_id"], []).append(event["state"])
        assert all(states == ["provisioning", "running"] for states in seen.values())


async def test_a_stream_of_everything_begins_now() -> None:
    async with running() as server:
        await server.create("old")
        async with server.http.stream("GET", "/v1/events") as response:
            chunks = response.aiter_bytes()
            assert await anext(chunks) == b": keepalive\n\n"
            await server.create("new")
            assert b"fuse-new" in await anext(chunks)


async def test_bad_event_ids_are_refused() -> None:
    async with running() as server:
        await server.create()
        for url in (URL, "/v1/events"):
            for bad in ("x", "x.y", ".1", "a." + "9" * 30):
                answer = await server.http.get(url, headers={"Last-Event-ID": bad})
                assert answer.status_code == 400
        assert (await server.http.get("/v1/events", headers={"Last-Event-ID": "unknown.1"})).status_code == 400


async def test_the_stream_of_an_unknown_environment_is_a_plain_404() -> None:
    async with running() as server:
        answer = await server.http.get(URL)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_an_end_between_reading_and_listening_is_not_missed() -> None:
    """Open streams while environments end, many times over: each gets its terminal event."""
    async with running(keepalive_s=5.0) as server:

        async def one(number: int) -> str:
            await server.create(f"t{number}")
            url = f"/v1/environments/fuse-t{number}/events"
            deleting = asyncio.ensure_future(server.delete(f"t{number}"))
            async with stream(server, url) as source:
                events = await rest_of(source)
            await deleting
            return str(events[-1]["state"])

        assert await asyncio.gather(*(one(number) for number in range(20))) == ["destroyed"] * 20


async def test_a_slow_reader_gets_every_event() -> None:
    async with running(FakeHost("h1"), policy=Policy(backoff_first_ms=1)) as server:
        made = await server.create()
        async with server.http.stream("GET", URL, headers={"Last-Event-ID": f"{made['uid']}.0"}) as response:
            await server.delete()  # everything happens before the first byte is read
            body = b"".join([chunk async for chunk in response.aiter_bytes()])
        assert body.count(b"data: ") == 4


async def test_streams_close_when_the_server_does() -> None:
    async with running() as server:
        await server.create()
        async with stream(server, URL) as source, stream(server, "/v1/events") as everything:
            await next_message(source)
            server.plane.closing.set()
            server.plane.signals.wake_all()
            assert await rest_of(source) == []
            assert await rest_of(everything) == []


async def test_open_streams_are_counted() -> None:
    async with running() as server:
        await server.create()
        gauge = server.plane.metrics.event_streams
        async with stream(server, URL) as source:
            await next_message(source)
            assert gauge._value.get() == 1
        await until(lambda: gauge._value.get() == 0)


async def _state(server: Running, uid: str, state: State) -> bool:
    return (await server.record(uid)).state is state
