"""What a control plane is told at start, checked before anything is touched. Reading variables, flags and files is the
CLI's part; every rule about the values is here."""

import ipaddress
import re
from urllib.parse import urlsplit

import msgspec

from fusevm.core.policy import Policy
from fusevm.model.errors import BadSetting
from fusevm.wire.pin import parse_host_token

MEMORY = ":memory:"
DEFAULT_PORT = 8080
_KEY = re.compile(r"[0-9a-fA-F]{64}")
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class HostSetting(msgspec.Struct, frozen=True, kw_only=True):
    """A host to register at start."""

    id: str
    #: `https://host:8090`, `http://127.0.0.1:8090` (loopback only) or `unix:///run/fuse/host.sock`.
    url: str
    #: `<secret>.<sha256 of the certificate's public key>`; only the secret for http.
    token: str = msgspec.field(default="")
    region: str = ""
    labels: dict[str, str] = {}


class ControlConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `serve` depends on."""

    #: `host:port`; an empty host is every address. Empty: `:8080` with a token, `127.0.0.1:8080` without.
    listen: str = ""
    #: Path of a SQLite file, or `:memory:`.
    database: str = MEMORY
    auth_token: str = ""
    #: Refuse to start unless token, encryption key and database are all set.
    require_auth: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    #: Names accepted in the Host and Origin headers when there is no token, beside the loopback ones.
    allowed_hosts: tuple[str, ...] = ()
    #: None: the stub host, which only pretends.
    hosts: tuple[HostSetting, ...] = ()
    policy: Policy = Policy()
    #: 64 hex digits; empty: generated beside the database (0600).
    encryption_key: str = ""
    #: When started as root: become this user after binding.
    drop_to_uid: int | None = None
    #: Written with the base URL once requests are served.
    ready_file: str = ""
    #: Seconds that create and delete wait for their end.
    wait_s: float = 55.0
    #: Seconds between comments on silent event streams.
    keepalive_s: float = 15.0
    #: Life of a lease on a pending action or a host; a dead replica's work is taken over after this.
    lease_s: float = 15.0
    #: Longest pause between looks for due work.
    poll_s: float = 1.0
    #: Pause between heartbeats of a host, and between its machine lists.
    heartbeat_s: float = 5.0
    reconcile_s: float = 10.0
    #: How long ended environments and their events are kept.
    retention_s: float = 7 * 86_400.0
    #: How long answers under an Idempotency-Key are kept.
    idempotency_s: float = 86_400.0
    #: How long a shutdown waits for requests under way.
    shutdown_s: float = 10.0
    #: `debug`, `info`, `warning` or `error`; and JSON lines or text.
    log_level: str = "info"
    log_json: bool = False


def check(config: ControlConfig) -> None:
    """Raise BadSetting for the first thing that is wrong."""
    host, _ = parse_listen(effective_listen(config))
    _check_required(config)
    if not config.auth_token and not _is_loopback(host):
        raise BadSetting(
            setting="listen",
            problem=f"{effective_listen(config)} can be reached from other machines; set an auth token, "
            f"or listen on 127.0.0.1",
        )
    if bool(config.tls_cert) != bool(config.tls_key):
        missing = "tls_key" if config.tls_cert else "tls_cert"
        raise BadSetting(setting=missing, problem="certificate and key belong together; set both or none")
    if config.encryption_key and not _KEY.fullmatch(config.encryption_key):
        raise BadSetting(setting="encryption_key", problem="give 64 hex digits (32 bytes)")
    if "://" in config.database and not config.database.startswith("sqlite://"):
        raise BadSetting(setting="database", problem="only SQLite is available: a path, sqlite:///path or :memory:")
    _check_numbers(config)
    _check_hosts(config.hosts)


def effective_listen(config: ControlConfig) -> str:
    """Where to listen, defaults applied."""
    return config.listen or (f":{DEFAULT_PORT}" if config.auth_token else f"127.0.0.1:{DEFAULT_PORT}")


def parse_listen(text: str) -> tuple[str, int]:
    """Split `host:port`; IPv6 addresses stand in brackets. Raises BadSetting."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise BadSetting(setting="listen", problem=f"{text!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def database_path(config: ControlConfig) -> str:
    """The SQLite file, or `:memory:`."""
    return config.database.removeprefix("sqlite://") or MEMORY


def accepted_hosts(config: ControlConfig) -> frozenset[str]:
    """Names that the Host and Origin headers may carry when there is no token."""
    return _LOOPBACK_NAMES | {name.lower() for name in config.allowed_hosts}


def is_loopback_url(url: str) -> bool:
    """May this URL be spoken to without TLS?"""
    return _is_loopback(urlsplit(url).hostname or "")


def _check_required(config: ControlConfig) -> None:
    if not config.require_auth:
        return
    has_database = database_path(config) != MEMORY
    needed = {
        "auth_token": bool(config.auth_token),
        "encryption_key": bool(config.encryption_key),
        "database": has_database,
    }
    missing = ", ".join(name for name, is_set in needed.items() if not is_set)
    if missing:
        raise BadSetting(setting="require_auth", problem=f"also set: {missing}")


def _check_numbers(config: ControlConfig) -> None:
    for name in ("wait_s", "keepalive_s", "lease_s", "poll_s", "heartbeat_s", "reconcile_s", "retention_s"):
        if getattr(config, name) <= 0:
            raise BadSetting(setting=name, problem="must be greater than 0")
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise BadSetting(setting="log_level", problem=f"{config.log_level!r} is not debug, info, warning or error")


def _check_hosts(hosts: tuple[HostSetting, ...]) -> None:
    seen: set[str] = set()
    for host in hosts:
        if host.id in seen:
            raise BadSetting(setting="hosts", problem=f"two hosts are called {host.id!r}")
        seen.add(host.id)
        check_host_url(host.url, host.token)


def check_host_url(url: str, token: str) -> None:
    """Is this a host daemon that may be spoken to with this token? Raises BadSetting."""
    parts = urlsplit(url)
    where = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("https", "http", "unix") or not where or parts.username or parts.query or parts.fragment:
        raise BadSetting(
            setting="firecracker_url",
            problem=f"{url!r} is not https://host:port, http://127.0.0.1:port or unix:///path",
        )
    if parts.scheme == "http" and not is_loopback_url(url):
        raise BadSetting(setting="firecracker_url", problem=f"{url!r} is plain HTTP to another machine; use https")
    if parts.scheme == "https":
        parse_host_token(token)


def _is_loopback(host: str) -> bool:
    if host.lower() in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
