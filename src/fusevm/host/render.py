"""Records to bodies. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import msgspec

from fusevm.host.agent import decode_output
from fusevm.host.images.store import Image
from fusevm.host.net.traffic import Traffic
from fusevm.host.quarantine import Quarantine
from fusevm.model.machine import Machine
from fusevm.model.network import PublishedPort
from fusevm.wire.guest import ExecResult, StreamFlags
from fusevm.wire.host_api import (
    HostExecAnswer,
    ImageBody,
    ImageRun,
    MachineBody,
    NetworkAnswer,
    PublishedPortBody,
    QuarantineBody,
    TrafficBody,
)

#: Stands for the values of environment variables, which may be secrets.
HIDDEN = "(hidden)"


def render_time(at_ms: int | None) -> str:
    """RFC 3339 in UTC with milliseconds; empty for None."""
    if at_ms is None:
        return ""
    moment = dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def render_machine(
    machine: Machine, quarantine: Quarantine | None = None, ports_used_s_ago: int | None = None
) -> MachineBody:
    """A machine without its secrets."""
    return MachineBody(
        id=machine.id,
        cluster=machine.fence.cluster,
        uid=machine.fence.uid,
        incarnation=machine.fence.incarnation,
        phase=machine.phase,
        spec=msgspec.structs.replace(machine.spec, env=dict.fromkeys(machine.spec.env, HIDDEN)),
        image_digest=machine.image_digest,
        driver=machine.driver,
        isolation=machine.isolation,
        address=machine.address,
        generation=machine.generation,
        timings=machine.timings,
        error=machine.error,
        published_ports=[render_port(machine.id, port) for port in machine.ports],
        ports_used_s_ago=ports_used_s_ago,
        created_at=render_time(machine.created_at_ms),
        started_at=render_time(machine.started_at_ms),
        quarantine=render_quarantine(quarantine) if quarantine is not None else None,
    )


def render_quarantine(state: Quarantine) -> QuarantineBody:
    """What is open with a machine, and when it is tried again."""
    return QuarantineBody(
        since=render_time(state.since_ms),
        attempts=state.attempts,
        problem=state.problem,
        retry_at=render_time(state.retry_at_ms),
    )


def render_port(machine_id: str, port: PublishedPort) -> PublishedPortBody:
    """A published port as the API shows it."""
    return PublishedPortBody(
        id=port.id,
        machine_id=machine_id,
        name=port.name,
        port=port.port,
        host_port=port.host_port,
        protocol=port.protocol,
        created_at=render_time(port.created_at_ms),
    )


def render_network(machine: Machine, traffic: Traffic | None) -> NetworkAnswer:
    """A machine's policy, and what it has sent and received."""
    counted = TrafficBody(**msgspec.structs.asdict(traffic)) if traffic is not None else None
    return NetworkAnswer(network=machine.spec.network, traffic=counted)


def render_image(image: Image, users: Sequence[str]) -> ImageBody:
    """An image as the API shows it."""
    config = image.config
    return ImageBody(
        digest=image.digest,
        names=list(image.names),
        size_bytes=image.record.size_bytes,
        architecture=image.record.architecture,
        origin=image.record.origin.value,
        source=image.record.source,
        manifest_digest=image.record.manifest_digest,
        config=ImageRun(
            env=config.env,
            workdir=config.workdir,
            user=config.user,
            entrypoint=list(config.entrypoint),
            cmd=list(config.cmd),
        ),
        users=list(users),
        created_at=render_time(image.record.created_at_ms),
    )


def render_exec(result: ExecResult) -> HostExecAnswer:
    """The contract's answer to a command. Raises AgentFailure for output that is no base64."""
    stdout, stderr = decode_output(result)
    return HostExecAnswer(
        exit_code=result.exit_code,
        stdout=stdout.decode(errors="replace"),
        stderr=stderr.decode(errors="replace"),
        duration_ms=result.duration_ms,
        stdout_b64=msgspec.UNSET if _is_text(stdout) else result.stdout_b64,
        stderr_b64=msgspec.UNSET if _is_text(stderr) else result.stderr_b64,
        truncated=msgspec.UNSET if result.truncated == StreamFlags() else result.truncated,
        timed_out=result.timed_out or msgspec.UNSET,
    )


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
