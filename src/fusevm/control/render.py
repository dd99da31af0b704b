"""Records as the public API shows them. Pure."""

from datetime import UTC, datetime

import msgspec
from msgspec.structs import asdict

from fusevm.model.environment import Environment
from fusevm.model.errors import error_classes
from fusevm.model.fact import Fact, Kind
from fusevm.model.host import Host
from fusevm.model.ids import environment_id
from fusevm.model.network import Network, PublishedPort, Transport
from fusevm.model.setup import AgentStatus, HealthStatus
from fusevm.model.snapshot import Snapshot
from fusevm.wire import rest, rest_fleet

#: Stable reason to the contract's code.
_CODES = {cls.reason: cls.code for cls in error_classes()}


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
        url=_url(env),
        endpoints=[_endpoint(env, port) for port in env.ports] if not env.is_terminal else [],
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
            seed_snapshot_id=spec.seed_snapshot_id,
            queue_seconds=spec.queue_seconds,
        ),
        network=render_network(spec.network),
        egress=rest.EgressBody(),
        on_host_loss="fail",
        created_at=render_time(env.created_at_ms),
        updated_at=render_time(env.updated_at_ms),
        running_at=render_time(env.running_at_ms),
        ended_at=render_time(env.ended_at_ms),
        desired=env.desired,
        reason=env.ending.reason if env.ending is not None else "",
        code=_CODES.get(env.ending.reason, "") if env.ending is not None else "",
        error=env.error,
        incarnation=env.incarnation,
        timings=_timings(env) if env.running_at_ms is not None else None,
        tenant=env.tenant,
        queued_until=render_time(env.queued_until_ms) if env.is_queued else "",
        health=_health(env.health) if env.health is not None else None,
        agent=_agent(env.agent) if env.agent is not None else None,
    )


def render_network(network: Network) -> rest.NetworkBody:
    """A policy."""
    return rest.NetworkBody(
        internet=network.internet,
        rules=list(network.rules) or msgspec.UNSET,
        ingress_kbit=network.ingress_kbit or msgspec.UNSET,
        egress_kbit=network.egress_kbit or msgspec.UNSET,
    )


def _url(env: Environment) -> str:
    """Where the user's daemon is reached; empty where it has no port or is not there."""
    port = next((port for port in env.ports if port.protocol is Transport.TCP and port.port == env.duties.port), None)
    return _authority(env, port) if port is not None and not env.is_terminal else ""


def _endpoint(env: Environment, port: PublishedPort) -> rest.EndpointBody:
    return rest.EndpointBody(name=port.name, url=_authority(env, port), port=port.port, protocol=port.protocol)


def _authority(env: Environment, port: PublishedPort) -> str:
    host = f"[{env.host_address}]" if ":" in env.host_address else env.host_address
    return f"{host}:{port.host_port}"


def _health(status: HealthStatus) -> rest.HealthBody:
    return rest.HealthBody(
        state=status.state, since=render_time(status.since_ms), failures=status.failures, message=status.message
    )


def _agent(status: AgentStatus) -> rest.AgentBody:
    return rest.AgentBody(
        state=status.state,
        since=render_time(status.since_ms),
        restarts=status.restarts,
        exit_code=status.exit_code,
        message=status.message,
    )


def _timings(env: Environment) -> rest.TimingsBody:
    times = env.timings
    return rest.TimingsBody(
        schedule_ms=round(times.schedule_ms, 3),
        prepare_ms=round(times.prepare_ms, 3),
        boot_ms=round(times.boot_ms, 3),
        agent_ms=round(times.agent_ms, 3),
        host_ms=round(times.host_ms, 3),
        setup_ms=round(times.setup_ms, 3),
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
        problem=host.problem,
        region=host.region,
        arch=host.arch,
        driver=host.driver,
        backend=host.driver,
        version=host.version,
        vmm_version=host.vmm_version,
        agent_version=host.agent_version,
        kernel=host.kernel,
        labels=host.labels,
        images=list(host.images),
        capacity=rest.CapacityBody(**asdict(host.capacity), arch=host.arch),
        allocated=rest.ResourcesBody(**asdict(host.allocated)),
        last_seen=render_time(host.last_seen_ms),
        created_at=render_time(host.created_at_ms),
        updated_at=render_time(host.updated_at_ms),
    )


def render_snapshot(snapshot: Snapshot) -> rest_fleet.SnapshotBody:
    """A snapshot."""
    exports = []
    if snapshot.export_ref:
        exports = [rest_fleet.ExportBody(destination=snapshot.export_ref, status=snapshot.export_status)]
    return rest_fleet.SnapshotBody(
        id=snapshot.id,
        vm_id=environment_id(snapshot.task_id),
        uid=snapshot.uid,
        state=snapshot.state,
        kind=snapshot.kind,
        task_id=snapshot.task_id,
        tenant_id=snapshot.tenant,
        host_id=snapshot.host_id,
        parent_snapshot_id=snapshot.parent_id,
        mode=snapshot.mode,
        name=snapshot.metadata.get("name", ""),
        comment=snapshot.comment,
        metadata=snapshot.metadata,
        layer_key=snapshot.layer_key,
        arch=snapshot.arch,
        digest=snapshot.digest,
        size_bytes=snapshot.size_bytes,
        last_error=snapshot.last_error,
        export_ref=snapshot.export_ref,
        exports=exports,
        retention_until=render_time(snapshot.retention_until_ms),
        created_at=render_time(snapshot.created_at_ms),
        updated_at=render_time(snapshot.updated_at_ms),
    )
