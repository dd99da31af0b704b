"""What the end of an action means: pure functions from answers and errors of a host to events of the lifecycle."""

from msgspec.structs import replace

from fusevm.model.environment import Action, BootMachine, DestroyMachine, Environment
from fusevm.model.errors import Error, MachineNotFound, StaleIncarnation
from fusevm.model.event import ActionRefused, BootRefused, BootSucceeded, DestroyConfirmed, Event, OutcomeUnknown
from fusevm.model.machine import Fence, MachineSpec, Phase
from fusevm.wire.host_api import CreateMachine, MachineBody

GIB = 1 << 30


def fence_of(cluster: str, env: Environment) -> Fence:
    """Who gives orders about the environment's present machine."""
    return Fence(cluster=cluster, uid=env.uid, incarnation=env.incarnation, action_seq=env.action_seq)


def machine_order(env: Environment, action: BootMachine, now_ms: int) -> CreateMachine:
    """The body of a create."""
    spec = MachineSpec(
        image=env.spec.image,
        cpus=env.spec.cpus,
        memory_mib=env.spec.ram_mb,
        disk_bytes=env.spec.storage_gb * GIB,
        hostname=host_name(env.task_id),
        network=env.spec.network,
    )
    left_ms = max(1_000, action.deadline_ms - now_ms)
    return CreateMachine(
        machine_id=action.machine_id, spec=spec, boot_timeout_ms=left_ms, snapshot_id=env.spec.seed_snapshot_id
    )


def host_name(task_id: str) -> str:
    """A host name (RFC 1123 label) made of a task id."""
    label = "".join(char if char.isalnum() else "-" for char in task_id.lower()).strip("-")
    return label[:63].rstrip("-") or "fuse"


def boot_outcome(action: BootMachine, machine: MachineBody, host_ms: float) -> Event:
    """The host answered a create."""
    cause = f"action {action.seq}"
    if machine.phase is Phase.RUNNING:
        return BootSucceeded(cause=cause, seq=action.seq, timings=replace(machine.timings, host_ms=host_ms))
    if machine.phase is Phase.CREATING:
        return OutcomeUnknown(cause=cause, seq=action.seq, message="the host is still making the machine")
    message = machine.error or f"the host reports the machine as {machine.phase}"
    return BootRefused(cause=cause, seq=action.seq, reason="boot_failed", message=message)


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
    if error.retryable:
        return OutcomeUnknown(cause=cause, seq=action.seq, message=error.message)
    if isinstance(action, BootMachine):
        return BootRefused(cause=cause, seq=action.seq, reason=error.reason, message=error.message)
    return ActionRefused(cause=cause, seq=action.seq, reason=error.reason, message=error.message)
