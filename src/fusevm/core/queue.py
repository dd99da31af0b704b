"""Who of those that wait gets which place: fair between tenants, and nobody is passed over for ever.

Turns: the tenant with the smallest dominant share of what is placed (the largest fraction of the fleet that it holds of
any resource) comes next, with its oldest; a place that is given counts at once. Who fits nowhere is passed over for
now, so that a large one does not hold up small ones, not even its own tenant's.

Patience: being passed over has an end. The first in turn that has waited for `policy.queue_patience_ms`, fits nowhere,
and would fit on an empty host, reserves the emptiest of those hosts: nobody is placed there meanwhile, neither from the
queue nor as a newcomer (`placement.place`). One host at a time is kept free.

Bound: a reserved host only empties, and the choice moves only to one that is emptier still. So where machines end
within a time L, hosts stay in service, and the waiting ones may use the same hosts, a place comes after patience + L,
and L more for each move of the choice; it goes to the tenant that holds least then. A tenant that keeps taking places
for small ones, and so always holds more than another one that waits for large ones, has chosen to wait.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

import msgspec
from msgspec.structs import replace

from fusevm.core.placement import can_reserve, limits, score
from fusevm.core.policy import Policy
from fusevm.core.spec import resources_of
from fusevm.model.environment import Environment, Spec
from fusevm.model.host import Host, Resources

_NOTHING: Mapping[str, str] = {}
_AMOUNTS = Resources.__struct_fields__
#: What placement looks at: specs of one kind fit or do not fit together.
_Kind = tuple[int, int, int, str, str, tuple[tuple[str, str], ...], str, str, str]


class Plan(msgspec.Struct, frozen=True):
    """What is to be done for those who wait."""

    #: (uid, host id) of all that can be placed now, in order; each is planned against what those before it took.
    placed: tuple[tuple[str, str], ...] = ()
    #: Id of the host that is kept free; empty: none.
    kept_free: str = ""


def plan_placements(
    waiting: Sequence[Environment],
    hosts: Sequence[Host],
    usage_by_tenant: Mapping[str, Resources],
    policy: Policy,
    *,
    now_ms: int,
    seeds: Mapping[str, str] = _NOTHING,
) -> Plan:
    """Who gets which place now, and which host is kept free.

    `seeds`: id of every seed snapshot among the waiting to the host where its bytes are; who needs one that is not in
    there is not placed.
    """
    table, shares = _Table(hosts, policy, seeds), _Shares(hosts, usage_by_tenant, policy)
    lines: dict[str, deque[Environment]] = defaultdict(deque)
    for env in sorted(waiting, key=_age):
        lines[env.tenant].append(env)
    placed: list[tuple[str, str]] = []
    turns = [(shares.of(tenant), _age(line[0]), tenant) for tenant, line in lines.items()]
    heapq.heapify(turns)
    while turns:
        tenant = heapq.heappop(turns)[2]
        line = lines[tenant]
        env = line.popleft()
        host_id = table.take(env.spec)
        if host_id:
            placed.append((env.uid, host_id))
            shares.add(tenant, resources_of(env.spec))
        elif now_ms - env.created_at_ms >= policy.queue_patience_ms:
            table.keep_free(env.spec)
        if line:
            heapq.heappush(turns, (shares.of(tenant), _age(line[0]), tenant))
    return Plan(tuple(placed), table.kept_free)


class _Table:
    """The hosts as the plan leaves them so far, ranked for every kind of wish.

    A place that is given changes one host. So a ranking is made once per kind and kept up to date: entries of an
    earlier version of their host are passed over.
    """

    def __init__(self, hosts: Sequence[Host], policy: Policy, seeds: Mapping[str, str]) -> None:
        self._hosts = {host.id: host for host in hosts}
        self._policy = policy
        self._seeds = seeds
        self._versions = dict.fromkeys(self._hosts, 0)
        self._rankings: dict[_Kind, tuple[Spec, list[tuple[float, str, int]]]] = {}
        self.kept_free = ""

    def take(self, spec: Spec) -> str:
        """Book the best place for it; empty: none fits."""
        ranking = self._ranking(spec)
        while ranking and (ranking[0][2] != self._versions[ranking[0][1]] or ranking[0][1] == self.kept_free):
            heapq.heappop(ranking)
        if not ranking:
            return ""
        chosen = self._hosts[ranking[0][1]]
        self._hosts[chosen.id] = replace(chosen, allocated=chosen.allocated.plus(resources_of(spec)))
        self._versions[chosen.id] += 1
        for kind_spec, kind_ranking in self._rankings.values():
            self._rank(self._hosts[chosen.id], kind_spec, kind_ranking)
        return chosen.id

    def _ranking(self, spec: Spec) -> list[tuple[float, str, int]]:
        """A heap of (negative score, host id, version of the host)."""
        kind = _kind(spec)
        if kind not in self._rankings:
            ranking: list[tuple[float, str, int]] = []
            self._rankings[kind] = spec, ranking
            for host in self._hosts.values():
                self._rank(host, spec, ranking)
        return self._rankings[kind][1]

    def _rank(self, host: Host, spec: Spec, ranking: list[tuple[float, str, int]]) -> None:
        if self._may_use(host, spec) and can_reserve(host, spec, self._policy):
            heapq.heappush(ranking, (-score(host, spec, self._policy), host.id, self._versions[host.id]))

    def keep_free(self, spec: Spec) -> None:
        """Keep the emptiest host free on which it would fit if that were empty, unless one is kept free already."""
        if self.kept_free:
            return
        able = [host for host in self._hosts.values() if self._may_use(host, spec) and self._would_fit(host, spec)]
        self.kept_free = min(able, key=lambda host: (self._load(host), host.id)).id if able else ""

    def _load(self, host: Host) -> float:
        return _share(host.allocated, limits(host, self._policy))

    def _would_fit(self, host: Host, spec: Spec) -> bool:
        return can_reserve(replace(host, allocated=Resources()), spec, self._policy)

    def _may_use(self, host: Host, spec: Spec) -> bool:
        return not spec.seed_snapshot_id or self._seeds.get(spec.seed_snapshot_id) == host.id


class _Shares:
    """Dominant share per tenant."""

    def __init__(self, hosts: Sequence[Host], usage: Mapping[str, Resources], policy: Policy) -> None:
        total = Resources()
        for host in hosts:
            total = total.plus(limits(host, policy))
        self._total = total
        self._usage = dict(usage)

    def of(self, tenant: str) -> float:
        """The largest fraction of the fleet that the tenant holds of any resource."""
        return _share(self._usage.get(tenant, Resources()), self._total)

    def add(self, tenant: str, amount: Resources) -> None:
        """It got this."""
        self._usage[tenant] = self._usage.get(tenant, Resources()).plus(amount)


def _age(env: Environment) -> tuple[int, str]:
    return env.created_at_ms, env.uid


def _kind(spec: Spec) -> _Kind:
    labels = tuple(sorted(spec.labels.items()))
    where = (spec.region, spec.arch, labels, spec.host_id, spec.image, spec.seed_snapshot_id)
    return (spec.cpus, spec.ram_mb, spec.storage_gb, *where)


def _share(amount: Resources, total: Resources) -> float:
    return max(
        (getattr(amount, name) / getattr(total, name) for name in _AMOUNTS if getattr(total, name) > 0), default=0.0
    )
