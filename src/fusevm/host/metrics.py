"""What the daemon measures, in Prometheus' words. One registry per daemon, so that tests may have several.

Owns: names and help texts. Must not: measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fusevm.host.drift import Drift, Kind, Thing
from fusevm.host.net.traffic import Traffic
from fusevm.host.process import resident_bytes
from fusevm.host.traffic_metrics import TrafficCollector
from fusevm.host.vmm.firecracker.readings import READINGS
from fusevm.model.machine import Machine, Phase

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """All metrics of one daemon."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fuse_host_requests",
            "Requests by route, method and status",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "fuse_host_request_seconds",
            "Time to the end of an answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.boot_seconds = Histogram(
            "fuse_host_boot_seconds",
            "Parts of creates and starts: reserve (journal), prepare (of it disk, cgroup, net, at the same time), "
            "spawn (the VMM), boot (to the guest's first word), agent (to its configuration)",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.boot_failures = Counter("fuse_host_boot_failures", "Boots that were undone", registry=self.registry)
        self.exits = Counter("fuse_host_machine_exits", "VMMs that ended without an order", registry=self.registry)
        self.leftovers_removed = Counter(
            "fuse_host_leftovers_removed",
            "Things of nobody, or of a machine that should not have them, that a sweep has removed",
            ["kind"],
            registry=self.registry,
        )
        self.drift = Gauge(
            "fuse_host_drift",
            "How registry and host differ at the last sweep: leftovers that could not be removed yet, things missing",
            ["kind", "state"],
            registry=self.registry,
        )
        self.images_removed = Counter(
            "fuse_host_images_removed", "Images that were removed, and why", ["why"], registry=self.registry
        )
        self.sweep_seconds = Gauge("fuse_host_sweep_seconds", "Duration of the last sweep", registry=self.registry)
        self._traffic = TrafficCollector()
        self.registry.register(self._traffic)

        self._vmms = {
            name: Counter(
                f"fuse_host_vmm_{name}", f"{reading.help}, by Firecracker's own count", registry=self.registry
            )
            for name, reading in READINGS.items()
        }

    def watch_machines(self, machines: Population, subscribers: Callable[[], int]) -> None:
        """Count machines by phase, and event streams, whenever somebody asks."""
        self.registry.register(_Gauges(machines, subscribers))

    def note_sweep(self, drift: Drift, removed: Iterable[Thing], seconds: float) -> None:
        """A sweep is over."""
        for thing in removed:
            self.note_removed(thing.kind)
        for state, things in (("leftover", drift.leftovers | drift.surplus), ("missing", drift.missing)):
            kinds = [thing.kind for thing in things]
            for kind in Kind:
                self.drift.labels(kind.value, state).set(kinds.count(kind))
        self.sweep_seconds.set(seconds)

    def note_removed(self, kind: Kind) -> None:
        """Something is gone that should not have been there."""
        self.leftovers_removed.labels(kind.value).inc()

    def note_traffic(self, traffic: Mapping[str, Traffic]) -> None:
        """What machines have sent and received, as of now."""
        self._traffic.now = dict(traffic)

    def count_vmms(self, added: Mapping[str, int]) -> None:
        """Add what a VMM has counted (`readings.READINGS`)."""
        for name, amount in added.items():
            self._vmms[name].inc(amount)

    def render(self) -> bytes:
        """Everything, as text."""
        return generate_latest(self.registry)

    def note_phases(self, seconds: Mapping[str, float]) -> None:
        """So long took parts of a create or start."""
        for phase, value in seconds.items():
            self.boot_seconds.labels(phase).observe(value)


class Population(Protocol):
    """Who is asked about machines."""

    def records(self) -> list[Machine]: ...

    def quarantined(self) -> Mapping[str, object]: ...


class _Gauges(Collector):
    """Machines by phase and what their VMMs take, as of now."""

    def __init__(self, machines: Population, subscribers: Callable[[], int]) -> None:
        self._machines = machines
        self._subscribers = subscribers

    def collect(self) -> Iterator[Metric]:
        """Every phase, also an empty one."""
        machines = self._machines.records()
        phases = [machine.phase for machine in machines]
        family = GaugeMetricFamily("fuse_host_machines", "Machines by phase", labels=["phase"])
        for phase in Phase:
            family.add_metric([phase.value], phases.count(phase))
        yield family
        yield GaugeMetricFamily(
            "fuse_host_machines_quarantined",
            "Machines with which something has failed and is tried again",
            value=len(self._machines.quarantined()),
        )
        resident = sum(resident_bytes(machine.vmm.pid) for machine in machines if machine.vmm is not None)
        yield GaugeMetricFamily(
            "fuse_host_vmm_memory_bytes", "Resident memory of all VMM processes together", value=resident
        )
        yield GaugeMetricFamily("fuse_host_event_streams", "Open event streams", value=self._subscribers())
