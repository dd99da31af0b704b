"""The host's network as the daemon sees it: slots with policy and DNS.

Life of a slot: the journal reserves a number (`candidates`), `acquire`, `open_tap` for the VMM,
`serve_dns`; `set_terms` at any time; after the VMM's end `release`, then the journal frees the number. After a
restart: `open` with the slots of all machines, then `serve_dns` for each. From time to time: `ensure`.

Owns: how the parts work together. Must not: know machines.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from fusevm.host.net.dns import DnsForwarder
from fusevm.host.net.firewall import Firewall
from fusevm.host.net.plan import NetworkPlan, Slot, check_range
from fusevm.host.net.pool import Observation, Pool
from fusevm.host.net.resolvers import RESOLV_CONF, ResolverFile
from fusevm.host.net.terms import DEFAULT_TERMS, Terms
from fusevm.host.net.traffic import Traffic, observe_traffic
from fusevm.host.net.uplink import ensure_forwarding, observe_routes, observe_uplinks
from fusevm.model.network import Network, Rule, is_denied


class HostNetwork:
    """Namespaces, policy and DNS of all machines of one daemon."""

    def __init__(self, plan: NetworkPlan, *, uplink: str = "", warm: int = 4, resolv_conf: Path = RESOLV_CONF) -> None:
        self.plan = plan
        #: Interface that the administrator chose; empty: that of the default route.
        self._uplink = uplink
        self._firewall = Firewall(plan)
        self._pool = Pool(plan, self._firewall, warm=warm)
        self._dns = DnsForwarder(ResolverFile(resolv_conf), _Policies(self._firewall, plan))

    async def open(self, keep: Mapping[int, Terms]) -> dict[int, Exception]:
        """Take the host's network over: finish the slots in `keep` (number to terms), remove all others.

        Returns the failures of kept slots: such a machine has no network, the others do. Raises
        NetworkRangeConflict and BadSetting before anything is touched. Switches IPv4 forwarding on.
        """
        check_range(self.plan, await observe_routes())
        uplinks = await observe_uplinks(self._uplink)
        await ensure_forwarding()
        return await self._pool.open(keep, uplinks)

    async def close(self) -> None:
        """Stop serving; slots stay as they are, for the next daemon to adopt."""
        await self._dns.close()
        await self._pool.close()

    async def ensure(self) -> bool:
        """Repair what others changed, and remove what nobody owns; return whether something was wrong. Idempotent.

        Looks at forwarding, uplinks, rules (ours and foreign ones), namespaces and veths.
        """
        was_off = await ensure_forwarding()
        was_wrong = await self._firewall.ensure(await observe_uplinks(self._uplink))
        strays = await self._pool.sweep(())
        return was_off or was_wrong or bool(strays)

    def candidates(self) -> Iterator[int]:
        """Yield numbers that are worth reserving, the fastest first; the journal takes the first that it has free."""
        return self._pool.candidates()

    async def acquire(self, index: int, terms: Terms = DEFAULT_TERMS) -> Slot:
        """Hand out slot `index` under `terms` (see `Pool.acquire`)."""
        return await self._pool.acquire(index, terms)

    async def release(self, index: int) -> None:
        """Give a slot up, its DNS included; it is destroyed in the background. Idempotent."""
        await self._dns.stop(index)
        self._pool.release(index)

    async def set_terms(self, slot: Slot, terms: Terms) -> None:
        """Change what a machine is granted, at once, open connections included (see `Pool.set_terms`)."""
        await self._pool.set_terms(slot.index, terms)

    async def serve_dns(self, slot: Slot) -> None:
        """Open the slot's DNS forwarder. Idempotent."""
        await self._dns.serve(slot)

    async def settle(self) -> None:
        """Wait until no slot is being made or destroyed."""
        await self._pool.settle()

    async def observe(self) -> Observation:
        """Read what exists on the host with this instance's prefix."""
        return await self._pool.observe()

    async def sweep(self, keep: Collection[int]) -> frozenset[int]:
        """Remove what nobody owns (see `Pool.sweep`); return the numbers."""
        return await self._pool.sweep(keep)

    async def traffic(self) -> dict[int, Traffic]:
        """Read what every slot has sent and received."""
        return observe_traffic(self.plan, await self._firewall.count(), self._dns.refused())

    async def uses(self) -> dict[int, int]:
        """Read when published ports were last used (see `Firewall.uses`)."""
        return await self._firewall.uses()


class _Policies:
    """What the DNS forwarder wants to know and to have done."""

    def __init__(self, firewall: Firewall, plan: NetworkPlan) -> None:
        self._firewall = firewall
        self._denied = (plan.network,)

    def policy(self, index: int) -> Network | None:
        terms = self._firewall.terms(index)
        return terms.policy if terms is not None else None

    def is_reachable(self, address: str) -> bool:
        return not is_denied(address, self._denied)

    async def pin(self, index: int, rules: Collection[Rule], addresses: Collection[str], lifetime_s: int) -> bool:
        return await self._firewall.pin(index, rules, addresses, lifetime_s)
