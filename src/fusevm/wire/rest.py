"""Bodies of the public REST API. Field names are the contract's; empty optionals are omitted, never null.

Sizes follow the contract: `ram_mb` is MiB, `storage_gb` is GiB. 0, "" and absent mean unset, as the SDK sends them.
"""

from typing import Annotated, Any, Literal

import msgspec

from fusevm.model.ids import TASK_ID
from fusevm.model.network import Rule, Transport
from fusevm.wire.guest import StreamFlags, StreamTotals

PAGE_DEFAULT, PAGE_MAX = 50, 200
#: What the control plane calls itself: in `Version` and, with its version, in the header `Server`.
SERVICE = "fuse-orchestrator"


#: Checked by `model.ids`, with its own error; here it is only told.
TaskId = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": f"^{TASK_ID.pattern}$", "examples": ["build-42"]})]


class SpecInput(msgspec.Struct, frozen=True, kw_only=True):
    """What a create may say about the machine."""

    cpus: int | None = None
    ram_mb: int | None = None
    storage_gb: int | None = None
    region: str | None = None
    image: str | None = None
    arch: str | None = None
    host_id: str | None = None
    labels: dict[str, str] | None = None
    max_runtime_seconds: int | str | None = None
    idle_timeout_seconds: int | None = None
    gpus: int | None = None
    gpu_kind: str | None = None
    gpu_profile: str | None = None
    huge_pages: bool | None = None


class NetworkInput(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine may reach. Other machines, its host, link-local and private ranges are denied whatever it says."""

    #: May it reach what no rule is about? Default: true, or false if a rule allows something.
    internet: bool | None = None
    #: In order; the first that matches decides.
    rules: list[Rule] | None = None
    #: Bandwidth to and from the machine in kbit/s; 0: no limit.
    ingress_kbit: int | None = None
    egress_kbit: int | None = None


class ExposeInput(msgspec.Struct, frozen=True, kw_only=True):
    """A port of the machine that its host publishes."""

    port: int
    #: Its name in the answer.
    name: str | None = msgspec.field(default=None, name="as")
    protocol: Transport | None = None
    #: Wanted on the host, within the range that it publishes; 0: any.
    host_port: int | None = None


class EgressInput(msgspec.Struct, frozen=True, kw_only=True):
    mode: str = "direct"
    provider: str | None = None
    protocol: str | None = None


class FileInput(msgspec.Struct, frozen=True, kw_only=True):
    """A file with its mode (octal text); the contract's form is the base64 text alone."""

    content_b64: str
    mode: str = "0644"


class AgentInput(msgspec.Struct, frozen=True, kw_only=True):
    """The user's daemon in the guest (docs/agent-spec.md)."""

    #: Name of a profile of the settings file whose values fill in what is not given here.
    profile: str | None = None
    files: dict[str, str | FileInput] | None = None
    download_url: str | None = None
    sha256: str | None = None
    command: list[str] | None = None
    drain_command: list[str] | None = None
    auth_token: str | None = None
    gateway: str | None = None
    gateway_token: str | None = None
    env: dict[str, str] | None = None
    port: int | None = None
    restart: Literal["always", "on-failure", "never"] | None = None


class HttpCheckInput(msgspec.Struct, frozen=True, kw_only=True):
    """GET on loopback in the guest; 200 to 399 passes."""

    port: int
    path: str | None = None


class HealthcheckInput(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one of `http` and `exec`. Seconds; 0 means the default."""

    http: HttpCheckInput | None = None
    exec: list[str] | None = None
    interval_seconds: int | None = None
    timeout_seconds: int | None = None
    retries: int | None = None
    start_period_seconds: int | None = None


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/environments`. What is not honoured yet answers 501 with a reason, never silence."""

    task_id: TaskId
    spec: SpecInput | None = None
    network: NetworkInput | None = None
    #: base64 of a JSON manifest (version 1): `workspace` and `env` act.
    manifest_inline: str | None = None
    secrets: dict[str, str] | None = None
    #: Run by `sh -lc` as root before the environment is `running`; its output is told as events.
    startup_script: str | None = None
    startup_script_timeout_seconds: int | None = None
    gateway_url: str | None = None
    gateway_token: str | None = None
    expose: list[ExposeInput] | None = None
    healthcheck: HealthcheckInput | None = None
    egress: EgressInput | None = None
    desktop: dict[str, Any] | None = None
    #: Absolute path to base64, or to content and mode.
    files: dict[str, str | FileInput] | None = None
    seed_snapshot_id: str | None = None
    #: Name of a profile, or a whole one.
    agent: str | AgentInput | None = None
    #: Wait this long for a place when no host has one.
    queue_seconds: int | None = None
    #: What becomes of it when its host is lost. `fail` (the default): it ends as `failed`, reason `host_lost`.
    #: `restore` (from its newest snapshot, on another host): 501, since snapshots cannot leave their host yet.
    on_host_loss: str | None = None


class SpecBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The spec in force, defaults filled in."""

    cpus: int = 0
    ram_mb: int = 0
    storage_gb: int = 0
    region: str = ""
    image: str = ""
    arch: str = ""
    host_id: str = ""
    labels: dict[str, str] = {}
    max_runtime_seconds: int = 0
    idle_timeout_seconds: int = 0
    seed_snapshot_id: str = ""
    queue_seconds: int = 0


class EgressBody(msgspec.Struct, frozen=True, kw_only=True):
    mode: Literal["direct"] = "direct"


class NetworkBody(msgspec.Struct, frozen=True, kw_only=True):
    """The policy in force; only `internet` is always there."""

    internet: bool = True
    rules: list[Rule] | msgspec.UnsetType = msgspec.UNSET
    ingress_kbit: int | msgspec.UnsetType = msgspec.UNSET
    egress_kbit: int | msgspec.UnsetType = msgspec.UNSET


class EndpointBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A published port of the machine."""

    name: str = msgspec.field(default="", name="as")
    #: host:port
    url: str = msgspec.field()
    #: Of the machine.
    port: int
    protocol: Transport


class TimingsBody(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds per phase of the create."""

    schedule_ms: float = 0
    prepare_ms: float = 0
    boot_ms: float = 0
    agent_ms: float = 0
    host_ms: float = 0
    #: Delivering files, the startup script, starting the daemon.
    setup_ms: float = 0


class HealthBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A verdict: starting, passing or failing."""

    state: str = msgspec.field()
    since: str = ""
    #: In a row.
    failures: int = 0
    message: str = ""


class AgentBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The user's daemon: starting, running, exited, failed or drained."""

    state: str = msgspec.field()
    since: str = ""
    restarts: int = 0
    #: Of its last end.
    exit_code: int | None = None
    message: str = ""


class EnvironmentBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An environment. `reason` and `ended_at` only when it ends or has ended."""

    id: str = msgspec.field()
    uid: str
    state: str
    task_id: str
    host_id: str = ""
    #: host:port under which the port of the daemon (`agent.port`) is reached; "" without one. Never omitted.
    url: str | None = None
    #: All published ports.
    endpoints: list[EndpointBody] = []
    spec: SpecBody
    network: NetworkBody
    egress: EgressBody | None = None
    #: Always `fail`; never omitted.
    on_host_loss: Literal["fail"] | None = None
    created_at: str
    updated_at: str
    running_at: str = ""
    ended_at: str = ""
    desired: str = ""
    #: Why it ends or has ended: the reason of an error, or deleted, idle, max_runtime, linger, host_lost ...
    reason: str = ""
    #: The code of the error that `reason` names; empty where it names none.
    code: str = ""
    error: str = ""
    #: Machines this environment has had; grows when one is replaced.
    incarnation: int = 0
    timings: TimingsBody | None = None
    tenant: str = ""
    #: While it waits for a place: when it gives up.
    queued_until: str = ""
    #: The last verdict of its health check.
    health: HealthBody | None = None
    #: The user's daemon as last seen.
    agent: AgentBody | None = None


class EnvironmentPage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    environments: list[EnvironmentBody] = msgspec.field()
    next_cursor: str = ""


class ExecBody(msgspec.Struct, frozen=True, kw_only=True):
    """`?action=exec`: the contract's body and ours. `encoding`: `text` (default) or `base64`."""

    cmd: list[str] | None = None
    shell: str | None = None
    timeout_ms: int | None = None
    env: dict[str, str] | None = None
    cwd: str | None = None
    user: str | None = None
    stdin_b64: str | None = None
    encoding: Literal["text", "base64"] = "text"


class ExecAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`stdout_b64`/`stderr_b64` are there when asked for, or when text would lose bytes."""

    exit_code: int
    stdout: str
    stderr: str
    stdout_b64: str | msgspec.UnsetType = msgspec.UNSET
    stderr_b64: str | msgspec.UnsetType = msgspec.UNSET
    signal: str | msgspec.UnsetType = msgspec.UNSET
    timed_out: bool = False
    duration_ms: int = 0
    truncated: StreamFlags = StreamFlags()
    total: StreamTotals = StreamTotals()


class EventBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event. `id` is absent on the first, synthetic message of a stream."""

    id: str = ""
    event: str
    vm_id: str
    uid: str
    state: str
    url: str = ""
    error: str = ""
    reason: str = ""
    message: str = ""
    cause: str = ""
    data: dict[str, str] = {}
    updated_at: str


class ResourcesBody(msgspec.Struct, frozen=True, kw_only=True):
    cpus: int = 0
    ram_mb: int = 0
    storage_gb: int = 0
    vm_count: int = 0


class CapacityBody(ResourcesBody, frozen=True, kw_only=True):
    arch: str = ""


class HostBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A host. `state` is the operator's wish, `health` what is observed."""

    id: str
    url: str
    state: str
    health: str
    #: Why it is not well; empty: it is.
    problem: str = ""
    region: str = ""
    arch: str = ""
    driver: str = ""
    #: The driver, under the contract's name for it.
    backend: str = ""
    version: str = ""
    #: Of the VMM, the guest agent and the guest kernel of this host.
    vmm_version: str = ""
    agent_version: str = ""
    kernel: str = ""
    labels: dict[str, str] = {}
    images: list[str] = []
    capacity: CapacityBody = msgspec.field(default_factory=CapacityBody)
    allocated: ResourcesBody = msgspec.field(default_factory=ResourcesBody)
    #: Of a registration: what was accepted and looks wrong.
    warnings: list[str] = []
    last_seen: str = ""
    created_at: str = ""
    updated_at: str = ""


class HostPage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    hosts: list[HostBody] = msgspec.field()
    next_cursor: str = ""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/version`."""

    service: str
    version: str
    api: str = "v1"


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /ready`."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str] = {}


class Invariants(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/debug/invariants`. `environments` and `hosts`: how many were looked at, so that nothing is not all well.

    The machines on the hosts are not part of it: their lists are of other moments than the store.
    """

    violations: list[str]
    environments: int
    hosts: int


class FilePath(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `?op=stat` and `?op=list`."""

    path: str


class FileMkdir(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Body of `?op=mkdir`. `mode` is octal text."""

    path: str
    parents: bool = msgspec.field(default=True)
    mode: str = "0755"


class FileMove(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `?op=move`."""

    path: str
    to: str


class FileRemove(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Body of `?op=remove`."""

    path: str
    recursive: bool = msgspec.field(default=False)


class SignalBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of a process's `?action=signal`: a name without SIG, or a number as text."""

    signal: str


class StdinWritten(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to a process's `?action=stdin`."""

    bytes: int


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /health`."""

    status: Literal["ok"] = "ok"
