"""What is counted. One registry per control plane, so that several live in one process (tests)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Names begin with `orchestrator_`, as dashboards of the contract expect."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "orchestrator_http_requests", "Requests answered", ["route", "method", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "orchestrator_http_request_duration_seconds",
            "Time to the end of the answer",
            ["route", "method"],
            buckets=_FAST,
            registry=registry,
        )
        self.in_flight = Gauge("orchestrator_http_requests_in_flight", "Requests under way", registry=registry)
        self.errors = Counter(
            "orchestrator_errors", "Errors answered, by stable reason", ["route", "reason"], registry=registry
        )
        self.operations = Counter(
            "orchestrator_operations", "Actions performed against hosts", ["op", "result"], registry=registry
        )
        self.operation_seconds = Histogram(
            "orchestrator_operations_duration_seconds",
            "Time an action took at the host",
            ["op"],
            buckets=_FAST,
            registry=registry,
        )
        self.reconcile_seconds = Histogram(
            "orchestrator_reconcile_duration_seconds",
            "One look at one host",
            buckets=_FAST,
            registry=registry,
        )
        self.reconcile_cycles = Counter(
            "orchestrator_reconcile_cycles", "Looks at hosts, by result", ["result"], registry=registry
        )
        self.orphans_destroyed = Counter(
            "orchestrator_reconcile_orphans_destroyed", "Machines nobody wanted", registry=registry
        )
        self.machines_missing = Counter(
            "orchestrator_reconcile_vms_missing_provider", "Machines their host no longer knew", registry=registry
        )
        self.loop_failures = Counter(
            "orchestrator_loop_failures", "Unexpected exceptions at loop boundaries", ["loop"], registry=registry
        )
        self.event_streams = Gauge("orchestrator_event_streams", "Open event streams", registry=registry)
        self.tracked = Gauge(
            "orchestrator_fleet_tracked_vms", "Live environments by state", ["state"], registry=registry
        )
        self.provider = Gauge(
            "orchestrator_fleet_provider_vms", "Machines in the host's last list", ["host"], registry=registry
        )
        self.host_up = Gauge("orchestrator_host_up", "1: the host answers", ["host"], registry=registry)
        self.host_allocated = Gauge(
            "orchestrator_host_allocated", "Booked on the host", ["host", "resource"], registry=registry
        )
        self.host_capacity = Gauge(
            "orchestrator_host_capacity", "Capacity of the host", ["host", "resource"], registry=registry
        )

    def operation(self, op: str, result: str, seconds: float) -> None:
        """One action is over."""
        self.operations.labels(op, result).inc()
        self.operation_seconds.labels(op).observe(seconds)

    def render(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)
