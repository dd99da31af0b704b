"""Budgets of the control plane (docs design, section 8), measured against a real server process with the stub host.

    python bench/control.py [--environments 10000] [--memory]

Prints: create p50/p99 one at a time, creates per second with 32 connections, the same again at the end (flat cost),
list of 50 among all, exec round trip, memory. The client speaks HTTP by hand, so that the server is what is measured.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

CONNECTIONS = 32


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

    def close(self) -> None:
        self._writer.close()


async def connect(port: int) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", port))


async def one_at_a_time(port: int, first: int, count: int) -> list[float]:
    client = await connect(port)
    times = [await client.create(first + number) for number in range(count)]
    client.close()
    return times


async def all_at_once(port: int, first: int, count: int) -> tuple[float, list[float]]:
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


@contextlib.asynccontextmanager
async def server(database: str, ready: Path) -> AsyncIterator[tuple[int, int]]:
    """(port, pid) of a server process."""
    command = [sys.executable, "-m", "fusevm.control", "--listen", "127.0.0.1:0", "--database", database]
    command += ["--ready-file", str(ready), "--log-level", "warning"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
    try:
        while not ready.exists():  # noqa: ASYNC240 - a local file, and nothing else runs
            if process.poll() is not None:
                raise RuntimeError("the server ended")
            await asyncio.sleep(0.05)
        text = ready.read_text()  # noqa: ASYNC240
        yield int(text.strip().rpartition(":")[2]), process.pid
    finally:
        process.terminate()
        process.wait(30)


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def cpu_s(pid: int) -> float:
    """Processor time of all threads: says what a create costs when other programs keep the machine busy."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(what: str, times: list[float]) -> None:
    ordered = sorted(times)
    p50, p99 = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
    print(f"{what:<60} p50 {p50 * 1000:7.2f} ms   p99 {p99 * 1000:7.2f} ms   n={len(times)}")


async def run(total: int, *, in_memory: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="fuse-bench-") as folder:
        database = ":memory:" if in_memory else os.path.join(folder, "fuse.db")  # noqa: PTH118
        print(f"database: {database}")
        async with server(database, Path(folder) / "ready") as (port, pid):
            print(f"{'memory, idle':<60} {resident_mb(pid):.0f} MB")
            show("create, one at a time, empty", await one_at_a_time(port, 0, 300))
            first = 300
            batch = max(1, (total - 600) // 4)
            for _ in range(4):
                before = cpu_s(pid)
                rate, times = await all_at_once(port, first, batch)
                cost_ms = (cpu_s(pid) - before) / batch * 1000
                show(f"create, {CONNECTIONS} connections, {rate:.0f}/s, {cost_ms:.2f} ms CPU, from {first}", times)
                first += batch
            show(f"create, one at a time, {first} live", await one_at_a_time(port, first, 300))
            first += 300
            show(f"list 50 of {first}", await timed(port, "GET", "/v1/environments?limit=50", b"", 100))
            page = "/v1/environments?limit=50&state=running&host_id=stub"
            show(f"list 50 of {first}, filtered", await timed(port, "GET", page, b"", 100))
            show("get", await timed(port, "GET", "/v1/environments/fuse-t000000", b"", 300))
            body = b'{"cmd":["true"]}'
            show("exec", await timed(port, "POST", "/v1/environments/fuse-t000000?action=exec", body, 300))
            print(f"{f'memory, {first} live':<60} {resident_mb(pid):.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, default=10_000)
    parser.add_argument("--memory", action="store_true", help="the in-memory store instead of a SQLite file")
    asked = parser.parse_args()
    asyncio.run(run(asked.environments, in_memory=asked.memory))


if __name__ == "__main__":
    main()
