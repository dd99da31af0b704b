"""Bandwidth limits and the loopback switch of a slot's links.

A limit is a token bucket filter (tc-tbf(8)) on the sending end of each direction: the host's end of the veth pair for
what goes to the machine, the namespace's end for what it sends. It delays before it drops, so that TCP finds the rate;
a limit in nftables could only drop. It does not depend on the VMM, so Firecracker's own limiters are not used.

Published ports answer on the host's loopback address, too: packets from 127.0.0.1 leave through a veth only where its
`route_localnet` is on (Linux, ip-sysctl), which it is only while a port is published. What a machine sends to the host
is refused by the table's chain `input` either way.

Owns: qdiscs of our links, that one switch. Must not: decide limits.
"""

import asyncio
from pathlib import Path

from fusevm.host.net.plan import Slot
from fusevm.host.net.terms import Terms
from fusevm.host.run import run

_TIMEOUT_S = 30.0
#: A bucket holds 10 ms of the rate, and at least two of the largest segments that a guest hands over (64 KiB).
_BURST_S = 0.01
_MIN_BURST_BYTES = 128 << 10
_LATENCY = "100ms"


def render_limit(device: str, kbit: int) -> list[str]:
    """Render the arguments of `tc` that set a limit, or remove it (0)."""
    if not kbit:
        return ["qdisc", "del", "dev", device, "root"]
    burst = max(int(kbit * 125 * _BURST_S), _MIN_BURST_BYTES)
    shape = ["tbf", "rate", f"{kbit}kbit", "burst", f"{burst}b", "latency", _LATENCY]
    return ["qdisc", "replace", "dev", device, "root", *shape]


async def shape(slot: Slot, old: Terms, new: Terms) -> None:
    """Make the limits of a slot and its loopback switch those of its new terms. CommandFailed if `tc` refuses."""
    if old.policy.egress_kbit != new.policy.egress_kbit:
        await _tc(["-n", slot.namespace], render_limit(slot.peer, new.policy.egress_kbit))
    if old.policy.ingress_kbit != new.policy.ingress_kbit:
        await _tc([], render_limit(slot.veth, new.policy.ingress_kbit))
    if bool(old.forwards) != bool(new.forwards):
        await asyncio.to_thread(_switch_loopback, slot.veth, is_on=bool(new.forwards))


async def reshape(slot: Slot, terms: Terms) -> None:
    """Make everything of a slot true, whatever an earlier daemon left. Idempotent."""
    for options, device, kbit in (
        (["-n", slot.namespace], slot.peer, terms.policy.egress_kbit),
        ([], slot.veth, terms.policy.ingress_kbit),
    ):
        # To delete what is not there fails.
        await _tc(options, render_limit(device, kbit), check=bool(kbit))
    await asyncio.to_thread(_switch_loopback, slot.veth, is_on=bool(terms.forwards))


async def _tc(options: list[str], arguments: list[str], *, check: bool = True) -> None:
    await run(["tc", *options, *arguments], timeout_s=_TIMEOUT_S, check=check)


def _switch_loopback(veth: str, *, is_on: bool) -> None:
    Path(f"/proc/sys/net/ipv4/conf/{veth}/route_localnet").write_text("1\n" if is_on else "0\n")
