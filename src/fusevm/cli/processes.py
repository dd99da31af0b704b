"""Processes by identity: a pid may be given to another program, pid and start time together are not."""

import contextlib
import os
import select
import signal
import time
from pathlib import Path

import msgspec

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """One process of one boot of this machine."""

    pid: int
    #: Field 22 of /proc/<pid>/stat: clock ticks since boot (proc(5)).
    start_ticks: int
    boot_id: str


def identify(pid: int) -> Identity | None:
    """The identity of a running process, or None when there is none (zombies do not count)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot_id = _BOOT_ID.read_text().strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else Identity(pid=pid, start_ticks=int(fields[19]), boot_id=boot_id)


def is_running(identity: Identity) -> bool:
    """Is exactly that process still there?"""
    return identify(identity.pid) == identity


def end(identity: Identity, number: int, timeout_s: float) -> bool:
    """Send a signal to exactly that process and wait for its end; True when it has ended. Idempotent."""
    try:
        fd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return True
    try:
        if not is_running(identity):
            return True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, number)
        return wait_end(fd, timeout_s)
    finally:
        os.close(fd)


def wait_end(pidfd: int, timeout_s: float) -> bool:
    """Wait until the process of a pidfd has ended; False when the time is over."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    ends_at = time.monotonic() + timeout_s
    while (rest := ends_at - time.monotonic()) > 0:
        if poller.poll(rest * 1000):
            return True
    return False
