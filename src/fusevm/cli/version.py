"""`fuse version`: what runs where."""

from typing import Any

import click

from fusevm import __version__
from fusevm.cli.failures import report_error
from fusevm.cli.options import State, api_options
from fusevm.cli.output import print_json, print_record
from fusevm.model.errors import Error
from fusevm.wire.rest import HostBody

_UNKNOWN = "unknown"


@click.command()
@api_options
def version(*, state: State) -> int:
    """Show the versions of this client, of the server and, for each host, of daemon, driver, VMM, agent and kernel.

    When no server answers: that of the client, a line on stderr, and exit code 5.
    """
    found: dict[str, Any] = {"client": __version__}
    failure: Error | None = None
    where = state.connection()
    try:
        with where.client() as fuse:
            answer = fuse.version()
            found["server"] = {"url": where.url, "service": answer.service, "version": answer.version}
            found["hosts"] = [_host(host) for host in fuse.hosts.list()]
    except Error as error:
        failure = error
    if state.is_json:
        print_json(found)
    else:
        print_record(_lines(found))
    return report_error(failure, is_json=state.is_json) if failure is not None else 0


def _host(host: HostBody) -> dict[str, str]:
    return {
        "id": host.id,
        "version": host.version,
        "driver": host.driver,
        "vmm_version": host.vmm_version,
        "agent_version": host.agent_version,
        "kernel": host.kernel,
    }


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [("client", found["client"])]
    if server := found.get("server"):
        pairs.append(("server", f"{server['version']} ({server['service']} at {server['url']})"))
    for host in found.get("hosts", []):
        pairs += [
            (f"host {host['id']}", host["version"] or _UNKNOWN),
            ("  driver", host["driver"] or _UNKNOWN),
            ("  VMM", host["vmm_version"] or _UNKNOWN),
            ("  guest agent", host["agent_version"] or _UNKNOWN),
            ("  guest kernel", host["kernel"] or _UNKNOWN),
        ]
    return pairs
