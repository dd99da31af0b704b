"""The life of one environment in sentences, for people who ask what happened and why."""

from collections.abc import Sequence

from fusevm.model.environment import BootMachine, Environment, State
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
    return f"{env.id} ({env.uid}{owner}) is a machine of {size} with image {spec.image}, placed on host {env.host_id}."


def _sentence(fact: Fact) -> str:
    if fact.kind is Kind.STATE:
        what = _STATES[fact.state]
    elif fact.kind is Kind.DEAD_LETTER:
        what = f"{fact.state} needs a person: attempts keep failing"
    else:
        what = f"{fact.kind.replace('_', ' ')} while {fact.state}"
    reason = f" ({fact.reason})" if fact.reason else ""
    message = f": {fact.message}" if fact.message else ""
    return f"{what}{reason}{message} [{fact.cause}]."


def _now(env: Environment) -> str:
    action = env.pending
    if action is None:
        return f"It is {env.state}; nothing is under way."
    what = "boot" if isinstance(action, BootMachine) else "destroy"
    attempt = f" (attempt {action.attempt + 1})" if action.attempt else ""
    problem = f"; last problem: {env.error}" if env.error else ""
    return (
        f"It is {env.state}; action {action.seq} is to {what} {action.machine_id} on host {action.host_id}"
        f"{attempt}{problem} [{action.cause}]."
    )
