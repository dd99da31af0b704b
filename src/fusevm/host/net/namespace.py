"""Runs a function inside a network namespace.

A thread enters the namespace by setns(2), calls the function, and dies; it is never one of a pool, so no other code
ever runs in a machine's namespace. Sockets and descriptors made there keep their namespace and may be used from the
event loop afterwards.

Owns: the threads and the file-type check of namespaces. Must not: know what is done inside.
"""

import asyncio
import ctypes
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, TypeVar

from fusevm.model.errors import Timeout

T = TypeVar("T")

#: linux/sched.h
_CLONE_NEWNET = 0x40000000
#: linux/magic.h: the file system of namespace files.
_NSFS_MAGIC = 0x6E736673
#: Entering and a few ioctls take well under a millisecond; only a wedged kernel takes longer.
DEFAULT_TIMEOUT_S = 10.0

# os.setns exists from Python 3.12 on.
_libc = ctypes.CDLL(None, use_errno=True)


class _StatFs(ctypes.Structure):
    """The start of struct statfs (statfs(2)); the rest is room for the kernel to write."""

    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_char * 256))


def is_namespace(path: str | Path) -> bool:
    """Tell whether a file is a namespace: a crash within `ip netns add` leaves an ordinary, empty file."""
    buffer = _StatFs()
    if _libc.statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        return False
    return bool(buffer.f_type == _NSFS_MAGIC)


async def run_inside(
    path: str | Path,
    function: Callable[[], T],
    *,
    discard: Callable[[T], None] | None = None,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
) -> T:
    """Call `function` in a thread inside the network namespace at `path` and return what it returns.

    Whatever it raises is raised; a missing namespace is FileNotFoundError. If nobody waits any more when it returns
    (timeout, cancellation), its result goes to `discard`, which closes it. Timeout at the deadline, if there is
    one: the thread is abandoned and keeps nothing but itself.
    """
    visit = _Visit(path, function, discard)
    visit.start()
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            return await asyncio.wrap_future(visit.outcome)
    except BaseException as e:
        visit.abandon()
        # The function may raise a TimeoutError of its own.
        if timeout_s is not None and isinstance(e, TimeoutError) and deadline.expired():
            raise Timeout(what=f"work in the namespace {path}", limit_s=math.ceil(timeout_s)) from e
        raise


class _Visit(Generic[T]):
    """One thread's stay in a namespace, and who closes what it brings back."""

    def __init__(self, path: str | Path, function: Callable[[], T], discard: Callable[[T], None] | None) -> None:
        self._path = path
        self._function = function
        self._discard = discard
        self._lock = threading.Lock()
        self._abandoned = False
        self.outcome: Future[T] = Future()
        # A running future cannot be cancelled: the thread always delivers into it.
        self.outcome.set_running_or_notify_cancel()

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"netns:{Path(self._path).name}", daemon=True).start()

    def abandon(self) -> None:
        """Declare that nobody takes the result; one that is there already is discarded."""
        with self._lock:
            self._abandoned = True
            delivered = self.outcome.done() and self.outcome.exception() is None
        if delivered and self._discard is not None:
            self._discard(self.outcome.result())

    def _run(self) -> None:
        try:
            _enter(self._path)
            result = self._function()
        except BaseException as e:  # noqa: BLE001 - carried to the waiting task
            self.outcome.set_exception(e)
            return
        with self._lock:
            if not self._abandoned:
                self.outcome.set_result(result)
                return
        if self._discard is not None:
            self._discard(result)


def _enter(path: str | Path) -> None:
    """Move the calling thread into a network namespace; it has no way back."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)
