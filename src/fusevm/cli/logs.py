"""`fuse logs`: what a machine wrote on its console, in its startup script or through its agent."""

import sys

import click

from fusevm.cli.options import State, api_options, environment_argument, environment_id
from fusevm.sdk.core import LogSource


@click.command()
@environment_argument
@click.option(
    "-s",
    "--source",
    type=click.Choice(["console", "startup", "agent"]),
    default="console",
    show_default=True,
    help="Whose output.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on until the environment ends.")
@api_options
def logs(*, state: State, env_id: str, source: LogSource, follow: bool) -> None:
    """Show the log of ENV as it is, byte for byte."""
    with state.client() as fuse:
        for piece in fuse.environments.logs(environment_id(env_id), source=source, follow=follow):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
