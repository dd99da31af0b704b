"""What the daemon measures, in Prometheus' words. One registry per daemon, so that tests may have several.

Owns: names and help texts. Must not: measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

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
            "Phases of creates and starts",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.boot_failures = Counter("fuse_host_boot_failures", "Boots that were undone", registry=self.registry)
        self.exits = Counter("fuse_host_machine_exits", "VMMs that ended without an order", registry=self.registry)
        self.leftovers_removed = Counter(
            "fuse_host_leftovers_removed",
            "Things without an owner that a sweep removed",
            ["kind"],
            registry=self.registry,
        )
        self.leftovers = Gauge(
            "fuse_host_leftovers", "Things without an owner at the last sweep (drift)", registry=self.registry
        )
        self.sweep_seconds = Gauge("fuse_host_sweep_seconds", "Duration of the last sweep", registry=self.registry)

    def watch_machines(self, machines: Callable[[], list[Machine]], subscribers: Callable[[], int]) -> None:
        """Count machines by phase, and event streams, whenever somebody asks."""
        self.registry.register(_Population(machines, subscribers))

    def render(self) -> bytes:
        """Everything, as text."""
        return generate_latest(self.registry)

    def note_boot(self, machine: Machine) -> None:
        """A machine has come up."""
        timings = machine.timings
        for phase, value_ms in (
            ("prepare", timings.prepare_ms),
            ("boot", timings.boot_ms),
            ("agent", timings.agent_ms),
        ):
            self.boot_seconds.labels(phase).observe(value_ms / 1000)


class _Population(Collector):
    """Machines by phase, as of now."""

    def __init__(self, machines: Callable[[], list[Machine]], subscribers: Callable[[], int]) -> None:
        self._machines = machines
        self._subscribers = subscribers

    def collect(self) -> Iterator[Metric]:
        """Every phase, also an empty one."""
        phases = [machine.phase for machine in self._machines()]
        family = GaugeMetricFamily("fuse_host_machines", "Machines by phase", labels=["phase"])
        for phase in Phase:
            family.add_metric([phase.value], phases.count(phase))
        yield family
        yield GaugeMetricFamily("fuse_host_event_streams", "Open event streams", value=self._subscribers())
