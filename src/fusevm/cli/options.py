"""Options that several commands share, and what they leave for the code that reports failures."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
import msgspec

from fusevm.cli import connection
from fusevm.cli.completion import complete_environment
from fusevm.cli.connection import Connection
from fusevm.sdk.client import Fuse

F = TypeVar("F", bound=Callable[..., Any])
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d|)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SIZE = re.compile(r"(\d+)\s*(m|mb|mib|g|gb|gib|t|tb|tib|)", re.IGNORECASE)
_MIB = {"": 1, "m": 1, "g": 1 << 10, "t": 1 << 20}


class State(msgspec.Struct, kw_only=True):
    """What the options said, for every command and for the code that reports failures. The context's `obj`."""

    environ: Mapping[str, str]
    url: str | None = None
    token: str | None = None
    ca_file: str | None = None
    is_debug: bool = False
    is_json: bool = False

    def connection(self) -> Connection:
        """Where to connect."""
        return connection.resolve(self.environ, url=self.url, token=self.token, ca_file=self.ca_file)

    def client(self) -> Fuse:
        """A client of the control plane."""
        return self.connection().client()


def output_options(function: F) -> F:
    """Add --debug and -o to a command; it is called with the State as `state`."""

    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @click.option(
        "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="For people, or for programs."
    )
    @functools.wraps(function)
    def wrapped(*, debug: bool, output: str, **arguments: Any) -> Any:
        state: State = click.get_current_context().obj
        state.is_debug = state.is_debug or debug
        state.is_json = output == "json"
        return function(state=state, **arguments)

    return wrapped  # type: ignore[return-value]  # click turns it into a command next


def api_options(function: F) -> F:
    """Add --url, --token, --ca-file, --debug and -o to a command; it is called with the State as `state`."""

    @click.option("--url", metavar="URL", help="Address of the control plane. [env: FUSE_BASE_URL]")
    @click.option("--token", metavar="TOKEN", help="Token. [env: FUSE_TOKEN]")
    @click.option("--ca-file", metavar="FILE", help="Certificates to trust (PEM). [env: FUSE_CA_FILE]")
    @output_options
    @functools.wraps(function)
    def wrapped(*, state: State, **arguments: Any) -> Any:
        for name in ("url", "token", "ca_file"):
            value = arguments.pop(name)
            if value is not None:
                setattr(state, name, value)
        return function(state=state, **arguments)

    return wrapped  # type: ignore[return-value]  # click turns it into a command next


def environment_argument(function: F) -> F:
    """Add the argument ENV, completed from the server."""
    return click.argument("env_id", metavar="ENV", shell_complete=complete_environment)(function)


def environment_id(text: str) -> str:
    """The public id of what a user typed: an id, or a bare task id."""
    return text if text.startswith("fuse-") else f"fuse-{text}"


def variables(pairs: tuple[str, ...], flag: str = "-e") -> dict[str, str]:
    """KEY=VALUE pairs as a mapping. Raises a usage error."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.UsageError(f"{flag} takes KEY=VALUE, not {pair!r}")
        found[name] = value
    return found


class Duration(click.ParamType["float | str"]):
    """Seconds from `90`, `90s`, `30m`, `2h`, `1d`; with `unlimited=True` also that word."""

    name = "duration"

    def __init__(self, *, unlimited: bool = False, minimum_s: float = 0.0) -> None:
        self._unlimited = unlimited
        self._minimum_s = minimum_s

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if not isinstance(value, str):
            return float(value)
        if self._unlimited and value == "unlimited":
            return value
        match = _DURATION.fullmatch(value.strip())
        words = ", or `unlimited`" if self._unlimited else ""
        if not match:
            self.fail(f"{value!r} is no duration; write 90s, 30m, 2h or 1d{words}", param, ctx)
        seconds = float(match[1]) * _SECONDS[match[2]]
        if seconds < self._minimum_s or (self._unlimited and seconds == 0):
            self.fail(f"{value!r} is too short; write at least {max(self._minimum_s, 1):g}s{words}", param, ctx)
        return seconds


class Size(click.ParamType[int]):
    """A size from `512`, `512M`, `4G` in a unit of mebibytes (`unit=1`) or gibibytes (`unit=1024`)."""

    name = "size"

    def __init__(self, unit_mib: int) -> None:
        self._unit_mib = unit_mib

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not isinstance(value, str):
            return int(value)
        match = _SIZE.fullmatch(value.strip())
        if not match:
            self.fail(f"{value!r} is no size; write 512M or 4G", param, ctx)
        letter = match[2][:1].lower()
        mib = int(match[1]) * (_MIB[letter] if letter else self._unit_mib)
        if mib % self._unit_mib:
            self.fail(f"{value!r} is not a whole number of GiB", param, ctx)
        return mib // self._unit_mib
