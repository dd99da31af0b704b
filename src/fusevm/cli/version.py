"""`fuse version`: what runs where."""

from typing import Any

import click

from fusevm import __version__
from fusevm.cli.connection import context_path, load_context
from fusevm.cli.failures import CliError
from fusevm.cli.options import State, api_options
from fusevm.cli.output import print_json, print_record
from fusevm.cli.places import SOCKET_NAME, find_places
from fusevm.model.errors import Error
from fusevm.wire.rest import HostBody


@click.command()
@api_options
def version(*, state: State) -> None:
    """Show the versions of this client, of the server and of each host with its driver, guest agent and kernel.

    What cannot be asked is said, and is no failure. Agent and kernel are known of this machine's own host daemon, to
    its user.
    """
    found: dict[str, Any] = {"client": __version__}
    where = state.connection()
    with where.client() as fuse:
        try:
            answer = fuse.version()
            found["server"] = {"url": where.url, "service": answer.service, "version": answer.version}
            found["hosts"] = [_host(host) for host in fuse.hosts.list()]
        except Error as error:
            found["problem"] = error.message
    local = _local_host(state)
    if local is not None:
        found["local_host"] = local
    if state.is_json:
        print_json(found)
    else:
        print_record(_lines(found))


def _host(host: HostBody) -> dict[str, str]:
    return {"id": host.id, "version": host.version, "driver": host.driver}


def _local_host(state: State) -> dict[str, str] | None:
    """What the host daemon of this machine says about itself; None when it cannot be asked."""
    from fusevm.cli.local_host import read_state  # noqa: PLC0415 - rarely there to be asked

    context = load_context(context_path(state.environ))
    places = find_places(context.data_root if context is not None else None, state.environ)
    try:
        facts = read_state(places.host / SOCKET_NAME).get("host", {})
    except (CliError, Error):
        return None
    return {
        "version": facts.get("version", ""),
        "driver": facts.get("driver", ""),
        "agent": facts.get("agent_version", ""),
        "kernel": facts.get("kernel", ""),
    }


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [("client", found["client"])]
    if server := found.get("server"):
        pairs.append(("server", f"{server['version']} ({server['service']} at {server['url']})"))
    pairs += [
        (f"host {host['id']}", f"{host['version'] or 'unknown'} (driver {host['driver'] or 'unknown'})")
        for host in found.get("hosts", [])
    ]
    if local := found.get("local_host"):
        pairs += [("local host", local["version"]), ("guest agent", local["agent"]), ("guest kernel", local["kernel"])]
    return [*pairs, ("problem", found.get("problem", ""))]
