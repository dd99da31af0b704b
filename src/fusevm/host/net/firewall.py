"""The host's nftables table of one daemon instance, kept equal to what is wanted.

What is wanted (uplinks, machines, their terms, pinned addresses) is held in memory; a change is one small transaction,
and whenever the table is not as it was left (someone flushed the rule set, firewalld reloaded), the whole table is
replaced in one transaction. Connections that a change no longer allows are cut by the rules at once, and leave the
host's connection tracking table right after.

Owns: the tables `inet fuse_<prefix>` and `inet fuse_<prefix>_limits`, the tagged rules in foreign chains. Must not:
make links.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from fusevm.host.net.conntrack import Connection, cut
from fusevm.host.net.foreign import (
    Chain,
    count_tagged,
    find_blocking_chains,
    parse_ruleset,
    render_passage,
    render_passage_removal,
)
from fusevm.host.net.limits import render_limits, render_limits_removal, render_new_limits
from fusevm.host.net.listing import Counts, TableListing, parse_table, parse_uses
from fusevm.host.net.nft import Json, Table
from fusevm.host.net.pins import PinBatch, Pinboard
from fusevm.host.net.plan import NetworkPlan, Slot, plan_slot
from fusevm.host.net.tables import (
    USED,
    render_host_table,
    render_host_table_removal,
    render_machines,
    render_machines_removal,
    render_terms_change,
)
from fusevm.host.net.terms import Forward, Terms
from fusevm.host.net.transaction import apply_transaction, list_rules, list_ruleset, list_set, list_table
from fusevm.host.net.verdicts import pin_set
from fusevm.host.tasks import finish
from fusevm.model.errors import CommandFailed
from fusevm.model.network import Rule, permits

log = structlog.get_logger()

#: Tables of the older iptables, which `nft` does not show (one name a line; absent without the module).
_LEGACY_TABLES = Path("/proc/net/ip_tables_names")


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What exists in the host's nftables."""

    has_table: bool
    #: Slots that have an element in the table, and whether they may reach the whole Internet.
    machines: dict[int, bool]
    #: Published ports.
    forwards: frozenset[tuple[str, Forward]] = frozenset()
    #: Chains of other programs that block machines unless our tagged pair is in them.
    blocking: list[Chain]
    #: Number of our tagged rules.
    tagged: int
    #: The older iptables has a filter table, which may block machines unseen.
    has_legacy_filter: bool


class Firewall:
    """The table and who is in it."""

    def __init__(self, plan: NetworkPlan) -> None:
        self._plan = plan
        self._table = Table("inet", plan.table)
        self._uplinks: tuple[str, ...] = ()
        self._machines: dict[int, Terms] = {}
        self._pins = Pinboard()
        #: When slots came into the table; without those that an earlier daemon had put there.
        self._admitted: dict[int, float] = {}
        #: What was counted in tables that were replaced since.
        self._counted: dict[int, Counts] = {}
        #: The kernel's listing of our chains right after they were made.
        self._fingerprint = b""
        #: The same of the table that limits connections.
        self._limits_fingerprint = b""
        self._is_open = False
        #: A transaction was cut off (cancelled, failed): the kernel's table may differ from what is wanted.
        self._is_doubtful = False
        self._lock = asyncio.Lock()

    async def open(self, uplinks: Sequence[str], machines: Mapping[int, Terms]) -> None:
        """Make the table with these machines in it, replacing one that exists, and the passage through others.

        Pinned addresses and counts of an earlier daemon's table are taken over.
        """
        async with self._lock:
            self._uplinks = tuple(uplinks)
            self._machines = dict(machines)
            self._take_over(await self._list_table())
            self._is_open = True
            await self._replace()
        doomed = {self._slot(index).address: terms for index, terms in machines.items() if not terms.is_plain}
        if doomed:
            await _cut(lambda connection: _is_forbidden(doomed, connection))

    async def ensure(self, uplinks: Sequence[str]) -> bool:
        """Repair what others have changed; return whether there was something to do. Idempotent."""
        async with self._lock:
            is_same = self._uplinks == tuple(uplinks) and not self._is_doubtful
            self._uplinks = tuple(uplinks)
            if is_same and await self._is_as_made():
                rules = await self._observe()
                wanted = {index: terms.is_plain for index, terms in self._machines.items()}
                if (rules.machines, rules.forwards) == (wanted, self._forwards()):
                    return await self._open_passage()
            await self._replace()
            return True

    async def admit(self, slots: Iterable[Slot], terms: Terms, *, is_fresh: bool = False) -> None:
        """Put slots into the table under the same terms; those in it already change to them.

        Connections that the new terms do not allow end; `is_fresh`: nobody can have any yet. Raises CommandFailed when
        nft refuses them; then everybody has the terms of before.
        """
        changed: dict[str, tuple[Terms, Terms]] = {}
        async with self._lock:
            before = dict(self._machines)
            fresh = [slot for slot in slots if before.get(slot.index) != terms]
            new = [(slot, terms) for slot in fresh if slot.index not in self._machines]
            commands: list[Json] = []
            for slot in fresh:
                old = self._machines.get(slot.index)
                if old is not None:
                    commands += render_terms_change(self._plan, slot, old, terms)
                    changed[slot.address] = (old, terms)
                    self._pins.keep(slot.index, {pin_set(slot, rule) for rule in terms.policy.domain_rules})
            commands += render_machines(self._plan, new)
            has_chains = bool(terms.policy.rules) or any(old.policy.rules for old, _ in changed.values())
            self._machines |= {slot.index: terms for slot in fresh}
            self._admitted |= {slot.index: asyncio.get_running_loop().time() for slot, _ in new}
            try:
                await self._change(commands, has_chains=has_chains)
            except CommandFailed:
                await self._take_back(before)
                raise
        if not is_fresh and any(_takes_away(old, new) for old, new in changed.values()):
            await _cut(lambda connection: _is_taken_away(changed, connection))

    async def dismiss(self, indexes: Iterable[int]) -> None:
        """Take slots out of the table: from here on they reach nothing. Idempotent; without effect before `open`."""
        async with self._lock:
            known = [index for index in indexes if index in self._machines]
            leaving = [(self._slot(index), self._machines.pop(index)) for index in known]
            for slot, _ in leaving:
                self._pins.keep(slot.index, set())
                self._admitted.pop(slot.index, None)
                self._counted.pop(slot.index, None)
            has_chains = any(terms.policy.rules for _, terms in leaving)
            await self._change(render_machines_removal(self._plan, leaving), has_chains=has_chains)
        addresses = {slot.address for slot, _ in leaving}
        if addresses:
            await _cut(lambda connection: connection.source in addresses or connection.answerer in addresses)

    async def pin(self, index: int, rules: Iterable[Rule], addresses: Collection[str], lifetime_s: int) -> bool:
        """Let a machine reach addresses by its domain rules for some seconds; return whether it may now.

        Whoever comes while a transaction is under way shares the next one. False where no rule is the machine's any
        more, where one has as many addresses as it may have, and where nft refuses the machine's own.
        """
        slot, loop = self._slot(index), asyncio.get_running_loop()
        names = {pin_set(slot, rule) for rule in rules}
        if self._pins.want(index, names, addresses, loop.time(), lifetime_s):
            async with self._lock:
                # It carries the pins of others: one who gives up must not take it from them.
                await finish(self._apply_pins())
        known = names & self._pin_sets(slot)
        return bool(known) and self._pins.holds(index, known, addresses, loop.time())

    async def remove(self) -> None:
        """Remove the table and our rules in foreign chains. Idempotent."""
        async with self._lock:
            self._is_open = False
            self._machines = {}
            await apply_transaction(render_host_table_removal(self._plan) + render_limits_removal(self._plan))
            await apply_transaction(render_passage_removal(self._plan, parse_ruleset(await list_ruleset())))

    def terms(self, index: int) -> Terms | None:
        """Return what a slot is granted, None if it is not in the table."""
        return self._machines.get(index)

    async def observe(self) -> Rules:
        """Read what is in the kernel."""
        async with self._lock:
            return await self._observe()

    async def count(self) -> dict[int, Counts]:
        """Read the counts of every slot."""
        async with self._lock:
            listing = await self._list_table()
            return {index: self._counted.get(index, Counts()) + counts for index, counts in listing.counts.items()}

    async def uses(self) -> dict[int, int]:
        """Read how many seconds ago clients last sent something to published ports, by slot, rounded up; who is not
        there had no client for days, or since somebody flushed the table. CommandFailed, OSError if nothing can be
        read. Cheap, and waits for no change. Of a slot that an earlier daemon had filled, it may be the use of the
        machine before."""
        found = parse_uses(self._plan, await list_set(self._plan.table, USED))
        now = asyncio.get_running_loop().time()
        # What is older was the use of another machine, which had the slot before.
        ages = {index: now - self._admitted.get(index, -math.inf) for index in self._machines}
        return {index: ago_s for index, ago_s in found.items() if ago_s <= ages.get(index, -math.inf) + 1}

    def _slot(self, index: int) -> Slot:
        return plan_slot(self._plan, index)

    def _forwards(self) -> frozenset[tuple[str, Forward]]:
        machines = self._machines.items()
        return frozenset(
            (self._slot(index).address, forward) for index, terms in machines for forward in terms.forwards
        )

    def _pin_sets(self, slot: Slot) -> set[str]:
        terms = self._machines.get(slot.index)
        return {pin_set(slot, rule) for rule in terms.policy.domain_rules} if terms is not None else set()

    async def _apply_pins(self) -> None:
        """Put what was wanted meanwhile into the kernel, each machine's by itself if it refuses all together.

        The table is left alone whatever happens: what one machine asks for is no reason to make it anew.
        """
        batch = self._pins.take(lambda index, name: name in self._pin_sets(self._slot(index)))
        try:
            if self._is_open:
                await self._apply_each(batch)
        finally:
            self._pins.settle()

    async def _apply_each(self, batch: PinBatch) -> None:
        if len(batch.slots) > 1:
            with contextlib.suppress(CommandFailed):
                await self._apply_batch(batch)
                return
        for index in batch.slots:
            part = batch.of(index)
            try:
                await self._apply_batch(part)
            except CommandFailed as e:
                self._pins.forget(part)
                log.warning("addresses_not_pinned", slot=index, problem=e.message)

    async def _apply_batch(self, batch: PinBatch) -> None:
        try:
            await apply_transaction(batch.render(self._table))
        except CommandFailed:
            raise
        except BaseException:
            self._pins.forget(batch)
            raise

    async def _change(self, commands: Sequence[Json], *, has_chains: bool = False) -> None:
        """Apply a small change; where the kernel's table is not what it follows from, make the whole table."""
        if not self._is_open:
            return
        if not self._is_doubtful:
            if not commands:
                return
            self._is_doubtful = True
            with contextlib.suppress(CommandFailed):
                await apply_transaction(commands)
                if has_chains:
                    self._fingerprint = await self._read_fingerprint()
                self._is_doubtful = False
                return
        await self._replace()

    async def _take_back(self, machines: dict[int, Terms]) -> None:
        """Return to the terms of before; refused ones in the whole table would have it refused to everybody."""
        self._machines = machines
        self._admitted = {index: since for index, since in self._admitted.items() if index in machines}
        with contextlib.suppress(CommandFailed, OSError):  # then the next change or `ensure` tries again
            self._take_over(await self._list_table())
            await self._replace()

    async def _replace(self) -> None:
        self._is_doubtful = True
        listing = await self._list_table()
        before = self._counted
        self._counted = before | {
            index: before.get(index, Counts()) + counts
            for index, counts in listing.counts.items()
            if index in self._machines
        }
        machines = [(self._slot(index), terms) for index, terms in sorted(self._machines.items())]
        pins = self._pins.remaining(asyncio.get_running_loop().time())
        table = render_host_table(self._plan, self._uplinks, machines, pins, listing.uses)
        try:
            await self._make_limits()  # before the first machine gets out
            await apply_transaction(table)
        except (CommandFailed, OSError):
            self._counted = before  # that table is still there, and will be counted again
            raise
        self._fingerprint = await self._read_fingerprint()
        self._is_doubtful = False
        await self._open_passage()

    async def _make_limits(self) -> None:
        """Make the rules that limit connections; what is counted stays, where the kernel has the table."""
        try:
            await apply_transaction(render_limits(self._plan))
        except CommandFailed:
            await apply_transaction(render_new_limits(self._plan))
        self._limits_fingerprint = await list_rules(self._plan.limits_table)

    def _take_over(self, listing: TableListing) -> None:
        """Remember the pins of an earlier daemon, so that machines may go on using what was resolved for them."""
        now = asyncio.get_running_loop().time()
        wanted = {
            pin_set(self._slot(index), rule): index
            for index, terms in self._machines.items()
            for rule in terms.policy.domain_rules
        }
        for name, addresses in listing.pins.items():
            if name in wanted:
                self._pins.restore(wanted[name], name, addresses, now)

    async def _open_passage(self) -> bool:
        commands = render_passage(self._plan, parse_ruleset(await list_ruleset()))
        await apply_transaction(commands)
        return bool(commands)

    async def _is_as_made(self) -> bool:
        limits = await list_rules(self._plan.limits_table)
        return (self._fingerprint, self._limits_fingerprint) == (await self._read_fingerprint(), limits)

    async def _read_fingerprint(self) -> bytes:
        return await list_rules(self._plan.table)

    async def _list_table(self) -> TableListing:
        return parse_table(self._plan, await list_table(self._plan.table))

    async def _observe(self) -> Rules:
        listing = await self._list_table()
        ruleset = parse_ruleset(await list_ruleset())
        return Rules(
            has_table=listing.exists,
            machines=listing.machines,
            forwards=listing.forwards,
            blocking=find_blocking_chains(ruleset),
            tagged=count_tagged(self._plan, ruleset),
            has_legacy_filter=await asyncio.to_thread(_has_legacy_filter),
        )


def _takes_away(old: Terms, new: Terms) -> bool:
    """May an open connection be forbidden by a change?"""
    return (old.policy != new.policy and not new.is_plain) or bool(old.forwards - new.forwards)


def _is_taken_away(changed: Mapping[str, tuple[Terms, Terms]], connection: Connection) -> bool:
    if connection.answerer in changed:
        gone = changed[connection.answerer][0].forwards - changed[connection.answerer][1].forwards
        ports = {(_NUMBERS[forward.protocol.value], forward.host_port) for forward in gone}
        return (connection.flow.protocol, connection.flow.port) in ports
    return _is_forbidden({address: new for address, (_, new) in changed.items()}, connection)


def _is_forbidden(terms: Mapping[str, Terms], connection: Connection) -> bool:
    """Is it one that a machine has opened and may not have?"""
    of_source = terms.get(connection.source)
    return of_source is not None and not permits(of_source.policy, connection.flow)


_NUMBERS = {"tcp": 6, "udp": 17}


async def _cut(is_doomed: Callable[[Connection], bool]) -> None:
    """The rules let none of these through any more: that their entries stay would cost only room."""
    try:
        await cut(is_doomed)
    except OSError as e:
        log.warning("connections_not_forgotten", problem=str(e))


def _has_legacy_filter() -> bool:
    try:
        return "filter" in _LEGACY_TABLES.read_text().split()
    except FileNotFoundError:
        return False
