"""What is counted. One registry per control plane, so that several live in one process (tests).

Owns names, help texts and what a label may become: values that others choose (tenants, keys) are bounded. Must not
measure. Gauges of what the store knows are in `fleet_gauges`; those of a host are shown by whoever watches it, while
the host answers.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fusevm.core.lifecycle import DEAD_LETTER_ATTEMPTS
from fusevm.model.environment import Action, DestroyMachine, Ending, Environment, State
from fusevm.model.errors import Error
from fusevm.model.event import (
    ActionRefused,
    BootRefused,
    BootSucceeded,
    Event,
    HostLost,
    OutcomeUnknown,
    SetUpSucceeded,
)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
#: For families with a label of many values.
_COARSE = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
#: Waiting may take a day.
_LONG = (0.1, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14_400, 86_400)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
#: Values of a label that others choose; the rest is counted as `OTHER`.
MOST_VALUES = 100
OTHER = "other"
#: Label of what belongs to no tenant: no tenant is called that.
NO_TENANT = "-"


class Bounded:
    """The values that a label has had; beyond the first `most`, all are one."""

    def __init__(self, most: int = MOST_VALUES) -> None:
        self._most = most
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value as a label."""
        if value not in self._seen and len(self._seen) < self._most:
            self._seen.add(value)
        return value if value in self._seen else OTHER


class HostView:
    """What the watch of one host sees. Shown from `Metrics.watching` to `close`; what is unknown is not shown."""

    def __init__(self, now: Callable[[], float], close: Callable[[], None]) -> None:
        self._now = now
        self.close = close
        self._looked_at = now()
        #: Did the last heartbeat get an answer? None: there was none yet.
        self.is_up: bool | None = None
        #: In the last list; None: the last one was not got.
        self.machines: int | None = None
        #: Environments with a health check, and those of them that fail.
        self.checked = self.failing = 0

    def listed(self, machines: int, environments: Sequence[Environment]) -> None:
        """The host's machines were compared with its environments."""
        self._looked_at = self._now()
        self.machines = machines
        verdicts = [env.health for env in environments if env.duties.healthcheck and env.health is not None]
        self.checked = len(verdicts)
        self.failing = sum(verdict.state == "failing" for verdict in verdicts)

    def silent(self) -> None:
        """The host gave no list: what its last one said is not told any more."""
        self.machines = None
        self.checked = self.failing = 0

    @property
    def lag_s(self) -> float:
        """Seconds since the last comparison."""
        return self._now() - self._looked_at


class Metrics:
    """Names begin with `orchestrator_`, as dashboards of the contract expect."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._now = now
        #: Of the hosts that this replica watches now.
        self.views: dict[str, HostView] = {}
        self._tenant, self._key, self._reason = Bounded(), Bounded(), Bounded()
        self._add_edge()
        self._add_actions()
        self._add_loops()
        self._add_store()
        self.registry.register(_Watched(self.views))

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, help_text, labels, buckets=buckets, registry=self.registry)

    # -- requests and streams -------------------------------------------------------------------------------------

    def _add_edge(self) -> None:
        self.requests = self._counter("orchestrator_http_requests", "Requests answered", "route", "method", "code")
        self.request_seconds = self._histogram(
            "orchestrator_http_request_duration_seconds", "Time to the end of the answer", "route", "method"
        )
        self.in_flight = Gauge("orchestrator_http_requests_in_flight", "Requests under way", registry=self.registry)
        self.errors = self._counter("orchestrator_errors", "Errors answered, by stable reason", "route", "reason")
        self.refused = self._counter(
            "orchestrator_requests_refused",
            "Requests refused by the gate, by what was wrong: address, token, session, scope, page, rate_limited",
            "kind",
        )
        self.key_requests = self._counter(
            "orchestrator_api_key_requests", "Requests with an API key, by its id; `other` beyond 100 keys", "key"
        )
        self.event_streams = Gauge(
            "orchestrator_event_streams", "Open event streams (SSE subscribers)", registry=self.registry
        )
        self.event_lag_seconds = self._histogram(
            "orchestrator_event_lag_seconds",
            "From an event's own time until a stream that had read everything before sends it",
        )

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request is over."""
        known = method if method in _METHODS else OTHER
        self.requests.labels(route, known, str(status)).inc()
        self.request_seconds.labels(route, known).observe(seconds)

    def key_used(self, key_id: str) -> None:
        """A request came with this key."""
        self.key_requests.labels(self._key(key_id)).inc()

    # -- environments and their actions ---------------------------------------------------------------------------

    def _add_actions(self) -> None:
        results = "ok, error, retry (it is unknown what came of it, or it is tried again) or lost (its host is gone)"
        self.operations = self._counter(
            "orchestrator_operations", f"Actions performed against hosts; result: {results}", "op", "result"
        )
        self.operation_seconds = self._histogram(
            "orchestrator_operations_duration_seconds", "Time an action took at the host", "op"
        )
        self.host_operations = self._counter("orchestrator_host_operations", "Actions by host", "host", "op", "result")
        self.host_operation_seconds = self._histogram(
            "orchestrator_host_operations_duration_seconds",
            "Time an action took, by host",
            "host",
            "op",
            buckets=_COARSE,
        )
        self.tenant_operations = self._counter(
            "orchestrator_tenant_operations",
            "Actions by tenant; `-`: of nobody, `other`: of any tenant beyond the first 100",
            "tenant",
            "op",
            "result",
        )
        self.tenant_operation_seconds = self._histogram(
            "orchestrator_tenant_operations_duration_seconds",
            "Time an action took, by tenant",
            "tenant",
            "op",
            buckets=_COARSE,
        )
        self.phase_seconds = self._histogram(
            "orchestrator_phase_duration_seconds",
            "Phases of a start: schedule (waiting for a place included), prepare, boot, agent, setup",
            "phase",
        )
        self.start_seconds = self._histogram(
            "orchestrator_environment_start_seconds",
            "From the creation of an environment until it runs, by tenant",
            "tenant",
            buckets=_COARSE,
        )
        self.ended = self._counter("orchestrator_environments_ended", "Environments that have ended", "state", "reason")
        self.idle_ended = self._counter(
            "orchestrator_reconcile_idle_vms_failed", "Environments ended because nobody used them"
        )
        self.stuck_ended = self._counter(
            "orchestrator_reconcile_stuck_tasks_failed", "Environments ended at the limit of their runtime"
        )
        self.idle_suspected = self._counter(
            "orchestrator_reconcile_idle_vms_suspected", "Environments that nobody uses, and whose end has begun"
        )
        self.stuck_suspected = self._counter(
            "orchestrator_reconcile_stuck_tasks_suspected",
            "Environments at the limit of their runtime, whose end has begun",
        )
        self.dead_letters = self._counter(
            "orchestrator_dead_letters", "Destroys that a person should look at; they go on"
        )
        self.queue_wait_seconds = self._histogram(
            "orchestrator_queue_wait_seconds",
            "Waiting for a place, by what came of it: placed, expired or gone (deleted while it waited)",
            "result",
            buckets=_LONG,
        )

    def performed(self, env: Environment, action: Action, op: str, event: Event, seconds: float) -> None:
        """An action was performed; `event` is what came of it."""
        result, tenant = _result(event), self._tenant(env.tenant or NO_TENANT)
        self.operations.labels(op, result).inc()
        self.operation_seconds.labels(op).observe(seconds)
        self.host_operations.labels(action.host_id, op, result).inc()
        self.host_operation_seconds.labels(action.host_id, op).observe(seconds)
        self.tenant_operations.labels(tenant, op, result).inc()
        self.tenant_operation_seconds.labels(tenant, op).observe(seconds)
        is_hopeless = isinstance(action, DestroyMachine) and action.attempt + 1 == DEAD_LETTER_ATTEMPTS
        if is_hopeless and isinstance(event, OutcomeUnknown):
            self.dead_letters.inc()

    def reported(self, env: Environment, event: Event) -> None:
        """An outcome was saved; `env` is the record after it."""
        if not isinstance(event, BootSucceeded | SetUpSucceeded) or env.state is not State.RUNNING:
            return
        for phase in ("schedule", "prepare", "boot", "agent", "setup"):
            took_ms = getattr(env.timings, f"{phase}_ms")
            if took_ms or phase != "setup":
                self.phase_seconds.labels(phase).observe(took_ms / 1000)
        if env.running_at_ms is not None:
            tenant = self._tenant(env.tenant or NO_TENANT)
            self.start_seconds.labels(tenant).observe((env.running_at_ms - env.created_at_ms) / 1000)

    def committed(self, env: Environment) -> None:
        """A record was saved by this replica."""
        if env.ending is None:
            return
        if not env.is_terminal:
            self._ends(env.ending, env.pending)
            return
        self.ended.labels(env.state, self._reason(env.ending.reason)).inc()
        if env.ending.reason == "idle":
            self.idle_ended.inc()
        elif env.ending.reason == "max_runtime":
            self.stuck_ended.inc()
        if env.queued_until_ms is not None and env.ended_at_ms is not None:
            result = "expired" if env.ending.state is State.FAILED else "gone"
            self.queue_wait_seconds.labels(result).observe((env.ended_at_ms - env.created_at_ms) / 1000)

    def _ends(self, ending: Ending, action: Action | None) -> None:
        """An end is under way; what has been tried before was counted then."""
        if not isinstance(action, DestroyMachine) or action.attempt:
            return
        if ending.reason == "idle":
            self.idle_suspected.inc()
        elif ending.reason == "max_runtime":
            self.stuck_suspected.inc()

    def placed(self, env: Environment) -> None:
        """An environment that waited has got its place."""
        if env.placed_at_ms is not None:
            self.queue_wait_seconds.labels("placed").observe((env.placed_at_ms - env.created_at_ms) / 1000)

    # -- loops ----------------------------------------------------------------------------------------------------

    def _add_loops(self) -> None:
        self.reconcile_seconds = self._histogram(
            "orchestrator_reconcile_duration_seconds", "One comparison of one host's machines with the store"
        )
        self.reconcile_cycles = self._counter(
            "orchestrator_reconcile_cycles",
            "Comparisons, by result: done or no_list (the host did not answer)",
            "result",
        )
        self.orphans_destroyed = self._counter(
            "orchestrator_reconcile_orphans_destroyed", "Machines nobody wanted, destroyed"
        )
        self.orphans_failed = self._counter(
            "orchestrator_reconcile_orphans_failed", "Tries to destroy one that did not succeed; it is tried again"
        )
        self.orphans_dead_lettered = self._counter(
            "orchestrator_reconcile_orphans_dead_lettered",
            "Orphans among the dead letters: a person should look at them; they are tried again all the same",
        )
        self.machines_missing = self._counter(
            "orchestrator_reconcile_vms_missing_provider", "Machines their host no longer knew"
        )
        self.machines_exited = self._counter(
            "orchestrator_reconcile_vms_exited", "Machines that ended by themselves, as their host says"
        )
        self.loop_failures = self._counter(
            "orchestrator_loop_failures", "Unexpected exceptions at loop boundaries", "loop"
        )
        self.leases_lost = self._counter(
            "orchestrator_leases_lost",
            "Leases that ran out under this replica and went to another: of an action, or of a host's watch",
            "kind",
        )

    def watching(self, host_id: str) -> HostView:
        """The watch of a host begins. Its gauges are shown until it closes the view."""
        view = HostView(self._now, lambda: self._close(host_id, view))
        self.views[host_id] = view
        return view

    def _close(self, host_id: str, view: HostView) -> None:
        if self.views.get(host_id) is view:
            del self.views[host_id]

    # -- the store ------------------------------------------------------------------------------------------------

    def _add_store(self) -> None:
        self.store_seconds = self._histogram(
            "orchestrator_store_transaction_duration_seconds", "Transactions of the database: read or write", "kind"
        )
        self.store_failures = self._counter(
            "orchestrator_store_transaction_failures",
            "Transactions that were not carried out, by stable reason; conflicts between writers are among them",
            "kind",
            "reason",
        )
        self.store_batch = self._histogram(
            "orchestrator_store_batch_transactions",
            "Transactions that shared one commit (SQLite)",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        )

    def transaction(self, kind: str, seconds: float, failure: BaseException | None) -> None:
        """Implements `store.measured.Meter`."""
        self.store_seconds.labels(kind).observe(seconds)
        if failure is not None:
            reason = failure.reason if isinstance(failure, Error) else type(failure).__name__
            self.store_failures.labels(kind, reason).inc()

    def batch(self, transactions: int) -> None:
        """Implements `store.measured.Meter`."""
        self.store_batch.observe(transactions)

    def render(self, *more: Collector) -> bytes:
        """Everything as Prometheus text, with what was read for this one answer."""
        text = generate_latest(self.registry)
        for collector in more:
            passing = CollectorRegistry()
            passing.register(collector)
            text += generate_latest(passing)
        return text


class _Watched(Collector):
    """The hosts that this replica watches, as of now."""

    def __init__(self, views: dict[str, HostView]) -> None:
        self._views = views

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "orchestrator_host_up",
            "1: the host has answered the last heartbeat; by whoever watches it",
            labels=["host"],
        )
        machines = GaugeMetricFamily(
            "orchestrator_fleet_provider_vms",
            "Machines in the host's list; not there while the host gives none",
            labels=["host"],
        )
        lag = GaugeMetricFamily(
            "orchestrator_watcher_lag_seconds", "Since the host's machines were compared last", labels=["host"]
        )
        for host_id, view in sorted(self._views.items()):
            if view.is_up is not None:
                up.add_metric([host_id], float(view.is_up))
            if view.machines is not None:
                machines.add_metric([host_id], view.machines)
            lag.add_metric([host_id], view.lag_s)
        yield from (up, machines, lag)
        views = self._views.values()
        yield GaugeMetricFamily(
            "orchestrator_reconcile_health_checked_vms",
            "Environments with a verdict of their health check, on the hosts that this replica watches",
            value=sum(view.checked for view in views),
        )
        yield GaugeMetricFamily(
            "orchestrator_reconcile_health_failing_vms",
            "Those of them whose health check fails",
            value=sum(view.failing for view in views),
        )


def _result(event: Event) -> str:
    match event:
        case OutcomeUnknown():
            return "retry"
        case BootRefused() | ActionRefused():
            return "error"
        case HostLost():
            return "lost"
        case _:
            return "ok"
