"""Real `fuse serve` processes over one PostgreSQL, in front of simulated hosts in one more process.

Everything is done from outside: signals, HTTP, SQL. Replicas are started anew on ports of their own, so clients look
at `Fleet.urls` before each request.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from fusevm.testing.simulated_hosts import Place, running_hosts
from fusevm.wire.sse import MessageDecoder

TOKEN = "replicas-token"
KEY = "5a" * 32
PATIENCE_S = 120.0
#: Answers of a replica that is going, or that has lost the database: ask again.
PASSING = ("shutting_down", "store_unreachable", "idempotency_in_progress")


class Program:
    """A process that writes a file once it is ready."""

    def __init__(self, name: str, folder: Path, command: list[str], environ: dict[str, str] | None = None) -> None:
        self.name = name
        self.ready = folder / f"{name}.ready"
        self.log = folder / f"{name}.log"
        self.command = [*command, "--ready-file", str(self.ready)]
        self.environ = {**os.environ, **(environ or {})}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> str:
        """Start and wait; what the file says."""
        self.launch()
        return self.wait_ready()

    def launch(self) -> None:
        self.ready.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environ
            )

    def wait_ready(self) -> str:
        until = time.monotonic() + PATIENCE_S
        while not self.ready.exists():
            assert self.is_running, f"{self.name} ended:\n{self.log.read_text()[-4000:]}"
            assert time.monotonic() < until, f"{self.name} does not start"
            time.sleep(0.01)
        return self.ready.read_text().strip()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        if self.is_running:
            self.end(signal.SIGKILL)


class Hosts:
    """The simulated hosts, which outlive every replica."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places

    def ask(self, path: str, method: str = "GET") -> list[Any]:
        """The answers of all."""
        with httpx.Client(timeout=PATIENCE_S) as http:
            return [http.request(method, place.url + path).json() for place in self.places]

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Creates wait within the block."""
        self.ask("/simulation/hold", "PUT")
        try:
            yield
        finally:
            self.ask("/simulation/hold", "DELETE")

    def machines(self) -> list[str]:
        """Ids of all machines that exist."""
        return [machine["id"] for answer in self.ask("/machines") for machine in answer["machines"]]

    def made(self) -> dict[str, list[str]]:
        """Environment uid to every machine that was ever made for it, on whatever host."""
        found: dict[str, list[str]] = {}
        for answer in self.ask("/simulation"):
            for uid, machines in answer["made"].items():
                found.setdefault(uid, []).extend(machines)
        return found


class Replica(Program):
    """A `fuse serve`."""

    def __init__(self, name: str, folder: Path, database: str) -> None:
        environ = {
            "HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder),
            "DATABASE_URL": database,
            "ORCH_AUTH_TOKEN": TOKEN,
            "TOKEN_ENCRYPTION_KEY": KEY,
            "FUSE_LOG_LEVEL": "warning",
            "FUSE_ALLOW_LOCAL_HOSTS": "true",
        }
        super().__init__(name, folder, [sys.executable, "-m", "fusevm", "serve", "--listen", "127.0.0.1:0"], environ)
        self.url = ""

    def start(self) -> str:
        self.url = super().start()
        return self.url


class Fleet:
    """Three replicas and their hosts."""

    def __init__(self, folder: Path, database: str, places: list[Place], count: int = 3) -> None:
        self.database = database
        self.hosts = Hosts(places)
        self.replicas = [Replica(f"replica{number}", folder, database) for number in range(count)]

    @property
    def urls(self) -> list[str]:
        """Of the replicas that run."""
        return [replica.url for replica in self.replicas if replica.is_running and replica.url]

    def start(self) -> None:
        """All at once, over an empty database, too."""
        for replica in self.replicas:
            replica.launch()
        for replica in self.replicas:
            replica.url = replica.wait_ready()
        self._register()

    def _register(self) -> None:
        with client(self.replicas[0].url) as http:
            for place in self.hosts.places:
                answer = http.post("/v1/hosts", json={"id": place.id, "url": place.url})
                assert answer.status_code == 201, answer.text

    def close(self) -> None:
        for replica in self.replicas:
            replica.close()


@contextlib.contextmanager
def running_fleet(folder: Path, database: str, *, hosts: int = 3, latency_ms: int = 0) -> Iterator[Fleet]:
    """A fleet within the block."""
    with running_hosts(folder, hosts, latency_ms=latency_ms) as places:
        fleet = Fleet(folder, database, places)
        try:
            fleet.start()
            yield fleet
        finally:
            fleet.close()


def client(url: str, token: str = TOKEN) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=PATIENCE_S)


def until(condition: Callable[[], Any]) -> Any:
    """Wait for a condition; its value."""
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, "this never became true"
        time.sleep(0.02)
    return value


class Caller:
    """Asks any replica, and another one when that has died. A request that names its key is safe to repeat."""

    def __init__(self, fleet: Fleet, chance: random.Random) -> None:
        self._fleet = fleet
        self._chance = chance
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
        headers = {"authorization": f"Bearer {TOKEN}"}
        self.http = httpx.AsyncClient(timeout=PATIENCE_S, limits=limits, headers=headers)
        #: Requests whose answer never came, and that were sent again.
        self.cut_off = 0
        self.answered = 0

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The first answer that some replica gives."""
        while True:
            urls = self._fleet.urls
            if urls:
                try:
                    answer = await self.http.request(method, self._chance.choice(urls) + path, **options)
                except httpx.TransportError:
                    self.cut_off += 1
                else:
                    if answer.status_code < 400 or _reason(answer) not in PASSING:
                        self.answered += 1
                        return answer
            await asyncio.sleep(self._chance.uniform(0.02, 0.2))


def _reason(answer: httpx.Response) -> str:
    return str(answer.json()["error"].get("details", {}).get("reason", ""))


class Stream:
    """An event stream that is read for as long as it lasts."""

    def __init__(self, response: httpx.Response) -> None:
        self._chunks = response.aiter_bytes()
        self._decoder = MessageDecoder()
        self._ready: list[dict[str, Any]] = []
        #: Comments seen.
        self.comments = 0

    async def next(self) -> dict[str, Any] | None:
        """The next event; None: the server has ended the stream as it should. Raises httpx.TransportError."""
        while not self._ready:
            try:
                chunk = await anext(self._chunks)
            except StopAsyncIteration:
                return None
            self.comments += chunk.startswith(b":")
            self._ready += [json.loads(message.data) for message in self._decoder.feed(chunk)]
        return self._ready.pop(0)

    async def rest(self) -> list[dict[str, Any]]:
        """Everything up to the end."""
        found = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found


@contextlib.asynccontextmanager
async def event_stream(http: httpx.AsyncClient, url: str, after: str = "") -> AsyncIterator[Stream]:
    """Open a stream; it is read by the caller."""
    headers = {"last-event-id": after} if after else {}
    async with http.stream("GET", url, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        yield Stream(response)


class Listener:
    """Follows all events of all environments, from replica to replica, and keeps what it hears."""

    def __init__(self, caller: Caller, fleet: Fleet, chance: random.Random) -> None:
        self._caller = caller
        self._fleet = fleet
        self._chance = chance
        self.events: list[dict[str, Any]] = []
        self.reconnects = 0

    async def run(self, after: str) -> None:
        """Until cancelled. `after`: the id of an event."""
        while True:
            if urls := self._fleet.urls:
                url = self._chance.choice(urls) + "/v1/events"
                with contextlib.suppress(httpx.TransportError):
                    async with event_stream(self._caller.http, url, after) as stream:
                        while (event := await stream.next()) is not None:
                            self.events.append(event)
                            after = event["id"]
                self.reconnects += 1
            await asyncio.sleep(0.05)

    def by_environment(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for event in self.events:
            found.setdefault(event["uid"], []).append(event)
        return found


async def last_event(http: httpx.AsyncClient, fleet: Fleet) -> str:
    """The id of an event of an environment that has ended: after it, streams tell everything that happens from now."""
    url = fleet.urls[0] + "/v1/environments"
    made = await http.post(url, json={"task_id": "anchor"})
    assert (await http.delete(f"{url}/fuse-anchor")).status_code == 204
    async with event_stream(http, f"{url}/fuse-anchor/events?uid={made.json()['uid']}") as stream:
        return str((await stream.rest())[-1]["id"])


def check_database(fleet: Fleet) -> None:
    """`fuse db check` and the invariants of a running replica; nothing is placed anywhere."""
    command = [sys.executable, "-m", "fusevm", "db", "check", "-o", "json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=fleet.replicas[0].environ)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["verdict"], verdict["secrets_tried"]) == ("sound", True)
    with client(fleet.urls[0]) as http:
        assert http.get("/v1/debug/invariants").json()["violations"] == []
        for host in http.get("/v1/hosts").json()["hosts"]:
            assert set(host["allocated"].values()) == {0}, host
