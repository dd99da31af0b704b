"""`fuse story`: the life of one environment, told from its events."""

import click

from fusevm.cli.options import State, api_options, environment_argument, environment_id
from fusevm.cli.output import print_json
from fusevm.model.environment import State as EnvironmentState
from fusevm.model.errors import EnvironmentEnded
from fusevm.wire.rest import EnvironmentBody, EventBody

_SENTENCES: dict[str, str] = {
    EnvironmentState.PROVISIONING: "provisioning began",
    EnvironmentState.RUNNING: "the machine came up",
    EnvironmentState.PAUSED: "it was paused",
    EnvironmentState.DRAINING: "draining began",
    EnvironmentState.DESTROYING: "its end began",
    EnvironmentState.DESTROYED: "it was destroyed",
    EnvironmentState.FAILED: "it failed",
}


@click.command()
@environment_argument
@click.option("--uid", default="", help="Exactly this one, ended or not.")
@api_options
def story(*, state: State, env_id: str, uid: str) -> None:
    """Tell what happened to ENV, and why. An id that is over tells of its last environment."""
    name = environment_id(env_id)
    with state.client() as fuse:
        try:
            one = fuse.environments.get(name, uid=uid)
        except EnvironmentEnded as error:
            one = fuse.environments.get(name, uid=error.uid)
        told = list(fuse.environments.past_events(name, uid=one.uid))
    if state.is_json:
        print_json({"environment": one, "events": told})
        return
    print(introduction(one))
    for event in told:
        print(sentence(event))
    print(f"It is {one.state}{f': {one.error}' if one.error else ''}.")


def introduction(one: EnvironmentBody) -> str:
    """What it is."""
    spec = one.spec
    size = f"{spec.cpus} vCPU, {spec.ram_mb} MiB, {spec.storage_gb} GiB"
    return f"{one.id} ({one.uid}) is a machine of {size} with image {spec.image}, placed on host {one.host_id}."


def sentence(event: EventBody) -> str:
    """One event as a sentence, with its time and its cause."""
    what = _SENTENCES.get(event.state, event.state) if event.event == "state" else event.event.replace("_", " ")
    if event.event == "dead_letter":
        what = f"{event.state} needs a person: attempts keep failing"
    reason = f" ({event.reason})" if event.reason else ""
    message = f": {event.message or event.error}" if event.message or event.error else ""
    cause = f" [{event.cause}]" if event.cause else ""
    return f"{event.updated_at}  {what}{reason}{message}{cause}"
