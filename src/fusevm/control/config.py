"""What a control plane is told at start, checked before anything is touched. Reading variables, flags and files is the
CLI's part; every rule about the values is here."""

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

import msgspec

from fusevm.control.store.location import MEMORY, POSTGRES_SCHEMES, SQLITE_SCHEME, is_postgres, sqlite_path
from fusevm.core.policy import Policy
from fusevm.model.errors import BadSetting
from fusevm.model.setup import AgentSpec
from fusevm.wire.pin import parse_host_token

DEFAULT_PORT = 8080
_KEY = re.compile(r"[0-9a-fA-F]{64}")
#: Hosts keep their tombstones for a day: many times this.
MAX_LEASE_S = 600.0
#: What is kept for latecomers is kept for at least so many leases.
KEPT_LEASES = 10
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
    #: Path of a SQLite file, `sqlite://` and the path, `:memory:`, or the URL of a PostgreSQL database.
    database: str = MEMORY
    #: Connections to PostgreSQL.
    database_pool: int = 10
    auth_token: str = ""
    #: Refuse to start unless token, encryption key and database are all set.
    require_auth: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    #: Networks from which requests are taken; empty: all. `/health`, `/ready`, `/metrics` and `/v1/version` answer all.
    allowed_cidrs: tuple[str, ...] = ()
    #: Networks of proxies whose `Forwarded` and `X-Forwarded-For` are believed.
    trusted_proxies: tuple[str, ...] = ()
    #: Origins (`https://console.example`) whose pages may read answers; `*`: all, without credentials.
    cors_origins: tuple[str, ...] = ()
    #: Is the session cookie only for HTTPS? None: where TLS is served.
    secure_cookies: bool | None = None
    #: Does `/metrics` ask for a token with the right `admin`?
    metrics_auth: bool = False
    #: Names accepted in the Host and Origin headers when there is no token, beside the loopback ones.
    allowed_hosts: tuple[str, ...] = ()
    #: None: the stub host, which only pretends.
    hosts: tuple[HostSetting, ...] = ()
    #: May the API register other hosts on this machine, without TLS?
    allow_local_hosts: bool = False
    policy: Policy = Policy()
    #: 64 hex digits; empty: generated beside the database (0600); with PostgreSQL: secrets are refused.
    encryption_key: str = ""
    #: Keys that were in force before: they open, and seal nothing.
    previous_keys: tuple[str, ...] = ()
    #: Daemons that a create may name (`agent: "name"`).
    agents: dict[str, AgentSpec] = {}
    #: `download_url` and `sha256` of an AgentSpec that has neither a URL nor a command.
    agent_download_url: str = ""
    agent_download_sha256: str = ""
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
    #: How long ended environments, and events of any, are kept.
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
    for name, key in (("encryption_key", config.encryption_key), *(("previous_keys", k) for k in config.previous_keys)):
        if key and not _KEY.fullmatch(key):
            raise BadSetting(setting=name, problem="give 64 hex digits (32 bytes)")
    if config.previous_keys and not config.encryption_key:
        raise BadSetting(setting="previous_keys", problem="there is no present key; also set: encryption_key")
    if "://" in config.database and not config.database.startswith((SQLITE_SCHEME, *POSTGRES_SCHEMES)):
        problem = "use postgresql://..., a path, sqlite:///path or :memory:"
        raise BadSetting(setting="database", problem=problem)
    for name in ("allowed_cidrs", "trusted_proxies"):
        _check_networks(name, getattr(config, name))
    _check_origins(config.cors_origins)
    if "*" in config.cors_origins and not config.auth_token:
        problem = "every page could use a server without a token; set an auth token, or list origins"
        raise BadSetting(setting="cors_origins", problem=problem)
    _check_numbers(config)
    _check_hosts(config)
    for name, agent in config.agents.items():
        check_agent(config, f"agents.{name}", agent)


def effective_listen(config: ControlConfig) -> str:
    """Where to listen, defaults applied."""
    return config.listen or (f":{DEFAULT_PORT}" if config.auth_token else f"127.0.0.1:{DEFAULT_PORT}")


def parse_listen(text: str) -> tuple[str, int]:
    """Split `host:port`; IPv6 addresses stand in brackets. Raises BadSetting."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise BadSetting(setting="listen", problem=f"{text!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def has_secure_cookies(config: ControlConfig) -> bool:
    """Is the session cookie only for HTTPS?"""
    return bool(config.tls_cert) if config.secure_cookies is None else config.secure_cookies


def accepted_hosts(config: ControlConfig) -> frozenset[str]:
    """Names that the Host and Origin headers may carry when there is no token."""
    return _LOOPBACK_NAMES | {name.lower() for name in config.allowed_hosts}


def is_loopback_url(url: str) -> bool:
    """May this URL be spoken to without TLS?"""
    return _is_loopback(urlsplit(url).hostname or "")


def _check_required(config: ControlConfig) -> None:
    if not config.require_auth:
        return
    needed = {
        "auth_token": bool(config.auth_token),
        "encryption_key": bool(config.encryption_key),
        "database": is_postgres(config.database) or sqlite_path(config.database) != MEMORY,
    }
    missing = ", ".join(name for name, is_set in needed.items() if not is_set)
    if missing:
        raise BadSetting(setting="require_auth", problem=f"also set: {missing}")


def _check_networks(name: str, networks: Iterable[str]) -> None:
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            problem = f"{network!r} is no network; write 10.0.0.0/8, 2001:db8::/32 or 192.0.2.7"
            raise BadSetting(setting=name, problem=problem) from error


def _check_origins(origins: tuple[str, ...]) -> None:
    """Every origin is spelled as browsers send it: a comparison of texts decides."""
    if "*" in origins and len(origins) > 1:
        problem = "`*` lets all pages read, but without credentials; give either `*` or a list of origins"
        raise BadSetting(setting="cors_origins", problem=problem)
    for origin in origins:
        parts = urlsplit(origin)
        is_origin = parts.scheme in ("http", "https") and parts.netloc and f"{parts.scheme}://{parts.netloc}" == origin
        if origin != "*" and not (is_origin and origin == origin.lower() and "@" not in origin):
            problem = f"{origin!r} is no origin; write https://console.example or http://localhost:4000"
            raise BadSetting(setting="cors_origins", problem=problem)


_POSITIVE = ("wait_s", "keepalive_s", "lease_s", "poll_s", "heartbeat_s", "reconcile_s", "retention_s", "database_pool")


def _check_numbers(config: ControlConfig) -> None:
    for name in _POSITIVE:
        if getattr(config, name) <= 0:
            raise BadSetting(setting=name, problem="must be greater than 0")
    if config.lease_s > MAX_LEASE_S:
        raise BadSetting(setting="lease_s", problem=f"must not be longer than {MAX_LEASE_S:.0f} s")
    for name in ("retention_s", "idempotency_s"):
        if getattr(config, name) < KEPT_LEASES * config.lease_s:
            raise BadSetting(setting=name, problem=f"must be at least {KEPT_LEASES} times lease_s")
    policy = config.policy
    for name in ("cpu_overcommit_percent", "ram_overcommit_percent", "storage_overcommit_percent"):
        if getattr(policy, name) < 1:
            raise BadSetting(setting=name.removesuffix("_percent"), problem="must be greater than 0")
    if policy.placement not in ("spread", "binpack"):
        raise BadSetting(setting="placement", problem=f"{policy.placement!r} is neither spread nor binpack")
    if policy.default_startup_timeout_s > policy.max_startup_timeout_s:
        problem = f"the default is longer than the longest allowed ({policy.max_startup_timeout_s} s)"
        raise BadSetting(setting="startup_script_timeout_seconds", problem=problem)
    longest, default = policy.longest_runtime_seconds, policy.default_max_runtime_seconds
    if longest and not 0 < default <= longest:
        problem = f"the default is longer than the longest allowed ({longest} s)"
        raise BadSetting(setting="default_runtime_seconds", problem=problem)
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise BadSetting(setting="log_level", problem=f"{config.log_level!r} is not debug, info, warning or error")


def check_agent(config: ControlConfig, setting: str, agent: AgentSpec) -> None:
    """Is there something to run, and are its paths and digest usable? Raises BadSetting."""
    problems = {
        "it has neither command nor download_url": not (
            agent.command or agent.download_url or config.agent_download_url
        ),
        "download_url is no http(s) URL": agent.download_url
        and not agent.download_url.startswith(("http://", "https://")),
        "sha256 is not 64 hex digits": agent.sha256 and not _KEY.fullmatch(agent.sha256),
        "port is not within 0 to 65535": not 0 <= agent.port <= 65_535,
        "paths of files are absolute": any(not path.startswith("/") for path in agent.files),
    }
    for problem, is_wrong in problems.items():
        if is_wrong:
            raise BadSetting(setting=setting, problem=problem)


def _check_hosts(config: ControlConfig) -> None:
    seen: set[str] = set()
    for host in config.hosts:
        if host.token and is_postgres(config.database) and not config.encryption_key:
            problem = "PostgreSQL stores the token of a host only with a key; `openssl rand -hex 32` makes one"
            raise BadSetting(setting="encryption_key", problem=problem)
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


def check_registered_url(config: ControlConfig, host_id: str, url: str) -> None:
    """May the API register a host there? Raises BadSetting.

    Without TLS nothing proves that a host daemon listens, so that any service of this machine could be asked.
    """
    is_in_settings = any((host.id, host.url) == (host_id, url) for host in config.hosts)
    if urlsplit(url).scheme == "https" or is_in_settings or config.allow_local_hosts:
        return
    raise BadSetting(
        setting="firecracker_url",
        problem=f"{url!r} is on the control plane's own machine; give https://host:port and the token that the host "
        f"daemon printed, or start the control plane with FUSE_ALLOW_LOCAL_HOSTS=true",
    )


def _is_loopback(host: str) -> bool:
    if host.lower() in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
