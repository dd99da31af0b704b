"""What Fuse takes when nothing happens: memory of both daemons, at rest and with machines, and the time of a command.

    .venv/bin/python bench/footprint.py [MACHINES]        default: 8

Beside `fuse env list`, the bare interpreter: what any program in Python costs here. Needs root, for taps and namespaces
as in production; leaves nothing behind.
"""

import contextlib
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fusevm.cli.installation import fuse_command
from fusevm.cli.measurements import MEMORY_MIB, Stack, local_stack

IMAGE, ROUNDS = "debian-12", 20
#: struct ucred (unix(7)).
_CREDENTIALS = struct.Struct("3i")


def main(machines: int) -> None:
    with local_stack(IMAGE) as (stack, _):
        host, control = host_pid(stack), control_pid(stack)
        before = memory_mb(host)
        say("host daemon, no machine", f"{before:.1f} MB")
        say("control plane, no machine", f"{memory_mb(control):.1f} MB")
        with running(stack, machines):
            after = memory_mb(host)
            say(f"host daemon, {machines} machines", f"{after:.1f} MB, {(after - before) / machines:.2f} MB each")
            say(f"control plane, {machines} machines", f"{memory_mb(control):.1f} MB")
            bare, listing = [], []
            for _ in range(ROUNDS):
                bare.append(timed([sys.executable, "-c", "pass"]))
                listing.append(timed(fuse_command("env", "list"), stack))
            say("python3 -c pass", f"p50 {statistics.median(bare):.0f} ms")
            say("fuse env list", f"p50 {statistics.median(listing):.0f} ms")


@contextlib.contextmanager
def running(stack: Stack, count: int) -> Iterator[None]:
    """So many machines, each with a command behind it."""
    made = []
    for number in range(count):
        made.append(stack.fuse.environments.create(f"footprint-{number}", image=IMAGE, ram_mb=MEMORY_MIB))
        stack.fuse.environments.exec(made[-1].id, shell="true")
    yield
    for environment in made:
        stack.fuse.environments.delete(environment.id)


def host_pid(stack: Stack) -> int:
    """Who serves the machine API's socket."""
    connection = stack.host_connection()
    with contextlib.closing(connection):
        found = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, _, _ = _CREDENTIALS.unpack(found)
    return int(pid)


def control_pid(stack: Stack) -> int:
    """The other child of the same `fuse up`."""
    host = host_pid(stack)
    siblings = [
        int(pid) for pid in Path(f"/proc/{parent_of(host)}/task/{parent_of(host)}/children").read_text().split()
    ]
    return next(pid for pid in siblings if pid != host and "serve" in words_of(pid))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def words_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def memory_mb(pid: int) -> float:
    """Resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1000


def timed(words: list[str], stack: Stack | None = None) -> float:
    """Milliseconds that a program takes."""
    environment = dict(os.environ)
    if stack is not None:
        address = stack.control_connection()
        environment["FUSE_BASE_URL"] = f"http://{address.host}:{address.port}"
        environment["FUSE_TOKEN"] = stack.headers["authorization"].removeprefix("Bearer ")
    started = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment)
    return (time.perf_counter() - started) * 1000


def say(what: str, figure: str) -> None:
    print(f"{what:<40}{figure}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
