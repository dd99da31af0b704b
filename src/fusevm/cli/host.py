"""`fuse host`: the hosts of a control plane, and the host daemon of this machine."""

import os
from pathlib import Path
from typing import Any

import click

from fusevm.cli import settings
from fusevm.cli.options import State, api_options
from fusevm.cli.output import print_json, print_record, print_table
from fusevm.cli.places import data_option
from fusevm.cli.setting_options import config_option, settings_options
from fusevm.wire.rest import HostBody


@click.group()
def host() -> None:
    """Show hosts; run the host daemon."""


@host.command(name="list")
@api_options
def list_(*, state: State) -> None:
    """List the hosts of the control plane."""
    with state.client() as fuse:
        found = list(fuse.hosts.list())
    if state.is_json:
        print_json(found)
        return
    columns = ("id", "state", "health", "driver", "cpus", "ram", "disk", "machines", "url")
    print_table(columns, [_row(one) for one in found])


def _row(one: HostBody) -> tuple[str, ...]:
    used, total = one.allocated, one.capacity
    return (
        one.id,
        one.state,
        one.health,
        one.driver,
        f"{used.cpus}/{total.cpus}",
        f"{used.ram_mb}/{total.ram_mb} MiB",
        f"{used.storage_gb}/{total.storage_gb} GiB",
        f"{used.vm_count}/{total.vm_count}",
        one.url,
    )


@host.command()
@click.argument("host_id", metavar="HOST")
@api_options
def get(*, state: State, host_id: str) -> None:
    """Show one host."""
    with state.client() as fuse:
        one = fuse.hosts.get(host_id)
    if state.is_json:
        print_json(one)
        return
    row = _row(one)
    print_record(
        [
            ("id", one.id),
            ("url", one.url),
            ("state", one.state),
            ("health", one.health),
            ("driver", one.driver),
            ("version", one.version),
            ("region", one.region),
            ("arch", one.arch),
            ("labels", ", ".join(f"{name}={value}" for name, value in one.labels.items())),
            ("images", ", ".join(one.images)),
            ("cpus", row[4]),
            ("memory", row[5]),
            ("disk", row[6]),
            ("machines", row[7]),
            ("last seen", one.last_seen),
        ]
    )


@host.command()
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


@host.command(name="state")
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
