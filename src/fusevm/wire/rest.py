"""Bodies of the public REST API. Field names are the contract's; empty optionals are omitted, never null.

Sizes follow the contract: `ram_mb` is MiB, `storage_gb` is GiB. 0, "" and absent mean unset, as the SDK sends them.
"""

from typing import Any, Literal

import msgspec

from fusevm.wire.guest import StreamFlags, StreamTotals

PAGE_DEFAULT, PAGE_MAX = 50, 200


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
    internet: bool = True
    rules: list[dict[str, Any]] = []


class EgressInput(msgspec.Struct, frozen=True, kw_only=True):
    mode: str = "direct"
    provider: str | None = None
    protocol: str | None = None


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/environments`. What is not honoured yet answers 501 with a reason, never silence."""

    task_id: str
    spec: SpecInput | None = None
    network: NetworkInput | None = None
    manifest_inline: str | None = None
    secrets: dict[str, str] | None = None
    startup_script: str | None = None
    startup_script_timeout_seconds: int | None = None
    gateway_url: str | None = None
    gateway_token: str | None = None
    expose: list[dict[str, Any]] | None = None
    healthcheck: dict[str, Any] | None = None
    egress: EgressInput | None = None
    desktop: dict[str, Any] | None = None
    files: dict[str, str] | None = None
    seed_snapshot_id: str | None = None
    agent: dict[str, Any] | None = None
    queue_seconds: int | None = None


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


class EgressBody(msgspec.Struct, frozen=True, kw_only=True):
    mode: Literal["direct"] = "direct"


class NetworkBody(msgspec.Struct, frozen=True, kw_only=True):
    internet: bool = True


class TimingsBody(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds per phase of the create."""

    schedule_ms: float = 0
    prepare_ms: float = 0
    boot_ms: float = 0
    agent_ms: float = 0
    host_ms: float = 0


class EnvironmentBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An environment. `reason` and `ended_at` only when it ends or has ended."""

    id: str = msgspec.field()
    uid: str
    state: str
    task_id: str
    host_id: str = ""
    #: host:port of the user's daemon; never omitted.
    url: str | None = None
    spec: SpecBody
    network: NetworkBody
    egress: EgressBody | None = None
    created_at: str
    updated_at: str
    running_at: str = ""
    ended_at: str = ""
    desired: str = ""
    reason: str = ""
    error: str = ""
    #: Machines this environment has had; grows when one is replaced.
    incarnation: int = 0
    timings: TimingsBody | None = None


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


class HostBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A host. `state` is the operator's wish, `health` what is observed."""

    id: str
    url: str
    state: str
    health: str
    region: str = ""
    arch: str = ""
    driver: str = ""
    version: str = ""
    #: Of the VMM, the guest agent and the guest kernel of this host.
    vmm_version: str = ""
    agent_version: str = ""
    kernel: str = ""
    labels: dict[str, str] = {}
    images: list[str] = []
    capacity: ResourcesBody = msgspec.field(default_factory=ResourcesBody)
    allocated: ResourcesBody = msgspec.field(default_factory=ResourcesBody)
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
