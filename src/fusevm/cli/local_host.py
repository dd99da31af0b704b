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
    try:
        return ask(path, "GET", "/state")
    except OSError as error:
        raise CliError(
            f"no host daemon answers at {path} ({error.strerror or error})",
            hint="`fuse up` or `fuse host serve` starts one; --data names another folder",
            code=UNAVAILABLE,
        ) from error


def ask(path: Path, method: str, target: str, body: Any = None) -> Any:
    """The JSON of an answer; errors are raised as what they are. Raises OSError when nobody listens."""
    connection = _UnixConnection(path)
    try:
        connection.request(method, target, body=msgspec.json.encode(body) if body is not None else None)
        answer = connection.getresponse()
        content = answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()
    if answer.status >= http.client.BAD_REQUEST:
        raise parse_error(answer.status, content)
    return msgspec.json.decode(content) if content else None
