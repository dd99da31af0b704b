"""A VMM that is a small real process: the guest agent itself, started as a VMM is started.

The process is confined as QEMU is (user, control groups, namespace, session of its own), outlives the daemon, is
adopted by pid and start time, and its agent is the real one on the real channel. What it lacks is the machine: commands
run on the host, as the machine's user, and that its disk is held still is only said (`held_disk`). A machine with the
hostname `mute` never answers.

For tests of everything around the VMM, at a few megabytes and milliseconds each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from fusevm.host.channel import GuestChannel
from fusevm.host.images.initramfs import agent_path
from fusevm.host.process import ProcessHandle, command_line_of
from fusevm.host.vmm.driver import JAIL, BootPlan
from fusevm.host.vmm.exit_reason import LastWords, explain_exit
from fusevm.host.vmm.launch import Launch, check_socket_path, open_output, start_in_thread
from fusevm.model.errors import BootFailed
from fusevm.model.machine import VmmProcess
from fusevm.testing.held_disk import HeldDisk, HoldingStream

MUTE = "mute"
#: Beside the agent's socket: the machine's disk is held (`held_disk`).
HELD = "held"
#: A file of this name beside the disk makes the driver refuse to boot.
REFUSE = "refuse"
OVERHEAD_MIB = 16
_LISTENS_S = 60.0
_POLL_S = 0.005
#: The machine's id becomes a word of the command line, as it is one of every VMM's.
_NAMED = 'exec -a "$0" "$@"'


class AgentVmm:
    """A running (or just ended) agent process."""

    def __init__(self, plan: BootPlan, handle: ProcessHandle) -> None:
        self._socket = socket_of(plan)
        self._output = plan.run_dir / "vmm.out"
        self._disk = HeldDisk(self._socket.with_name(HELD))
        self._handle = handle
        self._channel = GuestChannel(self._socket)
        self._killed = ""
        loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[str] = loop.create_future()
        self._watching = loop.create_task(self._watch(), name=f"agent {plan.machine_id}")

    @property
    def process(self) -> VmmProcess:
        """Identity that survives a restart of the daemon."""
        return self._handle.identity

    @property
    def has_ended(self) -> bool:
        """True once the process has."""
        return self._handle.has_ended

    async def listens(self) -> bool:
        """Connect the channel, if somebody accepts already."""
        try:
            await self._channel.connect()
        except ConnectionError:
            return False
        return True

    async def open_stream(self) -> HoldingStream:
        """Open a stream to the agent. Raises ConnectionError."""
        return HoldingStream(await self._channel.open_stream(), self._disk)

    async def wait_exit(self) -> str:
        """Return why the process ended once it has."""
        return await asyncio.shield(self._exit)

    async def pause(self) -> None:
        """Stop the process where it is."""
        self._handle.send(signal.SIGSTOP)

    async def resume(self) -> None:
        """Let it go on."""
        self._handle.send(signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL, and return when the process is gone."""
        self._killed = self._killed or "killed by the daemon"
        self._handle.send(signal.SIGKILL)
        await self.wait_exit()

    async def close(self) -> None:
        """Let go of it without ending it."""
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching
        await self._channel.close()
        self._handle.close()
        if not self._exit.done():
            self._exit.set_exception(ConnectionError("the daemon let go of the VMM"))
            self._exit.exception()  # nobody has to be waiting

    async def _watch(self) -> None:
        status = await self._handle.wait()
        await self._channel.close()
        for path in (self._socket, self._output):
            path.unlink(missing_ok=True)
        words = LastWords(status=status, killed=self._killed, shutdown="guest-shutdown" if status == 0 else "")
        if not self._exit.done():
            self._exit.set_result(explain_exit(words))


class AgentDriver:
    """Starts and finds agent processes."""

    name = "agent"

    def __init__(self, agent: Path | None = None) -> None:
        self._agent = agent or agent_path()

    async def boot(self, plan: BootPlan) -> AgentVmm:
        """Start the process; returns when its socket is there. Raises BootFailed, PathTooLong."""
        check_socket_path(socket_of(plan))
        if plan.console_log.with_name(REFUSE).exists():
            raise BootFailed(id=plan.machine_id, problem="a test wants it so")
        await asyncio.to_thread(_make_folder, plan)
        output = await asyncio.to_thread(open_output, plan.run_dir / "vmm.out")
        # By descriptor: the machine's user may not be able to enter the folders on the way.
        program = os.open(self._agent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            launch = Launch(
                argv=_command_line(plan, f"/proc/self/fd/{program}"),
                pass_fds=(program,),
                output_fd=output,
                netns=plan.nic.netns if plan.nic is not None else None,
                confinement=plan.confinement,
            )
            handle = ProcessHandle.of_child(await start_in_thread(launch))
        finally:
            os.close(output)
            os.close(program)
        vmm = AgentVmm(plan, handle)
        try:
            await _wait_listening(plan, vmm)
        except BaseException:
            await asyncio.shield(_discard(vmm))
            raise
        return vmm

    async def adopt(self, plan: BootPlan, process: VmmProcess) -> AgentVmm | None:
        """Take over a process of an earlier daemon; None when exactly that one no longer runs this machine."""
        handle = ProcessHandle.find(process)
        if handle is None:
            return None
        if plan.machine_id not in command_line_of(process.pid):
            handle.close()
            return None
        return AgentVmm(plan, handle)


def socket_of(plan: BootPlan) -> Path:
    """Where the agent listens: in a folder of the machine's user, as a jail is."""
    return plan.console_log.parent / JAIL / "agent.sock"


def _make_folder(plan: BootPlan) -> None:
    folder = socket_of(plan).parent
    (folder / "fuse").mkdir(parents=True, exist_ok=True)
    socket_of(plan).unlink(missing_ok=True)
    fence = plan.confinement
    if fence.uid is not None and fence.gid is not None:
        for path in (folder, folder / "fuse"):
            os.chown(path, fence.uid, fence.gid)


def _command_line(plan: BootPlan, agent: str) -> list[str]:
    words = dict(word.partition("=")[::2] for word in plan.command_line.split())
    path = socket_of(plan)
    environment = [f"FUSED_NONCE={words['fuse.nonce']}", f"FUSED_FOLDER={path.parent / 'fuse'}"]
    program = ["/bin/sleep", "infinity", str(path)] if words.get("fuse.hostname") == MUTE else []
    return [
        *("/usr/bin/env", *environment),
        *("/bin/bash", "-c", _NAMED, plan.machine_id),
        *(program or [agent, "serve", "--mux", str(path)]),
    ]


async def _wait_listening(plan: BootPlan, vmm: AgentVmm) -> None:
    if f"fuse.hostname={MUTE}" in plan.command_line.split():
        return
    async with asyncio.timeout(_LISTENS_S):
        while not await vmm.listens():
            if vmm.has_ended:
                raise BootFailed(id=plan.machine_id, problem=await vmm.wait_exit())
            await asyncio.sleep(_POLL_S)


async def _discard(vmm: AgentVmm) -> None:
    await vmm.kill()
    await vmm.close()
