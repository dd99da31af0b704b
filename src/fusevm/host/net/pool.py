"""Ready network slots, made ahead of need.

The journal owns numbers: it reserves one (best the first of `candidates()`), then calls `acquire`. The pool owns
kernel objects: it keeps a few slots complete, makes others on demand, and destroys a released slot entirely (namespace,
veth, rules), so that no connection, socket or neighbour of the old machine survives; the number can then be used anew.

All making and destroying is done by one background task, in batches; what nobody waits for is made in a lull. Nothing
is remembered across restarts: `open` finishes the slots that the journal still has and removes all others of this
instance.

Owns: which slots are warm. Must not: reserve numbers, know machines.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec
import structlog

from fusevm.host.net.firewall import Firewall, Rules
from fusevm.host.net.links import Objects, ensure_links, observe_objects, remove_links
from fusevm.host.net.plan import NetworkPlan, Slot, plan_slot
from fusevm.host.net.shaping import reshape, shape
from fusevm.host.net.terms import DEFAULT_TERMS, Terms
from fusevm.model.errors import CommandFailed, Error, ShuttingDown, SlotFailed, SlotInUse
from fusevm.model.network import Network

log = structlog.get_logger()

#: Slots made or destroyed in one go: bounds how long an `acquire` waits behind other work.
_BATCH = 8
#: Of a machine whose own terms cannot be enforced.
_NOTHING = Terms(policy=Network(internet=False))
#: Slots are made once nobody has taken one for this long, seconds, while some are left: whoever has just taken one goes
#: on to boot a machine, and needs the processors.
_LULL_S = 0.2
#: After a failure in the background, seconds until the next attempt.
_RETRY_S = 5.0


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What exists on the host under this instance's prefix."""

    objects: Objects
    rules: Rules

    @property
    def slots(self) -> frozenset[int]:
        """Numbers of which anything at all exists."""
        return self.objects.slots | frozenset(self.rules.machines)


class Pool:
    """Slots by state: wanted (somebody waits for it), making, ready, used, doomed (released, not yet destroyed)."""

    def __init__(self, plan: NetworkPlan, firewall: Firewall, *, warm: int = 4) -> None:
        self._plan = plan
        self._firewall = firewall
        self._warm = min(warm, plan.capacity)
        self._ready: dict[int, Slot] = {}
        self._used: dict[int, Slot] = {}
        #: Used ones whose limits and loopback switch may not be those of their terms: a change failed, or was cut off.
        self._misshapen: set[int] = set()
        self._making: set[int] = set()
        self._doomed: set[int] = set()
        self._wanted: dict[int, asyncio.Future[Slot]] = {}
        #: When the lull begins in which slots are made ahead of need, on the loop's clock.
        self._calm_at = 0.0
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self, keep: Mapping[int, Terms], uplinks: Sequence[str]) -> dict[int, Exception]:
        """Finish the slots in `keep`, which count as acquired, remove all others, and start keeping slots warm.

        Returns the failures of kept slots, by number: they stay acquired, but their machines have no network.
        """
        beyond = [index for index in keep if index >= self._plan.capacity]
        slots = {index: plan_slot(self._plan, index) for index in keep if index not in beyond}
        # First of all the rules: from here on nobody but the kept machines reaches anything.
        failures = await self._open_rules(uplinks, {index: keep[index] for index in slots})
        await self._remove_others(slots)
        failures |= await ensure_links(self._plan, list(slots.values()))
        problem = f"{self._plan.range} has only {self._plan.capacity} slots"
        failures |= {index: SlotFailed(index=index, problem=problem) for index in beyond}
        failures |= await self._reshape({index: keep[index] for index in slots.keys() - failures.keys()})
        self._misshapen = set(failures)
        self._used = slots
        self._task = asyncio.create_task(self._work(), name="network pool")
        return failures

    async def _open_rules(self, uplinks: Sequence[str], terms: Mapping[int, Terms]) -> dict[int, Exception]:
        """Open the firewall for all. One whose terms it refuses reaches nothing, and keeps no other from its own."""
        try:
            await self._firewall.open(uplinks, terms)
        except (CommandFailed, ValueError) as e:
            log.warning("rules_refused", problem=str(e), remedy="each machine's are tried by themselves")
        else:
            return {}
        accepted: dict[int, Terms] = {}
        failures: dict[int, Exception] = {}
        for index, wanted in terms.items():
            try:
                await self._firewall.open(uplinks, {**accepted, index: wanted})
                accepted[index] = wanted
            except (CommandFailed, ValueError) as e:
                failures[index] = e
        await self._firewall.open(uplinks, {**accepted, **dict.fromkeys(failures, _NOTHING)})
        return failures

    async def close(self) -> None:
        """Stop working in the background. Slots stay as they are: machines outlive the daemon."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for state in (self._ready, self._used, self._doomed):
            state.clear()
        for waiter in self._wanted.values():
            if not waiter.done():
                waiter.set_exception(ShuttingDown())

    def candidates(self) -> Iterator[int]:
        """Yield numbers that `acquire` takes, the fastest first: warm, being warmed, untouched, being destroyed."""
        yield from sorted(self._ready)
        own = self._own()
        yield from sorted(self._making - self._wanted.keys())
        yield from (index for index in range(self._plan.capacity) if index not in own)
        yield from sorted(index for index in self._doomed - self._wanted.keys() if index < self._plan.capacity)

    async def acquire(self, index: int, terms: Terms = DEFAULT_TERMS) -> Slot:
        """Hand out slot `index`, under `terms`; the caller has reserved the number and releases it.

        At once if it is warm and takes the default terms; otherwise it is made, or the terms applied, first.
        Raises SlotInUse, SlotFailed, or CommandFailed where the terms cannot be enforced; the slot is then not taken.
        """
        if self._task is None:
            raise ShuttingDown
        if index in self._used or index in self._wanted:
            raise SlotInUse(index=index)
        slot = self._ready.pop(index, None) or await self._demand(index)
        self._used[index] = slot
        self._calm_at = asyncio.get_running_loop().time() + _LULL_S
        self._wake_up()
        if terms != DEFAULT_TERMS:
            try:
                await self._apply(slot, DEFAULT_TERMS, terms, is_fresh=True)
            except BaseException:
                self.release(index)
                raise
        return slot

    async def set_terms(self, index: int, terms: Terms) -> None:
        """Change what is granted to the machine in a slot, open connections included.

        SlotFailed if there is none, CommandFailed or OSError if the host refuses; a repetition does what is missing.
        """
        slot = self._used.get(index)
        old = self._firewall.terms(index)
        if slot is None or old is None:
            raise SlotFailed(index=index, problem="it is not in use")
        await self._apply(slot, old, terms)

    async def _apply(self, slot: Slot, old: Terms, new: Terms, *, is_fresh: bool = False) -> None:
        is_known = slot.index not in self._misshapen
        self._misshapen.add(slot.index)
        await self._firewall.admit([slot], new, is_fresh=is_fresh)
        await (shape(slot, old, new) if is_known else reshape(slot, new))
        self._misshapen.discard(slot.index)

    def release(self, index: int) -> None:
        """Give a slot up; it is destroyed in the background, before its number serves again. Idempotent.

        Nothing may run in it any more, and no descriptor of it be open.
        """
        if self._used.pop(index, None) is not None:
            self._misshapen.discard(index)
            self._doomed.add(index)
            self._wake_up()

    async def settle(self) -> None:
        """Wait until the background has nothing left to do that can be done."""
        await self._settled.wait()

    async def observe(self) -> Observation:
        """Read what exists on the host with this instance's prefix."""
        objects = await asyncio.to_thread(observe_objects, self._plan)
        return Observation(objects=objects, rules=await self._firewall.observe())

    async def sweep(self, keep: Collection[int]) -> frozenset[int]:
        """Remove whatever exists of slots that are neither kept nor the pool's own; return their numbers. Idempotent.

        An open pool owns all that it has made, whoever has acquired it: what nobody needs any more is released. Warm
        slots that somebody has damaged are replaced.
        When the pool is closed and nothing is kept, the instance's table and its rules in foreign chains go, too.
        """
        if self._task is None:
            removed = await self._remove_others(keep)
            if not keep:
                await self._firewall.remove()
            return removed
        before, ready = self._own(), set(self._ready)
        objects = await asyncio.to_thread(observe_objects, self._plan)
        # From here on the background task sees to them, so that nobody is given one that is about to go.
        rest = objects.slots - frozenset(keep) - before - self._own()
        broken = ready.intersection(self._ready) - (objects.namespaces & objects.veths)
        for index in broken:
            del self._ready[index]
        rest |= broken
        if rest:
            self._doomed |= rest
            self._wake_up()
            await self.settle()
        return rest - self._doomed

    async def _reshape(self, keep: Mapping[int, Terms]) -> dict[int, Exception]:
        """Make limits true where an earlier daemon may have ended in the middle; return the failures."""
        limit = asyncio.Semaphore(_BATCH)

        async def one(index: int, terms: Terms) -> None:
            async with limit:
                await reshape(plan_slot(self._plan, index), terms)

        outcomes = await asyncio.gather(*(one(*item) for item in keep.items()), return_exceptions=True)
        return {index: outcome for index, outcome in zip(keep, outcomes, strict=True) if isinstance(outcome, Exception)}

    async def _remove_others(self, keep: Collection[int]) -> frozenset[int]:
        objects = await asyncio.to_thread(observe_objects, self._plan)
        rest = objects.slots - frozenset(keep)
        return rest - (await self._remove(rest)).keys()

    async def _remove(self, indexes: Collection[int]) -> dict[int, Exception]:
        """Remove slots, rules first; return the failures."""
        await self._firewall.dismiss(indexes)
        failures = await remove_links(self._plan, indexes)
        for index, failure in failures.items():
            log.warning("network_slot_not_removed", slot=index, problem=str(failure))
        return failures

    def _own(self) -> frozenset[int]:
        """Numbers in any state."""
        return frozenset().union(self._wanted, self._making, self._ready, self._used, self._doomed)

    async def _demand(self, index: int) -> Slot:
        plan_slot(self._plan, index)  # ValueError beyond the capacity
        waiter: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._wanted[index] = waiter
        self._wake_up()
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.done() and waiter.exception() is None:
                self._ready[index] = waiter.result()  # it was delivered in the same moment
            raise
        finally:
            del self._wanted[index]

    def _wake_up(self) -> None:
        self._settled.clear()
        self._wake.set()

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            failed = False
            try:
                failed = await self._turn()
            except Exception:  # a failure must not end the pool; the next turn looks at the world anew
                log.exception("network_pool_turn_failed")
                failed = True
            if not failed and self._has_work():
                continue
            pause_s = _RETRY_S if failed else self._lull_in_s()
            if failed or pause_s is None:
                self._settled.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    def _has_work(self) -> bool:
        return bool(self._doomed or self._open_demands() or self._to_warm())

    async def _turn(self) -> bool:
        """Make what is waited for, then destroy one batch, then warm one batch; return whether something failed."""
        demands = self._open_demands()
        urgent = [index for index in demands if index not in self._doomed]
        failed = await self._make(urgent) if urgent else False
        doomed = sorted(self._doomed, key=lambda index: index not in demands)[:_BATCH]
        if doomed:
            failed |= await self._destroy(doomed)
        warming = self._to_warm()
        if warming and not self._open_demands():
            failed |= await self._make(warming)
        return failed

    def _open_demands(self) -> list[int]:
        return [index for index, waiter in self._wanted.items() if not waiter.done()][:_BATCH]

    def _lull_in_s(self) -> float | None:
        """Seconds until slots may be made ahead of need; None if none are needed."""
        if len(self._ready) >= self._warm:
            return None
        return max(self._calm_at - asyncio.get_running_loop().time(), 0.0)

    def _to_warm(self) -> list[int]:
        if self._ready and self._lull_in_s():
            return []
        missing = min(self._warm - len(self._ready), _BATCH)
        own = self._own()
        free = (index for index in range(self._plan.capacity) if index not in own)
        return list(itertools.islice(free, max(missing, 0)))

    async def _make(self, indexes: Sequence[int]) -> bool:
        slots = [plan_slot(self._plan, index) for index in indexes]
        self._making = set(indexes)
        try:
            failures = await remove_links(self._plan, indexes)  # a crash may have left halves
            failures |= await ensure_links(self._plan, [slot for slot in slots if slot.index not in failures])
            await self._firewall.admit([slot for slot in slots if slot.index not in failures], DEFAULT_TERMS)
        except (Error, OSError) as e:
            failures = dict.fromkeys(indexes, e)
        finally:
            self._making = set()
        for slot in slots:
            self._deliver(slot, failures.get(slot.index))
        return bool(failures)

    def _deliver(self, slot: Slot, failure: Exception | None) -> None:
        if failure is not None:
            log.warning("network_slot_not_made", slot=slot.index, problem=str(failure))
            self._doomed.add(slot.index)
            self._fail_demand(slot.index, failure)
            return
        waiter = self._wanted.get(slot.index)
        if waiter is not None and not waiter.done():
            waiter.set_result(slot)
        else:
            self._ready[slot.index] = slot

    async def _destroy(self, indexes: Sequence[int]) -> bool:
        failures = await self._remove(indexes)
        self._doomed -= set(indexes) - failures.keys()
        for index, failure in failures.items():
            self._fail_demand(index, failure)
        return bool(failures)

    def _fail_demand(self, index: int, failure: Exception) -> None:
        waiter = self._wanted.get(index)
        if waiter is not None and not waiter.done():
            error = SlotFailed(index=index, problem=str(failure))
            error.__cause__ = failure
            waiter.set_exception(error)
