"""Limits of VMM processes: one control group per machine below a parent of ours.

A controller (memory, cpu, pids) lives either in the unified hierarchy (v2) or in one of its own (v1); a machine gets a
group in each hierarchy that is needed, all with the same relative path `<parent>/<name>`. Where v2 is mounted, even
without controllers, its group is used to kill; else the v1 freezer. What the host does not offer, or does not let us
use, is said in `degraded`, never ignored silently.

Owns: the groups below `parent`. Must not: move processes (they join by themselves before they exec), or touch the
groups of others.
"""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from fusevm.model.errors import BadSetting

CONTROLLERS: Final = ("memory", "cpu", "pids")
MOUNTINFO: Final = Path("/proc/self/mountinfo")
_PERIOD_US: Final = 100_000
#: How long the kernel may take to empty a killed group.
_EMPTY_TIMEOUT_S: Final = 10.0
_EMPTY_POLL_S: Final = 0.01
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}")
#: Parts of a parent: not `..`, not hidden.
_PARENT = re.compile(rf"{_NAME.pattern}(?:/{_NAME.pattern})*")
_OCTAL = re.compile(r"\\([0-7]{3})")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a VMM process may use."""

    #: Guest memory and the VMM's own.
    memory_bytes: int
    #: Full cpus.
    cpus: float
    #: Threads, as the kernel counts them.
    pids: int = 256


class Mounts(msgspec.Struct, frozen=True, kw_only=True):
    """Where the host's hierarchies are."""

    #: Mount point of v2; None without.
    unified: Path | None = None
    #: Controllers of v2 at its mount point.
    unified_controllers: frozenset[str] = frozenset()
    #: v1: controller to mount point.
    legacy: dict[str, Path] = {}


class Cgroup(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's groups."""

    #: Directories that the process joins; empty when the host lets us make none.
    paths: tuple[Path, ...] = ()
    #: Limits that do not hold, each with its reason.
    degraded: tuple[str, ...] = ()


def observe_mounts(mountinfo: Path = MOUNTINFO) -> Mounts:
    """Read where control groups are mounted."""
    unified, legacy = parse_mountinfo(mountinfo.read_text())
    controllers: frozenset[str] = frozenset()
    if unified is not None:
        with contextlib.suppress(OSError):
            controllers = frozenset((unified / "cgroup.controllers").read_text().split())
    return Mounts(unified=unified, unified_controllers=controllers, legacy=legacy)


def parse_mountinfo(text: str) -> tuple[Path | None, dict[str, Path]]:
    """Return the mount point of v2 and those of the v1 controllers (proc(5), /proc/[pid]/mountinfo)."""
    unified: Path | None = None
    legacy: dict[str, Path] = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        if len(fields) < 5 or len(tail) < 3:
            continue
        point = Path(_OCTAL.sub(lambda found: chr(int(found.group(1), 8)), fields[4]))
        if tail[0] == "cgroup2":
            unified = unified or point
        elif tail[0] == "cgroup":
            for option in tail[2].split(","):
                legacy.setdefault(option, point)
    return unified, legacy


class Cgroups:
    """The groups of one daemon's machines."""

    def __init__(self, parent: str, mounts: Mounts) -> None:
        if not _PARENT.fullmatch(parent):
            raise BadSetting(
                setting="cgroup_parent", problem=f"{parent!r} must be a relative path such as fuse/machines"
            )
        self._parent = parent
        self._mounts = mounts

    async def ensure(self, name: str, limits: Limits) -> Cgroup:
        """Make a machine's groups with their limits, or set the limits of those that are there. Idempotent."""
        return await asyncio.to_thread(self._ensure, name, limits)

    async def find(self, name: str) -> Cgroup:
        """Return the groups that a machine has already."""
        return Cgroup(paths=tuple(await asyncio.to_thread(self._groups, name)))

    async def kill(self, name: str) -> None:
        """SIGKILL every process of a machine's groups and wait until they are empty. Idempotent.

        Raises TimeoutError when a process does not go (it hangs in the kernel).
        """
        await asyncio.to_thread(self._kill, name)

    async def remove(self, name: str) -> None:
        """Kill what is left in a machine's groups and remove them. Idempotent; raises as `kill` does."""
        await asyncio.to_thread(self._remove, name)

    async def names(self) -> set[str]:
        """Return the machines that have groups, for sweeps."""
        return await asyncio.to_thread(self._names)

    def roots(self) -> list[Path]:
        """Mount points of the hierarchies in which a machine gets a group."""
        mounts = self._mounts
        legacy = [mounts.legacy[c] for c in CONTROLLERS if c in mounts.legacy and c not in mounts.unified_controllers]
        killing = mounts.unified or mounts.legacy.get("freezer")
        return list(dict.fromkeys([*legacy, *([killing] if killing is not None else [])]))

    # -- blocking --------------------------------------------------------------------------------------------------

    def _ensure(self, name: str, limits: Limits) -> Cgroup:
        paths: list[Path] = []
        degraded: list[str] = []
        for root in self.roots():
            path = root / self._parent / _checked(name)
            try:
                if root == self._mounts.unified:
                    degraded += _delegate(root, path.parent, self._mounts.unified_controllers)
                path.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                degraded.append(f"no group {path}: {e.strerror}")
                continue
            paths.append(path)
        for controller in CONTROLLERS:
            degraded += self._limit(name, controller, limits)
        return Cgroup(paths=tuple(paths), degraded=tuple(degraded))

    def _limit(self, name: str, controller: str, limits: Limits) -> list[str]:
        is_unified = controller in self._mounts.unified_controllers
        root = self._mounts.unified if is_unified else self._mounts.legacy.get(controller)
        if root is None:
            return [f"no {controller} limit: this host has no {controller} controller"]
        group = root / self._parent / name
        problems = []
        for file, value, is_needed in limit_files(controller, limits, is_unified=is_unified):
            try:
                (group / file).write_text(value)
            except OSError as e:
                if is_needed:
                    problems.append(f"no {controller} limit: {group / file}: {e.strerror}")
        return problems

    def _groups(self, name: str) -> list[Path]:
        return [path for root in self.roots() if (path := root / self._parent / _checked(name)).is_dir()]

    def _kill(self, name: str) -> None:
        groups = self._groups(name)
        deadline = time.monotonic() + _EMPTY_TIMEOUT_S
        while any(_kill_group(group) for group in groups):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the processes of control group {name} do not end")
            time.sleep(_EMPTY_POLL_S)

    def _remove(self, name: str) -> None:
        self._kill(name)
        deadline = time.monotonic() + _EMPTY_TIMEOUT_S
        for group in self._groups(name):
            while not _remove_group(group):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the control group {group} cannot be removed")
                time.sleep(_EMPTY_POLL_S)

    def _names(self) -> set[str]:
        parents = [root / self._parent for root in self.roots()]
        return {path.name for parent in parents if parent.is_dir() for path in parent.iterdir() if path.is_dir()}


def has_run_out_of_memory(groups: Iterable[Path]) -> bool:
    """Tell whether the kernel has killed one of the processes of a machine's groups for want of memory.

    Of its group or of the host: both count (`oom_kill` of cgroup v2's memory.events and v1's memory.oom_control).
    """
    return any(
        (words := line.split())[:1] == ["oom_kill"] and words[1:] != ["0"]
        for group in groups
        for name in ("memory.events", "memory.oom_control")
        for line in _read_lines(group / name)
    )


def limit_files(controller: str, limits: Limits, *, is_unified: bool) -> list[tuple[str, str, bool]]:
    """Return the files of a controller as (name, value, whether the limit depends on it). Pure."""
    quota = max(1000, round(limits.cpus * _PERIOD_US))
    match controller, is_unified:
        case "memory", True:
            return [("memory.max", str(limits.memory_bytes), True), ("memory.oom.group", "1", False)]
        case "memory", False:
            return [("memory.limit_in_bytes", str(limits.memory_bytes), True)]
        case "cpu", True:
            return [("cpu.max", f"{quota} {_PERIOD_US}", True)]
        case "cpu", False:
            return [("cpu.cfs_period_us", str(_PERIOD_US), True), ("cpu.cfs_quota_us", str(quota), True)]
        case _:
            return [("pids.max", str(limits.pids), True)]


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # a group without this controller, or one that is gone
        return []


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a control group")
    return name


def _delegate(root: Path, parent: Path, controllers: frozenset[str]) -> list[str]:
    """Hand the controllers down from the mount point to the parent, so that its children have them."""
    problems = []
    parent.mkdir(parents=True, exist_ok=True)
    for folder in [parent, *parent.parents][: len(parent.relative_to(root).parts) + 1][::-1]:
        for controller in (c for c in CONTROLLERS if c in controllers):
            try:
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")
            except OSError as e:
                problems.append(f"{controller} is not delegated by {folder}: {e.strerror}")
    return problems


def _kill_group(group: Path) -> bool:
    """Kill what is in a group; return whether something was."""
    with contextlib.suppress(OSError):
        pids = (group / "cgroup.procs").read_text().split()
        if not pids:
            return False
        if (group / "cgroup.kill").exists():
            (group / "cgroup.kill").write_text("1")
            return True
        _freeze(group, frozen=True)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _freeze(group, frozen=False)
        return True
    return False


def _freeze(group: Path, *, frozen: bool) -> None:
    with contextlib.suppress(OSError):  # only the freezer's own group has the file
        (group / "freezer.state").write_text("FROZEN" if frozen else "THAWED")


def _remove_group(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
