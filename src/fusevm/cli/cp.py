"""`fuse cp`: files and folders in and out of environments."""

import click

from fusevm.cli.completion import complete_environment
from fusevm.cli.failures import USAGE, CliError
from fusevm.cli.options import State, api_options, environment_id
from fusevm.cli.output import format_bytes, print_json
from fusevm.cli.progress import Meter
from fusevm.cli.transfer import Copied, Remote, download, upload


@click.command()
@click.option("-u", "--user", default="", metavar="USER", help="Owner of what is written in the environment.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@api_options
@click.argument("source", shell_complete=complete_environment)
@click.argument("target", shell_complete=complete_environment)
def cp(*, state: State, source: str, target: str, user: str, quiet: bool) -> None:
    """Copy SOURCE to TARGET; one of them is ENV:/path, the other a path here, or - for stdin or stdout.

    As with `cp -r`: a target that is a folder (or ends in /) takes the source under its own name, any other becomes it.
    Files arrive whole or not at all.

    \b
    fuse cp model.bin ENV:/data/            file into a folder
    fuse cp ENV:/var/log ./logs             folder
    tar c . | fuse cp - ENV:/tmp/all.tar    stdin
    fuse cp ENV:/etc/os-release -           stdout; a folder comes as tar
    """
    here, there = parse_place(source), parse_place(target)
    with state.client() as fuse, Meter(is_shown=not quiet and not state.is_json) as meter:
        if isinstance(there, Remote) and isinstance(here, str):
            done = upload(fuse, here, there, user=user, meter=meter)
        elif isinstance(here, Remote) and isinstance(there, str):
            done = download(fuse, here, there, meter=meter)
        else:
            sides = "both are in environments" if isinstance(here, Remote) else "none is in an environment (ENV:/path)"
            raise CliError(f"one side must be here and one in an environment; {sides}", code=USAGE)
    report(done, state, target=target, is_quiet=quiet)


def parse_place(text: str) -> Remote | str:
    """`ENV:/path`, or a path here. A path here that contains a colon is written with ./ in front."""
    env, colon, path = text.partition(":")
    if not colon or not env or "/" in env or text == "-":
        return text
    if not path.startswith("/"):
        raise CliError(f"{text!r}: the path in an environment is absolute: {env}:/{path}", code=USAGE)
    return Remote(env_id=environment_id(env), path=path)


def report(done: Copied, state: State, *, target: str, is_quiet: bool) -> None:
    """Say what was copied: on stdout as JSON, or on stderr; never where the data itself went to stdout."""
    if state.is_json and target != "-":
        print_json(done)
    elif not is_quiet and not state.is_json:
        digest = f", sha256 {done.sha256}" if done.sha256 else ""
        entries = f"{done.entries} entries, " if done.entries > 1 else ""
        click.echo(f"{done.path}: {entries}{format_bytes(done.size_bytes)}{digest}", err=True)
