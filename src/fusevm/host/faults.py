"""Crash points: where a test makes the daemon die, by name.

A point is reached right after (`create.intent`) or, with `.writing`, right before the commit of a journal entry, and
after each side effect in between. In production nothing listens. A daemon is killed at every one of them:
`tests/unit/host/test_kill_points.py` (fake driver and quarters), `tests/system/test_host_kill_points.py` (a daemon
process, real quarters, VMMs that are small processes) and, for create, stop and delete and at one point of each other
operation, `tests/real/test_host_crashes.py` (real machines). A point that is reached and not listed here fails the
tests of whoever reaches it.
"""

from __future__ import annotations

import os
import signal
from typing import Protocol

from fusevm.model.errors import BadSetting

VARIABLE = "FUSE_FAULT"

#: In the order in which a create reaches them.
CREATE_POINTS = (
    "create.intent.writing",
    "create.intent",
    "quarters.directories",
    "quarters.disk",
    "quarters.cgroup",
    "quarters.network",
    "create.prepared.writing",
    "create.prepared",
    "create.booted.writing",
    "create.booted",
    "create.answered",
    "create.running.writing",
    "create.running",
)
DELETE_POINTS = (
    "delete.intent.writing",
    "delete.intent",
    "delete.killed",
    "delete.vacated",
    "delete.gone.writing",
    "delete.gone",
)
STOP_POINTS = ("stop.intent.writing", "stop.intent", "stop.killed", "stop.done.writing", "stop.done")
RESIZE_POINTS = (
    "resize.intent.writing",
    "resize.intent",
    "resize.killed",
    "resize.grown",
    "resize.done.writing",
    "resize.done",
)
#: Of a visit to the disk of a machine at rest.
VISIT_POINTS = (
    "visit.intent.writing",
    "visit.intent",
    "visit.prepared.writing",
    "visit.prepared",
    "visit.booted.writing",
    "visit.booted",
    "visit.answered",
    "visit.done.writing",
    "visit.done",
)
#: Of a snapshot of a machine that runs, in order (of one that rests, `snapshot.stopped` is in place of the freeze);
#: from `snapshot.copied` on the machine is free again.
SNAPSHOT_POINTS = (
    "snapshot.intent.writing",
    "snapshot.intent",
    "freeze.before",
    "freeze.held",
    "freeze.copied",
    "freeze.thawed",
    "snapshot.copied.writing",
    "snapshot.copied",
    "snapshot.ready.writing",
    "snapshot.ready",
)
RESTORE_POINTS = (
    "restore.intent.writing",
    "restore.intent",
    "restore.staged",
    "restore.committed.writing",
    "restore.committed",
    "restore.vacated",
    "restore.swapped",
    "restore.prepared.writing",
    "restore.prepared",
    "restore.booted.writing",
    "restore.booted",
    "restore.answered",
    "restore.running.writing",
    "restore.running",
)
UNSNAPSHOT_POINTS = (
    "unsnapshot.intent.writing",
    "unsnapshot.intent",
    "unsnapshot.removed",
    "unsnapshot.gone.writing",
    "unsnapshot.gone",
)
#: Of a snapshot that is fetched from where it was carried; then it is made usable as any other.
IMPORT_POINTS = ("import.intent.writing", "import.intent", "import.copied.writing", "import.copied")
START_POINTS = ("start.intent.writing", "start.intent", "start.prepared", "start.booted", "start.running.writing")
NETWORK_POINTS = tuple(
    f"{change}{moment}"
    for change in ("network.changed", "port.published", "port.unpublished")
    for moment in (".writing", "", ".applied")
)
#: A port that could not be forwarded.
UNDONE_POINTS = ("port.undone.writing", "port.undone")
POINTS = frozenset(
    (
        *NETWORK_POINTS,
        *UNDONE_POINTS,
        *CREATE_POINTS,
        *DELETE_POINTS,
        *STOP_POINTS,
        *START_POINTS,
        *RESIZE_POINTS,
        *VISIT_POINTS,
        "visit.undone.writing",
        "visit.undone",
        *SNAPSHOT_POINTS,
        *RESTORE_POINTS,
        *UNSNAPSHOT_POINTS,
        *IMPORT_POINTS,
        "snapshot.stopped",
        "snapshot.undone.writing",
        "snapshot.undone",
        "restore.undone.writing",
        "restore.undone",
        "create.undone.writing",
        "create.undone",
        "start.prepared.writing",
        "start.booted.writing",
        "start.answered",
        "start.running",
        "start.undone.writing",
        "start.undone",
        "exit.seen.writing",
        "exit.seen",
        "exit.vacated.writing",
        "exit.vacated",
    )
)


#: One transaction and no side effect around it: there is nothing to finish or to undo.
_HARMLESS = ("guest.order", "purge")


def is_known(point: str) -> bool:
    """Is a point one at which tests kill the daemon, or one that needs none?"""
    return point in POINTS or point.removesuffix(".writing") in _HARMLESS


class Fault(Protocol):
    """Told about every point; may end the process. Called from the event loop and from the journal's thread."""

    def reached(self, point: str) -> None: ...


class NoFault:
    """Production."""

    def reached(self, point: str) -> None:
        """Go on."""


class KillAt:
    """The process dies at one point, as in a power cut: no handler, no clean-up."""

    def __init__(self, point: str) -> None:
        if point not in POINTS:
            raise BadSetting(setting=VARIABLE, problem=f"{point!r} is no crash point; there are {sorted(POINTS)}")
        self._point = point

    def reached(self, point: str) -> None:
        if point == self._point:
            os.kill(os.getpid(), signal.SIGKILL)


def make_fault(point: str) -> Fault:
    """The fault of a setting; none when it is empty. Raises BadSetting."""
    return KillAt(point) if point else NoFault()
