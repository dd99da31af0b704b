"""What the host daemon needs from a virtual machine monitor. Two implementations: `qemu`, and `firecracker`.

A driver knows processes, devices and the guest channel. It knows nothing of journals, tasks or the API.
"""

from pathlib import Path
from typing import Literal, Protocol

import msgspec

from fusevm.host.channel import AgentStream
from fusevm.model.machine import VmmProcess

#: What a driver keeps of a run beside the disk, in the machine's directory: the root directory of its VMM.
JAIL = "jail"
#: Drivers that have one of every machine that runs.
JAILERS = frozenset({"firecracker"})


class VmmGone(ConnectionError):
    """The VMM has ended; the text says why."""


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """What a device may do, on average over a second; 0: no limit."""

    bytes_per_s: int = 0
    ops_per_s: int = 0


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's network device."""

    #: Name of the tap in its network namespace; empty with `user_network`.
    tap: str = ""
    #: Open tap descriptor that the VMM inherits; None with `user_network`, or for a VMM that opens it by name.
    tap_fd: int | None = None
    mac: str = ""
    #: Options of QEMU's user network (`net.rootless`) when the daemon has no root; empty with a tap.
    user_network: str = ""
    #: Network namespace that the VMM process enters; None: the daemon's.
    netns: Path | None = None


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """How the VMM process is fenced in. All empty for a daemon without root."""

    uid: int | None = None
    gid: int | None = None
    #: Existing cgroup directories (one per v1 controller, or one v2 leaf) that the process joins before it execs.
    cgroups: tuple[Path, ...] = ()


class BootPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a driver needs to start one machine. All files exist and are readable by the confined uid."""

    machine_id: str
    cpus: int
    memory_mib: int
    kernel: Path
    initramfs: Path
    #: `fuse.*` parameters for the agent; the driver adds what kernel and VMM need.
    command_line: str
    #: Shared read-only root file system (ext4).
    image: Path | None = None
    #: Private writable disk (ext4).
    overlay: Path | None = None
    overlay_format: Literal["raw", "qcow2"] = "qcow2"
    #: Limit of each disk, image and overlay alike.
    disk_rate: Rate = Rate()
    #: Private directory of the machine for sockets and logs; its path is short (108-byte socket limit).
    run_dir: Path
    #: Where console and VMM output go, bounded by `console_bytes` (rotated, newest kept).
    console_log: Path
    console_bytes: int = 4 << 20
    #: Without one, a confined VMM has no network either.
    nic: Nic | None = None
    confinement: Confinement = Confinement()

    @property
    def is_cut_off(self) -> bool:
        """The VMM gets an empty network namespace: it was given none to enter, and has no business in the host's."""
        return self.nic is None and self.confinement.uid is not None


class Vmm(Protocol):
    """A running (or just ended) VMM process."""

    @property
    def process(self) -> VmmProcess:
        """Identity that survives a restart of the daemon."""
        ...

    async def open_stream(self) -> AgentStream:
        """Open a stream to the guest agent; waits until that serves.

        Raises ConnectionError; when the VMM has gone, its text is the reason that `wait_exit` returns.
        """
        ...

    async def pause(self) -> None:
        """Stop the machine where it is; returns when nothing of it runs. Idempotent; an adopted one stays paused.

        Streams stay open and are silent meanwhile. Raises VmmGone, NotSupported without a means to, Timeout.
        """
        ...

    async def resume(self) -> None:
        """Let a paused machine go on. Idempotent. Raises as `pause` does."""
        ...

    async def wait_exit(self) -> str:
        """Return why the process ended once it has (from QMP or the log, else `unknown`). Any number of callers."""
        ...

    async def kill(self) -> None:
        """SIGKILL, and return when the process is gone. Idempotent."""
        ...

    async def close(self) -> None:
        """Let go of it without ending it: the daemon stops, the machine runs on. Waiters get ConnectionError."""
        ...


class Driver(Protocol):
    """Starts and finds VMM processes."""

    @property
    def name(self) -> str: ...

    async def boot(self, plan: BootPlan) -> Vmm:
        """Start the process and connect the channel; returns before the guest is up.

        The VMM is in a session of its own and outlives the daemon. Raises VmmMissing, BootFailed, PathTooLong; then
        nothing is left but the console log.
        """
        ...

    async def adopt(self, plan: BootPlan, process: VmmProcess) -> Vmm | None:
        """Take over a process that an earlier daemon started; None when exactly that process no longer lives."""
        ...
