"""`fuse logs`: what a machine wrote on its console, or its startup script or daemon on their outputs."""

import sys
from typing import TYPE_CHECKING

import click

from fusevm.cli.options import State, api_options, environment_argument, environment_id

if TYPE_CHECKING:
    from fusevm.sdk.core import LogSource


@click.command()
@environment_argument
@click.option(
    "--source",
    type=click.Choice(["console", "startup", "agent"]),
    default="console",
    help="The machine's console (default), its startup script, or its daemon.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on until the machine, the script or the daemon ends.")
@api_options
def logs(*, state: State, env_id: str, source: "LogSource", follow: bool) -> None:
    """Show a log of ENV as it is, byte for byte."""
    with state.client() as fuse:
        for piece in fuse.environments.logs(environment_id(env_id), source=source, follow=follow):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
