"""What the end of an action means: pure functions from answers and errors of a host to events of the lifecycle."""

from msgspec.structs import replace

from fusevm.core.endings import is_put_back
from fusevm.model.environment import Action, BootMachine, DestroyMachine, Environment
from fusevm.model.errors import (
    BadSetting,
    CommandFailed,
    Error,
    HostRejected,
    Internal,
    MachineNotFound,
    StaleIncarnation,
    WrongCluster,
)
from fusevm.model.event import ActionRefused, BootRefused, BootSucceeded, DestroyConfirmed, Event, OutcomeUnknown
from fusevm.model.machine import Fence, MachineSpec, Moment, Phase
from fusevm.model.network import PublishedPort
from fusevm.wire.host_api import CreateMachine, MachineBody, PublishedPortBody

GIB = 1 << 30


def fence_of(cluster: str, env: Environment, valid_until: Moment | None = None) -> Fence:
    """Who gives orders about the environment's present machine, and until when."""
    return Fence(
        cluster=cluster,
        uid=env.uid,
        incarnation=env.incarnation,
        action_seq=env.action_seq,
        valid_until=valid_until,
    )


def machine_order(env: Environment, action: BootMachine, left_s: float) -> CreateMachine:
    """The body of a create that has so many seconds."""
    spec = MachineSpec(
        image=env.spec.image,
        cpus=env.spec.cpus,
        memory_mib=env.spec.ram_mb,
        disk_bytes=env.spec.storage_gb * GIB,
        hostname=host_name(env.task_id),
        network=env.spec.network,
        expose=env.spec.expose,
    )
    return CreateMachine(
        machine_id=action.machine_id,
        spec=spec,
        boot_timeout_ms=round(left_s * 1000),
        snapshot_id=env.spec.seed_snapshot_id,
    )


def host_name(task_id: str) -> str:
    """A host name (RFC 1123 label) made of a task id."""
    label = "".join(char if char.isalnum() else "-" for char in task_id.lower()).strip("-")
    return label[:63].rstrip("-") or "fuse"


def boot_outcome(action: BootMachine, machine: MachineBody, host_ms: float, host_address: str) -> Event:
    """The host answered a create."""
    cause = f"action {action.seq}"
    if machine.phase is Phase.RUNNING:
        return BootSucceeded(
            cause=cause,
            seq=action.seq,
            timings=replace(machine.timings, host_ms=host_ms),
            host_address=host_address,
            ports=tuple(map(_published, machine.published_ports)),
        )
    if machine.phase is Phase.CREATING:
        return OutcomeUnknown(cause=cause, seq=action.seq, message="the host is still making the machine")
    message = machine.error or f"the host reports the machine as {machine.phase}"
    return BootRefused(cause=cause, seq=action.seq, reason="boot_failed", message=message)


def _published(port: PublishedPortBody) -> PublishedPort:
    return PublishedPort(id=port.id, name=port.name, port=port.port, host_port=port.host_port, protocol=port.protocol)


def error_outcome(action: Action, error: Error) -> Event:
    """The host, the guest, or the way to them failed.

    What a repetition cannot cure is refused; a destroy is repeated until the host confirms, or says that it has no such
    machine or a newer word on it.
    """
    cause = f"action {action.seq}"
    if isinstance(action, DestroyMachine):
        if isinstance(error, MachineNotFound | StaleIncarnation):
            return DestroyConfirmed(cause=cause, seq=action.seq)
        return OutcomeUnknown(cause=cause, seq=action.seq, message=error.message)
    # A key or a certificate that this replica lacks: another one may have it, and nothing is wrong with the machine.
    if error.retryable or isinstance(error, BadSetting):
        return OutcomeUnknown(cause=cause, seq=action.seq, message=error.message)
    if isinstance(action, BootMachine):
        return BootRefused(cause=cause, seq=action.seq, reason=error.reason, message=error.message)
    # A host in trouble may have noted the policy all the same, and make it hold later.
    if is_put_back(action) and isinstance(error, Internal | CommandFailed):
        return OutcomeUnknown(cause=cause, seq=action.seq, message=error.message)
    # A host that turns us away says nothing about the machine, which may be in use.
    if isinstance(error, HostRejected | WrongCluster):
        return OutcomeUnknown(cause=cause, seq=action.seq, message=error.message)
    return ActionRefused(cause=cause, seq=action.seq, reason=error.reason, message=error.message)
