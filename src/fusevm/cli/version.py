"""`fuse version`: what runs where."""

from typing import Any

import click

from fusevm import __version__
from fusevm.cli.options import State, api_options
from fusevm.cli.output import print_json, print_record
from fusevm.model.errors import Error


@click.command()
@api_options
def version(*, state: State) -> None:
    """Show the versions of this client, of the server and of each host with its driver, agent and kernel.

    What cannot be asked is said, and is no failure.
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
    if state.is_json:
        print_json(found)
        return
    server = found.get("server")
    pairs = [("client", __version__)]
    if server:
        pairs.append(("server", f"{server['version']} ({server['service']} at {server['url']})"))
    for host in found.get("hosts", []):
        details = ", ".join(f"{name} {host[name]}" for name in ("driver", "agent", "kernel") if host[name])
        pairs.append((f"host {host['id']}", f"{host['version'] or 'unknown'}{f' ({details})' if details else ''}"))
    pairs.append(("problem", found.get("problem", "")))
    print_record(pairs)


def _host(host: Any) -> dict[str, str]:
    """The versions of a host; agent and kernel where the server tells them."""
    names = {"id": "id", "version": "version", "driver": "driver", "agent": "agent_version", "kernel": "kernel"}
    return {name: getattr(host, field, "") for name, field in names.items()}
