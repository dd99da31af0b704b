"""How environments and events read to people: shared by the command line and the web console. Pure, plain text."""

from fusevm.model.environment import State
from fusevm.model.network import Protocol, Rule
from fusevm.wire.rest import EnvironmentBody, EventBody

_SENTENCES: dict[str, str] = {
    State.PROVISIONING: "provisioning began",
    State.RUNNING: "the machine came up",
    State.PAUSED: "it was paused",
    State.DRAINING: "draining began",
    State.DESTROYING: "its end began",
    State.DESTROYED: "it was destroyed",
    State.FAILED: "it failed",
}


def introduction(one: EnvironmentBody) -> str:
    """What it is."""
    spec = one.spec
    size = f"{spec.cpus} vCPU, {spec.ram_mb} MiB, {spec.storage_gb} GiB"
    return f"{one.id} ({one.uid}) is a machine of {size} with image {spec.image}, placed on host {one.host_id}."


def record(one: EnvironmentBody) -> list[tuple[str, str]]:
    """Everything about it as names and values; values that it does not have are empty."""
    spec, timings = one.spec, one.timings
    phases = ("schedule", "prepare", "boot", "agent", "setup")
    start = [(phase, getattr(timings, f"{phase}_ms", 0)) for phase in phases]
    limit = "unlimited" if spec.max_runtime_seconds < 0 else f"{spec.max_runtime_seconds} s"
    return [
        ("id", one.id),
        ("uid", one.uid),
        ("state", one.state),
        ("reason", one.reason),
        ("error", one.error),
        ("image", spec.image),
        ("size", f"{spec.cpus} vCPU, {spec.ram_mb} MiB memory, {spec.storage_gb} GiB disk"),
        *describe_network(one),
        ("host", one.host_id),
        ("tenant", one.tenant),
        ("waits until", one.queued_until),
        ("daemon", _daemon(one)),
        ("health", _health(one)),
        ("began with", spec.seed_snapshot_id),
        ("runtime limit", limit),
        ("idle limit", f"{spec.idle_timeout_seconds} s" if spec.idle_timeout_seconds else "none"),
        ("url", one.url or ""),
        ("created", one.created_at),
        ("running", one.running_at),
        ("ended", one.ended_at),
        ("start", ", ".join(f"{name} {value:.0f} ms" for name, value in start if value)),
    ]


def describe_network(one: EnvironmentBody) -> list[tuple[str, str]]:
    """What it may reach, and its published ports, as names and values."""
    network = one.network
    rules = network.rules if isinstance(network.rules, list) else []
    limits = [
        f"{kbit} kbit/s {way}" for kbit, way in ((network.ingress_kbit, "in"), (network.egress_kbit, "out")) if kbit
    ]
    ports = [f"{entry.port}/{entry.protocol} at {entry.url}" for entry in one.endpoints]
    return [
        ("internet", "yes" if network.internet else "no"),
        ("rules", "; ".join(_rule(rule) for rule in rules)),
        ("bandwidth", ", ".join(limits)),
        ("ports", ", ".join(ports)),
    ]


def _rule(rule: Rule) -> str:
    ports = ", ".join(map(str, rule.ports))
    protocol = "" if rule.protocol is Protocol.ANY else f" {rule.protocol}"
    return f"{rule.action} {rule.domain or rule.cidr}{protocol}" + (f" port {ports}" if ports else "")


def _daemon(one: EnvironmentBody) -> str:
    if one.agent is None:
        return ""
    ended = f", exit code {one.agent.exit_code}" if one.agent.exit_code is not None else ""
    restarts = f", {one.agent.restarts} restarts" if one.agent.restarts else ""
    return f"{one.agent.state}{restarts}{ended}" + (f": {one.agent.message}" if one.agent.message else "")


def _health(one: EnvironmentBody) -> str:
    if one.health is None:
        return ""
    return one.health.state + (f": {one.health.message}" if one.health.message else "")


def sentence(event: EventBody) -> str:
    """One event as a sentence, with its time and its cause."""
    cause = f" [{event.cause}]" if event.cause else ""
    return f"{event.updated_at}  {happening(event)}{cause}"


def happening(event: EventBody) -> str:
    """What one event says happened, and why."""
    what = _SENTENCES.get(event.state, event.state) if event.event == "state" else event.event.replace("_", " ")
    if event.event == "dead_letter":
        what = f"{event.state} needs a person: attempts keep failing"
    reason = f" ({event.reason})" if event.reason else ""
    message = f": {event.message or event.error}" if event.message or event.error else ""
    return f"{what}{reason}{message}"


def format_age(timestamp: str, now_s: float) -> str:
    """How long an RFC 3339 time is ago: 12s, 5m, 3h, 2d; empty for an empty one."""
    if not timestamp:
        return ""
    from datetime import datetime  # noqa: PLC0415 - most commands do without

    try:
        seconds = max(int(now_s - datetime.fromisoformat(timestamp).timestamp()), 0)
    except ValueError:
        return timestamp
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
