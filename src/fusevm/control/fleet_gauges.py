"""Gauges of what the store knows, read when somebody asks, but not more often than every `FRESH_S` seconds: anybody may
ask, and as often as they like.

Every replica shows the same values: take the maximum over replicas, not the sum. A store that does not answer in time
is said to be down, and its gauges are not shown.
"""

import asyncio
from collections.abc import Iterator
from typing import Protocol

import msgspec
import structlog
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fusevm.control.clock import Clock
from fusevm.control.metrics import MOST_VALUES, NO_TENANT, OTHER
from fusevm.control.store.protocol import Tally
from fusevm.model.host import Host, HostHealth, Resources

log = structlog.get_logger()
#: Prometheus gives up after 10 s, and the rest of the metrics must not wait that long.
READ_TIMEOUT_S = 3.0
#: A reading is shown again for so long, also one that says that the store is down.
FRESH_S = 2.0
_AMOUNTS = Resources.__struct_fields__


class Counted(Protocol):
    """What is needed of the store."""

    async def tally(self) -> Tally:
        """Everything that is counted in the database."""
        ...

    async def hosts(self) -> list[Host]:
        """All hosts by id."""
        ...

    async def usage_by_tenant(self) -> dict[str, Resources]:
        """What is placed, per tenant."""
        ...


class FleetGauges(Collector):
    """One reading of the store, to be rendered once; without one, the store is down."""

    def __init__(
        self,
        *,
        now_ms: int = 0,
        tally: Tally | None = None,
        hosts: list[Host] | None = None,
        usage: dict[str, Resources] | None = None,
    ) -> None:
        self._now_ms = now_ms
        self._tally = tally
        self._hosts = hosts or []
        self._usage = usage or {}

    def collect(self) -> Iterator[Metric]:
        is_up = self._tally is not None
        yield GaugeMetricFamily(
            "orchestrator_store_up",
            "1: the store has answered in time; otherwise the gauges that are read from it are not there",
            value=float(is_up),
        )
        if self._tally is not None:
            yield from self._environments(self._tally)
            yield from self._snapshots(self._tally)
            yield from self._of_hosts()
            yield self._tenants()

    def _environments(self, tally: Tally) -> Iterator[Metric]:
        tracked = GaugeMetricFamily("orchestrator_fleet_tracked_vms", "Live environments by state", labels=["state"])
        for state, count in sorted(tally.live.items()):
            tracked.add_metric([state], count)
        yield tracked
        yield GaugeMetricFamily("orchestrator_queue_length", "Environments that wait for a place", value=tally.queued)
        waited_ms = self._now_ms - tally.queued_since_ms if tally.queued_since_ms is not None else 0
        yield GaugeMetricFamily(
            "orchestrator_queue_oldest_wait_seconds",
            "How long the first of them has waited; 0: nobody waits",
            value=max(0, waited_ms) / 1000,
        )

    def _snapshots(self, tally: Tally) -> Iterator[Metric]:
        count = GaugeMetricFamily("orchestrator_snapshots", "Snapshots by host and state", labels=["host", "state"])
        size = GaugeMetricFamily("orchestrator_snapshots_bytes", "Their bytes on the host", labels=["host", "state"])
        for (host_id, state), (number, size_bytes) in sorted(tally.snapshots.items()):
            count.add_metric([host_id, state], number)
            size.add_metric([host_id, state], size_bytes)
        yield from (count, size)

    def _of_hosts(self) -> Iterator[Metric]:
        hosts = GaugeMetricFamily("orchestrator_hosts", "Hosts by state and health", labels=["state", "health"])
        allocated = GaugeMetricFamily(
            "orchestrator_host_allocated",
            "Booked on the host: ours, whether it answers or not",
            labels=["host", "resource"],
        )
        capacity = GaugeMetricFamily(
            "orchestrator_host_capacity",
            "Capacity of the host; not there while the host is silent",
            labels=["host", "resource"],
        )
        kinds: dict[tuple[str, str], int] = {}
        for host in self._hosts:
            kinds[host.state, host.health] = kinds.get((host.state, host.health), 0) + 1
            _add_amounts(allocated, host.id, host.allocated)
            if host.health is HostHealth.OK:
                _add_amounts(capacity, host.id, host.capacity)
        for kind, number in sorted(kinds.items()):
            hosts.add_metric(kind, number)
        yield from (hosts, allocated, capacity)

    def _tenants(self) -> Metric:
        placed = GaugeMetricFamily(
            "orchestrator_tenant_allocated",
            "Booked by a tenant; `-`: by nobody, `other`: by all beyond the 100 with the most machines",
            labels=["tenant", "resource"],
        )
        ranked = sorted(self._usage.items(), key=lambda item: (-item[1].vm_count, item[0]))
        rest = Resources()
        for _, amount in ranked[MOST_VALUES:]:
            rest = rest.plus(amount)
        for tenant, amount in ranked[:MOST_VALUES]:
            _add_amounts(placed, tenant or NO_TENANT, amount)
        if rest != Resources():
            _add_amounts(placed, OTHER, rest)
        return placed


def _add_amounts(family: GaugeMetricFamily, whose: str, amount: Resources) -> None:
    for name, value in zip(_AMOUNTS, msgspec.structs.astuple(amount), strict=True):
        family.add_metric([whose, name], value)


async def read_fleet(store: Counted, now_ms: int, timeout_s: float = READ_TIMEOUT_S) -> FleetGauges:
    """Read the store; whatever goes wrong is an answer, too."""
    try:
        async with asyncio.timeout(timeout_s):
            tally, hosts, usage = await store.tally(), await store.hosts(), await store.usage_by_tenant()
    except Exception:  # the other metrics are needed most when the store is down
        log.exception("store_not_measured")
        return FleetGauges()
    return FleetGauges(now_ms=now_ms, tally=tally, hosts=hosts, usage=usage)


class Fleet:
    """The newest reading, for all who ask."""

    def __init__(self, store: Counted, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._lock = asyncio.Lock()
        self._gauges = FleetGauges()
        #: Loop time until which it is shown.
        self._fresh_until_s = float("-inf")

    async def gauges(self) -> FleetGauges:
        """A reading that is fresh enough; of those who ask at once one reads."""
        loop = asyncio.get_running_loop()
        async with self._lock:
            if loop.time() >= self._fresh_until_s:
                self._gauges = await read_fleet(self._store, self._clock.now_ms())
                self._fresh_until_s = loop.time() + FRESH_S
            return self._gauges
