"""Many pretended hosts in a process of their own, behind the real machine API: what replicas of a control plane share.

    python -m fusevm.testing.simulated_hosts --hosts 5 --latency-ms 5 --ready-file FILE

FILE then holds a JSON list of `{"id": ..., "url": ...}`. Every host is a `FakeHost` on a port of its own; one server
answers for all. Beside the machine API each has

- `GET /simulation`: which machines it has ever made, by environment, so that a test can tell what was made twice from
  what was asked for twice;
- `PUT /simulation/hold` and `DELETE /simulation/hold`: creates arrive and wait, until they may go on.
"""

import argparse
import asyncio
import contextlib
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from fusevm.control.main import HttpServer
from fusevm.model.host import Resources
from fusevm.model.machine import Fence
from fusevm.testing.fake_host import FakeHost, fake_host_app
from fusevm.wire.host_api import CreateMachine, MachineBody

BACKLOG = 512
START_S = 120.0


class Place(msgspec.Struct, frozen=True):
    """Where a host is reached."""

    id: str
    url: str


class Made(msgspec.Struct, frozen=True):
    """What a host has done so far."""

    #: Environment uid to the ids of the machines that were made for it.
    made: dict[str, set[str]]
    #: How many creates and destroys arrived, repetitions included.
    creates: int
    destroys: int


def host_id(number: int) -> str:
    """What the host of that number is called."""
    return f"sim{number:04}"


class SimulatedHost(FakeHost):
    """A FakeHost that remembers what it made, and forgets who called."""

    def __init__(self, host_id: str, capacity: Resources) -> None:
        super().__init__(host_id, capacity=capacity)
        self.made: dict[str, set[str]] = {}
        self.creates = self.destroys = 0

    async def create(self, fence: Fence, body: CreateMachine) -> MachineBody:
        self.creates += 1
        machine = await super().create(fence, body)
        self.made.setdefault(fence.uid, set()).add(machine.id)
        self.calls.clear()
        return machine

    async def destroy(self, fence: Fence, machine_id: str) -> None:
        self.destroys += 1
        await super().destroy(fence, machine_id)
        self.calls.clear()


class ManyHosts:
    """One ASGI application for all: the port says which host is meant. Every answer is late by about `latency_s`."""

    def __init__(self, latency_s: float, seed: int) -> None:
        self._latency_s = latency_s
        self._random = random.Random(seed)  # noqa: S311 - only spreads latencies
        self._by_port: dict[int, tuple[SimulatedHost, ASGIApp]] = {}

    def add(self, port: int, host: SimulatedHost) -> None:
        """Serve a host on a port."""
        self._by_port[port] = (host, fake_host_app(host))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host, app = self._by_port[scope["server"][1]]
        if scope["type"] == "http" and scope["path"].startswith("/simulation"):
            await _answer(send, _controlled(host, scope["method"], scope["path"]))
            return
        if self._latency_s:
            await asyncio.sleep(self._latency_s * self._random.uniform(0.5, 1.5))
        await app(scope, receive, send)


def _controlled(host: SimulatedHost, method: str, path: str) -> Made:
    """What a test asks of a host beside the machine API."""
    match method, path:
        case "PUT", "/simulation/hold":
            host.hold["create"] = asyncio.Event()
        case "DELETE", "/simulation/hold":
            host.hold.pop("create", asyncio.Event()).set()
        case _:
            pass
    return Made(host.made, host.creates, host.destroys)


async def _answer(send: Send, value: msgspec.Struct) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(value)})


async def serve(
    count: int, capacity: Resources, latency_s: float, seed: int, ready: Path, preload: Mapping[str, list[MachineBody]]
) -> None:
    """Serve until SIGTERM or SIGINT. `preload`: machines that are there from the beginning, by host."""
    app = ManyHosts(latency_s, seed)
    listeners = [socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) for _ in range(count)]
    places = []
    for number, listener in enumerate(listeners):
        port = listener.getsockname()[1]
        host = SimulatedHost(host_id(number), capacity)
        for machine in preload.get(host.id, ()):
            host.plant(machine)
        app.add(port, host)
        places.append(Place(host.id, f"http://127.0.0.1:{port}"))
    config = uvicorn.Config(app, log_config=None, lifespan="off", access_log=False, timeout_graceful_shutdown=1)
    server = HttpServer(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve(listeners))
        await server.up.wait()
        fresh = ready.with_name(ready.name + ".new")
        fresh.write_bytes(msgspec.json.encode(places))
        fresh.replace(ready)


@contextlib.contextmanager
def running_hosts(
    folder: Path, count: int, *, latency_ms: float = 0, preload: Mapping[str, list[MachineBody]] | None = None
) -> Iterator[list[Place]]:
    """The process, and where its hosts are, within the block."""
    ready, log = folder / "hosts.ready", folder / "hosts.log"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", __name__, "--hosts", str(count), "--latency-ms", str(latency_ms)]
    if preload:
        (folder / "hosts.preload").write_bytes(msgspec.json.encode(preload))
        command += ["--preload", str(folder / "hosts.preload")]
    with log.open("ab") as out:
        process = subprocess.Popen([*command, "--ready-file", str(ready)], stdout=out, stderr=out)
    try:
        until = time.monotonic() + START_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the simulated hosts do not start:\n{log.read_text()}")
            time.sleep(0.01)
        yield msgspec.json.decode(ready.read_bytes(), type=list[Place])
    finally:
        process.kill()
        process.wait()


def main() -> int:
    """Parse and serve; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fusevm.testing.simulated_hosts", description=__doc__)
    parser.add_argument("--hosts", type=int, default=3, help="how many")
    parser.add_argument("--cpus", type=int, default=10_000, help="capacity of each")
    parser.add_argument("--machines", type=int, default=10_000, help="most machines of each")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="mean time until an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the latencies")
    parser.add_argument("--preload", type=Path, help="JSON: host id to the machines that it has at the start")
    parser.add_argument("--ready-file", type=Path, required=True, help="written with ids and URLs once they are served")
    asked = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    capacity = Resources(cpus=asked.cpus, ram_mb=1 << 30, storage_gb=1 << 24, vm_count=asked.machines)
    content = asked.preload.read_bytes() if asked.preload else b"{}"
    preload = msgspec.json.decode(content, type=dict[str, list[MachineBody]])
    work = serve(asked.hosts, capacity, asked.latency_ms / 1000, asked.seed, asked.ready_file, preload)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
