"""The life of one environment in sentences, for people who ask what happened and why."""

from collections.abc import Sequence

from fusevm.model.environment import (
    Action,
    BootMachine,
    ChangeNetwork,
    DestroyMachine,
    DrainAgent,
    Environment,
    RestoreMachine,
    RotateToken,
    SetUpMachine,
    SnapshotMachine,
    State,
)
from fusevm.model.fact import Fact, Kind

_STATES = {
    State.PROVISIONING: "provisioning began",
    State.RUNNING: "the machine came up",
    State.PAUSED: "it was paused",
    State.DRAINING: "draining began",
    State.DESTROYING: "its end began",
    State.DESTROYED: "it was destroyed",
    State.FAILED: "it failed",
}
_KINDS = {
    Kind.STARTUP_OUTPUT: "the startup script said something",
    Kind.EXEC: "a command was run",
    Kind.AGENT: "news of the daemon",
    Kind.HEALTH: "the health check changed",
    Kind.SNAPSHOT: "a snapshot",
    Kind.HOST: "news of its host",
}
_TODO: dict[type[Action], str] = {
    BootMachine: "boot {machine}",
    SetUpMachine: "set up {machine}",
    DrainAgent: "drain the daemon of {machine}",
    RotateToken: "give a new token to {machine}",
    ChangeNetwork: "change the network of {machine}",
    SnapshotMachine: "take a snapshot of {machine}",
    RestoreMachine: "put {machine} back to a snapshot",
    DestroyMachine: "destroy {machine}",
}


def story(env: Environment, facts: Sequence[Fact]) -> list[str]:
    """One sentence for what it is, one per fact with the seconds since creation, one for what is under way."""
    lines = [_introduction(env)]
    lines += [f"+{(fact.at_ms - env.created_at_ms) / 1000:.3f} s: {_sentence(fact)}" for fact in facts]
    lines.append(_now(env))
    return lines


def _introduction(env: Environment) -> str:
    spec = env.spec
    size = f"{spec.cpus} vCPU, {spec.ram_mb} MiB, {spec.storage_gb} GiB"
    owner = f" for tenant {env.tenant}" if env.tenant else ""
    where = f"placed on host {env.host_id}" if env.host_id else "without a place"
    seed = f" from snapshot {spec.seed_snapshot_id}" if spec.seed_snapshot_id else ""
    return f"{env.id} ({env.uid}{owner}) is a machine of {size} with image {spec.image}{seed}, {where}."


def _sentence(fact: Fact) -> str:
    if fact.kind is Kind.STATE:
        what = _STATES[fact.state]
    elif fact.kind is Kind.DEAD_LETTER:
        what = f"{fact.state} needs a person: attempts keep failing"
    else:
        what = f"{_KINDS.get(fact.kind, fact.kind)} while {fact.state}"
    reason = f" ({fact.reason})" if fact.reason else ""
    about = "".join(f", {name.replace('_', ' ')} {value}" for name, value in sorted(fact.data.items()))
    message = f": {' '.join(fact.message.split())}" if fact.message else ""
    return f"{what}{reason}{about}{message} [{fact.cause}]."


def _now(env: Environment) -> str:
    action = env.pending
    if env.is_queued:
        return f"It is {env.state}; it waits for a place, at most {env.spec.queue_seconds} s."
    if action is None:
        return f"It is {env.state}; nothing is under way."
    what = _TODO[type(action)].format(machine=action.machine_id)
    attempt = f" (attempt {action.attempt + 1})" if action.attempt else ""
    problem = f"; last problem: {env.error}" if env.error else ""
    return (
        f"It is {env.state}; action {action.seq} is to {what} on host {action.host_id}"
        f"{attempt}{problem} [{action.cause}]."
    )
