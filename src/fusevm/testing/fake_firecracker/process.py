"""The `firecracker` program: its arguments, its API, its guest, its exit status."""

import argparse
import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

import msgspec

from fusevm.host.net.tap import attach_tap
from fusevm.testing.fake_firecracker.guests import Guest, Hardware, ProcessGuest, QemuGuest, StartFailed
from fusevm.testing.fake_firecracker.rules import VERSION, Answer, Rules
from fusevm.testing.fake_firecracker.server import ApiServer
from fusevm.testing.fake_firecracker.sinks import Serial, open_sink
from fusevm.testing.fake_firecracker.vsock import VsockServer
from fusevm.wire.streams import ByteStream

#: Exit statuses of the reference.
BAD_ARGUMENTS, GENERIC = 153, 1


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What the fake's installation decides."""

    guests: Literal["qemu", "process"]
    #: The agent's program, for guests that are processes.
    agent: Path


class Firecracker:
    """One microVM process; `root` is what it takes for `/`."""

    def __init__(self, arguments: argparse.Namespace, root: Path, setup: Setup) -> None:
        self._root = root
        self._setup = setup
        self._api_path = arguments.api_sock
        self._rules = Rules(arguments.id)
        self._guest: Guest | None = None
        self._serial: Serial | None = None
        self._log = -1
        self._tap: int | None = None
        self._servers: list[asyncio.Server] = []
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until the guest ends; the exit status."""
        self._servers.append(await ApiServer(self._decide).start(self._short(self._api_path)))
        status = await self._ended
        self._say(f"Firecracker exiting successfully. exit_code={status}" if status == 0 else "Firecracker exiting")
        return status

    # -- requests -------------------------------------------------------------------------------------------------

    async def _decide(self, method: str, path: str, content: bytes) -> Answer:
        before = (self._rules.state, dict(self._rules.config))
        answer = self._rules.answer(method, path, content)
        self._say(f"The API server received a {method} request on {path}. {answer.status}")
        try:
            await self._prepare(path, answer)
            await self._carry_out(answer.effect)
        except (OSError, StartFailed) as error:
            self._rules.state, self._rules.config = before
            return Answer(400, {"fault_message": f"{path.strip('/')}: {error}"})
        return answer

    async def _prepare(self, path: str, answer: Answer) -> None:
        """What an accepted configuration takes hold of at once: sockets, taps, files."""
        if answer.status != 204:
            return
        body = self._rules.config.get(path, {})
        if path == "/vsock":
            bridge = VsockServer(self._connect, lambda: self._rules.is_deaf)
            self._servers.append(await bridge.start(self._short(body["uds_path"])))
        elif path.startswith("/network-interfaces/"):
            self._tap = attach_tap(body["host_dev_name"])
        elif path.startswith("/drives/"):
            flags = os.O_RDONLY if body.get("is_read_only") else os.O_RDWR
            os.close(os.open(self._outside(body["path_on_host"]), flags))
        elif path == "/boot-source":
            for field in ("kernel_image_path", "initrd_path"):
                if field in body:
                    os.close(os.open(self._outside(body[field]), os.O_RDONLY))

    async def _carry_out(self, effect: str) -> None:
        match effect:
            case "/logger":
                self._log = open_sink(self._outside(self._rules.config["/logger"]["log_path"]))
            case "/serial":
                body = self._rules.config["/serial"]
                self._serial = Serial(open_sink(self._outside(body["serial_out_path"])), body.get("rate_limiter"))
            case "start":
                self._guest = await self._start()
                self._waiting = asyncio.ensure_future(self._wait(self._guest))
            case "pause" if self._guest is not None:
                await self._guest.pause()
            case "resume" if self._guest is not None:
                await self._guest.resume()
            case "ctrl-alt-del" if self._guest is not None:
                await self._guest.reset()

    # -- the guest ------------------------------------------------------------------------------------------------

    async def _start(self) -> Guest:
        hardware = self._hardware()
        folder = self._outside("/run")
        if self._setup.guests == "process":
            return await ProcessGuest.start(self._setup.agent, hardware, folder)
        return await QemuGuest.start(hardware, folder, self._write_serial)

    def _hardware(self) -> Hardware:
        config = self._rules.config
        boot, machine = config["/boot-source"], config.get("/machine-config", {})
        drives = [body for path, body in config.items() if path.startswith("/drives/")]
        nics = [body for path, body in config.items() if path.startswith("/network-interfaces/")]
        readonly = [one for one in drives if one.get("is_read_only")]
        writable = [one for one in drives if not one.get("is_read_only")]
        return Hardware(
            cpus=machine.get("vcpu_count", 1),
            memory_mib=machine.get("mem_size_mib", 128),
            kernel=self._outside(boot["kernel_image_path"]),
            initramfs=self._outside(boot["initrd_path"]),
            boot_args=boot.get("boot_args", ""),
            image=self._outside(readonly[0]["path_on_host"]) if readonly else None,
            overlay=self._outside(writable[0]["path_on_host"]) if writable else None,
            tap=self._tap,
            mac=nics[0].get("guest_mac", "") if nics else "",
        )

    async def _wait(self, guest: Guest) -> None:
        # A guest that switches itself off, instead of resetting, leaves an x86 VMM running.
        if await guest.wait() and not self._ended.done():
            self._ended.set_result(0)

    async def _connect(self) -> ByteStream:
        if self._guest is None:
            raise ConnectionRefusedError("the microVM does not run")
        return await self._guest.connect()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _outside(self, path: str) -> Path:
        return self._root / path.removeprefix("/")

    def _short(self, path: str) -> str:
        """A socket's path has 107 bytes; inside a real jail it is short by itself."""
        return os.path.relpath(self._outside(path), Path.cwd())

    def _write_serial(self, data: bytes) -> None:
        if self._serial is not None:
            self._serial.write(data)

    def _say(self, text: str) -> None:
        if self._log >= 0:
            with contextlib.suppress(OSError):
                os.write(self._log, f"[{self._rules.state}] {text}\n".encode())


class _Parser(argparse.ArgumentParser):
    """Ends as the reference does for arguments it does not know."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_ARGUMENTS, f"Arguments parsing error: {message}\n")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The program's arguments. Exits for those that it does not know."""
    parser = _Parser(prog="firecracker", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"Firecracker v{VERSION}")
    parser.add_argument("--id", default="anonymous-instance")
    parser.add_argument("--api-sock", default="/run/firecracker.socket")
    for name in ("--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us"):
        parser.add_argument(name)
    return parser.parse_args(words)


def serve(arguments: argparse.Namespace, root: Path, setup: Setup) -> int:
    """Run one process; the exit status."""
    os.chdir(root)

    async def main() -> int:
        return await Firecracker(arguments, root, setup).run()

    try:
        return asyncio.run(main())
    except OSError as error:
        print(f"Failed to open the API socket: {error}")
        return GENERIC
