"""What tests want to know about processes, and the programs themselves do not."""

import os
from pathlib import Path

from fusevm.host.process import command_line_of, identify
from fusevm.model.machine import VmmProcess

_PROC = Path("/proc")


def observe_cpu_s(pid: int) -> float:
    """Return the user and system time that a process has used. OSError when it has gone."""
    fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    # utime and stime: fields 14 and 15 of proc(5), counted from 1; three stand before the closing parenthesis.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def find_processes(word: str) -> list[VmmProcess]:
    """Return the running processes whose command line has exactly this word. Sees all as root, else the user's own."""
    pids = [int(path.name) for path in _PROC.iterdir() if path.name.isdecimal()]
    found = (identify(pid) for pid in pids if word in command_line_of(pid))
    return [process for process in found if process is not None]
