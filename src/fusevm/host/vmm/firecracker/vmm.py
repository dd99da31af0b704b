"""One Firecracker process: its API, its sinks, its guest's streams, its end."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from fusevm.host import freezer
from fusevm.host.cgroup import has_run_out_of_memory
from fusevm.host.process import ProcessHandle
from fusevm.host.vmm.console import ConsoleLog, FifoReader
from fusevm.host.vmm.driver import BootPlan, VmmGone
from fusevm.host.vmm.exit_reason import LastWords, explain_exit
from fusevm.host.vmm.firecracker import staging
from fusevm.host.vmm.firecracker.calls import Call
from fusevm.host.vmm.firecracker.client import ApiClient, Fault
from fusevm.host.vmm.firecracker.exits import explain_status, is_for_people, parse_status
from fusevm.host.vmm.firecracker.jail import Inside, Jail
from fusevm.host.vmm.firecracker.overwatch import Patience, wait_hung
from fusevm.host.vmm.firecracker.readings import Lines, parse_line
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
#: How long the jailer and Firecracker may take to open the API; 12 ms are usual.
_START_S: Final = 60.0
_KEPT_OUTPUT: Final = 16 << 10
#: Told what a machine's metrics have added (`readings`).
Count = Callable[[Mapping[str, int]], None]


def pipe_of(plan: BootPlan) -> Path:
    """Named pipe of Firecracker's own output. Pure."""
    return plan.run_dir / "vmm.out"


class FirecrackerVmm:
    """A running (or just ended) Firecracker."""

    def __init__(
        self, plan: BootPlan, jail: Jail, inside: Inside, handle: ProcessHandle, *, count: Count, patience: Patience
    ) -> None:
        self._id = plan.machine_id
        self._jail = jail
        self._inside = inside
        self._uid = plan.confinement.uid
        self._cgroups = plan.confinement.cgroups
        self._handle = handle
        self._console = ConsoleLog(plan.console_log, plan.console_bytes)
        #: What is shown to people, and the log with all its levels.
        self._output, self._said = bytearray(), bytearray()
        self._count = count
        self._lines, self._log_lines = Lines(), Lines()
        self._patience = patience
        self._pipe = pipe_of(plan)
        self._readers: list[FifoReader] = []
        #: To the guest; they break with the VMM, and when it is let go.
        self._streams: set[GuestConnection] = set()
        self._api = ApiClient(jail.outside(inside.api), self._uid)
        self._killed = ""
        self._overseeing: asyncio.Task[None] | None = None
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
                stream = await connect_guest(socket, self._uid, AGENT_PORT)
            except SocketRefused:
                raise
            except OSError:
                await self._pause(pause_s)
                pause_s = min(2 * pause_s, _MAX_LOOK_S)
            else:
                self._streams.add(stream)
                stream.on_close = partial(self._streams.discard, stream)
                return stream

    async def pause(self) -> None:
        """Freeze the machine's control group: no API call, so that 1.16.1 keeps its vsock connections."""
        if self._handle.has_ended:
            raise VmmGone(await self.wait_exit())
        await freezer.freeze(self._cgroups)

    async def resume(self) -> None:
        """Thaw it."""
        if self._handle.has_ended:
            raise VmmGone(await self.wait_exit())
        await asyncio.to_thread(freezer.thaw, self._cgroups)

    async def wait_exit(self) -> str:
        """Return why the process ended once it has."""
        return await asyncio.shield(self._exit)

    async def kill(self) -> None:
        """SIGKILL, and return when the process is gone."""
        if not self._exit.done():
            await asyncio.to_thread(self._end, "killed by the daemon")
        await self.wait_exit()

    async def close(self) -> None:
        """Let go of it without ending it. Waiters of `wait_exit` get ConnectionError."""
        for task in (self._overseeing, self._watching):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        await self._release()
        if not self._exit.done():
            self._exit.set_exception(ConnectionError("the daemon let go of the VMM"))
            self._exit.exception()  # nobody has to be waiting

    # -- for the driver --------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Read what Firecracker and its guest say from now on. Raises OSError."""
        inside, outside = self._inside, self._jail.outside
        self._readers.append(FifoReader(self._pipe, self._on_output))
        pipes = ((inside.log, self._on_log), (inside.console, self._console.write), (inside.metrics, self._on_metrics))
        for path, on_data in pipes:
            self._readers.append(FifoReader(outside(path), on_data, uid=self._uid))

    def reattach(self) -> None:
        """Take up what an earlier daemon has left of the same run."""
        self._console.load_tail()
        try:
            self.listen()
        except OSError as e:
            _log.warning("adopted VMM cannot be heard", extra={"machine": self._id, "problem": str(e)})
        self.oversee()

    def oversee(self) -> None:
        """End the VMM if it comes to hang."""
        self._overseeing = asyncio.get_running_loop().create_task(self._oversee(), name=f"overwatch {self._id}")

    async def carry_out(self, calls: list[Call]) -> None:
        """Wait for the API and say all this. Raises BootFailed with the reason of the end, or of the refusal."""
        try:
            async with asyncio.timeout(_START_S):
                await self._until_api()
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
        """Wait for a first answer. Raises VmmGone, OSError."""
        while not self._handle.has_ended:
            try:
                await self._api.info()
            except (FileNotFoundError, ConnectionRefusedError):  # not made yet, or made and not listening yet
                await asyncio.sleep(_LOOK_S)
            else:
                return
        raise VmmGone(await self.wait_exit())

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

    async def _oversee(self) -> None:
        await wait_hung(self._ask, lambda: freezer.is_frozen(self._cgroups), self._patience)
        _log.error("the VMM hangs and is ended", extra={"machine": self._id, "limit_s": self._patience.limit_s})
        await asyncio.to_thread(self._end, f"the VMM hung: its API was silent for {self._patience.limit_s:g} s")

    async def _ask(self) -> None:
        """Any answer is a sign of life, also a refusal."""
        with contextlib.suppress(Fault):
            await self._api.send(Call("GET", "/"))

    def _end(self, reason: str) -> None:
        self._killed = self._killed or reason
        self._handle.send(signal.SIGKILL)
        with contextlib.suppress(OSError):  # it was fast, and its group is gone
            freezer.thaw(self._cgroups)  # where a frozen process cannot die (cgroup v1)

    async def _watch(self) -> None:
        """Wait for the end, hear the last words, and clean up."""
        status = await self._handle.wait()
        if self._overseeing is not None:
            self._overseeing.cancel()
        for reader in self._readers:
            reader.drain()
        if status is None:  # no child of ours
            status = parse_status(bytes(self._said))
        words = LastWords(
            status=status,
            # The only end that a guest can bring about; a panic and a triple fault are resets, too.
            shutdown="guest-reset" if status == 0 else "",
            killed=self._killed,
            meaning=explain_status(status),
            is_out_of_memory=await asyncio.to_thread(has_run_out_of_memory, self._cgroups),
            console=self._console.tail,
            output=bytes(self._output),
        )
        await self._release()
        await asyncio.to_thread(self._remove)
        if not self._exit.done():
            self._exit.set_result(explain_exit(words))

    def _remove(self) -> None:
        """What cannot be removed is left to the machine's own end: this one's must be told."""
        try:
            staging.remove(self._jail.base)
            self._pipe.unlink(missing_ok=True)
        except OSError as e:
            _log.warning("the jail is not removed", extra={"machine": self._id, "problem": str(e)})

    async def _release(self) -> None:
        await self._api.close()
        for stream in list(self._streams):
            await stream.close()
        for reader in self._readers:
            reader.close()
        self._console.close()
        self._handle.close()

    def _on_output(self, data: bytes) -> None:
        self._output += data
        del self._output[:-_KEPT_OUTPUT]
        self._console.write(data)

    def _on_log(self, data: bytes) -> None:
        self._said += data
        del self._said[:-_KEPT_OUTPUT]
        for line in self._log_lines.feed(data):
            if is_for_people(line):
                self._on_output(line + b"\n")

    def _on_metrics(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            if added := parse_line(line):
                self._count(added)
