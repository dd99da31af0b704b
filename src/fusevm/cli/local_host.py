"""Talks to the host daemon of this machine over its Unix socket."""

import http.client
import socket
from pathlib import Path
from typing import Any

import msgspec

from fusevm.cli.failures import UNAVAILABLE, CliError
from fusevm.wire.errors import parse_error

_TIMEOUT_S = 30.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def is_healthy(path: Path) -> bool:
    """Does a host daemon answer there?"""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def read_state(path: Path) -> Any:
    """What `GET /state` answers. Raises CliError when nobody listens."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/state")
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise CliError(
            f"no host daemon answers at {path} ({problem})",
            hint="`fuse up` or `fuse host serve` starts one; --data names another folder",
            code=UNAVAILABLE,
        ) from error
    finally:
        connection.close()
    if answer.status != 200:
        raise parse_error(answer.status, body)
    return msgspec.json.decode(body)
