"""Environments in each state, made by the real functions, and hosts and snapshots."""

from typing import Any

from msgspec.structs import replace

from fusevm.core.lifecycle import Identity, begin, step
from fusevm.core.policy import Policy
from fusevm.core.snapshots import begin_snapshot
from fusevm.core.spec import complete
from fusevm.model.environment import Environment, State
from fusevm.model.event import (
    BootSucceeded,
    DestroyConfirmed,
    DestroyRequested,
    DrainRequested,
    HostLost,
    NetworkRequested,
    RestoreRequested,
    RotateRequested,
    SetUpSucceeded,
    SnapshotRequested,
)
from fusevm.model.host import Host, Resources
from fusevm.model.network import Network
from fusevm.model.setup import Duties
from fusevm.model.snapshot import Snapshot, SnapshotState

POLICY = Policy()
#: When everything is created.
NOW = 1_000_000
NONE = Duties()
#: A daemon, a script and a health check.
EVERYTHING = Duties(setup=True, startup_timeout_s=30, agent=True, healthcheck=True)


def provisioning(uid: str = "u1", host_id: str = "h1", *, duties: Duties = NONE, **spec: Any) -> Environment:
    identity = Identity(uid=uid, task_id=f"task-{uid}", machine_id=f"m-{uid}")
    return begin(
        identity, complete(POLICY, **spec), host_id, cause="create", now_ms=NOW, policy=POLICY, duties=duties
    ).record


def queued(uid: str = "u1", *, queue_seconds: int = 60, **spec: Any) -> Environment:
    """Waits for a place."""
    return provisioning(uid, "", queue_seconds=queue_seconds, **spec)


def setting_up(uid: str = "u1", host_id: str = "h1", *, duties: Duties = EVERYTHING, **spec: Any) -> Environment:
    """Has booted, and its setup is under way."""
    env = provisioning(uid, host_id, duties=duties, **spec)
    return step(env, BootSucceeded(cause="boot", seq=1), NOW + 500, POLICY).record


def running(uid: str = "u1", host_id: str = "h1", *, duties: Duties = NONE, **spec: Any) -> Environment:
    if duties.setup:
        env = setting_up(uid, host_id, duties=duties, **spec)
        return step(env, SetUpSucceeded(cause="setup", seq=2), NOW + 1_000, POLICY).record
    env = provisioning(uid, host_id, **spec)
    return step(env, BootSucceeded(cause="boot", seq=1), NOW + 1_000, POLICY).record


def rotating(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    return step(running(uid, host_id, **spec), RotateRequested(cause="rotate"), NOW + 2_000, POLICY).record


def changing_network(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    event = NetworkRequested(cause="network", network=Network(internet=False))
    return step(running(uid, host_id, **spec), event, NOW + 2_000, POLICY).record


def snapshotting(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    env = running(uid, host_id, **spec)
    return step(env, SnapshotRequested(cause="snapshot", snapshot=creating(env)), NOW + 2_000, POLICY).record


def restoring(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    env = running(uid, host_id, **spec)
    return step(env, RestoreRequested(cause="restore", snapshot=ready(env)), NOW + 2_000, POLICY).record


def paused(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    """Nothing pauses an environment yet; the record is made by hand."""
    return replace(running(uid, host_id, **spec), state=State.PAUSED)


def draining(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    return step(running(uid, host_id, **spec), DrainRequested(cause="drain"), NOW + 2_000, POLICY).record


def draining_agent(uid: str = "u1", host_id: str = "h1", **spec: Any) -> Environment:
    """Its daemon is being drained."""
    return draining(uid, host_id, duties=EVERYTHING, **spec)


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
#: Every situation, states with each action that may be under way in them.
SITUATIONS = {
    **{str(state): maker for state, maker in MAKERS.items()},
    "queued": queued,
    "setting_up": setting_up,
    "rotating": rotating,
    "changing_network": changing_network,
    "snapshotting": snapshotting,
    "restoring": restoring,
    "draining_agent": draining_agent,
}


def creating(env: Environment, **fields: Any) -> Snapshot:
    """A snapshot that is to be taken of the environment."""
    return begin_snapshot(env, f"0{env.uid}", now_ms=NOW + 2_000, **fields)


def ready(env: Environment, **fields: Any) -> Snapshot:
    """A complete snapshot of the environment."""
    made = {"state": SnapshotState.READY, "size_bytes": 9, "digest": "sha256:1", **fields}
    return replace(creating(env), **made)


def snapshots_of(env: Environment) -> dict[str, Snapshot]:
    """The snapshot that the pending action is about, as the store has it."""
    snapshot = getattr(env.pending, "snapshot", None)
    return {} if snapshot is None else {snapshot.id: snapshot}


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
