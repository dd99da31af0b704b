"""The `firecracker` program: its arguments, its API, its guest, its exit status. It runs in its jail."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NoReturn

import msgspec

from fusevm.host.net.tap import attach_tap
from fusevm.testing.fake_firecracker.guests import Guest, Hardware, ProcessGuest, QemuGuest, StartFailed
from fusevm.testing.fake_firecracker.rules import Answer, Rules
from fusevm.testing.fake_firecracker.server import ApiServer
from fusevm.testing.fake_firecracker.sinks import Counts, Log, Serial, open_sink
from fusevm.testing.fake_firecracker.vsock import VsockServer
from fusevm.wire.streams import ByteStream

#: Exit statuses of the reference.
BAD_ARGUMENTS, GENERIC = 153, 1
#: Seconds between two lines of metrics.
_METRICS_S: Final = 60


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What the fake's installation decides."""

    guests: Literal["qemu", "process"]
    #: The agent's program, for guests that are processes.
    agent: Path


class Firecracker:
    """One microVM process."""

    def __init__(self, arguments: argparse.Namespace, setup: Setup) -> None:
        self._setup = setup
        self._api_path: str = arguments.api_sock
        self._rules = Rules(arguments.id)
        if arguments.metadata:
            self._rules.metadata = json.loads(Path(arguments.metadata).read_bytes())
        self._guest: Guest | None = None
        self._log = Log(arguments.id)
        self._counts = Counts()
        self._serial: Serial | None = None
        self._tap: int | None = None
        self._servers: list[asyncio.Server] = []
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting: list[asyncio.Future[None]] = []

    async def run(self) -> int:
        """Serve until the guest ends; the exit status."""
        self._servers.append(await ApiServer(self._decide).start(self._api_path))
        status = await self._ended
        self._log.write("Info", f"Firecracker exiting successfully. exit_code={status}")
        self._counts.flush()
        return status

    # -- requests -------------------------------------------------------------------------------------------------

    async def _decide(self, method: str, path: str, content: bytes) -> Answer:
        before = (self._rules.state, dict(self._rules.config))
        answer = self._rules.answer(method, path, content)
        self._log.write("Info", f"The API server received a {method.capitalize()} request on {path!r}.")
        try:
            await self._prepare(path, answer)
            await self._carry_out(answer.effect)
        except (OSError, StartFailed) as error:
            self._rules.state, self._rules.config = before
            answer = Answer(400, {"fault_message": f"{path.strip('/')}: {error}"})
        section = {"GET": "get_api_requests", "PATCH": "patch_api_requests"}.get(method, "put_api_requests")
        self._counts.add(
            section, f"{path.split('/')[1] or 'instance_info'}_{'count' if answer.status < 300 else 'fails'}"
        )
        if answer.status >= 300:
            self._log.write("Error", f"Received Error. Status code: {answer.status}. Message: {answer.body}")
        return answer

    async def _prepare(self, path: str, answer: Answer) -> None:
        """What an accepted configuration takes hold of at once: sockets, taps, files."""
        if answer.status != 204:
            return
        body = self._rules.config.get(path, {})
        if path == "/vsock":
            bridge = VsockServer(self._connect, lambda: self._rules.is_deaf)
            self._servers.append(await bridge.start(body["uds_path"]))
        elif path.startswith("/network-interfaces/"):
            self._tap = attach_tap(body["host_dev_name"])
        elif path.startswith("/drives/"):
            os.close(os.open(body["path_on_host"], os.O_RDONLY if body.get("is_read_only") else os.O_RDWR))
        elif path == "/boot-source":
            for field in ("kernel_image_path", "initrd_path"):
                if field in body:
                    os.close(os.open(body[field], os.O_RDONLY))

    async def _carry_out(self, effect: str) -> None:
        config = self._rules.config
        match effect:
            case "/logger":
                self._log.open(Path(config[effect]["log_path"]), config[effect].get("level", "Info"))
            case "/metrics":
                self._counts.open(Path(config[effect]["metrics_path"]))
                self._waiting.append(asyncio.ensure_future(self._keep_counting()))
            case "/serial":
                sink = open_sink(Path(config[effect]["serial_out_path"]))
                self._serial = Serial(sink, config[effect].get("rate_limiter"), self._counts)
            case "flush":
                self._counts.flush()
            case "start":
                self._guest = await self._start()
                self._waiting.append(asyncio.ensure_future(self._wait(self._guest)))
            case "pause" if self._guest is not None:
                await self._guest.pause()
            case "resume" if self._guest is not None:
                await self._guest.resume()
            case "ctrl-alt-del" if self._guest is not None:
                await self._guest.reset()

    async def _keep_counting(self) -> None:
        while True:
            self._counts.flush()
            await asyncio.sleep(_METRICS_S)

    # -- the guest ------------------------------------------------------------------------------------------------

    async def _start(self) -> Guest:
        hardware, folder = self._hardware(), Path("/run")
        if self._setup.guests == "process":
            return await ProcessGuest.start(self._setup.agent, hardware, folder)
        return await QemuGuest.start(hardware, folder, self._write_serial)

    def _hardware(self) -> Hardware:
        config = self._rules.config
        boot, machine = config["/boot-source"], config.get("/machine-config", {})
        drives = [body for path, body in config.items() if path.startswith("/drives/")]
        nics = [body for path, body in config.items() if path.startswith("/network-interfaces/")]
        readonly = [Path(one["path_on_host"]) for one in drives if one.get("is_read_only")]
        writable = [Path(one["path_on_host"]) for one in drives if not one.get("is_read_only")]
        return Hardware(
            cpus=machine.get("vcpu_count", 1),
            memory_mib=machine.get("mem_size_mib", 128),
            kernel=Path(boot["kernel_image_path"]),
            initramfs=Path(boot["initrd_path"]),
            boot_args=boot.get("boot_args", ""),
            image=readonly[0] if readonly else None,
            overlay=writable[0] if writable else None,
            tap=self._tap,
            mac=nics[0].get("guest_mac", "") if nics else "",
        )

    async def _wait(self, guest: Guest) -> None:
        # A guest that switches itself off, instead of resetting, leaves an x86 VMM running.
        if await guest.wait() and not self._ended.done():
            self._ended.set_result(0)

    async def _connect(self) -> ByteStream:
        if self._guest is None or "/vsock" not in self._rules.config:
            raise ConnectionRefusedError("the microVM does not run")
        stream = await self._guest.connect()
        self._counts.add("vsock", "conns_added")
        return stream

    def _write_serial(self, data: bytes) -> None:
        if self._serial is not None:
            self._serial.write(data)
        else:
            with contextlib.suppress(OSError):
                os.write(sys.stdout.fileno(), data)


class _Parser(argparse.ArgumentParser):
    """Ends as the reference does for arguments it does not know."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_ARGUMENTS, f"Arguments parsing error: {message}\n")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The program's arguments. Exits for those that it does not know."""
    parser = _Parser(prog="firecracker", allow_abbrev=False)
    parser.add_argument("--id", default="anonymous-instance")
    parser.add_argument("--api-sock", default="/run/firecracker.socket")
    for name in ("--metadata", "--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us"):
        parser.add_argument(name)
    return parser.parse_args(words)


def main(words: Sequence[str], setup: Setup) -> int:
    """Run one process; the exit status."""
    arguments = parse(words)
    os.chdir("/")
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"  # for the fake's own children; the jailer has cleared it

    async def run() -> int:
        return await Firecracker(arguments, setup).run()

    try:
        return asyncio.run(run())
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return GENERIC
