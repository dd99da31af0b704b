"""Starting a VMM process so that it outlives the daemon and keeps nothing of it.

A chain of small programs, each of which replaces itself by the next, so that pid and start time stay: `sh` (joins the
cgroups, no core dumps, first in line for the OOM killer), `nsenter` or `unshare` (network namespace), `setpriv` (uid,
gid, no groups, no capabilities, no new privileges), the VMM. Sockets are made here, too: the daemon listens, connects,
and then passes the listening end on, so that nobody waits for anybody.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fusevm.host.channel import connect_now
from fusevm.host.run import SYSTEM_PATH
from fusevm.host.vmm.driver import Confinement
from fusevm.model.errors import PathTooLong, VmmMissing

#: Bytes of `sun_path` less the NUL (unix(7)).
MAX_SOCKET_PATH = 107
_BACKLOG = 8
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

#: Writing 0 moves the writer itself (cgroups(7)).
_SHIM = """ulimit -c 0
umask 077
echo 500 2>/dev/null >/proc/self/oom_score_adj
while [ "$1" != -- ]; do
  echo 0 >"$1/cgroup.procs" || { echo "cannot join the cgroup $1" >&2; exit 125; }
  shift
done
shift
exec "$@"
"""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """A VMM process to start."""

    argv: Sequence[str]
    #: Descriptors that it inherits under the same numbers.
    pass_fds: tuple[int, ...]
    #: Becomes standard output and error.
    output_fd: int
    #: Network namespace that it enters; None: the daemon's, or an empty one of its own.
    netns: Path | None = None
    is_cut_off: bool = False
    confinement: Confinement = Confinement()
    #: Supplementary groups that it keeps (for /dev/kvm).
    groups: tuple[int, ...] = ()


class Socket(msgspec.Struct, frozen=True, kw_only=True):
    """Both ends of a socket that the VMM will serve."""

    path: Path
    listener: socket.socket
    client: socket.socket


def find_program(name: str, remedy: str) -> str:
    """Return the absolute path of a program. Raises VmmMissing."""
    found = shutil.which(name, path=":".join((os.environ.get("PATH", ""), *SYSTEM_PATH)))
    if found is None:
        raise VmmMissing(program=name, remedy=remedy)
    return found


def check_socket_path(path: Path) -> None:
    """Raise PathTooLong for a path that no Unix socket can have."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise PathTooLong(path=str(path), limit=MAX_SOCKET_PATH)


def open_socket(path: Path) -> Socket:
    """Listen on a path in place of whatever is there, and connect to it. The caller closes both ends."""
    check_socket_path(path)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: the file never has another mode
        listener.bind(str(path))
        listener.listen(_BACKLOG)
        return Socket(path=path, listener=listener, client=connect_now(path))
    except BaseException:
        listener.close()
        path.unlink(missing_ok=True)
        raise


def open_output(path: Path) -> int:
    """Make a named pipe for a VMM's output and return the VMM's end.

    Opened for both directions: nobody has to read, and what is written waits up to the pipe's size, also while the
    daemon restarts. Not blocking: beyond that it is lost instead of stopping the VMM.
    """
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def render_launch(launch: Launch) -> list[str]:
    """Return the words of the whole chain."""
    words = [*("/bin/sh", "-c", _SHIM, "fuse-vmm"), *map(str, launch.confinement.cgroups), "--"]
    if launch.netns is not None:
        words += ["nsenter", f"--net={launch.netns}", "--"]
    elif launch.is_cut_off:
        words += ["unshare", "--net", "--"]
    return [*words, "setpriv", *_privileges(launch), "--", *launch.argv]


def start_process(launch: Launch) -> int:
    """Start the process and return its pid; the caller waits for it by pidfd. Blocks for some milliseconds."""
    process = subprocess.Popen(
        render_launch(launch),
        stdin=subprocess.DEVNULL,
        stdout=launch.output_fd,
        stderr=launch.output_fd,
        pass_fds=launch.pass_fds,
        env=_ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )
    # A Popen that goes away unwaited warns and waits behind our back; the process belongs to its pidfd.
    process.returncode = 0
    return process.pid


async def start_in_thread(launch: Launch) -> int:
    """Start the process beside the event loop; one that starts while we are cancelled is killed."""
    starting = asyncio.ensure_future(asyncio.to_thread(start_process, launch))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        starting.add_done_callback(_kill_unwanted)
        raise


def _kill_unwanted(starting: "asyncio.Future[int]") -> None:
    if not starting.cancelled() and starting.exception() is None:
        os.kill(starting.result(), signal.SIGKILL)
        os.waitpid(starting.result(), 0)


def _privileges(launch: Launch) -> list[str]:
    fence = launch.confinement
    words = ["--no-new-privs"]
    if fence.uid is None and fence.gid is None:
        return words
    if fence.uid is not None:
        words += ["--reuid", str(fence.uid)]
    if fence.gid is not None:
        words += ["--regid", str(fence.gid)]
    words += ["--groups", ",".join(map(str, launch.groups))] if launch.groups else ["--clear-groups"]
    return [*words, "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
