"""Firecracker's own metrics: what is taken from its lines, and how lines are found in what comes. Pure.

A line is a JSON object of sections. Its counters are what has happened since the line before, so that sums over lines,
and over machines, are the totals. Lines are those of a process that a guest may have broken into: nothing but numbers
within bounds is taken.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from fusevm.wire.decode import UNREADABLE

#: Longest line that is read; real ones have some thousand bytes.
MAX_LINE: Final = 128 << 10
#: Largest number that one line may add: 2^40 bytes in a minute is more than any device moves.
_MAX_STEP: Final = 1 << 40


class Reading(NamedTuple):
    """One counter: where it is in a line, and what it means."""

    section: str
    field: str
    help: str


#: By the name under which they are counted; sizes in bytes.
READINGS: Final[Mapping[str, Reading]] = {
    "disk_read_bytes": Reading("block", "read_bytes", "Bytes that guests have read from their disks"),
    "disk_written_bytes": Reading("block", "write_bytes", "Bytes that guests have written to their disks"),
    "disk_failures": Reading("block", "execute_fails", "Disk requests of guests that failed"),
    "disk_throttled": Reading("block", "rate_limiter_throttled_events", "Times that a disk waited for its limit"),
    "network_received_bytes": Reading("net", "rx_bytes_count", "Bytes that guests have received"),
    "network_sent_bytes": Reading("net", "tx_bytes_count", "Bytes that guests have sent"),
    "network_spoofed": Reading("net", "tx_spoofed_mac_count", "Frames that guests sent under another hardware address"),
    "channel_received_bytes": Reading("vsock", "rx_bytes_count", "Bytes that guests have received over their channel"),
    "channel_sent_bytes": Reading("vsock", "tx_bytes_count", "Bytes that guests have sent over their channel"),
    "channel_connections": Reading("vsock", "conns_added", "Connections to guest agents"),
    "entropy_bytes": Reading("entropy", "entropy_bytes", "Random bytes that guests have taken"),
    "console_dropped_bytes": Reading("uart", "rate_limiter_dropped_bytes", "Console output beyond its limit"),
    "balloon_deflations": Reading("balloon", "deflate_count", "Times that a balloon gave memory back to its guest"),
    "filtered_calls": Reading("seccomp", "num_faults", "System calls that the filter of a VMM forbade"),
    "cpu_failures": Reading("vcpu", "failures", "Virtual CPUs that could not be run"),
    "lost_lines": Reading("logger", "missed_metrics_count", "Lines of metrics that VMMs could not write"),
    "lost_log_lines": Reading("logger", "missed_log_count", "Log lines that VMMs could not write"),
}


def parse_line(line: bytes) -> dict[str, int]:
    """What a line adds, by name; empty for what is no such line."""
    try:
        sections = msgspec.json.decode(line)
    except UNREADABLE:
        return {}
    if not isinstance(sections, dict):
        return {}
    found = {name: _number(sections, reading) for name, reading in READINGS.items()}
    return {name: value for name, value in found.items() if value}


class Lines:
    """Whole lines out of pieces. A line that is too long is left out."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._is_skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take a piece; return the lines that it ends."""
        *ended, rest = data.split(b"\n")
        lines = []
        for part in ended:
            if not self._is_skipping and len(self._rest) + len(part) <= self._limit:
                lines.append(bytes(self._rest) + part)
            self._rest.clear()
            self._is_skipping = False
        if len(self._rest) + len(rest) > self._limit:
            self._is_skipping = True
            self._rest.clear()
        elif not self._is_skipping:
            self._rest += rest
        return lines


def _number(sections: dict[str, Any], reading: Reading) -> int:
    section = sections.get(reading.section)
    value = section.get(reading.field) if isinstance(section, dict) else None
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_STEP:
        return value
    return 0
