"""Why a machine's VMM ended, in words, from all that is known about it. Pure."""

import re
import signal

import msgspec

from fusevm.host.vmm.console import last_lines

UNKNOWN = "unknown"
#: What the daemon says of machines that it finds without their VMM when it starts.
HOST_REBOOTED = "host rebooted"
AWAY = "the VMM ended while the daemon was away"
SHUT_DOWN = "the guest shut down"
OUT_OF_MEMORY = "the VMM was killed because memory ran out"
_PANIC = re.compile(rb"Kernel panic - not syncing: ([^\r\n]{1,200})")
#: The agent's first word once it serves (guest/cmd/fused).
_READY = b"fused: ready after "
_FATAL = re.compile(rb"fused: FATAL: ([^\r\n]{1,400})")


class LastWords(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about the end of a VMM."""

    #: Exit status, negative for a signal; None when the process was no child of ours.
    status: int | None = None
    #: What this VMM means by that status; empty when it is like any program's.
    meaning: str = ""
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
        return SHUT_DOWN
    if words.shutdown == "host-signal":
        return "the VMM was asked to end by a signal"
    if words.shutdown:
        return f"the VMM ended ({words.shutdown})"
    return _by_status(words)


def explain_absence(console: bytes, *, is_out_of_memory: bool, is_disk_clean: bool | None) -> str:
    """Return why a VMM is no more whose end nobody has seen: no status, no event, no console since the daemon ended.

    A disk that was left in order is that of a guest which shut down. The console may go back to earlier runs: what
    counts is what was said after the agent of this one was ready.
    """
    said = console[console.rfind(_READY) + 1 :] if _READY in console else console
    shutdown = "guest-shutdown" if is_disk_clean else ""
    reason = explain_exit(LastWords(console=said, shutdown=shutdown, is_out_of_memory=is_out_of_memory))
    return f"{UNKNOWN}: {AWAY}" if reason == UNKNOWN else f"{reason} while the daemon was away"


def _by_status(words: LastWords) -> str:
    if words.is_out_of_memory:
        return OUT_OF_MEMORY
    said = last_lines(words.output)
    tail = f": {said}" if said else ""
    if words.status is None or (words.status == 0 and not said):
        return f"{UNKNOWN}{tail}"
    if words.status < 0:
        return f"the VMM was killed by {_signal_name(-words.status)}{tail}"
    meaning = f" ({words.meaning})" if words.meaning else ""
    return f"the VMM failed with status {words.status}{meaning}{tail}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
