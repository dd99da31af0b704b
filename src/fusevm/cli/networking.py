"""Network options of `env create`, `run` and `env network`: targets and ports as people write them."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import click

from fusevm.cli.failures import USAGE, CliError

#: NAME, *.NAME, ADDRESS or ADDRESS/BITS, then `:PORT`, `:FIRST-LAST` or several of them with commas.
_TARGET = re.compile(r"(?P<where>[A-Za-z0-9.*_/-]*)(?::(?P<ports>[0-9,-]+))?")
_ADDRESS = re.compile(r"[0-9./]+")
_PORT = re.compile(r"(?:(?P<host>\d+):)?(?P<port>\d+)(?:/(?P<protocol>tcp|udp))?")
#: Names of the options' values.
NETWORKING = ("no_internet", "allow", "deny", "publish")


def network_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--no-internet`, `--allow`, `--deny`, `--publish`."""
    function = click.option(
        "--publish",
        "-p",
        multiple=True,
        metavar="[HOST:]PORT[/udp]",
        help="Publish a port on the host. Repeatable.",
    )(function)
    return policy_options(function)


def policy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--no-internet`, `--allow`, `--deny`."""
    options = (
        click.option("--no-internet", is_flag=True, help="No connections to the Internet."),
        click.option(
            "--allow",
            multiple=True,
            metavar="TARGET[:PORTS]",
            help="Reach this name, address or network, and nothing else: pypi.org:443, '*.pypi.org', 192.0.2.0/24. "
            "Repeatable.",
        ),
        click.option(
            "--deny",
            multiple=True,
            metavar="ADDRESS[:PORTS]",
            help="Do not reach this address or network; comes before what is allowed. Repeatable.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def read_policy(*, no_internet: bool, allow: Iterable[str], deny: Iterable[str]) -> dict[str, Any]:
    """The options as the API's policy; empty where none was given."""
    rules = [{"action": "deny", **_read_target(text, "--deny")} for text in deny]
    rules += [_read_target(text, "--allow") for text in allow]
    policy: dict[str, Any] = {"rules": rules} if rules else {}
    return {**policy, "internet": False} if no_internet else policy


def read_ports(publish: Iterable[str]) -> list[int | dict[str, Any]]:
    """What `--publish` says, as the API has it."""
    return [_read_port(text) for text in publish]


def _read_target(text: str, option: str) -> dict[str, Any]:
    found = _TARGET.fullmatch(text)
    if found is None or not text:
        raise CliError(f"{option}: {text!r} is no name, address or network, with ports after a colon", code=USAGE)
    where, ports = found["where"], found["ports"]
    rule: dict[str, Any] = {}
    if where:
        rule["cidr" if _ADDRESS.fullmatch(where) else "domain"] = where
    if ports:
        rule["ports"] = [int(port) if port.isdecimal() else port for port in ports.split(",")]
    return rule


def _read_port(text: str) -> dict[str, Any]:
    found = _PORT.fullmatch(text)
    if found is None:
        raise CliError(f"--publish: {text!r} is not PORT, HOST:PORT or PORT/udp", code=USAGE)
    host = {"host_port": int(found["host"])} if found["host"] else {}
    protocol = {"protocol": found["protocol"]} if found["protocol"] else {}
    return {"port": int(found["port"]), **protocol, **host}
