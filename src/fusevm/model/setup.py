"""What an environment brings into its machine: files, secrets, a script, the user's daemon, a health check.

All of it may hold secrets: `Setup` is sealed in the store, delivered to the guest agent and never shown. The record
only knows `Duties`: what there is to do.
"""

from enum import StrEnum

import msgspec


class SetupFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file to write in the guest."""

    content_b64: str
    #: Octal text.
    mode: str = "0644"


class Restart(StrEnum):
    """When the user's daemon is started again."""

    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


class AgentSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The user's daemon in the guest. Where its parts are found there: docs/agent-spec.md."""

    #: Absolute path to content; written before the daemon starts.
    files: dict[str, SetupFile] = {}
    #: Fetched by the guest to `AGENT_PATH`, executable; empty: nothing is fetched.
    download_url: str = ""
    #: 64 hex digits; empty: not checked.
    sha256: str = ""
    #: Empty: the downloaded file.
    command: tuple[str, ...] = ()
    #: Run by drain, before the daemon is asked to end.
    drain_command: tuple[str, ...] = ()
    #: Empty: one is made.
    auth_token: str = ""
    gateway: str = ""
    gateway_token: str = ""
    env: dict[str, str] = {}
    #: Port on which it serves; 0: none. `url` of the environment, where it is exposed.
    port: int = 0
    restart: Restart = Restart.ALWAYS


#: Where a downloaded daemon is put.
AGENT_PATH = "/fuse/agent"


class HttpCheck(msgspec.Struct, frozen=True, kw_only=True):
    """GET on loopback in the guest; 200 to 399 passes."""

    port: int
    path: str = "/"


class Healthcheck(msgspec.Struct, frozen=True, kw_only=True):
    """How the guest agent judges the health of what runs there. Exactly one of `http` and `exec`."""

    http: HttpCheck | None = None
    exec: tuple[str, ...] = ()
    interval_seconds: int = 10
    timeout_seconds: int = 2
    #: Failures in a row that make it `failing`.
    retries: int = 3
    #: Failures within this time after the start do not count.
    start_period_seconds: int = 0


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is delivered after the boot."""

    #: Files below the guest's tmpfs `/fuse`, by relative path: `manifest.json`, `secrets.json`, `env`, `auth-token` ...
    fuse: dict[str, SetupFile] = {}
    #: Files by absolute path.
    files: dict[str, SetupFile] = {}
    #: Environment of every command, the script and the daemon (the manifest's `env`).
    env: dict[str, str] = {}
    #: Directory (the manifest's `workspace`) that is made before the script runs; empty: none.
    workspace: str = ""
    startup_script: str = ""
    startup_timeout_s: int = 30
    agent: AgentSpec | None = None
    healthcheck: Healthcheck | None = None
    #: Tokens that were replaced, newest last: a daemon that did not take the new one goes on with an old one.
    former_tokens: tuple[str, ...] = ()


class Duties(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a record knows of its setup."""

    #: There is something to deliver before the environment runs.
    setup: bool = False
    startup_timeout_s: int = 0
    #: A daemon is to be tracked, restarted and drained.
    agent: bool = False
    #: On which it serves; 0: on none.
    port: int = 0
    #: A verdict is to be fetched.
    healthcheck: bool = False


class AgentState(StrEnum):
    """Where the user's daemon is."""

    STARTING = "starting"
    RUNNING = "running"
    #: Ended, and is not to be started again.
    EXITED = "exited"
    #: Could not be started: download, digest, no such program.
    FAILED = "failed"
    DRAINED = "drained"


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The user's daemon as last seen."""

    state: AgentState
    restarts: int = 0
    #: Of its last end; None: it has not ended yet.
    exit_code: int | None = None
    message: str = ""
    since_ms: int = 0


class Verdict(StrEnum):
    """What the health check says."""

    STARTING = "starting"
    PASSING = "passing"
    FAILING = "failing"


class HealthStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The verdict as last seen."""

    state: Verdict
    since_ms: int = 0
    #: In a row.
    failures: int = 0
    message: str = ""
