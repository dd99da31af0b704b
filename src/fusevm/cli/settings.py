"""The one settings loader: a table of every setting, and where its value came from.

Precedence: flag, then environment variable, then settings file (TOML), then default. An empty variable counts as unset.
Errors name the source that was wrong. What settings mean together is checked by `control.config` and `host.config`;
their complaints are given the source's name here, too.
"""

import contextlib
import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fusevm.model.errors import BadSetting

_HEX_KEY = re.compile(r"[0-9a-fA-F]{64}")


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One setting. `name` is its key in the settings file, within the table's section."""

    name: str
    env: str
    flag: str
    #: Text to value; raises ValueError with what would be right.
    parse: Callable[[str], Any]
    default: Any
    help: str
    #: Name of the program's own field, where it differs; its complaints are translated back.
    field: str = ""
    #: Never shown; as a flag it would be visible in the process list.
    is_secret: bool = False
    #: Accepted and kept, but nothing reads it yet.
    is_later: bool = False

    @property
    def is_switch(self) -> bool:
        """A flag without a value."""
        return self.parse is parse_bool


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """Values of one table, and the source of each: a flag, a variable, a line of a file, or `default`."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    table: Sequence[Setting]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def is_given(self, name: str) -> bool:
        """False when it is the default."""
        return self.sources[name] != "default"

    def source(self, name: str) -> str:
        """How to name a setting to its user: by the source it came from, else by flag and variable."""
        if self.is_given(name):
            return self.sources[name]
        setting = next(setting for setting in self.table if setting.name == name)
        return f"{setting.env} (or {setting.flag})"

    @contextlib.contextmanager
    def naming_sources(self) -> Iterator[None]:
        """Give complaints about fields of a program's configuration the name that the user knows."""
        try:
            yield
        except BadSetting as error:
            fields = {setting.field or setting.name: setting.name for setting in self.table}
            names = fields | {setting.env: setting.name for setting in self.table}
            if error.setting not in names:
                raise
            problem = error.problem
            for field, name in fields.items():
                # A list of fields; elsewhere `listen` may be a verb.
                if "_" in field or problem.startswith("also set:"):
                    problem = re.sub(rf"\b{field}\b", self.source(name), problem)
            raise BadSetting(setting=self.source(names[error.setting]), problem=problem) from error


# -- parsers -------------------------------------------------------------------------------------------------------


def parse_text(text: str) -> str:
    """Any text."""
    return text


def parse_bool(text: str) -> bool:
    """true, 1, yes, on, or their opposites."""
    match text.strip().lower():
        case "true" | "1" | "yes" | "on":
            return True
        case "false" | "0" | "no" | "off":
            return False
        case _:
            raise ValueError(f"{text!r} is neither true nor false")


def parse_listen(text: str) -> str:
    """`host:port`, `:port` (every address), `[::1]:port`; port 0: any free one."""
    host, colon, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if (
        not colon
        or not port.isascii()
        or not port.isdecimal()
        or int(port) > 65535
        or (":" in host and not is_bracketed)
    ):
        raise ValueError(f"{text!r} is not host:port; write 127.0.0.1:8080, :8080 or [::1]:8080")
    return text


def parse_key(text: str) -> str:
    """64 hex digits."""
    if not _HEX_KEY.fullmatch(text):
        raise ValueError("it must be 64 hex digits (32 bytes); `openssl rand -hex 32` makes one")
    return text.lower()


def parse_token(text: str) -> str:
    """Printable ASCII without spaces: what fits into a header."""
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a token is printable ASCII without spaces")
    return text


def parse_url(text: str) -> str:
    """An http, https or unix URL."""
    scheme, found, rest = text.partition("://")
    if not found or scheme not in ("http", "https", "unix") or not rest:
        raise ValueError(f"{text!r} is no URL; write http://127.0.0.1:8090, https://host:8090 or unix:///path")
    return text


def parse_database(text: str) -> str:
    """sqlite:///path, postgresql://..., or a path."""
    scheme, found, _ = text.partition("://")
    if found and scheme not in ("sqlite", "postgres", "postgresql"):
        raise ValueError(f"{scheme}:// is no database that we know; use sqlite:///path or postgresql://...")
    return text


def parse_cidrs(text: str) -> tuple[str, ...]:
    """Networks separated by commas."""
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(str(ipaddress.ip_network(item)))
        except ValueError as error:
            raise ValueError(f"{item!r} is no network; write 10.0.0.0/8, 2001:db8::/32 or 192.0.2.7") from error
    return tuple(found)


def parse_names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def parse_path(text: str) -> Path:
    """A path, made absolute; `~` is the home directory."""
    return Path(text).expanduser().absolute()


def parse_number(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no number") from error
    if not 0 <= value < float("inf"):
        raise ValueError(f"{text} is out of range")
    return value


def parse_count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"{text!r} is no whole number")
    return int(text)


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser of fixed words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


# -- the tables ----------------------------------------------------------------------------------------------------

CONTROL: tuple[Setting, ...] = (
    Setting(
        name="listen",
        env="ORCH_LISTEN",
        flag="--listen",
        parse=parse_listen,
        default="",
        help="Address of the API, host:port. Default :8080 with a token, 127.0.0.1:8080 without.",
    ),
    Setting(
        name="firecracker_url",
        env="FIRECRACKER_BASE_URL",
        flag="--firecracker-url",
        parse=parse_url,
        default="",
        help="Host daemon to use, registered as `default`. Without: a stub that only pretends.",
    ),
    Setting(
        name="firecracker_token",
        env="FIRECRACKER_TOKEN",
        flag="--firecracker-token",
        parse=parse_token,
        default="",
        is_secret=True,
        help="Token that the host daemon printed.",
    ),
    Setting(
        name="database_url",
        env="DATABASE_URL",
        flag="--database-url",
        field="database",
        parse=parse_database,
        default="",
        help="sqlite:///path or a path. Default: in memory, nothing survives a restart.",
    ),
    Setting(
        name="token_encryption_key",
        env="TOKEN_ENCRYPTION_KEY",
        flag="--token-encryption-key",
        field="encryption_key",
        parse=parse_key,
        default="",
        is_secret=True,
        help="64 hex digits with which secrets are stored. Default: generated beside the database.",
    ),
    Setting(
        name="agent_download_url",
        env="AGENT_DOWNLOAD_URL",
        flag="--agent-download-url",
        parse=parse_url,
        default="",
        is_later=True,
        help="Default download_url of an AgentSpec that names none.",
    ),
    Setting(
        name="tls_cert",
        env="ORCH_TLS_CERT",
        flag="--tls-cert",
        parse=parse_text,
        default="",
        help="Certificate file (PEM) of the API; together with the key.",
    ),
    Setting(
        name="tls_key",
        env="ORCH_TLS_KEY",
        flag="--tls-key",
        parse=parse_text,
        default="",
        help="Key file (PEM) of the API; together with the certificate.",
    ),
    Setting(
        name="require_auth",
        env="ORCH_REQUIRE_AUTH",
        flag="--require-auth",
        parse=parse_bool,
        default=False,
        help="Refuse to start unless token, encryption key and database are all set.",
    ),
    Setting(
        name="auth_token",
        env="ORCH_AUTH_TOKEN",
        flag="--auth-token",
        parse=parse_token,
        default="",
        is_secret=True,
        help="The master token that clients send. Without one only loopback addresses are served.",
    ),
    Setting(
        name="allowed_cidrs",
        env="ORCH_ALLOWED_CIDRS",
        flag="--allowed-cidrs",
        parse=parse_cidrs,
        default=(),
        help="Networks, separated by commas, from which requests are taken. Default: from everywhere.",
    ),
    Setting(
        name="allowed_hosts",
        env="FUSE_ALLOWED_HOSTS",
        flag="--allowed-hosts",
        parse=parse_names,
        default=(),
        help="More names, separated by commas, for the Host header of a server without a token.",
    ),
    Setting(
        name="shutdown_timeout_seconds",
        env="ORCH_SHUTDOWN_TIMEOUT_SECONDS",
        flag="--shutdown-timeout",
        field="shutdown_s",
        parse=parse_number,
        default=10.0,
        help="Seconds that a shutdown waits for requests under way.",
    ),
    Setting(
        name="log_level",
        env="FUSE_LOG_LEVEL",
        flag="--log-level",
        parse=one_of("debug", "info", "warning", "error"),
        default="info",
        help="debug, info, warning or error.",
    ),
    Setting(
        name="log_json",
        env="FUSE_LOG_JSON",
        flag="--log-json",
        parse=parse_bool,
        default=False,
        help="Log lines as JSON.",
    ),
)

HOST: tuple[Setting, ...] = (
    Setting(
        name="data_root",
        env="FIRECRACKER_HOST_ROOT_DIR",
        flag="--root-dir",
        parse=parse_path,
        default=None,
        help="Journal, disks and keys of the host daemon; images, too, unless --artefacts. Default <data>/host.",
    ),
    Setting(
        name="firecracker_binary",
        env="FIRECRACKER_BINARY_PATH",
        flag="--firecracker-binary",
        parse=parse_path,
        default=None,
        is_later=True,
        help="The firecracker program.",
    ),
    Setting(
        name="jailer_binary",
        env="JAILER_BINARY_PATH",
        flag="--jailer-binary",
        parse=parse_path,
        default=None,
        is_later=True,
        help="The jailer program.",
    ),
    Setting(
        name="egress_interface",
        env="FIRECRACKER_HOST_EGRESS_INTERFACE",
        flag="--egress-interface",
        parse=parse_text,
        default="",
        help="Interface to the Internet. Default: that of the default route.",
    ),
    Setting(
        name="host_listen",
        env="FUSE_HOST_LISTEN",
        flag="--host-listen",
        field="listen",
        parse=parse_listen,
        default="127.0.0.1:8090",
        help="TCP address of the host daemon.",
    ),
    Setting(
        name="driver",
        env="FUSE_DRIVER",
        flag="--driver",
        parse=one_of("auto", "qemu"),
        default="auto",
        help="How machines are run: auto or qemu.",
    ),
    Setting(
        name="kernel",
        env="FUSE_KERNEL",
        flag="--kernel",
        parse=parse_path,
        default=None,
        help="Kernel file for machines. Default: Debian's cloud kernel, fetched once.",
    ),
    Setting(
        name="network_range",
        env="FUSE_NETWORK_RANGE",
        flag="--network-range",
        parse=parse_text,
        default="10.210.0.0/16",
        help="IPv4 network of the machines' outside addresses.",
    ),
    Setting(
        name="artefact_root",
        env="FUSE_ARTEFACT_ROOT",
        flag="--artefacts",
        parse=parse_path,
        default=None,
        help="Images, kernels and blank disks. Default: the data directory.",
    ),
    Setting(
        name="run_dir",
        env="FUSE_RUN_DIR",
        flag="--run-dir",
        parse=parse_path,
        default=None,
        help="Sockets of running machines; a short path. Default /run/fuse for root.",
    ),
    Setting(
        name="instance",
        env="FUSE_INSTANCE",
        flag="--instance",
        parse=parse_text,
        default="fuse",
        help="Starts the name of every kernel object; two daemons on one host need two.",
    ),
    Setting(
        name="user_network",
        env="FUSE_USER_NETWORK",
        flag="--user-network",
        parse=parse_bool,
        default=False,
        help="Without root: let machines reach the Internet with the daemon's own rights.",
    ),
    Setting(
        name="plain_http",
        env="FUSE_HOST_PLAIN_HTTP",
        flag="--plain-http",
        parse=parse_bool,
        default=False,
        help="Plain HTTP instead of TLS for the host daemon; loopback only.",
    ),
    Setting(
        name="max_machines",
        env="FUSE_MAX_MACHINES",
        flag="--max-machines",
        parse=parse_count,
        default=1000,
        help="Machines at the same time, stopped ones included.",
    ),
)

#: Section of the settings file -> its table.
SECTIONS: Mapping[str, tuple[Setting, ...]] = {"control": CONTROL, "host": HOST}


# -- loading -------------------------------------------------------------------------------------------------------


def load(
    section: str, flags: Mapping[str, str | bool | None], environ: Mapping[str, str], file: Path | None = None
) -> Loaded:
    """All values of one section. `flags` by setting name, None where not given. Raises BadSetting with the source."""
    table = SECTIONS[section]
    lines = load_file(file).get(section, {}) if file is not None else {}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in table:
        raw, source = _find(setting, flags, environ, lines, file)
        values[setting.name] = setting.default if raw is None else _parse(setting, raw, source)
        sources[setting.name] = source
    return Loaded(values=values, sources=sources, table=table)


def _find(
    setting: Setting,
    flags: Mapping[str, str | bool | None],
    environ: Mapping[str, str],
    lines: Mapping[str, str],
    file: Path | None,
) -> tuple[str | None, str]:
    flag = flags.get(setting.name)
    if flag is not None:
        return str(flag), setting.flag
    if environ.get(setting.env):
        return environ[setting.env], setting.env
    if setting.name in lines:
        return lines[setting.name], f"{setting.name} in {file}"
    return None, "default"


def _parse(setting: Setting, raw: str, source: str) -> Any:
    try:
        return setting.parse(raw)
    except ValueError as error:
        problem = str(error).replace(repr(raw), "its value") if setting.is_secret else str(error)
        raise BadSetting(setting=source, problem=problem) from error


def load_file(path: Path) -> dict[str, dict[str, str]]:
    """The sections of a settings file, values as text. Raises BadSetting for what nobody would read."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadSetting(setting=str(path), problem=error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSetting(setting=str(path), problem=f"it is no TOML: {error}") from error
    found: dict[str, dict[str, str]] = {}
    for section, lines in content.items():
        if section not in SECTIONS or not isinstance(lines, dict):
            raise BadSetting(setting=f"{section} in {path}", problem=_suggest(section, SECTIONS, "no section"))
        known = [setting.name for setting in SECTIONS[section]]
        for name in lines:
            if name not in known:
                raise BadSetting(setting=f"{name} in {path}", problem=_suggest(name, known, f"unknown in [{section}]"))
        found[section] = {name: _to_text(value) for name, value in lines.items()}
    return found


def _suggest(name: str, known: Sequence[str] | Mapping[str, object], problem: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"{problem}; did you mean {near[0]}?" if near else f"{problem}; known are {', '.join(known)}"


def _to_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def default_data_root(environ: Mapping[str, str], *, is_root: bool) -> Path:
    """Where everything of a local installation lives."""
    if is_root:
        return Path("/var/lib/fuse")
    base = environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "fuse"


def default_file(environ: Mapping[str, str]) -> Path | None:
    """The settings file: $FUSE_CONFIG, else the user's, else the system's; None when none is there."""
    if environ.get("FUSE_CONFIG"):
        return Path(environ["FUSE_CONFIG"])
    base = environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    for path in (Path(base) / "fuse" / "fuse.toml", Path("/etc/fuse/fuse.toml")):
        if path.is_file():
            return path
    return None
