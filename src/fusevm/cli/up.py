"""`fuse up`: the whole of Fuse on this machine, in the foreground."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType as StackFrame
from typing import TYPE_CHECKING, Any

import click
import msgspec

from fusevm.cli import settings
from fusevm.cli.connection import Context, context_path, save_private
from fusevm.cli.ephemeral import apart_from_others, temporary_places
from fusevm.cli.failures import report
from fusevm.cli.options import State
from fusevm.cli.output import say
from fusevm.cli.places import data_option, find_places
from fusevm.cli.setting_options import config_option, settings_options

if TYPE_CHECKING:
    from fusevm.cli.installation import Installation, Running

_FROM_CONTROL = ("listen", "auth_token", "tls_cert", "tls_key", "allowed_hosts", "log_level", "token_encryption_key")
_FROM_HOST = tuple(setting.name for setting in settings.HOST if setting.name not in ("data_root", "plain_http"))
CONTROL_SETTINGS = tuple(setting for setting in settings.CONTROL if setting.name in _FROM_CONTROL)
HOST_SETTINGS = tuple(setting for setting in settings.HOST if setting.name in _FROM_HOST)
_CHECK_S = 0.5


@click.command()
@data_option
@click.option(
    "--image", default="debian-12", show_default=True, metavar="NAME", help="Image to have ready; '' for none."
)
@click.option(
    "--ephemeral",
    is_flag=True,
    help="In a temporary folder unless --data names one; at the end all environments and their data are removed.",
)
@click.option("--no-context", is_flag=True, help="Do not make this the default server of this user's commands.")
@click.option("--ready-file", default="", hidden=True, help="Written with what runs, as JSON (0600), once it serves.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@config_option
@settings_options(CONTROL_SETTINGS)
@settings_options(HOST_SETTINGS)
@click.pass_obj
def up(
    state: State,
    /,
    *,
    data: str | None,
    image: str,
    ephemeral: bool,
    no_context: bool,
    ready_file: str,
    debug: bool,
    config_file: Path | None,
    **flags: Any,
) -> int:
    """Start Fuse on this machine: host daemon and control plane, in the foreground.

    As root machines get their own network, users and limits. What they are made from is fetched and built the first
    time. Ctrl-C stops Fuse; the machines keep running, and the next `fuse up` finds them again. `fuse down` ends them.
    """
    from fusevm.cli.installation import Installation  # noqa: PLC0415 - only for this command
    from fusevm.cli.preflight import check_start  # noqa: PLC0415 - as above

    state.is_debug = state.is_debug or debug
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    control = settings.load("control", flags, os.environ, config_file)
    host = settings.load("host", flags, os.environ, config_file)
    places = find_places(data, os.environ)
    if ephemeral and data is None:
        flags = flags | apart_from_others(host, places.data)
        host = settings.load("host", flags, os.environ, config_file)
        places = temporary_places()
    with contextlib.ExitStack() as undo:
        if ephemeral and data is None:
            undo.callback(places.data.rmdir)
        check_start(places, control, host, image)
        undo.pop_all()
    with Installation(places, control, host, say=say) as installation:
        try:
            installation.prepare(image)
            running = installation.start()
            with contextlib.suppress(KeyboardInterrupt):
                announce(running, image, host["instance"], ready_file=ready_file, is_default=not no_context)
                if not ready_file:
                    kept = "" if ephemeral else "; machines keep running. `fuse down` ends them, too"
                    say(f"Ctrl-C stops Fuse{kept}")
                watch(installation)
            if not ephemeral:
                tell_what_stays(installation.count_environments())
        finally:
            if ephemeral:
                installation.vanish(is_whole=data is None)
    return 0


def announce(running: "Running", image: str, instance: str, *, ready_file: str, is_default: bool) -> None:
    """Tell people, this user's other commands, and the program that started us."""
    if is_default:
        save_private(context_path(os.environ), running.context)
    if ready_file:
        save_private(Path(ready_file), Ready(context=running.context, instance=instance))
    for line in running.describe(image):
        print(line, flush=True)
    if is_default:
        print("Console fuse console", flush=True)


def watch(installation: "Installation") -> None:
    """Look after the daemons, until Ctrl-C, SIGTERM or SIGHUP: KeyboardInterrupt."""
    while True:
        time.sleep(_CHECK_S)
        installation.check()


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What `--ready-file` tells to programs that start us."""

    context: Context
    #: Starts the name of every kernel object.
    instance: str


def _interrupt(number: int, stack: StackFrame | None) -> None:
    del number, stack
    raise KeyboardInterrupt


def tell_what_stays(count: int | None) -> None:
    """What Ctrl-C did not end, and how to go on."""
    print(file=sys.stderr)
    if count is None:
        report("the control plane does not answer; machines that run keep running", "`fuse up` finds them again")
    elif count:
        noun = "environment keeps" if count == 1 else "environments keep"
        say(f"{count} {noun} running. `fuse up` finds them again; `fuse down` destroys them")
    else:
        say("Fuse has stopped; no environment was left")
