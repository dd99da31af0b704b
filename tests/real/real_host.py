"""Real host daemons with real machines, in network, mount and process namespaces of their own.

`Box` is a set of namespaces; whatever runs in it ends with it. `Host` is one data directory with the daemons that are
started on it, one after the other, and a client. `Guest` is a running machine, as its user sees it.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import websockets.asyncio.client as ws

from artefacts import IMAGE
from fusevm.host.cgroup import Cgroups, observe_mounts
from fusevm.host.faults import VARIABLE
from fusevm.host.images.initramfs import agent_path
from fusevm.model.errors import Error
from fusevm.model.machine import Fence
from fusevm.testing.fake_firecracker.install import install
from fusevm.wire.errors import parse_error
from fusevm.wire.frames import Frame, FrameType, decode_message, encode_frame
from fusevm.wire.guest import ExecRequest, ExecResult, Exit
from fusevm.wire.host_api import MachineAnswer, MachineBody, MachineList, fence_headers
from fusevm.wire.http1 import Body, Connection, Response
from fusevm.wire.streams import open_unix

ROOT = Path(__file__).resolve().parents[2]
#: Generous: two cores, software emulation, and whatever else the machine does.
BOOT_MS = 180_000
_START_S = 60.0
_UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
_PREPARE = "mkdir -p /run/netns && mount -t tmpfs fuse-test /run/netns && ip link set lo up && exec sleep infinity"


class Box:
    """Namespaces of their own."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen([*_UNSHARE, "--propagation", "private", "--", "sh", "-c", _PREPARE])
        self.pid = self._wait_inside()

    def _wait_inside(self) -> int:
        """The first process inside, once it has prepared everything."""
        deadline = time.monotonic() + _START_S
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        while time.monotonic() < deadline:
            for child in children.read_text().split():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/comm").read_text().strip() == "sleep":
                        return int(child)
            time.sleep(0.01)
        raise TimeoutError("the namespaces were not made")

    def enter(self, *argv: str | Path) -> list[str]:
        """The words that run a program inside."""
        where = ["nsenter", "-t", str(self.pid), "--net", "--mount", "--pid", f"--wd={ROOT}", "--"]
        return [*where, *map(str, argv)]

    @staticmethod
    def inner_pid(entered: "subprocess.Popen[Any]") -> int:
        """The program of `enter` itself, not the nsenter in front of it."""
        return int(Path(f"/proc/{entered.pid}/task/{entered.pid}/children").read_text().split()[0])

    @asynccontextmanager
    async def serve(self, folder: Path) -> AsyncIterator[str]:
        """A folder by URL, on the loopback inside."""
        words = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(folder), "0"]
        with subprocess.Popen(self.enter(*words), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
            assert server.stdout is not None
            # "Serving HTTP on 127.0.0.1 port 40093 (...) ..."
            said = await asyncio.to_thread(server.stdout.readline)
            try:
                yield f"http://127.0.0.1:{int(said.split()[5])}"
            finally:
                os.kill(self.inner_pid(server), signal.SIGKILL)

    def run(self, *argv: str | Path) -> str:
        """Run a program inside that must succeed; return its output."""
        done = subprocess.run(self.enter(*argv), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def close(self) -> None:
        """End everything inside."""
        self._holder.kill()
        self._holder.wait()


class Host:
    """A data directory, and the daemons that run on it."""

    def __init__(
        self,
        box: Box,
        artefacts: Path,
        name: str,
        *,
        warm_slots: int = 0,
        module: str = "fusevm.host",
        where: Path = Path("/var/tmp"),
    ) -> None:
        self.box = box
        #: More options of every daemon, by flag.
        self.options: dict[str, object] = {}
        #: The program: the daemon itself, or one of `fusevm.testing`.
        self._module = module
        self.instance = name
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=where))
        self.folder.chmod(0o755)
        self.data = self.folder / "data"
        self.run_dir = Path(f"/run/fuse-test-{self.folder.name}")
        self.log = self.folder / "daemon.log"
        self._artefacts = artefacts
        self._warm_slots = warm_slots
        self._daemon: subprocess.Popen[bytes] | None = None
        self._mounts = self._observe_mounts()

    # -- the daemon ---------------------------------------------------------------------------------------------

    @property
    def socket(self) -> Path:
        return self.data / "firecracker-host.sock"

    @property
    def daemon_pid(self) -> int:
        """The daemon itself."""
        assert self._daemon is not None
        return self.box.inner_pid(self._daemon)

    def launch(self, *more: str, fault: str = "") -> None:
        """Start a daemon without waiting for it."""
        options = {
            "--data-root": self.data,
            "--run-dir": self.run_dir,
            "--artefact-root": self._artefacts,
            "--listen": "127.0.0.1:0",
            "--driver": "qemu",
            "--instance": self.instance,
            "--warm-slots": self._warm_slots,
            "--sweep-interval-s": "1",
            "--disk-reserve-bytes": 1 << 30,
            **self.options,
        }
        words = [str(word) for option in options.items() for word in option]
        argv = self.box.enter(sys.executable, "-m", self._module, *words, *more)
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        environment.pop(VARIABLE, None)
        if fault:
            environment[VARIABLE] = fault
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(argv, stdout=log, stderr=log, env=environment)

    async def start(self, *more: str, fault: str = "") -> None:
        """Start a daemon and wait until it serves."""
        self.launch(*more, fault=fault)
        await until(self._serves, _START_S)

    async def _serves(self) -> bool:
        assert self._daemon is not None
        assert self._daemon.poll() is None, self.tail()
        with contextlib.suppress(OSError):
            return (await self.call("GET", "/health"))[0] == 200
        return False

    async def stop(self) -> int:
        """End the daemon in order; its exit status."""
        os.kill(self.daemon_pid, signal.SIGTERM)
        return await self.wait_end()

    async def kill(self) -> None:
        """SIGKILL, as a crash."""
        os.kill(self.daemon_pid, signal.SIGKILL)
        await self.wait_end()

    async def wait_end(self) -> int:
        """Wait for the daemon's end; its exit status, negative for a signal."""
        assert self._daemon is not None
        status = await asyncio.to_thread(self._daemon.wait, _START_S)
        self._daemon = None
        return status

    def tail(self) -> str:
        """The daemon's last words."""
        return self.log.read_text()[-4000:] if self.log.exists() else ""

    def close(self) -> None:
        """End everything and remove the directories."""
        self.box.close()
        if self._daemon is not None:
            self._daemon.wait()
        shutil.rmtree(self.folder)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        for name in self.group_names():
            asyncio.run(self._cgroups().remove(name))
        for root in self._cgroups().roots():
            for folder in (root / self.instance / "machines", root / self.instance):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    # -- what is left behind ------------------------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """Everything that exists of machines, in words; empty when there is none."""
        found = [f"process {line}" for line in self._processes()]
        namespaces = self.box.run("ip", "netns", "list").split()
        found += [f"namespace {name}" for name in namespaces if name.startswith(f"{self.instance}-")]
        links = self.box.run("ip", "-o", "link", "show").splitlines()
        found += [f"link {line}" for line in links if ": lo" not in line]
        found += [f"mount {line}" for line in self._observe_mounts() - self._mounts]
        found += [f"cgroup {name}" for name in self.group_names()]
        for kind, folder in (("machine", self.data / "machines"), ("run", self.run_dir)):
            if folder.exists():
                found += [f"{kind} directory {entry.name}" for entry in folder.iterdir() if entry.is_dir()]
        elements = json.loads(self.box.run("nft", "-j", "list", "ruleset"))["nftables"]
        maps = [entry["map"] for entry in elements if "map" in entry and entry["map"]["name"] == "machines"]
        found += [f"nft element {element}" for item in maps for element in item.get("elem", [])]
        return found

    async def wait_empty(self) -> list[str]:
        """What is left when the kernel has had its time to take network devices apart."""
        with contextlib.suppress(TimeoutError):
            await until(lambda: not self.leftovers(), 60)
        return self.leftovers()

    def _processes(self) -> list[str]:
        """Command lines inside the box that name our machines, or are those of a jailed VMM."""
        lines = self.box.run("ps", "-ww", "-eo", "pid=,args=").splitlines()
        return [line.strip() for line in lines if f"{self.data}/machines/" in line or "/firecracker --id " in line]

    def _observe_mounts(self) -> set[str]:
        return set(self.box.run("cat", "/proc/self/mounts").splitlines())

    def group_names(self) -> set[str]:
        """Machines that have control groups."""
        parents = [root / self.instance / "machines" for root in self._cgroups().roots()]
        return {entry.name for parent in parents if parent.is_dir() for entry in parent.iterdir() if entry.is_dir()}

    def _cgroups(self) -> Cgroups:
        return Cgroups(f"{self.instance}/machines", observe_mounts())

    # -- the client ---------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def exchange(
        self, method: str, target: str, fence: Fence | None = None, body: Body = None, headers=None
    ) -> AsyncIterator[Response]:
        """One request on a connection of its own."""
        connection = Connection(await open_unix(str(self.socket)))
        try:
            fields = {**(headers or {}), **(fence_headers(fence) if fence is not None else {})}
            yield await connection.request(method, target, headers=fields, body=body)
        finally:
            await connection.close()

    async def call(
        self, method: str, target: str, fence: Fence | None = None, body: Body = None, headers=None
    ) -> tuple[int, bytes]:
        """Status and whole body."""
        async with self.exchange(method, target, fence, body, headers) as response:
            return response.status, await response.read(256 << 20)

    async def ask(self, method: str, target: str, fence: Fence | None = None, body: Body = None, headers=None) -> bytes:
        """The body of a success; errors are raised as what they are."""
        status, content = await self.call(method, target, fence, body, headers)
        if status >= 400:
            raise parse_error(status, content)
        return content

    async def create(
        self, machine_id: str, fence: Fence | None, boot_timeout_ms: int = BOOT_MS, **spec: Any
    ) -> MachineBody:
        """Make a machine."""
        wanted = {"image": IMAGE, "memory_mib": 256, "disk_bytes": 1 << 30, "hostname": "box", **spec}
        body = json.dumps({"machine_id": machine_id, "spec": wanted, "boot_timeout_ms": boot_timeout_ms}).encode()
        return msgspec.json.decode(await self.ask("POST", "/machines", fence, body), type=MachineAnswer).machine

    async def machines(self) -> list[MachineBody]:
        """All of them."""
        return msgspec.json.decode(await self.ask("GET", "/machines"), type=MachineList).machines

    async def machine(self, machine_id: str) -> MachineBody:
        """One."""
        return msgspec.json.decode(await self.ask("GET", f"/machines/{machine_id}"), type=MachineAnswer).machine

    async def delete(self, machine_id: str, fence: Fence | None) -> None:
        """Remove a machine."""
        await self.ask("DELETE", f"/machines/{machine_id}", fence)


@contextlib.contextmanager
def emptied(host: Host) -> Iterator[None]:
    """At the end of a test nothing of machines may be left."""
    try:
        yield
        left = asyncio.run(host.wait_empty())
        assert not left, (left, host.tail())
    finally:
        host.close()


def make_jail_host(artefacts: Path, name: str, guests: Literal["qemu", "process"]) -> Host:
    """A host whose daemons run machines on Firecracker's fake; jails link files, so it is beside the artefacts."""
    host = Host(Box(), artefacts, name, where=artefacts)
    folder = host.folder / "programs"
    folder.mkdir()
    programs = install(folder, agent_path(), guests=guests)
    host.options = {
        "--driver": "firecracker",
        "--firecracker-binary": programs.firecracker,
        "--jailer-binary": programs.jailer,
    }
    return host


class Guest:
    """A running machine, as its user sees it."""

    def __init__(self, host: Host, machine_id: str, fence: Fence) -> None:
        self.host = host
        self.id = machine_id
        self.fence = fence

    def path(self, target: str) -> str:
        return f"/machines/{self.id}/guest{target}"

    async def ask(self, method: str, target: str, body: Body = None) -> bytes:
        """One request to the agent."""
        return await self.host.ask(method, self.path(target), self.fence, body)

    async def exec(self, *cmd: str, stdin: bytes | None = None, **more: Any) -> ExecResult:
        """Run a command."""
        encoded = base64.b64encode(stdin).decode() if stdin is not None else None
        request = ExecRequest(cmd=list(cmd), stdin_b64=encoded, **more)
        return msgspec.json.decode(await self.ask("POST", "/exec", msgspec.json.encode(request)), type=ExecResult)

    async def shell(self, text: str) -> str:
        """Run a shell command that must succeed; return its output."""
        result = await self.exec("sh", "-c", text)
        out, err = stdout_of(result), base64.b64decode(result.stderr_b64)
        assert result.exit_code == 0, (text, out, err)
        return out.decode()

    @asynccontextmanager
    async def frames(self, *cmd: str, **more: Any) -> AsyncIterator["Terminal"]:
        """An interactive command."""
        uri = f"ws://fuse{self.path('/exec')}"
        options = {"compression": None, "ping_interval": None, "max_size": 2 << 20}
        async with ws.unix_connect(
            str(self.host.socket), uri, additional_headers=fence_headers(self.fence), **options
        ) as socket:
            terminal = Terminal(socket)
            await terminal.send(FrameType.START, msgspec.json.encode(ExecRequest(cmd=list(cmd), **more)))
            yield terminal


class Terminal:
    """An open exec WebSocket."""

    def __init__(self, socket: ws.ClientConnection) -> None:
        self.socket = socket
        self.output = b""

    async def send(self, kind: FrameType, payload: bytes = b"") -> None:
        await self.socket.send(encode_frame(Frame(kind, payload)))

    async def receive(self) -> Frame:
        frame = decode_message(await self.socket.recv())
        if frame.type in (FrameType.STDOUT, FrameType.STDERR):
            self.output += frame.payload
        return frame

    async def read_until(self, words: bytes) -> None:
        """Read until the output contains some words."""
        try:
            async with asyncio.timeout(60):
                while words not in self.output:
                    await self.receive()
        except TimeoutError:
            raise AssertionError(f"no {words!r} in {self.output!r}") from None

    async def exit(self) -> Exit:
        """Read to the end."""
        async with asyncio.timeout(60):
            while (frame := await self.receive()).type is not FrameType.EXIT:
                assert frame.type is not FrameType.ERROR, frame.payload
        return msgspec.json.decode(frame.payload, type=Exit)


def stdout_of(result: ExecResult) -> bytes:
    return base64.b64decode(result.stdout_b64)


def make_fence(uid: str = "u1", incarnation: int = 1, action_seq: int = 1) -> Fence:
    return Fence(cluster="test", uid=uid, incarnation=incarnation, action_seq=action_seq)


async def until(condition: Any, timeout_s: float = 120.0) -> None:
    """Wait until a (possibly asynchronous) condition holds."""
    async with asyncio.timeout(timeout_s):
        while True:
            holds = condition()
            if asyncio.iscoroutine(holds):
                holds = await holds
            if holds:
                return
            await asyncio.sleep(0.05)


async def reason_of(asking: Any) -> str:
    """The reason of an error that must be raised."""
    try:
        value = await asking
    except Error as e:
        return e.reason
    raise AssertionError(f"no error, but {value!r}")
