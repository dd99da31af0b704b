"""What Firecracker's exit status and its log say about its end. Pure.

Statuses from 148 on are set by its signal handlers and by the checks of its start.
"""

import re
from typing import Final

_ENDED = re.compile(rb"Firecracker exiting [a-z ]+\. exit_code=(\d{1,3})")
_MEANINGS: Final = {
    148: "it made a system call that its filter forbids",
    149: "SIGBUS: a file that its memory or a disk was mapped from became shorter, or huge pages ran out",
    150: "SIGSEGV",
    151: "SIGXFSZ: it wrote a file beyond its limit",
    152: "bad configuration",
    153: "its arguments were not understood",
    154: "SIGXCPU",
    155: "SIGPIPE",
    156: "SIGHUP",
    157: "SIGILL",
}
#: `<time> [<id>:<thread>:<level>] <text>`.
_INFO = re.compile(rb"^\S+ \[[^\]]*:(?:INFO|DEBUG|TRACE)[\]:]")


def explain_status(status: int | None) -> str:
    """The meaning of an exit status that only Firecracker has, or ""."""
    return _MEANINGS.get(status, "") if status is not None else ""


def parse_status(log: bytes) -> int | None:
    """The exit status that the log names; for a process that was no child of ours."""
    found = _ENDED.findall(log)
    return int(found[-1]) if found else None


def is_for_people(line: bytes) -> bool:
    """Is it a warning, an error, or something that no logger wrote, a panic's text?"""
    return _INFO.match(line) is None
