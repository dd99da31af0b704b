"""`fuse shell`: a terminal in an environment."""

import os

import click

from fusevm.cli.command_line import CommandLine
from fusevm.cli.options import State, api_options, environment_argument, environment_id, variables
from fusevm.cli.terminal import STDIN, converse, terminal_size, usable_stdin
from fusevm.sdk.client import Fuse

#: The best shell that the image has.
LOGIN_SHELL = "if command -v bash >/dev/null 2>&1; then exec bash -l; else exec sh -l; fi"
_PLAIN_SHELL = "if command -v bash >/dev/null 2>&1; then exec bash; else exec sh; fi"


@click.command(cls=CommandLine)
@click.option("-u", "--user", default="", metavar="USER", help="Name, uid or uid:gid.")
@click.option("-w", "--cwd", default="", metavar="DIR", help="Working directory.")
@click.option("-e", "--env", "env", multiple=True, metavar="K=V", help="Environment variable. Repeatable.")
@api_options
@environment_argument
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def shell(*, state: State, env_id: str, command: tuple[str, ...], user: str, cwd: str, env: tuple[str, ...]) -> int:
    """Open a shell in ENV, or run COMMAND in a terminal there.

    All keys go to the other side, Ctrl-C included. The exit code is the shell's. When stdin is no terminal, a shell
    without one reads its commands from it: `fuse shell ENV < script.sh`.
    """
    with state.client() as fuse:
        return open_shell(fuse, environment_id(env_id), command, user=user, cwd=cwd, env=variables(env))


def open_shell(
    fuse: Fuse, env_id: str, command: tuple[str, ...] = (), *, user: str = "", cwd: str = "", env: dict[str, str]
) -> int:
    """Run a shell, or a command, on our own terminal or pipe and return its exit code."""
    stdin = usable_stdin()
    is_tty = stdin is not None and os.isatty(STDIN)
    rows, cols = terminal_size()
    values = dict(env)
    if is_tty and os.environ.get("TERM"):
        values.setdefault("TERM", os.environ["TERM"])
    text = "" if command else LOGIN_SHELL if is_tty else _PLAIN_SHELL
    session = fuse.environments.exec_stream(
        env_id, list(command), shell=text, env=values, cwd=cwd, user=user, tty=is_tty, rows=rows, cols=cols
    )
    return converse(session, stdin=stdin, is_tty=is_tty)
