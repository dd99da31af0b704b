"""`fuse run`: one command in a machine of its own, which is destroyed afterwards whatever happens."""

import contextlib
import os
import signal
import sys
import time
from types import FrameType as StackFrame
from typing import Any, NoReturn, Self

import click

from fusevm.cli.command_line import CommandLine
from fusevm.cli.env import create_fields, sizing_options
from fusevm.cli.exec import command_options, run_command
from fusevm.cli.failures import report
from fusevm.cli.options import State, api_options, variables
from fusevm.cli.output import is_terminal, say
from fusevm.cli.shell import open_shell
from fusevm.model.errors import BadRequest, Error, NotFound, Timeout
from fusevm.sdk.choices import make_task_id
from fusevm.sdk.client import Fuse
from fusevm.sdk.failures import ConnectionLost

#: After an interrupted create the request may still be on its way to the server.
_CLEANUP_TRIES = 4
_CLEANUP_PAUSE_S = 0.5


@click.command(cls=CommandLine)
@sizing_options
@command_options
@click.option("--task-id", metavar="ID", help="Name of the environment. Default: a random one.")
@click.option("--keep", is_flag=True, help="Leave the environment running afterwards.")
@api_options
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    *,
    state: State,
    image: str,
    command: tuple[str, ...],
    task_id: str | None,
    keep: bool,
    tty: bool,
    user: str,
    cwd: str,
    env: tuple[str, ...],
    timeout: float | None,
    no_stdin: bool,
    **sizing: Any,
) -> int:
    """Run COMMAND in a fresh machine made of IMAGE and destroy the machine afterwards, also on Ctrl-C.

    The exit code is the command's. Without COMMAND the image's own runs, its entrypoint and command; if it has none,
    on a terminal: a shell.
    """
    task = task_id or make_task_id("run")
    is_chatty = is_terminal(sys.stderr) and not state.is_json
    with state.client() as fuse, Ephemeral(fuse, f"fuse-{task}", keep=keep, is_ours=task_id is None) as environment:
        began = time.perf_counter()
        made = fuse.environments.create(task, **create_fields(image=image, **sizing))
        environment.is_certain = True
        if is_chatty:
            say(f"{made.id} runs on host {made.host_id} after {(time.perf_counter() - began) * 1000:.0f} ms")
        try:
            return run_command(
                fuse,
                made.id,
                command,
                image_command=not command,
                tty=tty or (not command and os.isatty(0) and os.isatty(1)),
                user=user,
                cwd=cwd,
                env=env,
                timeout=timeout,
                no_stdin=no_stdin,
                is_json=state.is_json,
            )
        except BadRequest as error:
            if command:
                raise
            if not os.isatty(0):
                raise click.UsageError(f"{image} has no command of its own: fuse run {image} -- COMMAND") from error
            return open_shell(fuse, made.id, user=user, cwd=cwd, env=variables(env))


class Ephemeral:
    """Destroys an environment at the end of the block, which SIGTERM and SIGHUP reach as SystemExit."""

    def __init__(self, fuse: Fuse, env_id: str, *, keep: bool, is_ours: bool) -> None:
        """`is_ours`: the id is random, so whatever has it was made by us."""
        self._fuse = fuse
        self._env_id = env_id
        self._is_kept = keep
        self._is_ours = is_ours
        #: The server has answered our create; before that it may never have heard of it.
        self.is_certain = False

    def __enter__(self) -> Self:
        self._old = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if self._is_kept and self.is_certain:
                say(f"{self._env_id} goes on; `fuse env rm {self._env_id}` ends it")
            elif self.is_certain or (self._is_ours and _may_exist(error)):
                self._destroy(1 if self.is_certain else _CLEANUP_TRIES)
            elif _may_exist(error):
                report(f"{self._env_id} may exist now", f"`fuse env rm {self._env_id}` ends it")
        finally:
            for number, handler in self._old.items():
                signal.signal(number, handler)

    def _destroy(self, tries: int) -> None:
        try:
            for attempt in range(tries):
                time.sleep(_CLEANUP_PAUSE_S if attempt else 0)
                with contextlib.suppress(NotFound):
                    return self._fuse.environments.delete(self._env_id, wait=False)
        except (Error, KeyboardInterrupt) as error:
            problem = error.message if isinstance(error, Error) else "interrupted"
            report(f"{self._env_id} may still exist ({problem})", f"`fuse env rm {self._env_id}` ends it")


def _may_exist(error: BaseException | None) -> bool:
    """After a create that ended like this: can there be an environment? What did not come up ends by itself."""
    return not isinstance(error, Error) or isinstance(error, ConnectionLost | Timeout)


def _end(number: int, stack: StackFrame | None) -> NoReturn:
    del stack
    raise SystemExit(128 + number)
