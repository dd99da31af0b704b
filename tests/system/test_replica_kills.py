"""Replicas are killed at random moments while many clients create and destroy: nothing is lost, doubled or stuck."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from replicas import Caller, Fleet, Listener, check_database, last_event, running_fleet

SEED = 20261121
ENVIRONMENTS = 1000
KILLS = 18
CLIENTS = 24
LIMIT_S = 240.0


@pytest.fixture
def fleet(postgres_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with running_fleet(tmp_path, postgres_url, hosts=5, latency_ms=5) as running:
        yield running


class Client:
    """Creates and destroys environments, each under its own key, whatever replica answers."""

    def __init__(self, caller: Caller, chance: random.Random) -> None:
        self._caller = caller
        self._chance = chance
        #: Task id to the uid that the answers named.
        self.uids: dict[str, str] = {}

    async def live(self, task_id: str) -> None:
        """One environment from its beginning to its end."""
        way = self._chance.choice(("wait", "wait", "poll", "at once"))
        await self._create(task_id, is_patient=way == "wait")
        if way != "at once":
            await self._run(task_id)
        await self._destroy(task_id)

    async def _create(self, task_id: str, *, is_patient: bool) -> None:
        headers = {"idempotency-key": f"key-{task_id}"}
        if not is_patient:
            headers["prefer"] = "respond-async"
        answer = await self._caller.ask("POST", "/v1/environments", json={"task_id": task_id}, headers=headers)
        assert answer.status_code in (201, 202), answer.text
        assert answer.json()["state"] in ("provisioning", "running"), answer.text
        self.uids[task_id] = answer.json()["uid"]

    async def _run(self, task_id: str) -> None:
        """Wait until it runs."""
        while True:
            answer = await self._caller.ask("GET", f"/v1/environments/fuse-{task_id}")
            assert answer.status_code == 200, answer.text
            if answer.json()["state"] == "running":
                return
            assert answer.json()["state"] == "provisioning", answer.text
            await asyncio.sleep(0.2)

    async def _destroy(self, task_id: str) -> None:
        """Ask once, and again where no answer came; its end is waited for by whoever checks."""
        headers = {"prefer": "respond-async"} if self._chance.random() < 0.5 else {}
        answer = await self._caller.ask("DELETE", f"/v1/environments/fuse-{task_id}", headers=headers)
        if answer.status_code == 404:
            # An earlier request was carried out, and its answer lost.
            assert answer.json()["error"]["details"]["reason"] == "ended", answer.text
            return
        assert answer.status_code in (202, 204), answer.text


async def _kill(fleet: Fleet, caller: Caller, chance: random.Random, total: int) -> int:
    """Kill some replica again and again, and start it anew; how often."""
    moments = sorted(chance.sample(range(20, total - 20), KILLS))
    async with asyncio.TaskGroup() as group:
        for moment in moments:
            while caller.answered < moment:
                await asyncio.sleep(0.005)
            await asyncio.sleep(chance.uniform(0, 0.05))
            while not fleet.urls:
                await asyncio.sleep(0.02)
            victim = chance.choice([replica for replica in fleet.replicas if replica.is_running and replica.url])
            victim.url = ""
            victim.end(signal.SIGKILL)
            group.create_task(asyncio.to_thread(victim.start))
    return len(moments)


@contextlib.asynccontextmanager
async def _listening(listener: Listener, after: str) -> AsyncIterator[None]:
    task = asyncio.create_task(listener.run(after))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_thousand_creates_and_destroys_survive_kills_at_random_moments(fleet: Fleet) -> None:
    chance = random.Random(SEED)
    caller = Caller(fleet, chance)
    clients = Client(caller, chance)
    listener = Listener(caller, fleet, chance)
    tasks = iter([f"t{number:04}" for number in range(ENVIRONMENTS)])

    async def work() -> None:
        for task_id in tasks:
            await clients.live(task_id)

    async with asyncio.timeout(LIMIT_S), caller.http, _listening(listener, await last_event(caller.http, fleet)):
        async with asyncio.TaskGroup() as group:
            killing = group.create_task(_kill(fleet, caller, chance, 2 * ENVIRONMENTS))
            for _ in range(CLIENTS):
                group.create_task(work())
        assert killing.result() == KILLS
        assert caller.cut_off > 0
        await _all_ended(caller, clients, listener)
        ended = await _ended(caller)
    _check_records(clients, ended)
    _check_events(clients, listener)
    made = fleet.hosts.made()
    assert {uid: machines for uid, machines in made.items() if len(machines) > 1} == {}
    assert fleet.hosts.machines() == []
    check_database(fleet)


async def _all_ended(caller: Caller, clients: Client, listener: Listener) -> None:
    """Nothing lives any more, and the end of everything was heard."""
    while (await caller.ask("GET", "/v1/environments")).json()["environments"]:
        await asyncio.sleep(0.2)
    while {*clients.uids.values()} > {event["uid"] for event in listener.events if event["state"] == "destroyed"}:
        await asyncio.sleep(0.05)


async def _ended(caller: Caller) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        query = f"?ended=true&limit=200&cursor={cursor}"
        page = (await caller.ask("GET", "/v1/environments" + query)).json()
        found += page["environments"]
        if not (cursor := page.get("next_cursor", "")):
            return [env for env in found if env["task_id"] != "anchor"]


def _check_records(clients: Client, ended: list[dict[str, Any]]) -> None:
    assert len(clients.uids) == len({*clients.uids.values()}) == ENVIRONMENTS
    assert len(ended) == ENVIRONMENTS
    assert {env["task_id"]: env["uid"] for env in ended} == clients.uids
    assert {env["state"] for env in ended} == {"destroyed"}


def _check_events(clients: Client, listener: Listener) -> None:
    heard = listener.by_environment()
    assert set(heard) == {*clients.uids.values()}
    for uid, events in heard.items():
        seqs = [int(event["id"].rpartition(".")[2]) for event in events]
        assert seqs == list(range(1, len(events) + 1)), (uid, seqs)
        states = [event["state"] for event in events]
        assert states.count("destroyed") == 1, (uid, states)
        assert states[-1] == "destroyed", (uid, states)
