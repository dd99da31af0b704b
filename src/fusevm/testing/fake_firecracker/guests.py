"""What runs in the fake's machines: a real guest in QEMU, or the agent as an ordinary process."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from fusevm.host.channel import GuestChannel
from fusevm.host.vmm.driver import BootPlan, Nic
from fusevm.host.vmm.launch import open_socket
from fusevm.host.vmm.qemu_args import Acceleration, Descriptors, render_command_line
from fusevm.host.vmm.qmp import Event, Qmp
from fusevm.host.vmm.tsc import ensure_tsc_khz
from fusevm.wire.streams import ByteStream, open_unix

QEMU: Final = "/usr/bin/qemu-system-x86_64"
_PR_SET_PDEATHSIG: Final = 1
Write = Callable[[bytes], None]


class StartFailed(Exception):
    """The guest could not be started; the text is the fault's."""


class Guest(Protocol):
    """A started guest."""

    async def connect(self) -> ByteStream:
        """A stream to the agent. Raises ConnectionError at once when nobody listens."""
        ...

    async def wait(self) -> bool:
        """Return once it has ended: True for a reset that it asked for, False when it just stopped."""
        ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def reset(self) -> None: ...


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine is made of, with paths as the process sees them."""

    cpus: int
    memory_mib: int
    kernel: Path
    initramfs: Path
    boot_args: str
    image: Path | None
    overlay: Path | None
    #: Open descriptor.
    tap: int | None
    mac: str


class ProcessGuest:
    """The agent without a machine."""

    def __init__(self, process: asyncio.subprocess.Process, path: Path) -> None:
        self._process = process
        self._path = path

    @classmethod
    async def start(cls, agent: Path, hardware: Hardware, folder: Path) -> "ProcessGuest":
        """Start the agent's program; its nonce is on the kernel's command line."""
        words = dict(word.split("=", 1) for word in hardware.boot_args.split() if "=" in word)
        if not hardware.kernel.stat().st_size:
            raise StartFailed("Cannot load kernel due to invalid memory configuration or invalid kernel image")
        environment = {"FUSED_NONCE": words.get("fuse.nonce", ""), "FUSED_FOLDER": str(folder / "fuse")}
        (folder / "fuse").mkdir(mode=0o700, exist_ok=True)
        path = folder / "agent"
        process = await asyncio.create_subprocess_exec(
            agent, "serve", "--unix", str(path), env=environment | {"PATH": os.environ["PATH"]}, preexec_fn=die_with_us
        )
        return cls(process, path)

    async def connect(self) -> ByteStream:
        try:
            return await open_unix(str(self._path))
        except OSError as error:
            raise ConnectionRefusedError(str(error)) from error

    async def wait(self) -> bool:
        return await self._process.wait() == 0

    async def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    async def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def reset(self) -> None:
        self._process.terminate()


class QemuGuest:
    """A machine in software emulation."""

    def __init__(self, process: asyncio.subprocess.Process, channel: GuestChannel, qmp: Qmp) -> None:
        self._process = process
        self._channel = channel
        self._qmp = qmp
        self._is_reset = True
        self._ready = asyncio.ensure_future(channel.wait_ready())
        self._ready.add_done_callback(lambda done: done.cancelled() or done.exception())

    @classmethod
    async def start(cls, hardware: Hardware, folder: Path, console: Write) -> "QemuGuest":
        """Boot it; returns when QEMU has read kernel and disks. Raises StartFailed."""
        acceleration = Acceleration(kind="tcg", tsc_khz=await ensure_tsc_khz(folder))
        with ExitStack() as passed:
            ends = [open_socket(folder / name) for name in ("qemu-agent", "qemu-qmp", "qemu-console")]
            for end in ends:
                passed.callback(end.listener.close)
            numbers = [end.listener.fileno() for end in ends]
            descriptors = Descriptors(agent=numbers[0], qmp=numbers[1], console=numbers[2], tap=hardware.tap)
            argv = render_command_line(QEMU, _plan(hardware, folder), acceleration, descriptors)
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(*numbers, *([hardware.tap] if hardware.tap is not None else [])),
                preexec_fn=die_with_us,
            )
        asyncio.get_running_loop().create_task(_copy_console(ends[2].client, console), name="console")
        channel = GuestChannel(folder / "qemu-agent")
        await channel.connect(ends[0].client)
        guest: list[QemuGuest] = []

        def on_event(event: Event) -> None:
            # An x86 guest that switches itself off leaves the real VMM running, with nothing to run.
            if event.name == "SHUTDOWN" and guest:
                guest[0]._is_reset = event.data.get("reason") != "guest-shutdown"

        qmp = await Qmp.start(ends[1].client, on_event)
        made = cls(process, channel, qmp)
        guest.append(made)
        ended = asyncio.ensure_future(process.wait())
        outcomes: list[asyncio.Future[Any]] = [qmp.ready, ended]
        await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
        if ended.done() or qmp.ready.exception() is not None:
            await ended
            raise StartFailed("Cannot load kernel due to invalid memory configuration or invalid kernel image")
        ended.cancel()
        return made

    async def connect(self) -> ByteStream:
        if not self._ready.done() or self._ready.exception() is not None:
            raise ConnectionRefusedError("the agent does not listen yet")
        return await self._channel.open_stream()

    async def wait(self) -> bool:
        await self._process.wait()
        return self._is_reset

    async def pause(self) -> None:
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        await self._qmp.execute("cont")

    async def reset(self) -> None:
        await self._qmp.execute("system_reset")


def die_with_us() -> None:
    """Called in the child: whoever kills the fake has killed its guest."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _plan(hardware: Hardware, folder: Path) -> BootPlan:
    return BootPlan(
        machine_id="guest",
        cpus=hardware.cpus,
        memory_mib=hardware.memory_mib,
        kernel=hardware.kernel,
        initramfs=hardware.initramfs,
        command_line=hardware.boot_args,
        image=hardware.image,
        overlay=hardware.overlay,
        overlay_format="raw",
        run_dir=folder,
        console_log=folder / "unused",
        nic=Nic(tap_fd=hardware.tap, mac=hardware.mac) if hardware.tap is not None else None,
    )


async def _copy_console(connected: socket.socket, write: Write) -> None:
    loop = asyncio.get_running_loop()
    with connected, contextlib.suppress(OSError):
        while data := await loop.sock_recv(connected, 1 << 16):
            write(data)
