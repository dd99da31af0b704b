"""Processes by identity instead of by bare pid.

A pid may be reused; pid, start time and boot id together are not. `ProcessHandle` holds a pidfd: signals reach exactly
that process or none, and its end is an event in the loop, for children and for processes of an earlier daemon alike.
Does not start processes.
"""

import asyncio
import contextlib
import errno
import os
import select
import signal
from functools import cache
from pathlib import Path

from fusevm.model.machine import VmmProcess

_PROC = Path("/proc")
#: Fields of /proc/<pid>/stat after the command name in parentheses, counted from 0 (proc(5)).
_STATE, _START = 0, 19
#: Of pidfd_open(2): no such process, or the number is by now that of a thread. Anything else says nothing about it.
_NO_PROCESS = (errno.ESRCH, errno.EINVAL, errno.ENOENT)


@cache
def boot_id() -> str:
    """Return the id of this boot of the host."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> VmmProcess | None:
    """Return the identity of a running process, or None when there is none (a zombie does not run)."""
    fields = _stat(pid)
    if fields is None or fields[_STATE] in ("Z", "X"):
        return None
    return VmmProcess(pid=pid, start_ticks=int(fields[_START]), boot_id=boot_id())


def command_line_of(pid: int) -> list[str]:
    """Return the words with which a process was started; empty when it has gone."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def resident_bytes(pid: int) -> int:
    """Memory that a process has in RAM now, what it shares included; 0 when it has gone (proc(5), statm)."""
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def root_of(pid: int) -> tuple[int, int] | None:
    """Return device and inode of a process's root directory; None when it has gone. OSError when we may not look.

    Where a process lives in a mount namespace of its own, the directory has no name that we could read. Other users'
    processes take CAP_SYS_PTRACE (proc(5)): without it a living VMM would pass for one that has gone.
    """
    try:
        found = (_PROC / str(pid) / "root" / ".").stat()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return found.st_dev, found.st_ino


def _stat(pid: int) -> list[str] | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


class ProcessHandle:
    """Exactly one process, through a pidfd. Belongs to the running loop; `close` it."""

    def __init__(self, identity: VmmProcess, pidfd: int) -> None:
        self.identity = identity
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._on_end)
        #: Status of `waitid`, negative for a signal; None while it runs and for a process that is not our child.
        self.exit_status: int | None = None

    @classmethod
    def of_child(cls, pid: int) -> "ProcessHandle":
        """Take over a child that was just started (it may have ended already; nobody else waits for it)."""
        pidfd = os.pidfd_open(pid)
        fields = _stat(pid)
        ticks = int(fields[_START]) if fields else 0
        return cls(VmmProcess(pid=pid, start_ticks=ticks, boot_id=boot_id()), pidfd)

    @classmethod
    def find(cls, identity: VmmProcess) -> "ProcessHandle | None":
        """Find a process of any parent; None when exactly that one no longer runs. OSError when we cannot tell."""
        if identity.boot_id != boot_id():
            return None
        try:
            pidfd = os.pidfd_open(identity.pid)
        except OSError as e:
            if e.errno in _NO_PROCESS:
                return None
            raise
        # Compared after the pidfd exists: from here on the pid cannot be somebody else's unnoticed.
        try:
            is_same = identify(identity.pid) == identity
        except BaseException:
            os.close(pidfd)
            raise
        if not is_same:
            os.close(pidfd)
            return None
        return cls(identity, pidfd)

    @property
    def has_ended(self) -> bool:
        """True as soon as the process has, whether or not the loop has run since."""
        if not self._ended.done() and self._pidfd >= 0:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if poller.poll(0):
                self._on_end()
        return self._ended.done()

    async def wait(self) -> int | None:
        """Return the exit status once the process has ended; None when it was no child of ours."""
        await asyncio.shield(self._ended)
        return self.exit_status

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when the process has ended."""
        if not self.has_ended and self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Let go of the process. Waiters get ConnectionError. Idempotent."""
        self._drop()
        if not self._ended.done():
            self._ended.set_exception(ConnectionError("the process was let go"))
            self._ended.exception()  # nobody has to be waiting

    def _on_end(self) -> None:
        if self._ended.done():
            return
        self._loop.remove_reader(self._pidfd)
        with contextlib.suppress(ChildProcessError):
            status = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            if status is not None:
                self.exit_status = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        self._drop()
        self._ended.set_result(None)

    def _drop(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
