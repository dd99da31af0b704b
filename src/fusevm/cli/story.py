"""`fuse story`: the life of one environment, told from its events."""

import click

from fusevm.cli.options import State, api_options, environment_argument, environment_id
from fusevm.cli.output import print_json
from fusevm.model.errors import EnvironmentEnded
from fusevm.sdk.words import introduction, sentence


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
    if told and told[0].id not in ("", f"{one.uid}.1"):
        print("What happened before is no longer kept.")
    for event in told:
        print(sentence(event))
    print(f"It is {one.state}{f': {one.error}' if one.error else ''}.")
