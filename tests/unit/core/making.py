"""Environments in each state, made by the real functions, and hosts."""

from typing import Any

from msgspec.structs import replace

from fusevm.core.lifecycle import Identity, begin, step
from fusevm.core.policy import Policy
from fusevm.core.spec import complete
from fusevm.model.environment import (
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    Environment,
    HostLost,
    State,
)
from fusevm.model.host import Host, Resources

POLICY = Policy()
#: When everything is created.
NOW = 1_000_000


def provisioning(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    identity = Identity(uid=uid, task_id=f"task-{uid}", machine_id=f"m-{uid}")
    return begin(identity, complete(POLICY, **spec), host_id, cause="create", now_ms=NOW, policy=POLICY).record


def running(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    env = provisioning(uid, host_id, **spec)
    return step(env, BootSucceeded(cause="boot", seq=1), NOW + 1_000, POLICY).record


def paused(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    """Nothing pauses an environment yet; the record is made by hand."""
    return replace(running(uid, host_id, **spec), state=State.PAUSED)


def draining(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    return step(running(uid, host_id, **spec), DrainRequested(cause="drain"), NOW + 2_000, POLICY).record


def destroying(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    return step(running(uid, host_id, **spec), DestroyRequested(cause="delete"), NOW + 3_000, POLICY).record


def destroyed(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    env = destroying(uid, host_id, **spec)
    return step(env, DestroyConfirmed(cause="destroy", seq=env.action_seq), NOW + 4_000, POLICY).record


def failed(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    return step(running(uid, host_id, **spec), HostLost(cause="watch", host_id=host_id), NOW + 3_000, POLICY).record


MAKERS = {
    State.PROVISIONING: provisioning,
    State.RUNNING: running,
    State.PAUSED: paused,
    State.DRAINING: draining,
    State.DESTROYING: destroying,
    State.DESTROYED: destroyed,
    State.FAILED: failed,
}


def host(id: str = "h1", **fields: Any) -> Host:  # noqa: A002 - the field's name
    """A host of 4 cpus, 4096 MiB, 100 GiB and 10 machines, with nothing on it."""
    capacity = Resources(cpus=4, ram_mb=4096, storage_gb=100, vm_count=10)
    return Host(
        **{
            "id": id,
            "url": f"http://{id}:8090",
            "capacity": capacity,
            "created_at_ms": NOW,
            "updated_at_ms": NOW,
            **fields,
        }
    )
