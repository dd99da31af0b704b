"""`fuse host`: the hosts of a control plane. The host daemon of this machine is in `host_daemon`."""

import sys
from typing import Any

import click

from fusevm.cli.completion import complete_host
from fusevm.cli.lazy import LazyGroup
from fusevm.cli.options import Size, State, api_options, variables
from fusevm.cli.output import print_json, print_record, print_table, say
from fusevm.cli.removing import remove_each
from fusevm.wire.rest import HostBody
from fusevm.wire.rest_fleet import CapacityInput


@click.group(
    cls=LazyGroup,
    commands_by_name={
        "list": ("fusevm.cli.host:list_", "List the hosts of the control plane."),
        "get": ("fusevm.cli.host:get", "Show one host."),
        "register": ("fusevm.cli.host:register", "Register a host daemon, or update one."),
        "cordon": ("fusevm.cli.host:cordon", "Place nothing new on a host."),
        "uncordon": ("fusevm.cli.host:uncordon", "Place on a host again."),
        "drain": ("fusevm.cli.host:drain", "Cordon a host and drain its environments."),
        "rm": ("fusevm.cli.host:rm", "Forget hosts without environments."),
        "install": ("fusevm.cli.host_install:install", "Turn this machine into a host."),
        "install-service": ("fusevm.cli.host_install:install_service", "Install only the host daemon's service."),
        "start": ("fusevm.cli.host_install:start", "Start the installed host daemon."),
        "upgrade": ("fusevm.cli.host_install:upgrade", "Let the services run this version; machines run on."),
        "install-control": ("fusevm.cli.host_install:install_control", "Run a control plane beside the host daemon."),
        "uninstall": ("fusevm.cli.host_install:uninstall", "Remove the services and what they have made."),
        "doctor": ("fusevm.cli.doctor:doctor", "Check whether this machine is fit to run environments."),
        "serve": ("fusevm.cli.host_daemon:serve", "Run the host daemon in the foreground."),
        "state": ("fusevm.cli.host_daemon:state_", "Print everything that this machine's host daemon knows."),
    },
)
def host() -> None:
    """Register, show, drain and remove hosts; install and run the host daemon."""


def _host_argument(function: Any) -> Any:
    return click.argument("host_id", metavar="HOST", shell_complete=complete_host)(function)


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
@_host_argument
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
            ("problem", one.problem),
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


@click.command()
@_host_argument
@click.argument("host_url", metavar="URL")
@click.option("--host-token", metavar="TOKEN", default="", help="As the daemon printed it; - reads it from stdin.")
@click.option("--region", default="", metavar="NAME", help="Where it is.")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="To place by. Repeatable.")
@click.option("--cpus", type=click.IntRange(1), help="CPUs that may be booked, instead of what the host reports.")
@click.option("--ram", type=Size(1), metavar="SIZE", help="Memory, likewise.")
@click.option("--disk", type=Size(1024), metavar="SIZE", help="Disk, likewise.")
@click.option("--max-machines", type=click.IntRange(1), help="Machines, likewise.")
@api_options
def register(
    *,
    state: State,
    host_id: str,
    host_url: str,
    host_token: str,
    region: str,
    labels: tuple[str, ...],
    cpus: int | None,
    ram: int | None,
    disk: int | None,
    max_machines: int | None,
) -> None:
    """Register the host daemon at URL as HOST, or update a known one. Without a token the known one stays."""
    is_piped = host_token == "-"  # noqa: S105 - no token
    token = sys.stdin.readline().strip() if is_piped else host_token
    capacity = CapacityInput(cpus=cpus, ram_mb=ram, storage_gb=disk, vm_count=max_machines)
    with state.client() as fuse:
        one = fuse.hosts.register(
            host_id, host_url, token=token, region=region, labels=variables(labels, "--label"), capacity=capacity
        )
    if state.is_json:
        print_json(one)
        return
    print(one.id)
    for warning in one.warnings:
        say(f"warning: {warning}")


@click.command()
@_host_argument
@api_options
def cordon(*, state: State, host_id: str) -> None:
    """Place nothing new on HOST. What runs there goes on."""
    _change(state, host_id, "cordon")


@click.command()
@_host_argument
@api_options
def uncordon(*, state: State, host_id: str) -> None:
    """Place on HOST again; also ends a drain."""
    _change(state, host_id, "uncordon")


@click.command()
@_host_argument
@api_options
def drain(*, state: State, host_id: str) -> None:
    """Cordon HOST and drain every environment there; each ends when it is removed, or after an hour."""
    _change(state, host_id, "drain")


def _change(state: State, host_id: str, action: str) -> None:
    with state.client() as fuse:
        getattr(fuse.hosts, action)(host_id)
        one = fuse.hosts.get(host_id)
    if state.is_json:
        print_json(one)
    else:
        print(f"{one.id} is {one.state}")


@click.command()
@click.argument("host_ids", metavar="HOST...", nargs=-1, required=True, shell_complete=complete_host)
@click.option(
    "--force", is_flag=True, help="Also with environments, when it is lost or refuses us: they end as failed."
)
@api_options
def rm(*, state: State, host_ids: tuple[str, ...], force: bool) -> int:
    """Forget hosts without environments. Goes on after a failure, and ends with its code."""
    with state.client() as fuse:
        return remove_each(lambda one: fuse.hosts.delete(one, force=force), host_ids, is_json=state.is_json)
