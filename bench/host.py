"""What the host daemon costs: measured with VMMs that are small processes, or with real ones.

    sudo .venv/bin/python bench/host.py [--vmm agent qemu firecracker]
                                        [--only phases stop parallel footprint bulk]
                                        [--creates 20] [--parallel 1 2 4 8 16] [--machines 0 50 200] [--mib 64]
                                        [--artefacts DIR] [--json FILE]

- phases: creates one after another; what each of their parts takes (reserve, disk, cgroup, net, spawn, boot, agent),
  with a warm pool of network slots and without. On KVM the boot of the VMM stands beside computer-host's own figure.
- stop: orderly ends from the order to the answer, one after another: of a machine that does nothing, and of one whose
  daemon ignores SIGTERM (real VMMs only). The budget of both is 2 s, where the guest's processors are real.
- parallel: so many creates at the same time; time of each, and creates per second.
- footprint: memory and processor time of the daemon at rest with 0, 50 and 200 machines (agent processes only).
- bulk: a file up and down and the output of a command, through the daemon and straight to an agent on the same kind of
  channel; fresh pairs, in turns. Both ends are processes here, so this is what the daemon could pass on at most; what
  it costs of a real machine's channel (the budget) is measured by `fuse bench`.

What a network slot costs is measured by `bench/network.py`.

Everything happens in namespaces of its own and leaves nothing behind. DIR has a kernel and an image, as
`fuse image build` and the tests make them (default: the tests' own). Needs root.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvloop

from fusevm.host.channel import AgentClient, GuestChannel
from fusevm.host.images.initramfs import agent_path
from fusevm.wire.http1 import Connection
from fusevm.wire.streams import open_unix

#: Module and driver of each kind of VMM; `qemu` and `firecracker` are real ones, and Firecracker needs KVM.
VMMS = {
    "agent": ("fusevm.testing.agent_daemon", "qemu"),
    "qemu": ("fusevm.host", "qemu"),
    "firecracker": ("fusevm.host", "firecracker"),
}
PHASES = ("reserve", "prepare", "disk", "cgroup", "net", "spawn", "boot", "agent")
INSTANCE = "fbench"
_INSIDE = "FUSE_BENCH_PRIVATE_HOST"
_PREPARE = 'mkdir -p /run/netns && mount -t tmpfs fuse-bench /run/netns && ip link set lo up && exec "$@"'
_NAMESPACES = ["--net", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
_BOOT_MS, _START_S, _WATCH_S = 300_000, 120.0, 20.0
_CHUNK = 1 << 16
_PAIRS, _REPEATS = 3, 4
_FILES = "fuse-bench-"
#: Of a user who has not thought of the end.
_STUBBORN = ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"]
#: Of the first machine of a daemon.
_UID = 200_000
#: What computer-host says of itself: from the start of its VMM until the guest runs, on KVM.
_PEER_BOOT_MS = 200


class Daemon:
    """A running host daemon, spoken to over its Unix socket."""

    def __init__(self, process: subprocess.Popen[bytes], data: Path) -> None:
        self.process = process
        self._data = data
        self._numbers = itertools.count()

    async def ask(self, method: str, target: str, body: Any = None) -> bytes:
        """The body of a success."""
        connection = Connection(await open_unix(str(self._data / "firecracker-host.sock")))
        try:
            response = await connection.request(method, target, body=body)
            content = await response.read(1 << 30)
        finally:
            await connection.close()
        if response.status >= 300:
            raise RuntimeError(f"{method} {target}: {response.status} {content[:500]!r}")
        return content

    async def create(self, image: str) -> tuple[str, float]:
        """A machine, and the seconds that it took."""
        machine_id = f"m-{next(self._numbers)}"
        spec = {"image": image, "memory_mib": 64 if self.is_small else 256, "disk_bytes": 256 << 20}
        body = json.dumps({"machine_id": machine_id, "spec": spec, "boot_timeout_ms": _BOOT_MS}).encode()
        began = time.perf_counter()
        await self.ask("POST", "/machines", body)
        return machine_id, time.perf_counter() - began

    async def delete(self, machine_ids: list[str]) -> None:
        """Remove machines, a few at a time."""
        for first in range(0, len(machine_ids), 8):
            await asyncio.gather(*(self.ask("DELETE", f"/machines/{one}") for one in machine_ids[first : first + 8]))

    @property
    def is_small(self) -> bool:
        """Are its VMMs small processes?"""
        return VMMS["agent"][0] in self.process.args  # type: ignore[operator]

    async def phases(self) -> dict[str, tuple[float, float]]:
        """Sum in seconds and number of each part of a create, so far."""
        text = (await self.ask("GET", "/metrics")).decode()
        found = re.findall(r'^fuse_host_boot_seconds_(sum|count)\{phase="(\w+)"\} (\S+)$', text, re.MULTILINE)
        values = {(phase, kind): float(number) for kind, phase, number in found}
        return {phase: (values.get((phase, "sum"), 0.0), values.get((phase, "count"), 0.0)) for phase in PHASES}

    def driver(self) -> str:
        """Who runs its machines, with the accelerator."""
        return str(json.loads((self._data / "host.json").read_bytes())["driver"])

    def resident_mb(self) -> float:
        """Memory of the daemon."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1000

    def cpu_s(self) -> float:
        """Processor time of the daemon, user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def running(vmm: str, asked: argparse.Namespace, *, warm: int) -> AsyncIterator[Daemon]:
    """A daemon in a folder of its own; at the end its machines and everything else are gone."""
    folder = make_folder()
    module, driver = VMMS[vmm]
    options = {
        "--data-root": folder / "data",
        "--run-dir": f"/run/{folder.name}",
        "--artefact-root": asked.artefacts,
        "--listen": "",
        "--driver": driver,
        "--instance": INSTANCE,
        "--warm-slots": warm,
        "--cpu-ratio": 1000,
        "--disk-ratio": 1000,
        "--ram-reserve-mib": 0,
        "--disk-reserve-bytes": 1 << 30,
    }
    words = [sys.executable, "-m", module, *(str(word) for option in options.items() for word in option)]
    process = start(words, folder / "log")
    daemon = Daemon(process, folder / "data")
    try:
        await _wait_serving(daemon, folder / "log")
        yield daemon
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            listing = json.loads(await daemon.ask("GET", "/machines"))
            await daemon.delete([machine["id"] for machine in listing["machines"]])
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        _remove_groups()
        shutil.rmtree(folder)
        shutil.rmtree(f"/run/{folder.name}", ignore_errors=True)


def make_folder() -> Path:
    """One that machines' users may enter."""
    folder = Path(tempfile.mkdtemp(prefix="fb-", dir="/var/tmp"))
    folder.chmod(0o755)
    return folder


def start(words: list[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a program; what it says goes into a file."""
    with log.open("wb") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=environment)


def said(log: Path) -> str:
    """Its last words."""
    return log.read_text()[-2000:]


async def _wait_serving(daemon: Daemon, log: Path) -> None:
    async with asyncio.timeout(_START_S):
        while True:
            if daemon.process.poll() is not None:
                raise RuntimeError(said(log))
            with contextlib.suppress(OSError):
                await daemon.ask("GET", "/health")
                return
            await asyncio.sleep(0.05)


def _remove_groups() -> None:
    """The parents of the machines' groups, which the daemon keeps."""
    for name in (f"{INSTANCE}/machines", INSTANCE):
        for path in (Path("/sys/fs/cgroup") / name, *Path("/sys/fs/cgroup").glob(f"*/{name}")):
            with contextlib.suppress(OSError):
                path.rmdir()


class Report:
    """What was found: printed at once, kept for the file."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"host": {"processors": os.cpu_count(), "load": os.getloadavg()[0]}}

    def say(self, section: str, what: str, figures: Mapping[str, float], samples: list[float] | None = None) -> None:
        """One line of a table."""
        told = "  ".join(f"{name} {value:.2f}" for name, value in figures.items())
        print(f"{section:<10} {what:<34} {told}", flush=True)
        entry = {"what": what, **figures, **({"samples": samples} if samples else {})}
        self.found.setdefault(section, []).append(entry)


def median_ms(seconds: list[float]) -> dict[str, float]:
    """p50, p95 in milliseconds."""
    ordered = sorted(seconds)
    return {"p50_ms": statistics.median(ordered) * 1000, "p95_ms": ordered[int(0.95 * (len(ordered) - 1))] * 1000}


# -- phases ------------------------------------------------------------------------------------------------------------


async def bench_phases(vmm: str, asked: argparse.Namespace, report: Report) -> None:
    for warm in (4, 0):
        async with running(vmm, asked, warm=warm) as daemon:
            first, _ = await daemon.create(asked.image)  # makes what all others share
            await daemon.delete([first])
            await asyncio.sleep(1)
            before, took = await daemon.phases(), []
            for _ in range(asked.creates):
                machine_id, seconds = await daemon.create(asked.image)
                took.append(seconds)
                await daemon.delete([machine_id])
                await asyncio.sleep(0.2)  # the pool makes another slot
            after = await daemon.phases()
            name = f"{vmm}, {'warm' if warm else 'no'} slots"
            means = {phase: _mean_ms(before[phase], after[phase]) for phase in PHASES}
            for phase, mean_ms in means.items():
                report.say("phases", f"{name}: {phase}", {"mean_ms": mean_ms})
            report.say("phases", f"{name}: whole create", median_ms(took), took)
            if "kvm" in daemon.driver():
                boot_ms = means["spawn"] + means["boot"]
                report.say("phases", f"{name}: VMM boot", {"mean_ms": boot_ms, "computer_host_ms": _PEER_BOOT_MS})


def _mean_ms(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Of what was counted between: sums in seconds, and numbers."""
    count = after[1] - before[1]
    return (after[0] - before[0]) / count * 1000 if count else 0.0


# -- stop --------------------------------------------------------------------------------------------------------------


async def bench_stop(vmm: str, asked: argparse.Namespace, report: Report) -> None:
    async with running(vmm, asked, warm=4) as daemon:
        # An agent that is a process runs no daemons: their home is root's.
        kinds = {"idle": []} if daemon.is_small else {"idle": [], "a daemon ignores SIGTERM": _STUBBORN}
        for what, command in kinds.items():
            took = []
            for _ in range(asked.creates):
                machine_id, _ = await daemon.create(asked.image)
                if command:
                    await _start_daemon(daemon, machine_id, command)
                took.append(await timed(lambda one=machine_id: daemon.ask("POST", f"/machines/{one}/stop")))
                await daemon.delete([machine_id])
            report.say("stop", f"{vmm}, {what}", median_ms(took), took)


async def _start_daemon(daemon: Daemon, machine_id: str, command: list[str]) -> None:
    """Give the machine a daemon, and wait for its first word."""
    guest = f"/machines/{machine_id}/guest"
    await daemon.ask("PUT", f"{guest}/agent", json.dumps({"id": "bench", "command": command}).encode())
    async with asyncio.timeout(_START_S):
        while not await daemon.ask("GET", f"{guest}/agent/output?stream=stdout&offset=0"):  # noqa: ASYNC110 - it comes from outside
            await asyncio.sleep(0.05)


# -- many at once ------------------------------------------------------------------------------------------------------


async def bench_parallel(vmm: str, asked: argparse.Namespace, report: Report) -> None:
    async with running(vmm, asked, warm=16) as daemon:
        first, _ = await daemon.create(asked.image)
        await daemon.delete([first])
        for width in asked.parallel:
            await asyncio.sleep(2)  # the pool is warm again
            began = time.perf_counter()
            made = await asyncio.gather(*(daemon.create(asked.image) for _ in range(width)))
            whole_s = time.perf_counter() - began
            took = [seconds for _, seconds in made]
            figures = {**median_ms(took), "per_second": width / whole_s}
            report.say("parallel", f"{vmm}, {width} at once", figures, took)
            await daemon.delete([machine_id for machine_id, _ in made])


# -- at rest -----------------------------------------------------------------------------------------------------------


async def bench_footprint(asked: argparse.Namespace, report: Report) -> None:
    async with running("agent", asked, warm=4) as daemon:
        alive = 0
        for wanted in asked.machines:
            while alive < wanted:
                await asyncio.gather(*(daemon.create(asked.image) for _ in range(min(8, wanted - alive))))
                alive += min(8, wanted - alive)
            await asyncio.sleep(3)
            before = daemon.cpu_s()
            await asyncio.sleep(asked.watch)
            cpu = (daemon.cpu_s() - before) / asked.watch
            figures = {"memory_mb": daemon.resident_mb(), "cpu_percent": cpu * 100}
            report.say("footprint", f"{wanted} machines at rest", figures)


# -- bulk --------------------------------------------------------------------------------------------------------------


async def bench_bulk(asked: argparse.Namespace, report: Report) -> None:
    found: dict[tuple[str, str], list[float]] = {}
    size = asked.mib << 20
    for _ in range(_PAIRS):
        async with running("agent", asked, warm=1) as daemon, raw_agent() as raw:
            machine_id, _ = await daemon.create(asked.image)
            host = HostWay(daemon, machine_id)
            for _ in range(_REPEATS):
                for way, name in ((raw, "raw"), (host, "host")):
                    for what, work in transfers(way, size):
                        began = time.perf_counter()
                        await work
                        found.setdefault((what, name), []).append(asked.mib / (time.perf_counter() - began))
    remove_files()
    for what in dict.fromkeys(what for what, _ in found):
        raw_mib, host_mib = (statistics.median(found[what, name]) for name in ("raw", "host"))
        figures = {"raw_mib_s": raw_mib, "host_mib_s": host_mib, "percent_of_raw": host_mib / raw_mib * 100}
        report.say("bulk", what, figures, found[what, "host"])


def fresh_file() -> str:
    """A file that an agent may make: a process, it has the host's folders, and each machine's user its own files."""
    return f"/tmp/{_FILES}{secrets.token_hex(4)}"


def remove_files() -> None:
    """What transfers have left."""
    for path in Path("/tmp").glob(f"{_FILES}????????"):
        if path.is_file():
            path.unlink()


class RawWay:
    """Straight to an agent."""

    def __init__(self, client: AgentClient) -> None:
        self._client = client
        self.file = fresh_file()

    async def call(self, method: str, target: str, body: Any = None) -> int:
        """Bytes of the answer."""
        response = await self._client.request(method, target, body=body)
        total = 0
        async for chunk in response.chunks():
            total += len(chunk)
        if response.status >= 300:
            raise RuntimeError(f"{method} {target}: {response.status}")
        return total


class HostWay:
    """Through the daemon."""

    def __init__(self, daemon: Daemon, machine_id: str) -> None:
        self._daemon = daemon
        self._prefix = f"/machines/{machine_id}/guest"
        self.file = fresh_file()

    async def call(self, method: str, target: str, body: Any = None) -> int:
        return len(await self._daemon.ask(method, self._prefix + target, body))


def transfers(way: RawWay | HostWay, size: int) -> Iterator[tuple[str, Coroutine[Any, Any, int]]]:
    """What is measured, in order: a file up, the same down, the output of a command."""
    yield "upload", way.call("PUT", f"/files?path={way.file}&user={_UID}:{_UID}", chunks(size))
    yield "download", way.call("GET", f"/files?path={way.file}")
    command = {"cmd": ["head", "-c", str(min(size, 12 << 20)), "/dev/zero"], "cwd": "/", "timeout_ms": 60_000}
    yield "exec output (12 MiB, base64)", way.call("POST", "/exec", json.dumps(command).encode())


async def chunks(size: int) -> AsyncIterator[bytes]:
    """So many bytes."""
    block = os.urandom(_CHUNK)
    for _ in range(size // _CHUNK):
        yield block


@contextlib.asynccontextmanager
async def raw_agent() -> AsyncIterator[RawWay]:
    """An agent process on the multiplexer, and nothing between."""
    folder = Path(tempfile.mkdtemp(prefix="fb-raw-", dir="/var/tmp"))
    environment = {"FUSED_FOLDER": str(folder), "PATH": os.environ["PATH"]}
    process = start([str(agent_path()), "serve", "--mux", str(folder / "s")], folder / "log", environment)
    channel = GuestChannel(folder / "s")
    client = AgentClient(channel.open_stream)
    try:
        async with asyncio.timeout(_START_S):
            while not (folder / "s").exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.01)
            await channel.wait_ready()
        yield RawWay(client)
    finally:
        await client.close()
        await channel.close()
        process.kill()
        process.wait()
        shutil.rmtree(folder)


async def timed(work: Callable[[], Coroutine[Any, Any, object]]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


# -- all of it ---------------------------------------------------------------------------------------------------------


async def measure(asked: argparse.Namespace, report: Report) -> None:
    for vmm in asked.vmm:
        if "phases" in asked.only:
            await bench_phases(vmm, asked, report)
        if "stop" in asked.only:
            await bench_stop(vmm, asked, report)
        if "parallel" in asked.only:
            await bench_parallel(vmm, asked, report)
    if "footprint" in asked.only:
        await bench_footprint(asked, report)
    if "bulk" in asked.only:
        await bench_bulk(asked, report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", nargs="+", default=["agent"], choices=sorted(VMMS))
    parser.add_argument("--only", nargs="+", default=["phases", "stop", "parallel", "footprint", "bulk"])
    parser.add_argument("--creates", type=int, default=20)
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--machines", type=int, nargs="+", default=[0, 50, 200])
    parser.add_argument("--watch", type=float, default=_WATCH_S, help="seconds of rest that are watched")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--image", default="debian-12")
    parser.add_argument("--artefacts", type=Path, default=os.environ.get("FUSE_TEST_DATA", "/var/cache/fuse-test"))
    parser.add_argument("--json", type=Path, help="write every figure and sample here")
    return parser.parse_args()


def main() -> None:
    if os.environ.get(_INSIDE) != "1":
        parse()  # what is wrong with the arguments is said before anything is made
        command = ["unshare", *_NAMESPACES, "sh", "-c", _PREPARE, "bench", sys.executable, *sys.argv]
        sys.exit(subprocess.run(command, env={**os.environ, _INSIDE: "1"}, check=False).returncode)
    asked, report = parse(), Report()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors", flush=True)
    uvloop.run(measure(asked, report))
    if asked.json is not None:
        asked.json.write_text(json.dumps(report.found))


if __name__ == "__main__":
    main()
