"""Stopping the processes of a control group where they are, and letting them go on.

By v2's `cgroup.freeze`, which every group but the root has, or by v1's freezer. Frozen processes can be killed on v2;
on v1 they die once they are thawed.

Owns: nothing. Must not: decide who is frozen, or make groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from fusevm.model.errors import NotSupported, Timeout

#: How long the kernel may take: a process that waits for a disk in the kernel freezes when it comes back.
FREEZE_S: Final = 10.0
_POLL_S: Final = 0.002


class _Kind(NamedTuple):
    """The files of one kind of freezer."""

    order: str
    freeze: str
    thaw: str
    #: Where the state is, and the line that says that all are frozen.
    state: str
    frozen: str


_KINDS: Final = (
    _Kind("cgroup.freeze", "1", "0", "cgroup.events", "frozen 1"),
    _Kind("freezer.state", "FROZEN", "THAWED", "freezer.state", "FROZEN"),
)


async def freeze(groups: Iterable[Path], limit_s: float = FREEZE_S) -> None:
    """Freeze everything in a machine's groups; returns when nothing runs. Idempotent.

    Raises NotSupported where no group can be frozen, Timeout when something does not stop: then all goes on.
    """
    group, kind = _find(groups)
    try:
        async with asyncio.timeout(limit_s):
            while kind.frozen not in _lines(group / kind.state):
                # Said again: a v1 freezer that met a process about to start another stays half-way.
                (group / kind.order).write_text(kind.freeze)
                await asyncio.sleep(_POLL_S)
    except BaseException as error:
        (group / kind.order).write_text(kind.thaw)
        if isinstance(error, TimeoutError):
            raise Timeout(what=f"the pause of {group.name}", limit_s=round(limit_s)) from error
        raise


def thaw(groups: Iterable[Path]) -> None:
    """Let everything in a machine's groups go on. Idempotent; a group that cannot be frozen needs nothing."""
    try:
        group, kind = _find(groups)
    except NotSupported:
        return
    (group / kind.order).write_text(kind.thaw)


def is_frozen(groups: Iterable[Path]) -> bool:
    """Have a machine's groups been frozen, by whomever?"""
    return any(kind.frozen in _lines(group / kind.state) for group in groups for kind in _KINDS)


def _find(groups: Iterable[Path]) -> tuple[Path, _Kind]:
    for group in groups:
        for kind in _KINDS:
            if (group / kind.order).exists():
                return group, kind
    raise NotSupported(feature="Pausing a machine without a control group")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
