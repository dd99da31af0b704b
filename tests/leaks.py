"""What a test may leave behind, observed: things of this process, of its descendants, and of the world it made.

`Watch.observe` before and after, `await_gone` for what the kernel is still taking apart. Everything is compared by
name, so what somebody else makes meanwhile must not be visible here: the world is our own (`own_world`), processes
carry the mark of this run or are in our namespaces, control groups begin with this run's prefix.
"""

import asyncio
import contextlib
import gc
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from own_world import INSIDE, MARK, run_prefix

#: What ends by itself within this time has not leaked. Only tests that leak wait that long.
GRACE_S = 10.0
_POLL_S = 0.01
#: Descriptors that are nobody's resource: the loop's own, and files of /proc that are open while we look.
_IGNORED = ("anon_inode:[eventpoll]", "/proc/", "/dev/null", "/dev/pts/", "/dev/urandom")


#: What belongs to daemons and machines.
OF_STACK = frozenset({"process", "namespace", "interface", "mount", "run directory"})
KINDS = OF_STACK | {"descriptor", "thread", "temporary file"}
#: Visible outside of our namespaces, and slower to look for.
OF_RUN = frozenset({"group"})


class Thing(msgspec.Struct, frozen=True, order=True):
    """Something that can be left behind."""

    kind: str
    #: For a process its pid, for a descriptor what it points to.
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}{_command(self.name) if self.kind == 'process' else ''}"


class Watch:
    """Observes again and again; remembers which processes of the machine are not ours."""

    def __init__(self) -> None:
        self._others: set[int] = set()
        self._namespace = _namespace_of("self") if os.environ.get(INSIDE) else ""

    def enter(self) -> None:
        """From now on also processes in the mount namespace of this one are ours, whatever their environment."""
        self._namespace = _namespace_of("self")

    def observe(self, kinds: frozenset[str] = KINDS) -> frozenset[Thing]:
        """Return everything of these kinds that is there."""
        return frozenset(Thing(kind, name) for kind in kinds for name in self._names(kind))

    def _names(self, kind: str) -> Iterable[str]:
        is_ours = bool(self._namespace) and not os.environ.get(INSIDE)
        match kind:
            case "descriptor":
                return _descriptors()
            case "thread":
                return (f"{thread.name} ({thread.ident})" for thread in threading.enumerate() if not thread.daemon)
            case "process":
                return map(str, self._processes())
            case "temporary file":
                return [*_entries(tempfile.gettempdir()), *(_entries("/var/tmp") if is_ours else [])]
            case "namespace" if is_ours:
                return _entries("/run/netns")
            case "interface" if is_ours:
                return _entries("/sys/class/net")
            case "mount" if is_ours:
                return (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines())
            case "group":
                found = ((folder, name) for folder, inner, _ in os.walk("/sys/fs/cgroup") for name in inner)
                return (f"{folder}/{name}" for folder, name in found if name.startswith(run_prefix()))
            case "run directory" if is_ours:
                # A killed process leaves the file of its lock, and no lock.
                return (name for name in _entries("/run") if not name.endswith(".lock"))
        return ()

    def _processes(self) -> Iterator[int]:
        """Our descendants, also those that have another parent by now, and children that nobody waited for."""
        pids = {int(name) for name in _entries("/proc") if name.isdecimal()} - {os.getpid()}
        self._others &= pids
        for pid in pids - self._others:
            if self._is_ours(pid):
                yield pid
            else:
                self._others.add(pid)

    def _is_ours(self, pid: int) -> bool:
        if os.getpid() == 1 and _has_ended(pid):
            return False  # an orphan that the first process of a namespace inherits
        with contextlib.suppress(OSError):
            if f"{MARK}={run_prefix()}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return True
        if self._namespace and _namespace_of(str(pid)) == self._namespace:
            return True
        with contextlib.suppress(OSError):
            return _fields(pid)[1] == str(os.getpid())
        return False


def await_gone(observe: Callable[[], frozenset[Thing]]) -> list[Thing]:
    """Return what is still there once it has had time to go."""
    if not (left := observe()):
        return []
    gc.collect()  # what a cycle holds is released, or reported by its own warning
    ends_at = time.monotonic() + GRACE_S
    while (left := observe()) and time.monotonic() < ends_at:
        time.sleep(_POLL_S)
    return sorted(left)


async def tasks_left(ours: asyncio.Task[object] | None) -> list[str]:
    """Return the tasks of this loop that do not end by themselves, but for `ours`."""
    if tasks := asyncio.all_tasks() - {ours}:
        _, tasks = await asyncio.wait(tasks, timeout=GRACE_S)
    return sorted(f"{task.get_name()} ({task.get_coro()})" for task in tasks)


def end(things: Iterable[Thing]) -> None:
    """Kill leaked processes, so that the next test does not suffer."""
    for thing in things:
        if thing.kind == "process":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(thing.name), signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(thing.name), 0)


def _descriptors() -> Iterator[str]:
    for name in _entries("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115 - thousands of times
            if not target.startswith(_IGNORED):
                yield f"{name} ({target})"


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - thousands of times
    except FileNotFoundError:
        return []


def _namespace_of(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")  # noqa: PTH115 - thousands of times
    except OSError:
        return ""


def _has_ended(pid: int) -> bool:
    try:
        return _fields(pid)[0] == "Z"
    except OSError:
        return True


def _fields(pid: int) -> list[str]:
    """State, parent, ... (proc(5), /proc/[pid]/stat)."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def _command(pid: str) -> str:
    """A few words about a process."""
    try:
        state = _fields(int(pid))[0]
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""
    return " (ended, nobody waited for it)" if state == "Z" else f" ({words[:300]})"
