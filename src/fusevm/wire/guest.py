"""Bodies of the guest agent's API (docs/guest-protocol.md), shared by host daemon, control plane, SDK and CLI."""

from typing import Literal

import msgspec

from fusevm.model.setup import AgentStatus, HealthStatus, Restart, SetupFile

PROTOCOL_MAJOR = 1
UPGRADE = "fuse-frames/1"
MAX_OUTPUT_BYTES = 16 << 20


class Thawed(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `POST /thaw`."""

    #: Writes were held from the freeze until now.
    was_frozen: bool = False


class ExecRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A command to run. Exactly one of `cmd`, `shell` and `image_command`."""

    cmd: list[str] = []
    #: Text for `sh -lc`.
    shell: str = ""
    #: The image's own entrypoint and command; an image without them is refused with `bad_request`.
    image_command: bool = False
    env: dict[str, str] = {}
    cwd: str = ""
    #: Name, uid, or uid:gid; empty: the image's user, else root.
    user: str = ""
    stdin_b64: str | None = None
    #: Milliseconds; 0: the receiver's default.
    timeout_ms: int = 0
    tty: bool = False
    rows: int = 24
    cols: int = 80
    #: Cap of each captured stream, in bytes.
    max_output_bytes: int = 0
    #: Background processes only: keep a pipe open as standard input.
    stdin: bool = False
    #: Background processes only: a process that was started under the same key is answered instead of a new one.
    key: str = ""


class Exit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a command ended. `exit_code` of a signalled one is 128 + number, of a timed-out one 124."""

    exit_code: int = msgspec.field(default=0)
    signal: str = ""
    timed_out: bool = False
    duration_ms: int = 0


class StreamFlags(msgspec.Struct, frozen=True, kw_only=True):
    stdout: bool = False
    stderr: bool = False


class StreamTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes written by the command, captured or not."""

    stdout: int = 0
    stderr: int = 0


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of the agent's one-shot exec."""

    exit_code: int
    stdout_b64: str = ""
    stderr_b64: str = ""
    signal: str = ""
    timed_out: bool = False
    duration_ms: int = 0
    truncated: StreamFlags = StreamFlags()
    total: StreamTotals = StreamTotals()


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Absolute offsets of the retained output: oldest byte, and one past the newest."""

    start: int = 0
    end: int = 0


class Output(msgspec.Struct, frozen=True, kw_only=True):
    stdout: Span = Span()
    stderr: Span = Span()


class Process(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A background process."""

    pid: int
    #: As given when it was started; `/processes/@KEY` finds it, too.
    key: str = ""
    cmd: list[str] = []
    state: Literal["running", "exited"] = msgspec.field(default="running")
    started_at_unix_ms: int = 0
    exit: Exit | None = None
    output: Output = Output()


class ProcessList(msgspec.Struct, frozen=True, kw_only=True):
    processes: list[Process] = []


class BootPhase(msgspec.Struct, frozen=True, kw_only=True):
    phase: str
    #: Milliseconds since the guest kernel started.
    at_ms: int


class LoginStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How people can log in."""

    #: As the machine's disk has it, on one line.
    host_public_key: str = ""
    #: The image has an sshd, which was started.
    served: bool = False


class AgentHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Who the agent is and how its boot went."""

    ok: bool = True
    protocol: str = ""
    version: str = ""
    nonce: str = ""
    boot_id: str = ""
    uptime_ms: int = 0
    time_unix_ns: int = 0
    hostname: str = ""
    boot: list[BootPhase] = []
    processes: int = 0
    #: None: nobody can.
    login: LoginStatus | None = None


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an image says about commands that run in it."""

    env: dict[str, str] = {}
    workdir: str = ""
    user: str = ""
    #: Entrypoint and command, one after the other; what `image_command` runs.
    command: list[str] = []


class LoginKeys(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who may log in by SSH, and the key by which the machine proves who it is."""

    #: Private, in OpenSSH's format.
    host_key: str = msgspec.field()
    #: On one line, without a comment.
    host_public_key: str = msgspec.field()
    authorized_keys: tuple[str, ...] = ()
    trusted_user_ca_keys: tuple[str, ...] = ()


class Configure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the agent learns after boot. Idempotent."""

    generation: int = 0
    time_unix_ns: int = 0
    hostname: str = ""
    env: dict[str, str] = {}
    image: ImageConfig | None = None
    entropy_b64: str = ""
    nameservers: list[str] = []
    hosts: dict[str, str] = {}
    #: None: nobody logs in.
    login: LoginKeys | None = None


class SetupBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Body of `PUT /setup`. Idempotent by `id`."""

    #: Which machine of which environment: `<uid>/<incarnation>`.
    id: str = msgspec.field()
    #: Files below the tmpfs `/fuse`, by relative path.
    fuse: dict[str, SetupFile] = {}
    #: Files by absolute path.
    files: dict[str, SetupFile] = {}
    #: Added to the environment of every command.
    env: dict[str, str] = {}
    #: Made where missing; default working directory of every command. Empty: the image's.
    workdir: str = ""


class AgentOrder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Body of `PUT /agent`: supervise this daemon. The same `id` again changes nothing; another one restarts it."""

    id: str = msgspec.field()
    command: list[str] = []
    env: dict[str, str] = {}
    download_url: str = ""
    #: 64 hex digits, or empty.
    sha256: str = ""
    drain_command: list[str] = []
    restart: Restart = Restart.ALWAYS


class DrainOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /agent/drain`: run the drain command, ask the daemon to end, wait. Idempotent."""

    timeout_ms: int


class DrainAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the drain went. `message` is empty when the command succeeded and the daemon ended in time."""

    #: Of the daemon; None: there was none.
    exit_code: int | None = None
    message: str = ""


class GuestState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answer of `GET /state`: what the control plane tracks. None: there is no such thing."""

    #: Another number after every change; not ordered. `GET /state?after=VERSION&wait_ms=` waits for one.
    version: int = 0
    setup_id: str = ""
    agent_id: str = ""
    agent: AgentStatus | None = None
    health: HealthStatus | None = None


class FileWritten(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    size_bytes: int
    sha256: str


class FilePatched(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to a write in place."""

    path: str
    #: Of the whole file afterwards.
    size_bytes: int


class FileMatch(msgspec.Struct, frozen=True, kw_only=True):
    """The first match of one line."""

    path: str
    #: From 1.
    line: int
    match: str


class FileMatches(msgspec.Struct, frozen=True, kw_only=True):
    matches: list[FileMatch] = []
    #: There may be more.
    truncated: bool = False


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file, directory, link or special file."""

    path: str
    name: str
    type: Literal["file", "directory", "symlink", "other"]
    size_bytes: int = msgspec.field(default=0)
    #: Octal text, such as 0644.
    mode: str = ""
    uid: int = 0
    gid: int = 0
    mtime_ms: int = 0
    target: str = ""


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    entries: list[FileEntry] = []


class Extracted(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to an archive upload."""

    entries: int
    bytes: int
