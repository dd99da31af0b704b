"""Calls about environments: their life, commands, events, logs."""

import base64
from typing import Any, Literal, TypedDict
from urllib.parse import quote

import msgspec

from fusevm.model.environment import State
from fusevm.model.errors import NotFound
from fusevm.sdk.core.exchange import (
    WAIT_TIMEOUT_S,
    Call,
    Request,
    Retry,
    get,
    json_reader,
    make_target,
    post,
    to_b64,
    to_json,
)
from fusevm.wire.errors import ending_error
from fusevm.wire.rest import (
    CreateRequest,
    EnvironmentBody,
    EnvironmentPage,
    ExecAnswer,
    ExecBody,
    ExposeInput,
    FileInput,
    NetworkInput,
    SpecInput,
)

#: How much longer than its own limit a command's answer may take.
EXEC_GRACE_S = 20.0
EXEC_DEFAULT_MS = 60_000
#: A command: program and arguments.
Argv = list[str]


class CreateFields(TypedDict, total=False):
    """What `create` takes by keyword. What is absent, empty or 0 gets the server's default."""

    image: str
    cpus: int
    #: MiB.
    ram_mb: int
    #: GiB.
    storage_gb: int
    region: str
    arch: str
    host_id: str
    labels: dict[str, str]
    #: Seconds, or "unlimited".
    max_runtime_seconds: int | str
    idle_timeout_seconds: int
    internet: bool
    #: As in the API (docs/network.md): `{"rules": [{"domain": "pypi.org", "ports": [443]}]}`.
    network: dict[str, Any]
    #: Ports to publish: numbers, or as in the API `{"port": 53, "protocol": "udp"}`.
    expose: list[int | dict[str, Any]]
    secrets: dict[str, str]
    #: Run by `sh -lc` as root before the environment runs.
    startup_script: str
    startup_script_timeout_seconds: int
    #: Absolute path to contents (mode 0644), or to contents and mode as octal text; together at most 512 KiB.
    files: dict[str, bytes | tuple[bytes, str]]
    #: Contents of a manifest file.
    manifest: bytes
    #: The user's daemon: the name of a profile, or its description as in the API (docs/agent-spec.md).
    agent: str | dict[str, Any]
    gateway_url: str
    gateway_token: str
    #: As in the API: `{"http": {"port": 8000}}`, or `{"exec": [...]}`.
    healthcheck: dict[str, Any]
    #: Begin with this snapshot's disk instead of an image.
    seed_snapshot_id: str
    #: Wait that long for a place instead of failing at once.
    queue_seconds: int


_SPEC_FIELDS = frozenset(SpecInput.__struct_fields__)


def make_create_request(task_id: str, fields: CreateFields) -> CreateRequest:
    """The body of a create. Bytes are encoded as the contract wants them."""
    given: dict[str, Any] = {name: value for name, value in fields.items() if value}
    spec = {name: given.pop(name) for name in list(given) if name in _SPEC_FIELDS}
    if "files" in given:
        given["files"] = {path: _file(content) for path, content in given["files"].items()}
    if "manifest" in given:
        given["manifest_inline"] = to_b64(given.pop("manifest"))
    given.pop("internet", None)
    policy = dict(given.pop("network", {}))
    if not fields.get("internet", True):
        policy["internet"] = False
    network = make_network(policy) if policy else None
    expose = [port if isinstance(port, dict) else {"port": port} for port in given.pop("expose", [])]
    given |= {"expose": msgspec.convert(expose, list[ExposeInput])} if expose else {}
    return CreateRequest(task_id=task_id, spec=SpecInput(**spec), network=network, **given)


def make_network(policy: dict[str, Any]) -> NetworkInput:
    """A policy as the API has it. Raises msgspec.ValidationError, a ValueError, for what is none."""
    return msgspec.convert(policy, NetworkInput)


def change_network(env_id: str, policy: dict[str, Any]) -> Call[EnvironmentBody]:
    """Hold a running environment to another policy. Safe to repeat."""
    body = to_json(make_network(policy))
    headers = {"Content-Type": "application/json"}
    return Call(
        request=Request(
            method="PUT", target=make_target("environments", env_id, "network"), headers=headers, body=body
        ),
        read=json_reader(EnvironmentBody),
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S,
    )


def _file(content: bytes | tuple[bytes, str]) -> str | FileInput:
    if isinstance(content, bytes):
        return to_b64(content)
    data, mode = content
    return FileInput(content_b64=to_b64(data), mode=mode)


def create_environment(request: CreateRequest, *, key: str, wait: bool = True) -> Call[EnvironmentBody]:
    """Create; answered when it runs, or `provisioning` after 55 s, or at once without `wait`. Safe to repeat by key."""
    headers = {} if wait else {"Prefer": "respond-async"}
    return Call(
        request=post(make_target("environments"), request, key=key, headers=headers),
        read=json_reader(EnvironmentBody),
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S,
    )


def list_environments(
    *,
    task_id: str = "",
    state: str = "",
    host_id: str = "",
    ended: bool = False,
    limit: int | None = None,
    cursor: str = "",
) -> Call[EnvironmentPage]:
    """One page of environments; the live ones, or the ended ones."""
    query = {
        "task_id": task_id,
        "state": state,
        "host_id": host_id,
        "ended": True if ended else None,
        "limit": limit,
        "cursor": cursor,
    }
    return get(make_target("environments", query=query), EnvironmentPage)


def get_environment(env_id: str, *, uid: str = "") -> Call[EnvironmentBody]:
    """The live environment of an id, or with `uid` that one, ended or not."""
    return get(make_target("environments", env_id, query={"uid": uid}), EnvironmentBody)


def raise_unless_up(environment: EnvironmentBody) -> None:
    """Raise the error of its ending for an environment that ended instead of coming up, as a create answers it."""
    if environment.state in (State.FAILED, State.DESTROYING, State.DESTROYED):
        raise ending_error(
            environment.id,
            environment.uid,
            state=environment.state,
            reason=environment.reason,
            message=environment.error,
        )


def delete_environment(env_id: str, *, wait: bool = True) -> Call[bool]:
    """Destroy. True: it is gone; False: accepted, and still under way (after 55 s with `wait`). Safe to repeat."""
    headers = {} if wait else {"Prefer": "respond-async"}
    return Call(
        request=Request(method="DELETE", target=make_target("environments", env_id), headers=headers),
        read=lambda answer: answer.status != 202,
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S,
        done_by=(NotFound,),
    )


def rotate_token(env_id: str, *, key: str) -> Call[bool]:
    """Give the daemon a new token. True: the old one is refused; False: still under way after 55 s. Repeated by key."""
    return Call(
        request=post(make_target("environments", env_id, query={"action": "rotate-token"}), key=key),
        read=lambda answer: answer.status != 202,
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S,
    )


def drain_environment(env_id: str) -> Call[EnvironmentBody]:
    """Begin the end: the machine stays for inspection until it is deleted or lingered out. Safe to repeat."""
    return Call(
        request=post(make_target("environments", env_id, query={"action": "drain"})),
        read=json_reader(EnvironmentBody),
        retry=Retry.ALWAYS,
        timeout_s=WAIT_TIMEOUT_S,
    )


def make_exec_body(
    cmd: Argv | None,
    *,
    shell: str = "",
    env: dict[str, str] | None = None,
    cwd: str = "",
    user: str = "",
    timeout_ms: int = 0,
    stdin: bytes = b"",
    binary: bool = False,
) -> ExecBody:
    """The body of a one-shot exec; exactly one of `cmd` and `shell`."""
    return ExecBody(
        cmd=cmd or None,
        shell=shell or None,
        env=env or None,
        cwd=cwd or None,
        user=user or None,
        timeout_ms=timeout_ms or None,
        stdin_b64=to_b64(stdin) if stdin else None,
        encoding="base64" if binary else "text",
    )


def output_of(answer: ExecAnswer) -> tuple[bytes, bytes]:
    """Standard output and standard error of a command as bytes, without loss."""

    def pick(text: str, encoded: str | msgspec.UnsetType) -> bytes:
        return base64.b64decode(encoded) if isinstance(encoded, str) else text.encode()

    return pick(answer.stdout, answer.stdout_b64), pick(answer.stderr, answer.stderr_b64)


def exec_environment(env_id: str, request: ExecBody) -> Call[ExecAnswer]:
    """Run a command and wait for its end. Never repeated once it was sent: the command may have run."""
    wait_ms = request.timeout_ms or EXEC_DEFAULT_MS
    return Call(
        request=post(make_target("environments", env_id, query={"action": "exec"}), request),
        read=json_reader(ExecAnswer),
        retry=Retry.UNSENT,
        timeout_s=wait_ms / 1000 + EXEC_GRACE_S,
    )


def watch_events(env_id: str, *, uid: str = "", last_event_id: str = "") -> Request:
    """The event stream of one environment (`sse`), or of all with an empty id."""
    target = make_target("environments", env_id, "events", query={"uid": uid}) if env_id else make_target("events")
    headers = {"Accept": "text/event-stream"}
    return Request(
        method="GET", target=target, headers=headers | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    )


def first_event_id(uid: str) -> str:
    """The event id before the first event of an environment: the whole story is replayed after it."""
    return f"{uid}.0"


LogSource = Literal["console", "startup", "agent"]


def read_logs(env_id: str, *, source: LogSource = "console", follow: bool = False) -> Request:
    """The log of one source as bytes; with `follow` until the environment ends."""
    query = {"source": source, "follow": follow or None}
    return Request(method="GET", target=make_target("environments", env_id, "logs", query=query))


def exec_target(env_id: str) -> str:
    """WebSocket target for commands with streams; the first frame is START."""
    return make_target("environments", env_id, "exec")


def shell_target(env_id: str, *, rows: int = 24, cols: int = 80, cmd: Argv | None = None) -> str:
    """WebSocket target for a terminal, which the server starts by itself."""
    target = make_target("environments", env_id, "shell", query={"rows": rows, "cols": cols})
    return target + "".join("&cmd=" + quote(argument, safe="") for argument in cmd or [])
