"""`fuse logs`: what a machine wrote on its console."""

import sys

import click

from fusevm.cli.options import State, api_options, environment_argument, environment_id


@click.command()
@environment_argument
@click.option("-f", "--follow", is_flag=True, help="Go on until the environment ends.")
@api_options
def logs(*, state: State, env_id: str, follow: bool) -> None:
    """Show the console of ENV as it is, byte for byte."""
    with state.client() as fuse:
        for piece in fuse.environments.logs(environment_id(env_id), follow=follow):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
