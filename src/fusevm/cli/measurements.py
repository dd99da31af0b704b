"""The measurements of `fuse bench`. Raw and Fuse alternate within each; times by the monotonic clock."""

import asyncio
import collections
import contextlib
import http.client
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fusevm.cli.connection import Context
from fusevm.cli.ephemeral_stack import ephemeral_stack
from fusevm.cli.failures import CliError
from fusevm.cli.installation import local_client
from fusevm.cli.measurement_report import Comparison, Results
from fusevm.cli.raw_channel import RawMachine
from fusevm.host.disk.qcow2 import render_overlay
from fusevm.host.images.blank import ensure_blank
from fusevm.host.images.initramfs import ensure_initramfs
from fusevm.host.images.kernel import KernelStore
from fusevm.host.images.store import ImageStore
from fusevm.sdk.client import Fuse
from fusevm.wire.frames import FrameType

#: What a layer may add to a request, in ms.
_LAYERS = {"host": 3, "control plane": 6}
_Way = tuple[Callable[[], http.client.HTTPConnection], dict[str, str], dict[str, str]]
RAW_SCRIPT = Path(__file__).with_name("raw_vmm.py")
DISK_BYTES = 4 << 30
MEMORY_MIB = 512
_START_TIMEOUT_S = 900
_STOP_TIMEOUT_S = 60
#: Requests that one raw machine answers after its first.
RAW_ROUNDS = 20
#: Fresh pairs of machines that bulk is measured on, and how often on each; in emulation, equal machines differ.
_STREAM_PAIRS, _STREAM_REPEATS = 3, 4


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much to measure."""

    boots: int
    rounds: int
    size_bytes: int
    image: str


class Round(NamedTuple):
    """Seconds of one request, and those of them in which the agent had its command running."""

    total_s: float
    inside_s: float


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of machine are made of."""

    kernel: Path
    initramfs: Path
    image: Path
    blank: Path


class Stack:
    """A Fuse of its own (`fuse up --ephemeral`), and ways to talk to each of its layers."""

    def __init__(self, context: Context) -> None:
        self.fuse = local_client(context)
        self._socket = Path(context.data_root) / "host" / "firecracker-host.sock"
        self._address = context.url.split("//")[1]
        self.headers = {"authorization": f"Bearer {context.token}"}

    def host_connection(self) -> http.client.HTTPConnection:
        """A connection to the host daemon, past the control plane."""
        connection = http.client.HTTPConnection("localhost", timeout=120)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self._socket))
        return connection

    def control_connection(self) -> http.client.HTTPConnection:
        """A connection to the control plane, past the SDK."""
        return http.client.HTTPConnection(self._address, timeout=120)

    def machine_of(self, env_id: str) -> tuple[str, dict[str, str]]:
        """Id of an environment's machine, and the fence with which the host lets us touch it."""
        uid = self.fuse.environments.get(env_id).uid
        machines = ask(self.host_connection(), "GET", "/machines", {})["machines"]
        machine = next(one for one in machines if one["uid"] == uid)
        fence = {"fuse-cluster": machine["cluster"], "fuse-uid": uid, "fuse-action-seq": "1000"}
        return machine["id"], fence | {"fuse-incarnation": str(machine["incarnation"])}


def measure_all(plan: Plan) -> Results:
    """Start a stack, measure everything, leave nothing behind."""
    with local_stack(plan.image) as (stack, parts):
        comparisons = [*measure_boots(stack, parts, plan)]
        comparisons += measure_rounds(stack, parts, plan)
        comparisons += asyncio.run(measure_streams(stack, parts, plan))
        host = next(stack.fuse.hosts.list())
    about = {
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "driver": host.driver,
        "environment": f"1 vCPU, {MEMORY_MIB} MiB, image {plan.image}",
    }
    return Results(about=about, comparisons=comparisons)


@contextlib.contextmanager
def local_stack(image: str) -> Iterator[tuple[Stack, Parts]]:
    """A Fuse of its own, ended with all it made at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="fuse-bench-") as folder,
        ephemeral_stack(Path(folder) / "ready", image) as up,
    ):
        yield Stack(up.context), asyncio.run(_find_parts(image))


async def _find_parts(image: str) -> Parts:
    from fusevm.cli.places import find_places  # noqa: PLC0415 - only here

    data = find_places(None, os.environ).data
    kernel = await KernelStore(data).ensure()
    found = await ImageStore(data).resolve(image)
    return Parts(
        kernel=kernel.vmlinux,
        initramfs=await ensure_initramfs(data, kernel),
        image=found.rootfs,
        blank=await ensure_blank(data, DISK_BYTES),
    )


# -- boots --------------------------------------------------------------------------------------------------------


def measure_boots(stack: Stack, parts: Parts, plan: Plan) -> Iterator[Comparison]:
    """Cold starts: process start to the first word of the agent, and create to the first result of a command."""
    raw_boot, raw_exec, fuse_boot, fuse_exec = [], [], [], []
    for number in range(plan.boots):
        raw = run_raw(parts, "true")
        raw_boot.append(raw["hello_s"] * 1000)
        raw_exec.append(raw["first_answer_s"] * 1000)
        started = time.perf_counter()
        environment = stack.fuse.environments.create(f"bench-boot-{number}", image=plan.image, ram_mb=MEMORY_MIB)
        stack.fuse.environments.exec(environment.id, shell="true")  # noqa: S604 - in the machine
        fuse_exec.append((time.perf_counter() - started) * 1000)
        fuse_boot.append(environment.timings.boot_ms if environment.timings is not None else 0.0)
        stack.fuse.environments.delete(environment.id)
    yield Comparison(what="boot to channel", unit="ms", raw=raw_boot, fuse=fuse_boot)
    yield Comparison(what="create to first exec result", unit="ms", raw=raw_exec, fuse=fuse_exec, budget=150)


def run_raw(parts: Parts, command: str = "") -> dict[str, Any]:
    """One machine of the raw script, with a fresh disk: a command, or a request without a process, over and over."""
    with tempfile.TemporaryDirectory(prefix="fuse-bench-", dir="/var/tmp") as folder:
        overlay = Path(folder) / "overlay.qcow2"
        overlay.write_bytes(render_overlay(DISK_BYTES, str(parts.blank)))
        files = [str(path) for path in (parts.kernel, parts.initramfs, parts.image, overlay)]
        words = [sys.executable, str(RAW_SCRIPT), *files, *([command] if command else [])]
        done = subprocess.run(words, check=False, capture_output=True, timeout=_START_TIMEOUT_S)
        if done.returncode != 0:
            raise CliError("the raw VMM failed", hint=done.stderr.decode(errors="replace")[-500:])
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


# -- round trips --------------------------------------------------------------------------------------------------


def measure_rounds(stack: Stack, parts: Parts, plan: Plan) -> Iterator[Comparison]:
    """A request without a process, and a command, through each layer; raw and Fuse on machines that are made anew."""
    raw: dict[str, list[Round]] = {"agent call": [], "exec": []}
    fuse: dict[tuple[str, str], list[Round]] = {(what, layer): [] for what in raw for layer in _LAYERS}
    for number in range(max(1, plan.rounds // RAW_ROUNDS)):
        environment = stack.fuse.environments.create(f"bench-rounds-{number}", image=plan.image, ram_mb=MEMORY_MIB)
        ways = _request_ways(stack, environment.id)
        for what, command in (("agent call", ""), ("exec", "true")):
            answer = run_raw(parts, command)
            raw[what] += [Round(*pair) for pair in zip(answer["round_s"], answer["inside_s"], strict=True)]
            for layer in _LAYERS:
                connect, headers, targets = ways[layer]
                fuse[what, layer] += time_rounds(connect(), targets[what], headers, command)
        stack.fuse.environments.delete(environment.id)
    for (what, layer), rounds in fuse.items():
        yield from _compare(f"{what}, through the {layer}", raw[what], rounds, _LAYERS[layer])


def _compare(what: str, raw: list[Round], fuse: list[Round], budget: float) -> Iterator[Comparison]:
    """A command's own time differs more between two equal machines than a layer adds: the budget is for the rest."""
    whole = Comparison(what=what, unit="ms", raw=[r.total_s * 1000 for r in raw], fuse=[r.total_s * 1000 for r in fuse])
    if not any(r.inside_s for r in raw):
        yield msgspec.structs.replace(whole, budget=budget)
        return
    yield whole
    yield Comparison(
        what=f"{what}, less the command's own time",
        unit="ms",
        raw=[(r.total_s - r.inside_s) * 1000 for r in raw],
        fuse=[(r.total_s - r.inside_s) * 1000 for r in fuse],
        budget=budget,
    )


def _request_ways(stack: Stack, env_id: str) -> dict[str, _Way]:
    """Per layer: how it is connected to, the headers it wants, and its target for each kind of request."""
    machine, fence = stack.machine_of(env_id)
    guest, public = f"/machines/{machine}/guest", f"/v1/environments/{env_id}"
    return {
        "host": (stack.host_connection, fence, {"agent call": f"{guest}/processes", "exec": f"{guest}/exec"}),
        "control plane": (
            stack.control_connection,
            stack.headers,
            {"agent call": f"{public}/processes", "exec": f"{public}?action=exec"},
        ),
    }


def time_rounds(
    connection: http.client.HTTPConnection, target: str, headers: dict[str, str], command: str
) -> list[Round]:
    """As many equal requests in a row as a raw machine answers; as there, the first does not count.

    In a row, because what a command leaves behind in caches makes the next request of another kind slower, raw or not.
    """
    method, body = ("POST", {"shell": command}) if command else ("GET", None)
    rounds = []
    with contextlib.closing(connection):
        ask(connection, method, target, headers, body)
        for _ in range(RAW_ROUNDS):
            started = time.perf_counter()
            answer = ask(connection, method, target, headers, body)
            rounds.append(Round(time.perf_counter() - started, answer.get("duration_ms", 0) / 1000))
    return rounds


def timed(call: Callable[[], object]) -> float:
    """Milliseconds that it takes."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def ask(
    connection: http.client.HTTPConnection, method: str, target: str, headers: dict[str, str], body: object = None
) -> Any:
    """One exchange on a kept connection."""
    data = None if body is None else json.dumps(body).encode()
    connection.request(method, target, body=data, headers=headers | {"content-type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    if response.status >= 300:
        raise CliError(f"{method} {target}: {response.status}", hint=answer.decode(errors="replace")[:300])
    return json.loads(answer) if answer else None


# -- streams ------------------------------------------------------------------------------------------------------


async def measure_streams(stack: Stack, parts: Parts, plan: Plan) -> list[Comparison]:
    """Files and command output in bulk: straight on the channel, and through host daemon and control plane."""
    raw: dict[str, list[float]] = collections.defaultdict(list)
    fuse: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    mib = plan.size_bytes / (1 << 20)
    for number in range(_STREAM_PAIRS):
        environment = await asyncio.to_thread(
            stack.fuse.environments.create, f"bench-streams-{number}", image=plan.image, ram_mb=MEMORY_MIB
        )
        ways = await asyncio.to_thread(_stream_ways, stack, environment.id, plan.size_bytes)
        async with _raw_machine(parts) as machine:
            for _ in range(_STREAM_REPEATS):
                for way in dict.fromkeys(way for way, _ in ways):
                    raw[way].append(mib / await machine.transfer(way, plan.size_bytes))
                for key, call in ways.items():
                    fuse[key].append(mib / (await asyncio.to_thread(timed, call) / 1000))
        await asyncio.to_thread(stack.fuse.environments.delete, environment.id)
    return [
        Comparison(what=f"{way}, through the {layer}", unit="MiB/s", raw=raw[way], fuse=found, budget=0.8)
        for (way, layer), found in fuse.items()
    ]


@contextlib.asynccontextmanager
async def _raw_machine(parts: Parts) -> AsyncIterator[RawMachine]:
    """A machine straight on the driver, with a disk of its own."""
    with tempfile.TemporaryDirectory(prefix="fb-", dir="/run" if os.geteuid() == 0 else None) as name:
        folder = Path(name)
        overlay = folder / "overlay.qcow2"
        overlay.write_bytes(render_overlay(DISK_BYTES, str(parts.blank)))
        straight = RawMachine(
            parts.kernel, parts.initramfs, parts.image, overlay=overlay, folder=folder, memory_mib=MEMORY_MIB
        )
        async with straight as machine:
            yield machine


def _stream_ways(stack: Stack, env_id: str, size: int) -> dict[tuple[str, str], Callable[[], object]]:
    """How bulk goes through each layer."""
    machine, fence = stack.machine_of(env_id)
    at_host = f"/machines/{machine}/guest/files?path=/root/bench"
    public = f"/v1/environments/{env_id}/files?path=/root/bench"
    return {
        ("upload", "host"): lambda: upload(stack.host_connection(), at_host, fence, size),
        ("upload", "control plane"): lambda: upload(stack.control_connection(), public, stack.headers, size),
        ("download", "host"): lambda: download(stack.host_connection(), at_host, fence, size),
        ("download", "control plane"): lambda: download(stack.control_connection(), public, stack.headers, size),
        ("output", "control plane"): lambda: output(stack.fuse, env_id, size),
    }


def upload(connection: http.client.HTTPConnection, target: str, headers: dict[str, str], size: int) -> None:
    """Write a file of zeros."""
    with contextlib.closing(connection):
        connection.request("PUT", target, body=bytes(size), headers=headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise CliError(f"upload: {response.status}", hint=answer.decode(errors="replace")[:300])


def download(connection: http.client.HTTPConnection, target: str, headers: dict[str, str], size: int) -> None:
    """Read that file."""
    with contextlib.closing(connection):
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        buffer, left = bytearray(1 << 20), size
        while left:
            count = response.readinto(buffer)
            if not count:
                raise CliError(f"the download ended {left} bytes early")
            left -= count


def output(fuse: Fuse, env_id: str, size: int) -> None:
    """Read what a command writes."""
    with fuse.environments.exec_stream(env_id, ["head", "-c", str(size), "/dev/zero"]) as session:
        received = sum(len(frame.payload) for frame in session.frames() if frame.type is FrameType.STDOUT)
    if received != size:
        raise CliError(f"{received} bytes of output came of {size}")
