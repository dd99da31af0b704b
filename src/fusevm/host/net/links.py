"""Namespaces, veth pairs and addresses of slots: rendered for `ip -batch`, applied, observed, removed.

Creation is one `ip` process on the host's side for a whole batch of slots, then per slot one thread (tap, sysctls),
one `ip` and one `nft` process inside. Every step may be repeated: a half-made slot is finished by doing it again.

Owns: the kernel objects of slots inside and outside, save the host's nftables (`firewall`). Must not: decide when
(`pool`).
"""

import asyncio
import secrets
import socket
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import msgspec

from fusevm.host.net.namespace import is_namespace, run_inside
from fusevm.host.net.plan import (
    NAMESPACE_DIRECTORY,
    NetworkPlan,
    Slot,
    namespace_name,
    parse_namespace,
    parse_veth,
    veth_name,
)
from fusevm.host.net.tables import render_namespace_tables
from fusevm.host.net.tap import ensure_tap
from fusevm.host.net.transaction import apply_transaction
from fusevm.host.run import Completed, run
from fusevm.model.errors import Internal

_TIMEOUT_S = 30.0
#: An `ip` that outlived a killed daemon would go on making what the next daemon's sweep has just removed.
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
#: Slots that are set up inside at the same time.
_PARALLEL = 4
#: Written inside each namespace. A new one takes its IPv4 values from the host, so nothing is left to chance.
_SYSCTLS: tuple[tuple[str, str], ...] = (
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
)


class Objects(msgspec.Struct, frozen=True, kw_only=True):
    """What exists on the host, by slot number."""

    namespaces: frozenset[int]
    #: Namespace files that are no namespaces: left by a crash in the middle of `ip netns add`.
    stubs: frozenset[int]
    veths: frozenset[int]

    @property
    def slots(self) -> frozenset[int]:
        return self.namespaces | self.stubs | self.veths


def observe_objects(plan: NetworkPlan) -> Objects:
    """List this instance's namespaces and veths."""
    folder = Path(NAMESPACE_DIRECTORY)
    files = {name: index for name in _list(folder) if (index := parse_namespace(plan, name)) is not None}
    namespaces = frozenset(index for name, index in files.items() if is_namespace(folder / name))
    veths = frozenset(index for _, name in socket.if_nameindex() if (index := parse_veth(plan, name)) is not None)
    return Objects(namespaces=namespaces, stubs=frozenset(files.values()) - namespaces, veths=veths)


# -- rendered -------------------------------------------------------------------------------------------------------


def render_creation(slots: Iterable[Slot], existing: Objects) -> str:
    """Render the host's side of slots for `ip -batch`, leaving out what exists."""
    lines: list[str] = []
    for slot in slots:
        if slot.index not in existing.namespaces:
            lines.append(f"netns add {slot.namespace}")
        if slot.index not in existing.veths:
            peer = f"peer name {slot.peer} mtu {slot.mtu} netns {slot.namespace}"
            lines.append(f"link add {slot.veth} mtu {slot.mtu} type veth {peer}")
        lines.append(f"addr replace {slot.host_address}/{slot.prefix_length} dev {slot.veth}")
        # No IPv6 link-local address: the host has no business on that link but IPv4.
        lines.append(f"link set {slot.veth} addrgenmode none up")
    return "".join(f"{line}\n" for line in lines)


def render_inside(slot: Slot) -> str:
    """Render the links and addresses inside a slot's namespace for `ip -batch`. The tap must exist."""
    lines = [
        "link set lo up",
        f"link set {slot.tap} address {slot.gateway_mac} mtu {slot.mtu} addrgenmode none up",
        f"addr replace {slot.gateway}/{slot.guest_prefix_length} dev {slot.tap}",
        f"neigh replace {slot.guest_address} lladdr {slot.guest_mac} dev {slot.tap} nud permanent",
        f"addr replace {slot.address}/{slot.prefix_length} dev {slot.peer}",
        f"link set {slot.peer} addrgenmode none up",
        f"route replace default via {slot.host_address}",
    ]
    return "".join(f"{line}\n" for line in lines)


def render_removal(plan: NetworkPlan, slots: Iterable[int], existing: Objects, group: int) -> str:
    """Render the removal of slots for `ip -batch`.

    The veths go first, together (by `group`, a number nothing else uses): one grace period of the kernel instead of
    one for each, and even a namespace that something still holds is cut off.
    """
    doomed = sorted(slots)
    veths = [f"link set {veth_name(plan, index)} group {group}" for index in doomed if index in existing.veths]
    lines = [*veths, *([f"link del group {group}"] if veths else [])]
    named = existing.namespaces | existing.stubs
    lines += [f"netns del {namespace_name(plan, index)}" for index in doomed if index in named]
    return "".join(f"{line}\n" for line in lines)


# -- applied --------------------------------------------------------------------------------------------------------


async def ensure_links(plan: NetworkPlan, slots: Collection[Slot]) -> dict[int, Exception]:
    """Make slots complete, keeping what exists: a namespace in use stays in use. Idempotent.

    Returns the failures by slot number; the other slots are complete. A caller that wants slots new removes them first.
    """
    existing = await asyncio.to_thread(observe_objects, plan)
    wanted = frozenset(slot.index for slot in slots)
    # Without its namespace the other end of a veth is somewhere else: such a pair is of no use.
    useless = wanted & (existing.stubs | (existing.veths - existing.namespaces))
    failures = await remove_links(plan, useless)
    if useless:
        existing = await asyncio.to_thread(observe_objects, plan)
    makeable = [slot for slot in slots if slot.index not in failures]
    outside = await _run_batch(render_creation(makeable, existing))
    limit = asyncio.Semaphore(_PARALLEL)
    outcomes = await asyncio.gather(*(_ensure_inside(slot, limit) for slot in makeable), return_exceptions=True)
    for slot, outcome in zip(makeable, outcomes, strict=True):
        if isinstance(outcome, Exception):
            outcome.add_note(f"`ip` on the host said: {outside}")
            failures[slot.index] = outcome
    return failures


async def remove_links(plan: NetworkPlan, slots: Collection[int]) -> dict[int, Exception]:
    """Remove the namespaces and veths of slots. Idempotent.

    Returns the failures by slot number; of the other slots nothing is left.
    """
    existing = await asyncio.to_thread(observe_objects, plan)
    text = render_removal(plan, slots, existing, group=secrets.randbelow(2**30) + 2**30)
    if not text:
        return {}
    said = await _run_batch(text)
    left = (await asyncio.to_thread(observe_objects, plan)).slots.intersection(slots)
    return {index: Internal(problem=f"network slot {index} cannot be removed: {said}") for index in left}


async def _run_batch(text: str) -> str:
    """Run commands of `ip` on the host, all of them whatever fails; return what it complained about."""
    if not text:
        return ""
    # -force: one bad slot must not keep the others. Who cares for one looks at what exists afterwards.
    done = await _run(["ip", "-force", "-batch", "-"], text.encode(), check=False)
    return done.stderr.decode(errors="replace").strip()


async def _ensure_inside(slot: Slot, limit: asyncio.Semaphore) -> None:
    async with limit:
        await run_inside(slot.namespace_path, lambda: _prepare(slot))
        await _run(["ip", "-n", slot.namespace, "-batch", "-"], render_inside(slot).encode())
        await apply_transaction(render_namespace_tables(slot), namespace_path=slot.namespace_path)


async def _run(argv: Sequence[str], stdin: bytes, *, check: bool = True) -> Completed:
    return await run([*_DIES_WITH_US, *argv], stdin=stdin, timeout_s=_TIMEOUT_S, check=check)


def _prepare(slot: Slot) -> None:
    """Make what needs no process; runs inside the namespace."""
    # /proc/sys/net belongs to the namespace of the thread that opens it.
    for name, value in _SYSCTLS:
        path = Path("/proc/sys", name)
        if path.exists():
            path.write_text(value)
    ensure_tap(slot.tap)


def _list(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
