"""Three replicas of the control plane over one PostgreSQL: any of them serves any call, and any of them may go."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio
from replicas import (
    PATIENCE_S,
    TOKEN,
    Caller,
    Fleet,
    Replica,
    Stream,
    check_database,
    client,
    event_stream,
    last_event,
    running_fleet,
    until,
)

from fusevm.testing.postgres import PostgresServer

# They are killed and started anew, so that afterwards other processes run than before.
pytestmark = pytest.mark.shared_stack
A, B, C = 0, 1, 2


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """One of our own: it is restarted."""
    with PostgresServer() as opened:
        yield opened


@pytest.fixture(scope="module")
def fleet(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Started all at once over an empty database. Every test leaves three replicas running."""
    with server.database() as url, running_fleet(tmp_path_factory.mktemp("fleet"), url) as running:
        yield running


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(timeout=PATIENCE_S, headers=headers) as opened:
        yield opened


def _environments(fleet: Fleet, replica: int, id_: str = "") -> str:
    return fleet.replicas[replica].url + "/v1/environments" + (f"/fuse-{id_}" if id_ else "")


async def _create(http: httpx.AsyncClient, fleet: Fleet, replica: int, task_id: str) -> dict[str, Any]:
    answer = await http.post(_environments(fleet, replica), json={"task_id": task_id})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def _is_in(http: httpx.AsyncClient, url: str, state: str) -> None:
    """Wait until an environment is in a state."""
    async with asyncio.timeout(PATIENCE_S):
        while (answer := await http.get(url)).is_error or answer.json()["state"] != state:
            await asyncio.sleep(0.02)


def _seqs(events: list[dict[str, Any]]) -> list[int]:
    return [int(event["id"].rpartition(".")[2]) for event in events if "id" in event]


def test_replicas_that_start_at_once_over_an_empty_database_make_one_cluster(
    server: PostgresServer, fleet: Fleet
) -> None:
    assert server.execute("select count(*) from meta where name = 'cluster'", fleet.database) == "1"
    versions = server.execute("select version from schema_version order by version", fleet.database).split()
    assert versions == sorted(set(versions))
    assert versions
    ids = []
    for replica in fleet.replicas:
        with client(replica.url) as http:
            ids.append([host["id"] for host in http.get("/v1/hosts").json()["hosts"] if host["state"] == "active"])
    assert ids == [[place.id for place in fleet.hosts.places]] * 3


async def test_any_replica_serves_any_call(fleet: Fleet, http: httpx.AsyncClient) -> None:
    made = await _create(http, fleet, A, "anywhere")
    assert (await http.get(_environments(fleet, B, "anywhere"))).json() == made
    body = {"cmd": ["echo", "hello"]}
    ran = await http.post(_environments(fleet, C, "anywhere") + "?action=exec", json=body)
    assert ran.json()["stdout"] == "echo hello\n"
    taken = (await http.post(_environments(fleet, B, "anywhere") + "/snapshots", json={})).json()
    assert taken["state"] == "ready"
    assert (await http.delete(f"{fleet.replicas[A].url}/v1/snapshots/{taken['id']}")).status_code in (202, 204)
    assert (await http.delete(_environments(fleet, C, "anywhere"))).status_code == 204
    assert (await http.get(_environments(fleet, A, "anywhere"))).status_code == 404


async def test_a_stream_hears_at_once_what_happens_through_another_replica(
    fleet: Fleet, http: httpx.AsyncClient
) -> None:
    await _create(http, fleet, A, "heard")
    async with asyncio.timeout(PATIENCE_S), event_stream(http, _environments(fleet, A, "heard") + "/events") as stream:
        assert (await stream.next() or {})["state"] == "running"
        assert (await http.delete(_environments(fleet, B, "heard"))).status_code == 204
        before = stream.comments
        ends = await stream.rest()
        # A stream that only looks again from time to time says so by a comment first.
        assert stream.comments == before
    assert [event["state"] for event in ends] == ["destroying", "destroyed"]
    ended = _environments(fleet, C, "heard") + f"/events?uid={ends[0]['uid']}"
    async with asyncio.timeout(PATIENCE_S), event_stream(http, ended, after=ends[0]["id"]) as replay:
        assert await replay.rest() == ends[1:]
    async with asyncio.timeout(PATIENCE_S), event_stream(http, ended) as whole:
        assert _seqs(await whole.rest()) == [1, 2, 3, 4]


async def test_all_events_are_heard_at_once_on_every_replica(fleet: Fleet, http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(PATIENCE_S), contextlib.AsyncExitStack() as stack:
        urls = [replica.url + "/v1/events" for replica in fleet.replicas]
        streams = [await stack.enter_async_context(event_stream(http, url)) for url in urls]
        heads = [asyncio.create_task(stream.next()) for stream in streams]
        await _create(http, fleet, A, "global")
        first = await asyncio.gather(*heads)
        assert first[0] == first[1] == first[2]
        before = [stream.comments for stream in streams]
        await http.delete(_environments(fleet, B, "global"))
        for stream in streams:
            states = [(await stream.next() or {})["state"] for _ in range(3)]
            assert states == ["running", "destroying", "destroyed"]
        assert [stream.comments for stream in streams] == before


async def test_streams_wait_for_a_transaction_that_is_late_and_then_tell_each_event_once_and_in_order(
    fleet: Fleet, http: httpx.AsyncClient
) -> None:
    anchor = await last_event(http, fleet)
    urls = [replica.url + "/v1/events" for replica in fleet.replicas]
    doc = '{"uid":"held","seq":1,"kind":"state","state":"running","at_ms":1,"cause":"c"}'
    raw = await asyncpg.connect(fleet.database)
    try:
        async with asyncio.timeout(PATIENCE_S), contextlib.AsyncExitStack() as stack:
            held = raw.transaction()
            await held.start()
            await raw.execute("select pg_current_xact_id()")
            streams = [await stack.enter_async_context(event_stream(http, url, anchor)) for url in urls[:2]]
            readers = [asyncio.create_task(_take(stream, 9)) for stream in streams]
            uids = ["held"]
            for number in (A, B):
                uids.append((await _create(http, fleet, number, f"late{number}"))["uid"])
                assert (await http.delete(_environments(fleet, C, f"late{number}"))).status_code == 204
            await asyncio.sleep(0.5)
            assert not any(reader.done() for reader in readers)
            # One that comes back meanwhile.
            streams.append(await stack.enter_async_context(event_stream(http, urls[C], anchor)))
            readers.append(asyncio.create_task(_take(streams[-1], 9)))
            await raw.execute(
                "insert into events (uid, seq, task_id, tenant, at_ms, doc) values ('held', 1, 'held', '', 1, $1)", doc
            )
            await held.commit()
            told, *others = await asyncio.gather(*readers)
            assert others == [told, told]
            assert [event["uid"] for event in told] == [uids[0], *[uids[1]] * 4, *[uids[2]] * 4]
            assert _seqs(told) == [1, *range(1, 5), *range(1, 5)]
            # Nothing comes a second time, and whoever begins in the midst misses nothing.
            fresh = (await _create(http, fleet, A, "fresh"))["uid"]
            for stream in streams:
                assert (await stream.next() or {})["id"] == f"{fresh}.1"
            for index, event in enumerate(told):
                async with event_stream(http, urls[index % 3], event["id"]) as again:
                    rest = await _take(again, len(told) - index)
                    assert [*rest[:-1], rest[-1]["id"]] == [*told[index + 1 :], f"{fresh}.1"]
            await http.delete(_environments(fleet, B, "fresh"))
    finally:
        await raw.execute("delete from events where uid = 'held'")
        await raw.close()


async def _take(stream: Stream, count: int) -> list[dict[str, Any]]:
    """The next events of a stream."""
    return [await stream.next() or {} for _ in range(count)]


def test_a_key_revoked_on_one_replica_is_refused_on_the_others_at_once(fleet: Fleet) -> None:
    first, second, third = (replica.url for replica in fleet.replicas)
    with client(first) as master:
        made = master.post("/v1/api-keys", json={"label": "short-lived"}).json()
        for url in (second, third):
            with client(url, made["key"]) as http:
                assert http.get("/v1/environments").status_code == 200
        assert master.delete(f"/v1/api-keys/{made['id']}").status_code == 204
        for url in (second, third):
            with client(url, made["key"]) as http:
                assert http.get("/v1/environments").status_code == 401


async def test_what_is_done_twice_under_one_key_on_two_replicas_is_done_once(
    fleet: Fleet, http: httpx.AsyncClient
) -> None:
    headers = {"idempotency-key": "once"}
    answers = await asyncio.gather(
        *(http.post(_environments(fleet, replica), json={"task_id": "once"}, headers=headers) for replica in (A, B, C))
    )
    done = [answer.json()["uid"] for answer in answers if answer.status_code == 201]
    # Until the first has bound its environment to the key, the others are told to come back.
    assert {answer.status_code for answer in answers} <= {201, 409}
    again = await http.post(_environments(fleet, B), json={"task_id": "once"}, headers=headers)
    assert {again.json()["uid"], *done} == {again.json()["uid"]}
    assert len(fleet.hosts.made()[again.json()["uid"]]) == 1
    await http.delete(_environments(fleet, C, "once"))


async def test_a_create_whose_replica_is_killed_is_finished_by_another(fleet: Fleet, http: httpx.AsyncClient) -> None:
    headers = {"idempotency-key": "taken-over"}
    body = {"task_id": "taken-over"}
    with fleet.hosts.holding():
        asked = asyncio.create_task(http.post(_environments(fleet, A), json=body, headers=headers))
        await _is_in(http, _environments(fleet, B, "taken-over"), "provisioning")
        await asyncio.to_thread(fleet.replicas[A].end, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            await asked
    again = await http.post(_environments(fleet, C), json=body, headers=headers)
    assert (again.status_code, again.json()["state"]) == (201, "running")
    assert len(fleet.hosts.made()[again.json()["uid"]]) == 1
    await http.delete(_environments(fleet, B, "taken-over"))
    await asyncio.to_thread(fleet.replicas[A].start)


async def test_a_rolling_restart_ends_every_stream_cleanly_and_loses_nothing(
    fleet: Fleet, http: httpx.AsyncClient
) -> None:
    caller = Caller(fleet, random.Random(1))
    after = await last_event(http, fleet)
    followers = {number: Follower(caller, fleet, after) for number in (A, B, C)}
    async with asyncio.timeout(2 * PATIENCE_S), caller.http:
        tasks = [asyncio.create_task(follower.run(number)) for number, follower in followers.items()]
        await asyncio.gather(*(follower.is_open.wait() for follower in followers.values()))
        made = [await _roll(fleet, http, number) for number in followers]
        for number in followers:
            await caller.ask("DELETE", f"/v1/environments/fuse-rolled{number}")
        while any(follower.ended < {*made} for follower in followers.values()):
            assert not any(task.done() for task in tasks), [task.exception() for task in tasks if task.done()]
            await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for follower in followers.values():
        assert follower.ends >= 1
        for uid in made:
            assert _seqs([event for event in follower.events if event["uid"] == uid]) == [1, 2, 3, 4]


class Follower:
    """One stream of everything, which goes on at another replica where it ended."""

    def __init__(self, caller: Caller, fleet: Fleet, after: str) -> None:
        self._caller = caller
        self._fleet = fleet
        self._after = after
        self.events: list[dict[str, Any]] = []
        self.is_open = asyncio.Event()
        #: How often a server has ended it.
        self.ends = 0

    @property
    def ended(self) -> set[str]:
        """Environments of which the end was heard."""
        return {event["uid"] for event in self.events if event["state"] == "destroyed"}

    async def run(self, first: int) -> None:
        """Until cancelled. Raises httpx.TransportError when an open stream is cut off instead of ended."""
        url = self._fleet.replicas[first].url
        while True:
            async with contextlib.AsyncExitStack() as stack:
                opening = event_stream(self._caller.http, url + "/v1/events", self._after)
                try:
                    stream = await stack.enter_async_context(opening)
                except httpx.TransportError:
                    await asyncio.sleep(0.02)
                else:
                    self.is_open.set()
                    await self._read(stream)
            url = self._fleet.urls[-1]

    async def _read(self, stream: Stream) -> None:
        while (event := await stream.next()) is not None:
            self.events.append(event)
            self._after = event["id"]
        self.ends += 1


async def _roll(fleet: Fleet, http: httpx.AsyncClient, number: int) -> str:
    """Restart one replica while a create is under way on it; the uid."""
    replica, task_id = fleet.replicas[number], f"rolled{number}"
    with fleet.hosts.holding():
        url = _environments(fleet, number)
        asked = asyncio.create_task(http.post(url, json={"task_id": task_id}))
        await _is_in(http, _environments(fleet, (number + 1) % 3, task_id), "provisioning")
        status = await asyncio.to_thread(replica.end, signal.SIGTERM)
        answer = await asked
        assert (status, answer.status_code, answer.json()["state"]) == (0, 201, "provisioning")
    # Its lease was given back: another replica goes on.
    await _is_in(http, _environments(fleet, (number + 1) % 3, task_id), "running")
    await asyncio.to_thread(replica.start)
    return str(answer.json()["uid"])


async def test_a_host_is_watched_by_another_replica_when_its_watcher_dies(
    server: PostgresServer, fleet: Fleet, http: httpx.AsyncClient
) -> None:
    host = fleet.hosts.places[0].id

    def watcher() -> Replica | None:
        row = server.execute(f"select lease_owner from hosts where id = '{host}'", fleet.database)
        pid = row.split("-")[1] if row else ""
        return next((replica for replica in fleet.replicas if replica.is_running and str(replica.pid) == pid), None)

    def seen() -> int:
        return int(server.execute(f"select last_seen_ms from hosts where id = '{host}'", fleet.database))

    first = await asyncio.to_thread(until, watcher)
    await asyncio.to_thread(first.end, signal.SIGKILL)
    second = await asyncio.to_thread(until, watcher)
    assert second is not first
    before = seen()
    await asyncio.to_thread(until, lambda: seen() > before)
    await asyncio.to_thread(first.start)


async def test_replicas_recover_by_themselves_when_postgresql_is_restarted(
    server: PostgresServer, fleet: Fleet, http: httpx.AsyncClient
) -> None:
    if not server.is_ours:
        pytest.skip("the server named by FUSE_TEST_DATABASE_URL cannot be restarted")
    pids = [replica.pid for replica in fleet.replicas]
    await _create(http, fleet, A, "survivor")
    server.stop(is_crash=True)
    for replica in fleet.replicas:
        answer = await http.get(replica.url + "/v1/environments")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable"), answer.text
        ready = await http.get(replica.url + "/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
        assert (await http.get(replica.url + "/health")).status_code == 200
    server.start()  # here and not in a thread: it dies with the thread that started it
    async with asyncio.timeout(PATIENCE_S):
        for replica in fleet.replicas:
            while (await http.get(replica.url + "/ready")).status_code != 200:
                await asyncio.sleep(0.02)
    assert [replica.pid for replica in fleet.replicas if replica.is_running] == pids
    made = await _create(http, fleet, B, "after")
    for number in (A, B, C):
        assert (await http.get(_environments(fleet, number, "survivor"))).json()["state"] == "running"
        assert (await http.get(_environments(fleet, number, "after"))).json() == made
    await _hears_again(fleet, http)
    for number, task_id in ((A, "survivor"), (C, "after")):
        assert (await http.delete(_environments(fleet, number, task_id))).status_code == 204


async def _hears_again(fleet: Fleet, http: httpx.AsyncClient) -> None:
    """Wait until a commit through one replica wakes the streams of another without a comment between."""
    async with asyncio.timeout(PATIENCE_S):
        for attempt in range(100):
            await _create(http, fleet, A, f"again{attempt}")
            async with event_stream(http, _environments(fleet, C, f"again{attempt}") + "/events") as stream:
                await stream.next()
                await http.delete(_environments(fleet, B, f"again{attempt}"))
                before = stream.comments
                assert [event["state"] for event in await stream.rest()] == ["destroying", "destroyed"]
                if stream.comments == before:
                    return
    raise AssertionError("the replica does not hear the others any more")


def test_nothing_of_all_this_has_damaged_the_database(fleet: Fleet) -> None:
    until(lambda: not fleet.hosts.machines())
    check_database(fleet)
