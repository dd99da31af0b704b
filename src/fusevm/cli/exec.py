"""`fuse exec`: run a command in an environment, with its streams, signals and exit code."""

import base64
import os
from typing import Any

import click

from fusevm.cli.command_line import CommandLine
from fusevm.cli.options import Duration, State, api_options, environment_argument, environment_id, variables
from fusevm.cli.output import print_json
from fusevm.cli.terminal import STDIN, converse, terminal_size, usable_stdin
from fusevm.sdk.client import Fuse
from fusevm.wire.frames import FrameType


def command_options(function: Any) -> Any:
    """The options of everything that runs a command."""
    options = (
        click.option("-t", "--tty", is_flag=True, help="Give it a terminal."),
        click.option("-u", "--user", default="", metavar="USER", help="Name, uid or uid:gid."),
        click.option("-w", "--cwd", default="", metavar="DIR", help="Working directory."),
        click.option("-e", "--env", "env", multiple=True, metavar="K=V", help="Environment variable. Repeatable."),
        click.option("--timeout", type=Duration(), metavar="TIME", help="Kill it after this long; exit code 124."),
        click.option("-n", "--no-stdin", is_flag=True, help="Give it no input."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command(name="exec", cls=CommandLine)
@command_options
@click.option("-c", "--shell", default="", metavar="TEXT", help="Run TEXT by `sh -lc` instead of a command.")
@api_options
@environment_argument
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def exec_(*, state: State, env_id: str, command: tuple[str, ...], shell: str, **options: Any) -> int:
    """Run COMMAND in ENV: input, output and exit code are its own.

    Our stdin is passed on, unless -n. Ctrl-C is sent to the command; a second one ends it. With -o json the output is
    collected and printed with the exit code as one document.
    """
    if bool(command) == bool(shell):
        raise click.UsageError("give a command, or a text with -c")
    with state.client() as fuse:
        return run_command(fuse, environment_id(env_id), command, shell=shell, is_json=state.is_json, **options)


def run_command(
    fuse: Fuse,
    env_id: str,
    command: tuple[str, ...],
    *,
    shell: str = "",
    image_command: bool = False,
    tty: bool = False,
    user: str = "",
    cwd: str = "",
    env: tuple[str, ...] = (),
    timeout: float | None = None,
    no_stdin: bool = False,
    is_json: bool = False,
) -> int:
    """Run a command with our own streams and return its exit code."""
    rows, cols = terminal_size()
    values = variables(env)
    if tty and os.environ.get("TERM"):
        values.setdefault("TERM", os.environ["TERM"])
    session = fuse.environments.exec_stream(
        env_id,
        list(command),
        shell=shell,
        image_command=image_command,
        env=values,
        cwd=cwd,
        user=user,
        timeout_ms=round((timeout or 0) * 1000),
        tty=tty,
        rows=rows,
        cols=cols,
    )
    stdin = usable_stdin(is_wanted=not no_stdin)
    if not is_json:
        return converse(session, stdin=stdin, is_tty=tty)
    collected: dict[FrameType, bytearray] = {FrameType.STDOUT: bytearray(), FrameType.STDERR: bytearray()}
    stdin = None if stdin == STDIN and os.isatty(STDIN) else stdin
    code = converse(session, stdin=stdin, is_tty=False, sink=lambda kind, data: collected[kind].extend(data))
    ended = session.exit
    print_json(
        {
            "exit_code": code,
            "signal": ended.signal if ended else "",
            "timed_out": ended.timed_out if ended else False,
            "duration_ms": ended.duration_ms if ended else 0,
            **_as_text("stdout", bytes(collected[FrameType.STDOUT])),
            **_as_text("stderr", bytes(collected[FrameType.STDERR])),
        }
    )
    return code


def _as_text(name: str, data: bytes) -> dict[str, str]:
    """Output as text, and also as base64 where text would lose bytes."""
    text = data.decode("utf-8", "replace")
    lossless = text.encode() == data
    return {name: text} if lossless else {name: text, f"{name}_b64": base64.b64encode(data).decode()}
