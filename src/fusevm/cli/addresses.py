"""The addresses that a local installation listens on, settled before its programs start."""

import socket

from fusevm.cli.settings import Loaded
from fusevm.model.errors import PortInUse


def choose_address(loaded: Loaded, name: str, default: str) -> str:
    """The address asked for, which must be free; else the default, or another port when that is taken.

    The port is settled here, so that a program that is started again comes back under the same address.
    """
    address: str = loaded[name] if loaded.is_given(name) else default
    host, _, port = address.rpartition(":")
    found = free_port(host.strip("[]"), int(port))
    if found is None and loaded.is_given(name):
        raise PortInUse(address=address, setting=loaded.source(name))
    return f"{host}:{found or free_port(host.strip('[]'), 0)}"


def free_port(host: str, port: int) -> int | None:
    """The port if we could listen there (0: some free one), else None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError:
            return None
        return int(sock.getsockname()[1])
