"""`fuse host serve` and `fuse host state`: the host daemon of this machine."""

import os
from pathlib import Path
from typing import Any

import click

from fusevm.cli import settings
from fusevm.cli.output import print_json
from fusevm.cli.places import data_option
from fusevm.cli.setting_options import config_option, settings_options


@click.command()
@data_option
@config_option
@settings_options(settings.HOST)
def serve(*, data: str | None, config_file: Path | None, **flags: Any) -> int:
    """Run the host daemon in the foreground until SIGTERM or Ctrl-C. As root, except for trying it out.

    Each setting is taken from its flag, else its variable, else the [host] section of the settings file, else its
    default.
    """
    from fusevm.cli.host_settings import host_config  # noqa: PLC0415 - the daemon's weight is only for this command
    from fusevm.cli.supervised import follow_supervisor  # noqa: PLC0415 - as above
    from fusevm.host.main import serve as run  # noqa: PLC0415 - as above

    loaded = settings.load("host", flags, os.environ, config_file)
    with loaded.naming_sources():
        config = host_config(loaded, os.environ, data)
        config.check()
        follow_supervisor(os.environ)
        return run(config)


@click.command(name="state")
@data_option
@config_option
@settings_options(settings.HOST)
def state_(*, data: str | None, config_file: Path | None, **flags: Any) -> None:
    """Print everything that the host daemon of this machine knows, as JSON. As its user."""
    from fusevm.cli.host_settings import host_config  # noqa: PLC0415 - the daemon's weight is only for this command
    from fusevm.cli.local_host import read_state  # noqa: PLC0415 - as above

    loaded = settings.load("host", flags, os.environ, config_file)
    with loaded.naming_sources():
        config = host_config(loaded, os.environ, data)
    print_json(read_state(config.api_socket))
