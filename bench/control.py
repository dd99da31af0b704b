"""Budgets of the control plane (docs design, section 8), measured against a real `fuse serve` with simulated hosts.

    python bench/control.py [--stores sqlite postgres] [--sizes 0 1000 10000] [--streams 1000]
                            [--hosts 1000] [--machines 100] [--only create fanout reconcile] [--json FILE]

- create: one at a time (p50, p99) and with 32 connections (per second), where 0, 1,000 and 10,000 environments live;
  a list page of 50 of them; processor time per create; memory. Beside it, in turns, the rows by raw SQL on the same
  disk (`store.py`): what a create could cost at best.
- fanout: one event to 1,000 open streams, p99 from the moment that the record names to the client's last byte.
- reconcile: 1,000 hosts with 100 machines each, all well: processor seconds per second, and how often each was looked
  at.

The clients speak HTTP by hand, so that the server is what is measured; they, the simulated hosts and the database run
on the same machine. At full size this takes about ten minutes.
"""

import argparse
import asyncio
import calendar
import contextlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvloop
from msgspec.structs import replace
from store import POLICY, SPEC, now_ms, raw_postgres, raw_sqlite
from store import run as run_raw

from fusevm.control.render import render_time
from fusevm.control.store.opening import open_store
from fusevm.control.store.protocol import Reservation
from fusevm.core import lifecycle
from fusevm.core.lifecycle import Identity
from fusevm.core.spec import resources_of
from fusevm.model import ids
from fusevm.model.event import BootSucceeded
from fusevm.model.host import Host, Resources
from fusevm.model.machine import MachineSpec, Phase
from fusevm.testing.postgres import PostgresServer
from fusevm.testing.simulated_hosts import Place, host_id, running_hosts
from fusevm.wire.host_api import MachineBody

CONNECTIONS = 32
ALONE, TOGETHER, LISTS = 300, 1000, 100
#: Creates of the fan-out's streams, and seconds for which reconciling is watched.
EVENTS, WATCH_S = 20, 30.0
KEY = "00" * 32


class Client:
    """One keep-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, method: str, target: str, body: bytes = b"") -> tuple[int, bytes]:
        head = f"{method} {target} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line[16:]) for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length: ")), 0
        )
        return int(answer[9:12]), await self._reader.readexactly(length)

    async def create(self, number: int) -> float:
        began = time.perf_counter()
        status, body = await self.ask("POST", "/v1/environments", json.dumps({"task_id": f"t{number:06}"}).encode())
        if status != 201 or json.loads(body)["state"] != "running":
            raise RuntimeError(f"{status} {body!r}")
        return time.perf_counter() - began

    async def open_stream(self, target: str) -> None:
        self._writer.write(f"GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head)

    async def next_event(self) -> tuple[float, dict[str, Any]]:
        """When it had arrived as a whole, in milliseconds since the epoch, and the event."""
        while not (line := await self._reader.readuntil(b"\n")).startswith(b"data: "):
            pass
        return time.time() * 1000, json.loads(line[6:])

    def close(self) -> None:
        self._writer.close()


async def connect(port: int) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", port))


# -- the parts -----------------------------------------------------------------------------------------------------


class Server:
    """A `fuse serve`."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.pid = pid

    @property
    def memory_mb(self) -> float:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

    @property
    def cpu_s(self) -> float:
        """Processor time of all threads: says what something costs when other programs keep the machine busy."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def serving(database: str, folder: Path) -> AsyncIterator[Server]:
    """A server process with the default settings."""
    ready = folder / "ready"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "fusevm", "serve", "--listen", "127.0.0.1:0", "--ready-file", str(ready)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("ORCH_", "FUSE_"))}
    environ |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "FUSE_LOG_LEVEL": "warning"}
    environ |= {"DATABASE_URL": database, "TOKEN_ENCRYPTION_KEY": KEY, "FUSE_ALLOW_LOCAL_HOSTS": "true"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environ)  # noqa: ASYNC220
    try:
        while not ready.exists():
            if process.poll() is not None:
                raise RuntimeError("the server ended")
            await asyncio.sleep(0.05)
        yield Server(int(ready.read_text().strip().rpartition(":")[2]), process.pid)
    finally:
        process.terminate()
        process.wait(60)


async def register(port: int, places: list[Place]) -> None:
    """Tell the server its hosts."""
    client = await connect(port)
    for place in places:
        status, body = await client.ask("POST", "/v1/hosts", json.dumps({"id": place.id, "url": place.url}).encode())
        if status != 201:
            raise RuntimeError(body)
    client.close()


class Report:
    """Figures as they come, for people and, at the end, for programs."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def times(self, what: str, seconds: list[float], **more: Any) -> None:
        """p50 and p99 of single times."""
        ordered = sorted(seconds)
        p50, p99 = (statistics.median(ordered) * 1000, ordered[int(len(ordered) * 0.99)] * 1000)
        extra = "".join(f"   {name} {value:.2f}" for name, value in more.items() if isinstance(value, float))
        print(f"{what:<58} p50 {p50:8.2f} ms   p99 {p99:8.2f} ms   n={len(ordered)}{extra}", flush=True)
        samples = [round(one * 1000, 3) for one in seconds]
        self.found.append({"what": what, "p50_ms": p50, "p99_ms": p99, **more, "samples_ms": samples})

    def value(self, what: str, value: float, unit: str) -> None:
        print(f"{what:<58} {value:12.2f} {unit}", flush=True)
        self.found.append({"what": what, "value": value, "unit": unit})


# -- create and list -----------------------------------------------------------------------------------------------


async def together(port: int, first: int, count: int) -> tuple[float, list[float]]:
    """Creates per second, and the single times."""
    numbers = iter(range(first, first + count))
    times: list[float] = []

    async def work() -> None:
        client = await connect(port)
        for number in numbers:
            times.append(await client.create(number))  # noqa: PERF401 - `numbers` is shared
        client.close()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(work())
    return count / (time.perf_counter() - began), times


async def alone(port: int, first: int, count: int) -> list[float]:
    client = await connect(port)
    times = [await client.create(first + number) for number in range(count)]
    client.close()
    return times


async def timed(port: int, method: str, target: str, body: bytes, count: int) -> list[float]:
    client = await connect(port)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        status, _ = await client.ask(method, target, body)
        times.append(time.perf_counter() - began)
        if status != 200:
            raise RuntimeError(f"{target}: {status}")
    client.close()
    return times


async def bench_create(name: str, database: str, raw: Any, sizes: list[int], folder: Path, report: Report) -> None:
    """Creates and lists at every size; raw SQL in turns with them."""
    with running_hosts(folder, 5) as places:
        async with serving(database, folder) as server:
            await register(server.port, places)
            report.value(f"{name}: memory, idle", server.memory_mb, "MB")
            live = 0
            for size in sizes:
                if size > live:
                    await together(server.port, live, size - live)
                    live = size
                live = await _at_size(name, server, raw, live, report)
            report.value(f"{name}: memory, {live} live", server.memory_mb, "MB")
            for what, method, target, body in (
                (f"list 50 of {live}, filtered", "GET", "/v1/environments?limit=50&state=running", b""),
                ("get", "GET", "/v1/environments/fuse-t000000", b""),
                ("exec", "POST", "/v1/environments/fuse-t000000?action=exec", b'{"cmd":["true"]}'),
            ):
                report.times(f"{name}: {what}", await timed(server.port, method, target, body, LISTS))


async def _at_size(name: str, server: Server, raw: Any, live: int, report: Report) -> int:
    """What one size costs; how many live then."""
    result = await run_raw(raw, ALONE, 1)
    report.times(f"{name}: raw SQL of a create, one at a time", [one / 1000 for one in result["samples_ms"]])
    report.times(f"{name}: create, one at a time, {live} live", await alone(server.port, live, ALONE))
    live += ALONE
    result = await run_raw(raw, TOGETHER, CONNECTIONS)
    report.value(f"{name}: raw SQL of a create, {CONNECTIONS} at once", result["per_s"], "/s")
    before = server.cpu_s
    rate, times = await together(server.port, live, TOGETHER)
    cost_ms = (server.cpu_s - before) / TOGETHER * 1000
    report.times(f"{name}: create, {CONNECTIONS} at once, {live} live", times, per_s=rate, cpu_ms=cost_ms)
    live += TOGETHER
    report.times(f"{name}: list 50 of {live}", await timed(server.port, "GET", "/v1/environments?limit=50", b"", LISTS))
    return live


# -- events --------------------------------------------------------------------------------------------------------


async def bench_fanout(name: str, database: str, streams: int, folder: Path, report: Report) -> None:
    """One event to many streams: how long until the last of them has it, and until each."""
    with running_hosts(folder, 1) as places:
        async with serving(database, folder) as server:
            await register(server.port, places)
            clients = [await connect(server.port) for _ in range(streams)]
            for client in clients:
                await client.open_stream("/v1/events")
            maker = await connect(server.port)
            delays: list[float] = []
            lasts: list[float] = []
            before = server.cpu_s
            for number in range(EVENTS):
                reading = [asyncio.create_task(_running_event(client)) for client in clients]
                await maker.create(number)
                late = await asyncio.gather(*reading)
                delays += late
                lasts.append(max(late))
            cost = (server.cpu_s - before) / (2 * EVENTS * streams) * 1e6
            report.times(f"{name}: event to {streams} streams, each", delays)
            report.times(f"{name}: event to {streams} streams, the last", lasts)
            report.value(f"{name}: event to {streams} streams, CPU", cost, "us per event and stream")
            report.value(f"{name}: memory, {streams} streams", server.memory_mb, "MB")
            for client in (*clients, maker):
                client.close()


async def _running_event(client: Client) -> float:
    """Seconds from the moment that the event names until it has arrived."""
    while True:
        arrived_ms, event = await client.next_event()
        if event["state"] == "running":
            return max(0.0, arrived_ms - _parse_time(event["updated_at"])) / 1000


def _parse_time(text: str) -> float:
    whole, _, rest = text.removesuffix("Z").partition(".")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) * 1000 + float(f"0.{rest or 0}") * 1000


# -- reconcile -----------------------------------------------------------------------------------------------------


def _environments(hosts: int, machines: int) -> Iterator[Identity]:
    for number in range(hosts * machines):
        entropy = number.to_bytes(26, "big")
        yield Identity(
            uid=ids.make_uid(now_ms(), entropy[16:]), task_id=f"r{number}", machine_id=ids.make_machine_id(entropy[10:])
        )


async def bench_reconcile(database: str, hosts: int, machines: int, folder: Path, report: Report) -> None:
    """Hosts on which everything is as it should be."""
    known = list(_environments(hosts, machines))
    store = await open_store(database, POLICY, now_ms)
    preload: dict[str, list[MachineBody]] = {}
    for number, identity in enumerate(known):
        preload.setdefault(host_id(number % hosts), []).append(_machine(store.cluster, identity))
    with running_hosts(folder, hosts, preload=preload) as places:
        await _fill(store, places, known)
        await store.close()
        async with serving(database, folder) as server:
            await asyncio.sleep(WATCH_S / 2)  # every host has been taken up, and looked at once
            cpu, cycles = server.cpu_s, await _cycles(server.port)
            await asyncio.sleep(WATCH_S)
            spent, done = server.cpu_s - cpu, await _cycles(server.port) - cycles
            what = f"reconcile {hosts} hosts x {machines} machines"
            report.value(f"{what}: CPU", spent / WATCH_S, "s per s")
            report.value(f"{what}: a host is looked at every", hosts * WATCH_S / max(done, 1), "s")
            report.value(f"{what}: CPU", spent / max(done, 1) * 1000, "ms per look, heartbeats included")
            report.value(f"{what}: memory", server.memory_mb, "MB")
            client = await connect(server.port)
            _, body = await client.ask("GET", "/v1/environments?ended=true")
            if json.loads(body)["environments"]:
                raise RuntimeError("environments ended although everything was well")
            client.close()


def _machine(cluster: str, identity: Identity) -> MachineBody:
    return MachineBody(
        id=identity.machine_id,
        cluster=cluster,
        uid=identity.uid,
        incarnation=1,
        phase=Phase.RUNNING,
        spec=MachineSpec(image=SPEC.image, cpus=SPEC.cpus, memory_mib=SPEC.ram_mb, disk_bytes=SPEC.storage_gb << 30),
        driver="fake",
        created_at=render_time(now_ms()),
    )


async def _fill(store: Any, places: list[Place], known: list[Identity]) -> None:
    """The records of hosts and running environments, without a control plane."""
    room = Resources(cpus=1 << 30, ram_mb=1 << 40, storage_gb=1 << 30, vm_count=1 << 30)
    for place in places:
        await store.save_host(Host(id=place.id, url=place.url, capacity=room, created_at_ms=1, updated_at_ms=1))
    numbers = iter(enumerate(known))

    async def work() -> None:
        for number, identity in numbers:
            host = places[number % len(places)].id
            step = lifecycle.begin(identity, SPEC, host, cause="bench", now_ms=now_ms(), policy=POLICY)
            booted = lifecycle.step(step.record, BootSucceeded(cause="bench", seq=1), now_ms(), POLICY)
            whole = replace(booted, facts=step.facts + booted.facts)
            await store.create(whole, Reservation(host, resources_of(SPEC), lambda _host: True), None)

    async with asyncio.TaskGroup() as group:
        for _ in range(256):
            group.create_task(work())


async def _cycles(port: int) -> float:
    client = await connect(port)
    _, text = await client.ask("GET", "/metrics")
    client.close()
    pattern = r'^orchestrator_reconcile_cycles_total\{[^}]*"done"[^}]*\} (\S+)$'
    return sum(float(number) for number in re.findall(pattern, text.decode(), re.MULTILINE))


# -- all of it -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def databases(kind: str, folder: Path) -> Iterator[Iterator[str]]:
    """Fresh databases, one after another."""
    if kind == "sqlite":
        yield (str(folder / f"fuse{number}.db") for number in range(1000))
        return
    with PostgresServer() as server:
        yield (server.create_database() for _ in range(1000))


async def bench_store(kind: str, asked: argparse.Namespace, folder: Path, report: Report) -> None:
    with databases(kind, folder) as fresh:
        if "create" in asked.only:
            if kind == "postgres":
                raw, pool = await raw_postgres(next(fresh))
            else:
                raw, pool = raw_sqlite(folder / "raw.db"), None
            await bench_create(kind, next(fresh), raw, asked.sizes, folder, report)
            if pool is not None:
                await pool.close()
        if "fanout" in asked.only:
            await bench_fanout(kind, next(fresh), asked.streams, folder, report)
        if "reconcile" in asked.only and kind == asked.stores[0]:
            await bench_reconcile(next(fresh), asked.hosts, asked.machines, folder, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", nargs="+", default=["sqlite", "postgres"], choices=["sqlite", "postgres"])
    parser.add_argument("--only", nargs="+", default=["create", "fanout", "reconcile"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 1_000, 10_000])
    parser.add_argument("--streams", type=int, default=1_000)
    parser.add_argument("--hosts", type=int, default=1_000)
    parser.add_argument("--machines", type=int, default=100, help="per host")
    parser.add_argument("--json", type=Path, help="write every figure and sample here")
    asked = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    report = Report()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors", flush=True)
    with tempfile.TemporaryDirectory(prefix="fuse-bench-") as name:
        for kind in asked.stores:
            uvloop.run(bench_store(kind, asked, Path(name), report))
    if asked.json is not None:
        asked.json.write_text(json.dumps(report.found))


if __name__ == "__main__":
    main()
