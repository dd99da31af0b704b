"""Compares the registry with the host: removes what is nobody's, clears what a machine at rest should not have, tells
what is missing.

There should be no difference: whatever makes something has written its intent first. A sweep at the start and every
minute finds what slips through all the same (a bug, a tool that lied, a person), says so loudly, and removes it. Except
at the start, everything must be seen twice: a machine may come or go between a look at the host and a look at the
registry. What is missing is told and not made again: whoever took it away may have had a reason, and a machine without
its disk is better looked at by a person.

Owns: the second look, and what follows from it. Must not: touch anything of a machine behind its task's back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import structlog

from fusevm.host.drift import Claim, Drift, Kind, Thing, compare
from fusevm.host.grounds import Ground, Slots, Snapshots, Witness
from fusevm.model.errors import Error

log = structlog.get_logger()

#: How long a sweep waits for the task of one machine: it may be at something else.
_TIDY_TIMEOUT_S = 60.0


class Sweeper:
    """Looks for differences and removes leftovers."""

    def __init__(
        self,
        grounds: Sequence[Ground],
        claims: Callable[[], Mapping[str, Claim]],
        *,
        witnesses: Sequence[Witness] = (),
        slots: Slots | None = None,
        snapshots: Snapshots | None = None,
        tidy: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._grounds = grounds
        self._witnesses = witnesses
        self._slots = slots
        self._snapshots = snapshots
        #: What every known machine claims, as of now.
        self._claims = claims
        #: Clears what a machine at rest should not have, by its own task.
        self._tidy = tidy
        self._seen = Drift()
        #: Removed since the start.
        self.removed = 0
        #: How they differ now: leftovers and surplus that are still there, and what two looks have missed.
        self.drift = Drift()

    @property
    def kinds(self) -> AbstractSet[Kind]:
        """Everything that leftovers can be."""
        return {Kind.SLOT, *(ground.kind for ground in self._grounds)}

    async def sweep(self, *, is_start: bool = False) -> frozenset[Thing]:
        """Look once; remove what was seen before, or at the start everything. Returns what was removed."""
        seen = await self._look()
        confirmed = seen.both(self._seen)
        removed = await self._remove(seen.leftovers if is_start else confirmed.leftovers)
        removed |= await self._clear_surplus(confirmed.surplus)
        if self._slots is not None:
            removed |= await self._clear_slots(self._slots)
        self._tell_missing(confirmed.missing)
        left, surplus = seen.leftovers - removed, seen.surplus - removed
        self._seen = Drift(leftovers=left, surplus=surplus, missing=seen.missing)
        self.drift = Drift(leftovers=left, surplus=surplus, missing=confirmed.missing)
        self.removed += len(removed)
        return removed

    async def _look(self) -> Drift:
        """What exists first, who is known then: whoever was made in between is known."""
        found: dict[Kind, set[str]] = {}
        for ground in self._grounds:
            found |= await _ask(ground.kind, _observe_one(ground))
        for witness in self._witnesses:
            found |= await _ask(type(witness).__name__, witness.observe())
        observed = {Thing(kind=kind, name=name) for kind, names in found.items() for name in names}
        drift = compare(observed, self._claims(), found.keys())
        # What a witness sees of nobody goes with what it is in.
        leftovers = frozenset(thing for thing in drift.leftovers if thing.kind in self.kinds)
        missing = drift.missing | await self._look_at_snapshots()
        return Drift(leftovers=leftovers, surplus=drift.surplus, missing=missing)

    async def _look_at_snapshots(self) -> frozenset[Thing]:
        """Those that have lost their bytes."""
        try:
            return await self._snapshots.missing() if self._snapshots is not None else frozenset()
        except (Error, OSError) as e:
            log.warning("not_looked_at", who=Kind.SNAPSHOT, problem=str(e))
            return frozenset()

    async def _remove(self, doomed: frozenset[Thing]) -> frozenset[Thing]:
        removed: set[Thing] = set()
        for ground in self._grounds:
            for thing in sorted(thing for thing in doomed if thing.kind is ground.kind):
                if thing.name not in self._claims() and await self._clear(ground, thing):
                    removed.add(thing)
        return frozenset(removed)

    async def _clear(self, ground: Ground, thing: Thing) -> bool:
        try:
            await ground.clear(thing.name)
        except (Error, OSError) as e:
            log.warning("leftover_not_removed", kind=thing.kind, problem=str(e), **_named(thing))
            return False
        log.warning("leftover_removed", kind=thing.kind, **_named(thing))
        return True

    async def _clear_surplus(self, surplus: frozenset[Thing]) -> frozenset[Thing]:
        removed: set[Thing] = set()
        if self._tidy is None:
            return frozenset()
        for name in sorted({thing.name for thing in surplus}):
            things = {thing for thing in surplus if thing.name == name}
            kinds = sorted(thing.kind for thing in things)
            try:
                async with asyncio.timeout(_TIDY_TIMEOUT_S):
                    await self._tidy(name)
            except (Error, OSError) as e:
                log.warning("surplus_not_removed", machine=name, kinds=kinds, problem=str(e) or "it took too long")
                continue
            log.warning("surplus_removed", machine=name, kinds=kinds)
            removed |= things
        return frozenset(removed)

    async def _clear_slots(self, slots: Slots) -> frozenset[Thing]:
        try:
            numbers = await slots.clear_all()
        except (Error, OSError) as e:
            log.warning("slots_not_swept", problem=str(e))
            return frozenset()
        for number in numbers:
            log.warning("leftover_removed", kind=Kind.SLOT, slot=number)
        return frozenset(Thing(kind=Kind.SLOT, name=number) for number in numbers)

    def _tell_missing(self, missing: frozenset[Thing]) -> None:
        """Once, when it is sure; the metric goes on."""
        for thing in sorted(missing - self.drift.missing):
            log.error("thing_missing", kind=thing.kind, **_named(thing))


def _named(thing: Thing) -> dict[str, str]:
    """Whose a thing is, as a field of the log."""
    owner = {Kind.SNAPSHOT: "snapshot", Kind.SLOT: "slot"}.get(thing.kind, "machine")
    return {owner: thing.name}


async def _observe_one(ground: Ground) -> dict[Kind, set[str]]:
    return {ground.kind: await ground.observe()}


async def _ask(who: str, observation: Awaitable[dict[Kind, set[str]]]) -> dict[Kind, set[str]]:
    """One that cannot look says nothing, and keeps no other from looking."""
    try:
        return await observation
    except (Error, OSError) as e:
        log.warning("not_looked_at", who=who, problem=str(e))
        return {}
