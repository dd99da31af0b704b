"""`fuse down`: stop what `fuse up` started, and destroy its machines."""

import os
import signal

import click

from fusevm.cli import settings
from fusevm.cli.failures import CliError
from fusevm.cli.installation import Installation, UpRecord, load_record, load_settings, local_client
from fusevm.cli.options import State
from fusevm.cli.output import say
from fusevm.cli.places import Places, data_option, find_places
from fusevm.cli.processes import end, is_running
from fusevm.cli.removing import remove_all

_STOP_S = 60.0


@click.command()
@data_option
@click.option("--keep", is_flag=True, help="Leave the machines running; the next `fuse up` finds them.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_obj
def down(state: State, *, data: str | None, keep: bool, debug: bool) -> int:
    """Stop Fuse on this machine and destroy its environments.

    Also after Ctrl-C or a crash of `fuse up`: then Fuse is started for as long as it takes.
    """
    state.is_debug = state.is_debug or debug
    places = find_places(data, state.environ)
    record = load_record(places)
    if record is not None and is_running(record.supervisor):
        return stop_running(places, record, keep=keep)
    if keep or not places.control.is_dir():
        say(f"nothing runs from {places.data}")
        return 0
    return clean_up(places)


def stop_running(places: Places, record: UpRecord, *, keep: bool) -> int:
    """Destroy through the running control plane, then end its supervisor."""
    code = 0
    if not keep and record.context is not None:
        with local_client(record.context) as fuse:
            ids = [one.id for one in fuse.environments.list()]
            code = remove_all(fuse, ids, done=lambda env_id: say(f"{env_id} destroyed"))
    if not end(record.supervisor, signal.SIGTERM, _STOP_S):
        raise CliError(f"`fuse up` (pid {record.supervisor.pid}) does not end", hint="look at its output")
    say("Fuse has stopped" + ("; its machines run on" if keep else ""))
    if not keep and not code:
        with make_installation(places) as installation:
            installation.remove_traces()
    return code


def make_installation(places: Places) -> Installation:
    """The installation with the settings it ran with last."""
    control = settings.load("control", {}, os.environ)
    return Installation(places, control, settings.load("host", load_settings(places), os.environ), say=say)


def clean_up(places: Places) -> int:
    """Start Fuse quietly, destroy everything, stop."""
    with make_installation(places) as installation:
        installation.start()
        installation.destroy_all()
        installation.stop()
        installation.remove_traces()
    say("Fuse has stopped; nothing runs any more")
    return 0
