"""Which server a command talks to: flags, then FUSE_BASE_URL and FUSE_TOKEN, then the context that `fuse up` wrote.

The token of the context is only ever sent to the address of the context.
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from fusevm.cli.failures import USAGE, CliError
from fusevm.sdk.client import DEFAULT_URL, Fuse


class Context(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What `fuse up` leaves for other commands of the same user (`context.json`, 0600)."""

    url: str = msgspec.field()
    token: str = ""
    ca_file: str = ""
    #: `ca_file` is the server's own certificate; its names do not matter.
    pin_certificate: bool = False
    #: Data directory of the stack behind it, when it runs on this machine.
    data_root: str = ""


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """Where to connect, and how."""

    url: str
    token: str = ""
    ca_file: str = ""
    pin_certificate: bool = False

    def client(self) -> Fuse:
        """A client; nothing is sent yet."""
        return Fuse(self.url, self.token, ca_file=self.ca_file or None, pin_certificate=self.pin_certificate)


def context_path(environ: Mapping[str, str]) -> Path:
    """Where the context is kept."""
    base = environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "fuse" / "context.json"


def load_context(path: Path) -> Context | None:
    """The context, or None when there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Context)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise CliError(
            f"{path} cannot be read: {error}", hint="delete it, or give --url and --token", code=USAGE
        ) from error


def save_private(path: Path, value: msgspec.Struct) -> None:
    """Replace a JSON file with a token in it atomically; only its owner can read it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".context-")  # 0600 from the start
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(value)) + b"\n")
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_context(path: Path, url: str) -> None:
    """Forget the context if it still is the one of this URL."""
    with contextlib.suppress(OSError, CliError):
        context = load_context(path)
        if context is not None and context.url == url:
            path.unlink()


def resolve(
    environ: Mapping[str, str], *, url: str | None = None, token: str | None = None, ca_file: str | None = None
) -> Connection:
    """Put together what flags, variables and the context say."""
    asked_url = url or environ.get("FUSE_BASE_URL") or ""
    asked_token = token or environ.get("FUSE_TOKEN") or ""
    asked_ca = ca_file or environ.get("FUSE_CA_FILE") or ""
    context = None if asked_url and asked_token else load_context(context_path(environ))
    if context is None or (asked_url and asked_url.rstrip("/") != context.url.rstrip("/")):
        return Connection(url=asked_url or DEFAULT_URL, token=asked_token, ca_file=asked_ca)
    return Connection(
        url=context.url,
        token=asked_token or context.token,
        ca_file=asked_ca or context.ca_file,
        pin_certificate=context.pin_certificate and not asked_ca,
    )
