"""The `fuse` command: finds the subcommand, and turns whatever it raises into a line on stderr and an exit code.

Subcommands are loaded when they are called; this module imports nothing that they alone need.
"""

import os
import sys
from collections.abc import Sequence

import click

from fusevm import __version__
from fusevm.cli.failures import INTERRUPTED, OTHER, PIPE_CLOSED, CliError, report, report_error
from fusevm.cli.lazy import LazyGroup, ReaderGone
from fusevm.cli.options import State
from fusevm.model.errors import Error

COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("fusevm.cli.up:up", "Start Fuse on this machine: host daemon and control plane."),
    "down": ("fusevm.cli.down:down", "Stop what `fuse up` started, and its machines."),
    "run": ("fusevm.cli.run:run", "Run one command in a fresh environment."),
    "env": ("fusevm.cli.env:env", "Create, list, show, drain and remove environments."),
    "exec": ("fusevm.cli.exec:exec_", "Run a command in an environment."),
    "shell": ("fusevm.cli.shell:shell", "Open a shell in an environment."),
    "cp": ("fusevm.cli.cp:cp", "Copy files and folders in and out."),
    "logs": ("fusevm.cli.logs:logs", "Show the console of an environment, or what its script or daemon wrote."),
    "snapshot": ("fusevm.cli.snapshot:snapshot", "Take, list, show, restore and delete snapshots."),
    "story": ("fusevm.cli.story:story", "Tell what happened to an environment, and why."),
    "console": ("fusevm.cli.console:console", "Show environments and hosts in a browser."),
    "host": ("fusevm.cli.host:host", "Register, show, drain and remove hosts; run the host daemon."),
    "key": ("fusevm.cli.key:key", "Make, list and revoke API keys."),
    "serve": ("fusevm.cli.serve:serve", "Run the control plane."),
    "db": ("fusevm.cli.db:db", "Check, migrate and back up the control plane's database."),
    "image": ("fusevm.cli.image:image", "List and build images on this machine."),
    "doctor": ("fusevm.cli.doctor:doctor", "Check whether this machine is fit to run environments."),
    "bench": ("fusevm.cli.bench:bench", "Measure this machine."),
    "version": ("fusevm.cli.version:version", "Show the versions of everything involved."),
    "completion": ("fusevm.cli.completion:completion", "Print the completion script of a shell."),
}


@click.group(cls=LazyGroup, commands_by_name=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--url", metavar="URL", help="Address of the control plane. [env: FUSE_BASE_URL]")
@click.option("--token", metavar="TOKEN", help="Token; better given by the variable. [env: FUSE_TOKEN]")
@click.option("--ca-file", metavar="FILE", help="Certificates to trust (PEM). [env: FUSE_CA_FILE]")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="fuse")
@click.pass_context
def cli(context: click.Context, url: str | None, token: str | None, ca_file: str | None, *, debug: bool) -> None:
    """Fuse: microVM sandboxes on your own servers.

    `fuse up` starts everything on this machine. `fuse run debian-12 -- uname -a` runs a command in a machine of its
    own.
    """
    state: State = context.obj
    state.url, state.token, state.ca_file, state.is_debug = url, token, ca_file, debug


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line and return its exit code; failures are reported on stderr."""
    state = State(environ=os.environ)
    try:
        result = cli.main(list(arguments), prog_name="fuse", standalone_mode=False, obj=state)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except ReaderGone:
        return PIPE_CLOSED
    except Exception as error:  # noqa: BLE001 - the boundary of the program: nobody gets to see a traceback unasked
        if state.is_debug:
            import traceback  # noqa: PLC0415 - only for --debug

            traceback.print_exc()
        if isinstance(error, Error):
            return report_error(error, is_json=state.is_json)
        if isinstance(error, CliError):
            report(str(error), error.hint)
            return error.code
        if isinstance(error, OSError) and error.strerror:
            report(f"{error.strerror}{f': {error.filename}' if error.filename else ''}")
            return OTHER
        report(f"internal error: {type(error).__name__}: {error}", "run it with --debug and report what it shows")
        return OTHER
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the program."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = PIPE_CLOSED
    if code == PIPE_CLOSED:
        # The reader has gone; Python must not try to flush what is left at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
