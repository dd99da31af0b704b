"""What the console is told at start, and the rule about where it may listen."""

import ipaddress

import msgspec

from fusevm.model.errors import BadSetting


class ConsoleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `main.serve` depends on."""

    #: A loopback address, or `localhost`.
    host: str
    #: 0: any free one.
    port: int
    #: The control plane, and how to reach it.
    url: str
    token: str = ""
    ca_file: str = ""
    pin_certificate: bool = False
    #: Written (0600) with the address, key included, once pages are served.
    ready_file: str = ""


def check(config: ConsoleConfig) -> None:
    """Raise BadSetting for an address that other machines can reach."""
    if not is_loopback(config.host):
        port = config.port or 4000
        raise BadSetting(
            setting="--listen",
            problem=f"{config.host or 'every address'} can be reached from other machines, and the console acts with "
            f"your token; listen on localhost, and reach it through a tunnel: ssh -L {port}:localhost:{port} MACHINE",
        )


def is_loopback(host: str) -> bool:
    """Does this name or address never leave the machine? Names other than `localhost` do not count."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
