"""The host's nftables table of one daemon instance, kept equal to what is wanted.

What is wanted (uplinks, machines, policies) is
held in memory; a change is one small transaction, and whenever the table is not as it was left (someone flushed the
rule set, firewalld reloaded), the whole table is replaced in one transaction.

Owns: the table `inet fuse_<prefix>`, the tagged rules in foreign chains. Must not: make links.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from fusevm.host.net.foreign import (
    Chain,
    count_tagged,
    find_blocking_chains,
    parse_ruleset,
    render_passage,
    render_passage_removal,
)
from fusevm.host.net.nft import Json
from fusevm.host.net.plan import NetworkPlan, Slot, parse_veth, plan_slot
from fusevm.host.net.tables import (
    render_host_table,
    render_host_table_removal,
    render_machines,
    render_machines_removal,
    render_policy_change,
)
from fusevm.host.net.transaction import apply_transaction
from fusevm.host.run import run
from fusevm.model.environment import Network
from fusevm.model.errors import CommandFailed

_TIMEOUT_S = 30.0
#: Tables of the older iptables, which `nft` does not show (one name a line; absent without the module).
_LEGACY_TABLES = Path("/proc/net/ip_tables_names")


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What exists in the host's nftables."""

    has_table: bool
    #: Slots that have an element in the table, and whether they may reach the Internet.
    machines: dict[int, bool]
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
        self._uplinks: tuple[str, ...] = ()
        self._machines: dict[int, Network] = {}
        #: The kernel's listing of our chains right after they were made.
        self._fingerprint = b""
        self._is_open = False
        #: A transaction was cut off (cancelled, failed): the kernel's table may differ from what is wanted.
        self._is_doubtful = False
        self._lock = asyncio.Lock()

    async def open(self, uplinks: Sequence[str], machines: Mapping[int, Network]) -> None:
        """Make the table with these machines in it, replacing one that exists, and the passage through others."""
        async with self._lock:
            self._uplinks = tuple(uplinks)
            self._machines = dict(machines)
            self._is_open = True
            await self._replace()

    async def ensure(self, uplinks: Sequence[str]) -> bool:
        """Repair what others have changed; return whether there was something to do. Idempotent."""
        async with self._lock:
            is_same = self._uplinks == tuple(uplinks) and not self._is_doubtful
            self._uplinks = tuple(uplinks)
            if is_same and self._fingerprint == await self._read_fingerprint():
                rules = await self._observe()
                if rules.machines == {index: policy.internet for index, policy in self._machines.items()}:
                    return await self._open_passage()
            await self._replace()
            return True

    async def admit(self, slots: Iterable[Slot], policy: Network) -> None:
        """Put slots into the table under one policy; those in it already change to it."""
        async with self._lock:
            fresh = [slot for slot in slots if self._machines.get(slot.index) != policy]
            known = [slot for slot in fresh if slot.index in self._machines]
            new = [(slot, policy) for slot in fresh if slot.index not in self._machines]
            commands = [command for slot in known for command in render_policy_change(self._plan, slot, policy)]
            commands += render_machines(self._plan, new)
            self._machines |= {slot.index: policy for slot in fresh}
            await self._change(commands)

    async def dismiss(self, indexes: Iterable[int]) -> None:
        """Take slots out of the table: from here on they reach nothing. Idempotent; without effect before `open`."""
        async with self._lock:
            known = [index for index in indexes if index in self._machines]
            leaving = [(plan_slot(self._plan, index), self._machines.pop(index)) for index in known]
            await self._change(render_machines_removal(self._plan, leaving))

    async def remove(self) -> None:
        """Remove the table and our rules in foreign chains. Idempotent."""
        async with self._lock:
            self._is_open = False
            self._machines = {}
            await apply_transaction(render_host_table_removal(self._plan))
            await apply_transaction(render_passage_removal(self._plan, parse_ruleset(await _list_ruleset())))

    def policy(self, index: int) -> Network | None:
        """Return what a slot may reach, None if it is not in the table."""
        return self._machines.get(index)

    async def observe(self) -> Rules:
        """Read what is in the kernel."""
        async with self._lock:
            return await self._observe()

    async def _change(self, commands: Sequence[Json]) -> None:
        """Apply a small change; where the kernel's table is not what it follows from, make the whole table."""
        if not self._is_open:
            return
        if not self._is_doubtful:
            if not commands:
                return
            self._is_doubtful = True
            with contextlib.suppress(CommandFailed):
                await apply_transaction(commands)
                self._is_doubtful = False
                return
        await self._replace()

    async def _replace(self) -> None:
        self._is_doubtful = True
        machines = [(plan_slot(self._plan, index), policy) for index, policy in sorted(self._machines.items())]
        await apply_transaction(render_host_table(self._plan, self._uplinks, machines))
        self._fingerprint = await self._read_fingerprint()
        self._is_doubtful = False
        await self._open_passage()

    async def _open_passage(self) -> bool:
        commands = render_passage(self._plan, parse_ruleset(await _list_ruleset()))
        await apply_transaction(commands)
        return bool(commands)

    async def _read_fingerprint(self) -> bytes:
        """List our chains and rules without what changes by itself: elements (-t), counters (-s)."""
        argv = ["nft", "-s", "-t", "list", "table", "inet", self._plan.table]
        return (await run(argv, timeout_s=_TIMEOUT_S, check=False)).stdout

    async def _observe(self) -> Rules:
        argv = ["nft", "-j", "list", "table", "inet", self._plan.table]
        listing = await run(argv, timeout_s=_TIMEOUT_S, check=False)
        has_table = listing.returncode == 0
        ruleset = parse_ruleset(await _list_ruleset())
        return Rules(
            has_table=has_table,
            machines=_parse_machines(self._plan, listing.stdout) if has_table else {},
            blocking=find_blocking_chains(ruleset),
            tagged=count_tagged(self._plan, ruleset),
            has_legacy_filter=await asyncio.to_thread(_has_legacy_filter),
        )


class _Concatenation(msgspec.Struct, frozen=True):
    concat: tuple[str, str]


class _Set(msgspec.Struct, frozen=True):
    name: str
    elem: list[object] = []


class _Line(msgspec.Struct, frozen=True):
    set: _Set | None = None


class _Listing(msgspec.Struct, frozen=True):
    nftables: list[_Line]


def _parse_machines(plan: NetworkPlan, listing: bytes) -> dict[int, bool]:
    """Read the sets of our table: numbers of slots and whether they may reach the Internet."""
    sets = {line.set.name: line.set.elem for line in msgspec.json.decode(listing, type=_Listing).nftables if line.set}
    offline = set(msgspec.convert(sets.get("offline", []), list[str]))
    sources = msgspec.convert(sets.get("sources", []), list[_Concatenation])
    machines = {parse_veth(plan, source.concat[0]): source.concat[0] not in offline for source in sources}
    return {index: has_internet for index, has_internet in machines.items() if index is not None}


async def _list_ruleset() -> bytes:
    """List all rules of the host, without the elements of sets, which may be many."""
    return (await run(["nft", "-j", "-t", "list", "ruleset"], timeout_s=_TIMEOUT_S)).stdout


def _has_legacy_filter() -> bool:
    try:
        return "filter" in _LEGACY_TABLES.read_text().split()
    except FileNotFoundError:
        return False
