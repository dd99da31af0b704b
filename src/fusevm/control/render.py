"""Records as the public API shows them. Pure."""

from datetime import UTC, datetime

from fusevm.model.environment import Environment
from fusevm.model.fact import Fact, Kind
from fusevm.model.host import Host, Resources
from fusevm.model.ids import environment_id
from fusevm.wire import rest


def render_time(at_ms: int | None) -> str:
    """RFC 3339 with milliseconds, in UTC; empty for None and 0."""
    if not at_ms:
        return ""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def render_environment(env: Environment) -> rest.EnvironmentBody:
    """An environment."""
    spec = env.spec
    return rest.EnvironmentBody(
        id=env.id,
        uid=env.uid,
        state=env.state,
        task_id=env.task_id,
        host_id=env.host_id,
        url="",
        spec=rest.SpecBody(
            cpus=spec.cpus,
            ram_mb=spec.ram_mb,
            storage_gb=spec.storage_gb,
            region=spec.region,
            image=spec.image,
            arch=spec.arch,
            host_id=spec.host_id,
            labels=spec.labels,
            max_runtime_seconds=spec.max_runtime_seconds,
            idle_timeout_seconds=spec.idle_timeout_seconds,
        ),
        network=rest.NetworkBody(internet=spec.network.internet),
        egress=rest.EgressBody(),
        created_at=render_time(env.created_at_ms),
        updated_at=render_time(env.updated_at_ms),
        running_at=render_time(env.running_at_ms),
        ended_at=render_time(env.ended_at_ms),
        desired=env.desired,
        reason=env.ending.reason if env.ending is not None else "",
        error=env.error,
        incarnation=env.incarnation,
        timings=_timings(env) if env.running_at_ms is not None else None,
    )


def _timings(env: Environment) -> rest.TimingsBody:
    times = env.timings
    return rest.TimingsBody(
        schedule_ms=round(times.schedule_ms, 3),
        prepare_ms=round(times.prepare_ms, 3),
        boot_ms=round(times.boot_ms, 3),
        agent_ms=round(times.agent_ms, 3),
        host_ms=round(times.host_ms, 3),
    )


def render_event_id(fact: Fact) -> str:
    """The id of an event: the same on every stream."""
    return f"{fact.uid}.{fact.seq}"


def parse_event_id(text: str) -> tuple[str, int] | None:
    """(uid, seq) of an event id, or None."""
    uid, dot, seq = text.strip().rpartition(".")
    return (uid, int(seq)) if dot and uid and seq.isdecimal() and len(seq) < 19 else None


def render_event(fact: Fact, task_id: str) -> rest.EventBody:
    """A fact as an event."""
    is_state = fact.kind is Kind.STATE
    return rest.EventBody(
        id=render_event_id(fact),
        event=fact.kind,
        vm_id=environment_id(task_id),
        uid=fact.uid,
        state=fact.state,
        error=fact.message if is_state else "",
        message="" if is_state else fact.message,
        reason=fact.reason,
        cause=fact.cause,
        data=fact.data,
        updated_at=render_time(fact.at_ms),
    )


def render_present(env: Environment) -> rest.EventBody:
    """The synthetic first message of a stream: the present state, without an id."""
    return rest.EventBody(
        event=Kind.STATE,
        vm_id=env.id,
        uid=env.uid,
        state=env.state,
        error=env.error,
        reason=env.ending.reason if env.ending is not None else "",
        updated_at=render_time(env.updated_at_ms),
    )


def render_host(host: Host) -> rest.HostBody:
    """A host."""
    return rest.HostBody(
        id=host.id,
        url=host.url,
        state=host.state,
        health=host.health,
        region=host.region,
        arch=host.arch,
        driver=host.driver,
        version=host.version,
        vmm_version=host.vmm_version,
        agent_version=host.agent_version,
        kernel=host.kernel,
        labels=host.labels,
        images=list(host.images),
        capacity=_resources(host.capacity),
        allocated=_resources(host.allocated),
        last_seen=render_time(host.last_seen_ms),
        created_at=render_time(host.created_at_ms),
        updated_at=render_time(host.updated_at_ms),
    )


def _resources(amount: Resources) -> rest.ResourcesBody:
    return rest.ResourcesBody(
        cpus=amount.cpus, ram_mb=amount.ram_mb, storage_gb=amount.storage_gb, vm_count=amount.vm_count
    )
