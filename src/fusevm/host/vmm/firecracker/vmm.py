"""One Firecracker process: its API, its sinks, its guest's streams, its end."""

import asyncio
import contextlib
import logging
import signal
from pathlib import Path
from typing import Final

from fusevm.host.cgroup import has_run_out_of_memory
from fusevm.host.process import ProcessHandle
from fusevm.host.vmm.console import ConsoleLog, FifoReader
from fusevm.host.vmm.driver import BootPlan
from fusevm.host.vmm.exit_reason import LastWords, explain_exit
from fusevm.host.vmm.firecracker import staging
from fusevm.host.vmm.firecracker.calls import Call
from fusevm.host.vmm.firecracker.client import ApiClient, Fault
from fusevm.host.vmm.firecracker.jail import Inside, Jail
from fusevm.host.vmm.firecracker.sockets import GuestConnection, SocketRefused, connect_guest
from fusevm.model.errors import BootFailed
from fusevm.model.machine import VmmProcess

_log = logging.getLogger(__name__)
#: Port on which the agent listens (guest/internal/vsock).
AGENT_PORT: Final = 1024
#: How often it is looked for what no event tells: the API's socket, and an agent that listens.
_LOOK_S, _MAX_LOOK_S = 0.002, 0.05
#: A connection that broke because the VMM ended: how long its end may take to be seen.
_END_SEEN_S: Final = 1.0
_KEPT_OUTPUT: Final = 16 << 10
#: What Firecracker logs when its guest has asked for a reset, the only end that a guest of ours can ask for.
_ENDED_WELL: Final = b"exit_code=0"


def pipe_of(plan: BootPlan) -> Path:
    """Named pipe of Firecracker's own output. Pure."""
    return plan.run_dir / "vmm.out"


class VmmGone(ConnectionError):
    """The VMM has ended; the text says why."""


class FirecrackerVmm:
    """A running (or just ended) Firecracker."""

    def __init__(self, plan: BootPlan, jail: Jail, inside: Inside, handle: ProcessHandle) -> None:
        self._id = plan.machine_id
        self._jail = jail
        self._inside = inside
        self._uid = plan.confinement.uid
        self._cgroups = plan.confinement.cgroups
        self._handle = handle
        self._console = ConsoleLog(plan.console_log, plan.console_bytes)
        self._output = bytearray()
        self._pipe = pipe_of(plan)
        self._readers: list[FifoReader] = []
        self._api = ApiClient(jail.outside(inside.api), self._uid)
        self._killed = ""
        loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[str] = loop.create_future()
        self._watching = loop.create_task(self._watch(), name=f"vmm {self._id}")

    @property
    def process(self) -> VmmProcess:
        """Identity that survives a restart of the daemon."""
        return self._handle.identity

    @property
    def api(self) -> ApiClient:
        """The API socket."""
        return self._api

    async def open_stream(self) -> GuestConnection:
        """Open a stream to the agent; waits for the guest to serve. Raises VmmGone when the VMM ends meanwhile."""
        pause_s = _LOOK_S
        socket = self._jail.outside(self._inside.vsock)
        while True:
            if self._handle.has_ended:
                raise VmmGone(await self.wait_exit())
            try:
                return await connect_guest(socket, self._uid, AGENT_PORT)
            except SocketRefused:
                raise
            except OSError:
                await self._pause(pause_s)
                pause_s = min(2 * pause_s, _MAX_LOOK_S)

    async def wait_exit(self) -> str:
        """Return why the process ended once it has."""
        return await asyncio.shield(self._exit)

    async def kill(self) -> None:
        """SIGKILL, and return when the process is gone."""
        if not self._exit.done():
            self._killed = self._killed or "killed by the daemon"
            self._handle.send(signal.SIGKILL)
        await self.wait_exit()

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
        """Read what Firecracker and its guest say from now on. Raises OSError."""
        inside, outside = self._inside, self._jail.outside
        self._readers = [
            FifoReader(self._pipe, self._on_output),
            FifoReader(outside(inside.log), self._on_output),
            FifoReader(outside(inside.console), self._console.write),
        ]

    def reattach(self) -> None:
        """Take up what an earlier daemon has left of the same run."""
        self._console.load_tail()
        try:
            self.listen()
        except OSError as e:
            _log.warning("adopted VMM cannot be heard", extra={"machine": self._id, "problem": str(e)})

    async def carry_out(self, calls: list[Call]) -> None:
        """Wait for the API and say all this. Raises BootFailed with the reason of the end, or of the refusal."""
        await self._until_api()
        try:
            for call in calls:
                await self._api.send(call)
        except Fault as fault:
            raise BootFailed(id=self._id, problem=str(fault)) from fault
        except TimeoutError as error:
            raise BootFailed(id=self._id, problem="its VMM does not answer") from error
        except OSError as error:
            raise BootFailed(id=self._id, problem=str(await self._why(error))) from error

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _until_api(self) -> None:
        socket = self._jail.outside(self._inside.api)
        while not socket.is_socket():
            if self._handle.has_ended:
                raise BootFailed(id=self._id, problem=await self.wait_exit())
            await asyncio.sleep(_LOOK_S)

    async def _pause(self, seconds: float) -> None:
        """Wait a little, but not beyond the end of the VMM."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wait_exit()

    async def _why(self, error: OSError) -> OSError:
        """Return the better explanation of a broken connection: that of the VMM's end, if it is one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SEEN_S):
                return VmmGone(await self.wait_exit())
        return error

    async def _watch(self) -> None:
        """Wait for the end, hear the last words, and clean up."""
        status = await self._handle.wait()
        for reader in self._readers:
            reader.drain()
        output = bytes(self._output)
        words = LastWords(
            status=status,
            shutdown="guest-reset" if status == 0 or (status is None and _ENDED_WELL in output) else "",
            killed=self._killed,
            is_out_of_memory=await asyncio.to_thread(has_run_out_of_memory, self._cgroups),
            console=self._console.tail,
            output=output,
        )
        await self._release()
        await asyncio.to_thread(self._remove)
        if not self._exit.done():
            self._exit.set_result(explain_exit(words))

    def _remove(self) -> None:
        staging.remove(self._jail)
        self._pipe.unlink(missing_ok=True)

    async def _release(self) -> None:
        await self._api.close()
        for reader in self._readers:
            reader.close()
        self._console.close()
        self._handle.close()

    def _on_output(self, data: bytes) -> None:
        self._output += data
        del self._output[:-_KEPT_OUTPUT]
