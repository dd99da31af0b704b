"""`fuse host`: the hosts of a control plane. The host daemon of this machine is in `host_daemon`."""

import click

from fusevm.cli.lazy import LazyGroup
from fusevm.cli.options import State, api_options
from fusevm.cli.output import print_json, print_record, print_table
from fusevm.wire.rest import HostBody


@click.group(
    cls=LazyGroup,
    commands_by_name={
        "list": ("fusevm.cli.host:list_", "List the hosts of the control plane."),
        "get": ("fusevm.cli.host:get", "Show one host."),
        "serve": ("fusevm.cli.host_daemon:serve", "Run the host daemon in the foreground."),
        "state": ("fusevm.cli.host_daemon:state_", "Print everything that this machine's host daemon knows."),
    },
)
def host() -> None:
    """Show hosts; run the host daemon."""


@click.command(name="list")
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


@click.command()
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
            ("VMM", one.vmm_version),
            ("guest agent", one.agent_version),
            ("guest kernel", one.kernel),
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
