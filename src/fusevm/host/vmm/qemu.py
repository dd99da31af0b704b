"""The `qemu` driver: machines on QEMU's microvm, with KVM or in software emulation.

QEMU is started with three sockets on which the daemon already listens and to which it is connected: the guest channel,
the control socket and the console. They stay in the run directory, so that a restarted daemon connects again to the
same paths. QEMU accepts one client on each. What a VMM has in its run directory is removed when its end is noticed.
"""

import asyncio
import contextlib
import logging
import os
import signal
import stat
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec

from fusevm.host.cgroup import has_run_out_of_memory
from fusevm.host.channel import GuestChannel, GuestStream, TooManyStreams, connect_unix
from fusevm.host.process import ProcessHandle, command_line_of
from fusevm.host.vmm.console import ConsoleLog, ConsoleReader, PipeReader, last_lines
from fusevm.host.vmm.driver import BootPlan, VmmGone
from fusevm.host.vmm.exit_reason import LastWords, explain_exit
from fusevm.host.vmm.launch import (
    Launch,
    Socket,
    check_socket_path,
    find_program,
    open_output,
    open_socket,
    start_in_thread,
)
from fusevm.host.vmm.qemu_args import Acceleration, Accelerator, Descriptors, render_command_line
from fusevm.host.vmm.qmp import Event, Qmp, QmpError
from fusevm.host.vmm.tsc import ensure_tsc_khz
from fusevm.model.errors import BootFailed, NotSupported, Timeout
from fusevm.model.machine import VmmProcess

_log = logging.getLogger(__name__)
PROGRAM: Final = "qemu-system-x86_64"
REMEDY: Final = "install it with `apt-get install qemu-system-x86`"
_KVM: Final = Path("/dev/kvm")
#: How long the last words of an ended VMM may take to arrive; they are in the sockets already.
_LAST_WORDS_S: Final = 2.0
#: A channel that broke because the VMM ended: how long its end may take to be seen.
_END_SEEN_S: Final = 1.0
#: How long QEMU may take to stop and flush its disks.
_ORDER_S: Final = 30.0


class RunFiles(msgspec.Struct, frozen=True):
    """What a VMM keeps in its run directory."""

    directory: Path

    @property
    def agent(self) -> Path:
        """Socket of the guest channel."""
        return self.directory / "agent.sock"

    @property
    def qmp(self) -> Path:
        """Control socket."""
        return self.directory / "qmp.sock"

    @property
    def console(self) -> Path:
        """Socket of the serial port."""
        return self.directory / "console.sock"

    @property
    def output(self) -> Path:
        """Named pipe of the VMM's own output."""
        return self.directory / "vmm.out"

    def check(self) -> None:
        """Raise PathTooLong when the sockets cannot be made."""
        for path in (self.agent, self.qmp, self.console):
            check_socket_path(path)

    def remove(self) -> None:
        """Remove them all. Idempotent."""
        for path in (self.agent, self.qmp, self.console, self.output):
            with contextlib.suppress(OSError):
                path.unlink()


class QemuVmm:
    """A running (or just ended) QEMU."""

    def __init__(self, plan: BootPlan, handle: ProcessHandle) -> None:
        self._id = plan.machine_id
        self._files = RunFiles(plan.run_dir)
        self._cgroups = plan.confinement.cgroups
        self._handle = handle
        self._log = ConsoleLog(plan.console_log, plan.console_bytes)
        self._output = bytearray()
        self._channel = GuestChannel(self._files.agent)
        self._console: ConsoleReader | None = None
        self._pipe: PipeReader | None = None
        self._qmp: Qmp | None = None
        self._shutdown = ""
        self._killed = ""
        loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[str] = loop.create_future()
        self._watching = loop.create_task(self._watch(), name=f"vmm {self._id}")
        self._checking: asyncio.Task[None] | None = None

    @property
    def process(self) -> VmmProcess:
        """Identity that survives a restart of the daemon."""
        return self._handle.identity

    @property
    def channel(self) -> GuestChannel:
        """The guest channel, for its counters and for tests."""
        return self._channel

    @property
    def qmp(self) -> Qmp | None:
        """The control socket; None when it could not be reached."""
        return self._qmp

    async def open_stream(self) -> GuestStream:
        """Open a stream to the agent; waits for the guest to serve. Raises VmmGone when the VMM ends meanwhile."""
        try:
            return await self._open_stream()
        except TooManyStreams:
            raise
        except ConnectionError:
            # The connection may have broken before this call, or by the guest's fault: one new epoch is worth a try.
            return await self._open_stream()

    async def wait_ready(self) -> None:
        """Wait until the guest agent has answered on the channel. Raises VmmGone."""
        try:
            await self._channel.wait_ready()
        except ConnectionError as e:
            raise await self._why(e) from e

    async def pause(self) -> None:
        """Stop the virtual CPUs; what the guest has written to its disks is with the host's kernel then."""
        await self._order("stop")

    async def resume(self) -> None:
        """Let them go on."""
        await self._order("cont")

    async def wait_exit(self) -> str:
        """Return why the process ended once it has."""
        return await asyncio.shield(self._exit)

    async def kill(self) -> None:
        """SIGKILL, and return when the process is gone."""
        await self._kill("killed by the daemon")

    async def close(self) -> None:
        """Let go of it without ending it. Waiters of `wait_exit` get ConnectionError."""
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching
        await self._release()
        if not self._exit.done():
            self._exit.set_exception(ConnectionError("the daemon let go of the VMM"))
            self._exit.exception()  # nobody has to be waiting

    # -- for the driver --------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Read what QEMU says from now on.

        To be called while the caller still holds the pipe's other end: a pipe that neither has open forgets the last
        words of a QEMU that ended at once. Raises OSError.
        """
        self._pipe = PipeReader(self._files.output, self._on_output)

    async def attach(self, agent: Socket, qmp: Socket, console: Socket) -> None:
        """Take over the connections that were made before QEMU started."""
        await self._channel.connect(agent.client)
        self._console = await ConsoleReader.start(console.client, self._log)
        self._qmp = await Qmp.start(qmp.client, self._on_event)

    async def reattach(self) -> None:
        """Connect to a VMM of an earlier daemon, as far as its sockets are still there."""
        self._log.load_tail()
        try:
            self.listen()
            self._console = await ConsoleReader.start(await connect_unix(self._files.console), self._log)
            self._qmp = await Qmp.start(await connect_unix(self._files.qmp), self._on_event)
            await self._channel.connect()
        except OSError as e:
            _log.warning("adopted VMM is not fully reachable", extra={"machine": self._id, "problem": str(e)})

    async def wait_started(self) -> None:
        """Wait until QEMU has made its devices and read the kernel. Raises BootFailed."""
        if self._qmp is not None:
            outcomes: list[asyncio.Future[Any]] = [self._qmp.ready, self._exit]
            await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
            if self._qmp.ready.done() and self._qmp.ready.exception() is None:
                return
        raise BootFailed(id=self._id, problem=await self.wait_exit())

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _open_stream(self) -> GuestStream:
        if self._handle.has_ended:
            raise VmmGone(await self.wait_exit())
        try:
            return await self._channel.open_stream()
        except TooManyStreams:
            raise
        except ConnectionError as e:
            raise await self._why(e) from e

    async def _why(self, error: ConnectionError) -> ConnectionError:
        """Return the better explanation of a broken channel: that of the VMM's end, if it is one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SEEN_S):
                return VmmGone(await self.wait_exit())
        return error

    async def _order(self, command: str) -> None:
        if self._qmp is None:
            raise NotSupported(feature="Pausing a machine whose control socket is gone")
        try:
            async with asyncio.timeout(_ORDER_S):
                await self._qmp.execute(command)
        except ConnectionError as e:
            raise await self._why(e) from e
        except TimeoutError as e:
            raise Timeout(what=f"`{command}` of {self._id}", limit_s=round(_ORDER_S)) from e

    async def _kill(self, reason: str) -> None:
        if not self._exit.done():
            self._killed = self._killed or reason
            self._handle.send(signal.SIGKILL)
        await self.wait_exit()

    async def _watch(self) -> None:
        """Wait for the end, hear the last words, and clean up."""
        status = await self._handle.wait()
        if self._console is not None:
            self._console.drain()
        parts = [part.ended for part in (self._qmp, self._console, self._pipe) if part is not None]
        if parts:
            await asyncio.wait(parts, timeout=_LAST_WORDS_S)
        words = LastWords(
            status=status,
            shutdown=self._shutdown,
            killed=self._killed,
            is_out_of_memory=await asyncio.to_thread(has_run_out_of_memory, self._cgroups),
            console=self._log.tail,
            output=bytes(self._output),
        )
        await self._release()
        self._files.remove()
        if not self._exit.done():
            self._exit.set_result(explain_exit(words))

    async def _release(self) -> None:
        """Close every connection and descriptor."""
        await self._channel.close()
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.wait({self._checking})
        if self._qmp is not None:
            await self._qmp.close()
        if self._console is not None:
            self._console.close()
            await self._console.ended
        if self._pipe is not None:
            self._pipe.close()
        self._log.close()
        self._handle.close()

    def _on_output(self, data: bytes) -> None:
        self._output += data
        del self._output[: -(16 << 10)]
        self._log.write(data)

    def _on_event(self, event: Event) -> None:
        if event.name == "SHUTDOWN":
            self._shutdown = str(event.data.get("reason", "unknown"))
        elif event.name == "STOP" and self._checking is None:
            self._checking = asyncio.get_running_loop().create_task(self._check_stop(), name=f"stop {self._id}")

    async def _check_stop(self) -> None:
        """End a machine that its accelerator could not go on with: QEMU would keep it stopped for ever."""
        try:
            if self._qmp is None or (await self._qmp.execute("query-status"))["status"] != "internal-error":
                return
        except (ConnectionError, QmpError):
            return
        finally:
            self._checking = None
        lines = last_lines(bytes(self._output), count=100, limit=1 << 14).splitlines()
        said = next((line for line in lines if "error" in line), "internal error")
        self._killed = f"the VMM could not go on: {said}"
        self._handle.send(signal.SIGKILL)


class QemuDriver:
    """Starts and finds QEMU processes."""

    name = "qemu"

    def __init__(
        self, *, accelerator: Accelerator = "tcg", program: str = PROGRAM, cache_dir: Path | None = None
    ) -> None:
        self.accelerator: Accelerator = accelerator
        self._program = program
        self._cache_dir = cache_dir
        self._acceleration: Acceleration | None = None

    async def boot(self, plan: BootPlan) -> QemuVmm:
        """Start QEMU; returns when it runs the guest, before that is up. The console log stays also on failure.

        Raises VmmMissing, BootFailed, PathTooLong; nothing else is left then.
        """
        program = find_program(self._program, REMEDY)
        files = RunFiles(plan.run_dir)
        files.check()
        acceleration = await self._ensure_acceleration()
        async with AsyncExitStack() as undo:
            undo.callback(files.remove)
            sockets = [_open(undo, path) for path in (files.agent, files.qmp, files.console)]
            agent, qmp, console = sockets
            with ExitStack() as passed:  # what is QEMU's alone once it runs
                for end in sockets:
                    passed.callback(end.listener.close)
                output = open_output(files.output)
                passed.callback(os.close, output)
                descriptors = Descriptors(
                    agent=agent.listener.fileno(),
                    qmp=qmp.listener.fileno(),
                    console=console.listener.fileno(),
                    tap=plan.nic.tap_fd if plan.nic is not None else None,
                )
                argv = render_command_line(program, plan, acceleration, descriptors)
                launch = _launch(argv, plan, descriptors, output, acceleration.kind)
                handle = ProcessHandle.of_child(await start_in_thread(launch))
                vmm = QemuVmm(plan, handle)
                undo.push_async_callback(_discard, vmm)
                vmm.listen()
            await vmm.attach(agent, qmp, console)
            await vmm.wait_started()
            undo.pop_all()
            return vmm

    async def adopt(self, plan: BootPlan, process: VmmProcess) -> QemuVmm | None:
        """Take over a QEMU of an earlier daemon; None when exactly that process no longer runs this machine."""
        handle = ProcessHandle.find(process)
        if handle is None:
            return None
        if plan.machine_id not in command_line_of(process.pid):
            handle.close()
            return None
        vmm = QemuVmm(plan, handle)
        await vmm.reattach()
        return vmm

    async def _ensure_acceleration(self) -> Acceleration:
        if self._acceleration is None:
            khz = await ensure_tsc_khz(self._cache_dir) if self.accelerator == "tcg" else 0
            self._acceleration = Acceleration(kind=self.accelerator, tsc_khz=khz)
        return self._acceleration


def _open(undo: AsyncExitStack, path: Path) -> Socket:
    ends = open_socket(path)
    undo.callback(ends.client.close)
    return ends


def _launch(argv: list[str], plan: BootPlan, descriptors: Descriptors, output: int, kind: Accelerator) -> Launch:
    sockets = (descriptors.agent, descriptors.qmp, descriptors.console)
    return Launch(
        argv=argv,
        pass_fds=sockets if descriptors.tap is None else (*sockets, descriptors.tap),
        output_fd=output,
        netns=plan.nic.netns if plan.nic is not None else None,
        is_cut_off=plan.is_cut_off,
        confinement=plan.confinement,
        groups=_kvm_groups() if kind == "kvm" else (),
    )


def _kvm_groups() -> tuple[int, ...]:
    """Return the group that may use KVM, if it is a group's."""
    with contextlib.suppress(OSError):
        status = _KVM.stat()
        if status.st_mode & stat.S_IRGRP and status.st_mode & stat.S_IWGRP:
            return (status.st_gid,)
    return ()


async def _discard(vmm: QemuVmm) -> None:
    await vmm.kill()
    await vmm.close()
