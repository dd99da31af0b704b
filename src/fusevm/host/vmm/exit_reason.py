"""Why a machine's VMM ended, in words, from all that is known about it. Pure."""

import re
import signal

import msgspec

from fusevm.host.vmm.console import last_lines

UNKNOWN = "unknown"
OUT_OF_MEMORY = "the VMM was killed because memory ran out"
_PANIC = re.compile(rb"Kernel panic - not syncing: ([^\r\n]{1,200})")
_FATAL = re.compile(rb"fused: FATAL: ([^\r\n]{1,400})")


class LastWords(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about the end of a VMM."""

    #: Exit status, negative for a signal; None when the process was no child of ours.
    status: int | None = None
    #: `reason` of QEMU's SHUTDOWN event; empty when there was none.
    shutdown: str = ""
    #: We killed it ourselves, for this reason.
    killed: str = ""
    #: The kernel has killed the process for want of memory: its control group says so.
    is_out_of_memory: bool = False
    #: End of the guest's console.
    console: bytes = b""
    #: End of the VMM's own output.
    output: bytes = b""


def explain_exit(words: LastWords) -> str:
    """Return why it ended: the guest's own words first, then QEMU's, then the process status, else `unknown`."""
    if words.killed:
        return words.killed
    by_guest = words.shutdown.startswith("guest-")
    if by_guest or not words.shutdown:
        if fatal := _FATAL.findall(words.console):
            return f"the guest agent gave up: {last_lines(fatal[-1])}"
        if panic := _PANIC.findall(words.console):
            return f"the guest's kernel panicked: {last_lines(panic[-1])}"
    if by_guest:
        return "the guest shut down"
    if words.shutdown == "host-signal":
        return "the VMM was asked to end by a signal"
    if words.shutdown:
        return f"the VMM ended ({words.shutdown})"
    return _by_status(words)


def _by_status(words: LastWords) -> str:
    if words.is_out_of_memory:
        return OUT_OF_MEMORY
    said = last_lines(words.output)
    tail = f": {said}" if said else ""
    if words.status is None or (words.status == 0 and not said):
        return f"{UNKNOWN}{tail}"
    if words.status < 0:
        return f"the VMM was killed by {_signal_name(-words.status)}{tail}"
    return f"the VMM failed with status {words.status}{tail}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
