"""Processes that belong to machines: those whose command line names a machine's path, as QEMU's names its disk's, and
those whose root directory is a machine's jail.

What no record knows (a crash between the start of a process and its entry in the journal) is found this way, and ended
through a pidfd, so that nothing else can be hit.

Owns: the search and the kill. Must not: decide which machines there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from fusevm.host.listing import names_in
from fusevm.host.process import ProcessHandle, command_line_of, identify, root_of
from fusevm.host.vmm.driver import JAIL
from fusevm.model.errors import Timeout
from fusevm.model.machine import VmmProcess

_PROC = Path("/proc")
_KILL_TIMEOUT_S = 10


async def find_strays(machines: Path) -> dict[str, list[VmmProcess]]:
    """Find all processes that name a path below a machine's directory, or are jailed there; by machine id.

    OSError where jails exist and some process may not be looked at: not all would be found.
    """
    return await asyncio.to_thread(_find, machines)


async def kill_strays(machines: Path, machine_id: str) -> int:
    """Kill every process of one machine; return how many there were when they are gone. Raises Timeout."""
    killed = 0
    while found := (await find_strays(machines)).get(machine_id):
        for process in found:
            await kill_process(process)
            killed += 1
    return killed


async def kill_process(process: VmmProcess) -> None:
    """Kill exactly this process and wait for its end. Raises Timeout for one that hangs in the kernel."""
    handle = ProcessHandle.find(process)
    if handle is None:
        return
    try:
        handle.send(signal.SIGKILL)
        async with asyncio.timeout(_KILL_TIMEOUT_S):
            await handle.wait()
    except TimeoutError as e:
        raise Timeout(what=f"the end of process {process.pid}", limit_s=_KILL_TIMEOUT_S) from e
    finally:
        handle.close()


def _find(machines: Path) -> dict[str, list[VmmProcess]]:
    marker = f"{machines}/"
    found: dict[str, list[VmmProcess]] = {}
    jails = _find_jails(machines)
    own = os.getpid()
    for pid in _pids():
        identity = identify(pid)
        if pid == own or identity is None:
            continue
        ids = _named(command_line_of(pid), marker)
        if jails and (root := root_of(pid)) in jails:
            ids.add(jails[root])
        for machine_id in ids:
            found.setdefault(machine_id, []).append(identity)
    return found


def _find_jails(machines: Path) -> dict[tuple[int, int] | None, str]:
    """Root directories of jails (`<machines>/<id>/jail/<program>/<id>/root`), by device and inode."""
    jails: dict[tuple[int, int] | None, str] = {}
    for machine_id in names_in(machines):
        base = machines / machine_id / JAIL
        for jail in (base / program / name for program in names_in(base) for name in names_in(base / program)):
            with contextlib.suppress(OSError):
                found = (jail / "root").stat(follow_symlinks=False)
                jails[found.st_dev, found.st_ino] = machine_id
    return jails


def _pids() -> Iterator[int]:
    """Processes that may be a machine's: an ordinary user has none of others, and may not be told of them (proc(5))."""
    own = os.geteuid()
    for entry in _PROC.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if entry.name.isdecimal() and own in (0, entry.stat().st_uid):
                yield int(entry.name)


def _named(words: list[str], marker: str) -> set[str]:
    """Machine ids whose directory is named in a command line, and whose name is a word of it."""
    ids = {word.partition(marker)[2].partition("/")[0] for word in words if marker in word}
    return {machine_id for machine_id in ids if machine_id and machine_id in words}
