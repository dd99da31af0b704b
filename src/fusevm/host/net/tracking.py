"""Room in the kernel's connection tracking for every machine's connections and the host's own.

A machine's connections, its own and those of its published ports' clients together, are limited by what is open in the
host's table (`limits`). If that is full, the kernel drops every new connection of the host: so it must hold more than
all machines together may have open. Not reckoned: a TCP connection that has ended keeps its entry for up to 2 minutes
(TIME_WAIT; 10 s after a reset) and longer while somebody sends on it. Those the kernel removes with its next pass when
the table is full (gc_worker of nf_conntrack_core.c), which it never does with an established one.

Owns: `nf_conntrack_max`, which it only raises. Must not: touch entries (`conntrack`).
"""

import asyncio
import os
from pathlib import Path
from typing import Final

import structlog

from fusevm.host.net.conntrack import load

log = structlog.get_logger()

#: Connections that a machine may have open at once, in and out together, where there is room. An entry takes some
#: 320 bytes of the kernel's.
MAX_CONNECTIONS: Final = 8192
#: No machine has less memory (`machines`).
_MIN_MEMORY_MIB: Final = 64
#: Fewer are of no use to a machine.
_MIN_CONNECTIONS: Final = 64
#: Of the table a quarter, or so many entries, are the host's own.
_RESERVED: Final = 65_536
_MAX_ENTRIES = Path("/proc/sys/net/netfilter/nf_conntrack_max")


def machines_at_once(max_machines: int) -> int:
    """Machines that can run on this host, by its memory."""
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return max(1, min(max_machines, memory_mib // _MIN_MEMORY_MIB))


def needed_entries(machines: int) -> int:
    """Entries with which so many machines can use up their own only. Pure."""
    return _RESERVED + machines * MAX_CONNECTIONS


def connections_each(entries: int, machines: int) -> int:
    """Connections that each of so many machines may have, for the host to keep its share of a table. Pure."""
    left = entries - min(_RESERVED, entries // 4)
    return max(_MIN_CONNECTIONS, min(MAX_CONNECTIONS, left // max(machines, 1)))


async def ensure_room(machines: int) -> int:
    """Raise the limit of the table to what is needed; return what each machine may have. Idempotent.

    Where it cannot be raised (a container's /proc/sys), machines get less.
    """
    return await asyncio.to_thread(_ensure_room, machines)


def _ensure_room(machines: int) -> int:
    needed = needed_entries(machines)
    try:
        load()
        entries = int(_MAX_ENTRIES.read_text())
        if entries < needed:
            _MAX_ENTRIES.write_text(f"{needed}\n")
            entries = needed
    except OSError as e:
        # Without the file the kernel cannot be told, and has no limit that is known.
        entries = _read_entries(needed)
        each = connections_each(entries, machines)
        remedy = f"sysctl net.netfilter.nf_conntrack_max={needed}"
        log.warning("connections_limited", entries=entries, each=each, problem=str(e), remedy=remedy)
    return connections_each(entries, machines)


def _read_entries(otherwise: int) -> int:
    try:
        return int(_MAX_ENTRIES.read_text())
    except OSError:
        return otherwise
