"""Every error Fuse can answer with.

One tree. A class states the contract's `code` (which clients compare), our own stable `reason`, the HTTP `status` and
whether a retry can help. Its annotated fields are the keyword arguments of its constructor; the message is built from
them by `template`, and says what to do. The same class crosses guest -> host -> control plane -> SDK (`wire.errors`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, dataclass_transform, get_type_hints

_INTEGER = re.compile(r"-?[0-9]{1,18}")


@dataclass_transform(kw_only_default=True)
class Error(Exception):
    """Base of every error that may reach a user. Not raised itself."""

    code: ClassVar[str] = "internal"
    reason: ClassVar[str] = ""
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    template: ClassVar[str] = ""

    def __init__(self, **fields: Any) -> None:
        names = field_names(type(self))
        if set(fields) != set(names):
            raise TypeError(f"{type(self).__name__} takes exactly {sorted(names)}, got {sorted(fields)}")
        for name, value in fields.items():
            setattr(self, name, value)
        super().__init__(self.template.format(**fields))

    @property
    def message(self) -> str:
        """The sentence for the user."""
        return str(self.args[0])

    @property
    def details(self) -> dict[str, str]:
        """Reason and fields as strings, as the contract wants them."""
        return {"reason": self.reason, **{name: str(getattr(self, name)) for name in field_names(type(self))}}

    @classmethod
    def rebuild(cls, message: str, details: Mapping[str, str]) -> Self:
        """Make the error again on the far side of a wire, with the sender's sentence; missing fields become empty."""
        error = cls.__new__(cls)
        Exception.__init__(error, message)
        for name, kind in field_names(cls).items():
            raw = details.get(name, "")
            setattr(error, name, (int(raw) if _INTEGER.fullmatch(raw) else 0) if kind is int else raw)
        return error


def field_names(cls: type[Error]) -> dict[str, type]:
    """The constructor fields of an error class, with their types (`str` or `int`)."""
    hints = get_type_hints(cls)
    return {name: kind for name, kind in hints.items() if kind in (str, int)}


def error_classes(base: type[Error] = Error) -> Iterator[type[Error]]:
    """Every concrete error class: those with a reason."""
    for cls in base.__subclasses__():
        if cls.__dict__.get("reason"):
            yield cls
        yield from error_classes(cls)


# -- invalid_argument ----------------------------------------------------------------------------------------------


class InvalidArgument(Error):
    """The caller sent something that can never work as it is."""

    code, status = "invalid_argument", 400


class BadField(InvalidArgument):
    """One field of a request is wrong."""

    reason = "bad_field"
    template = "{field}: {problem}"
    field: str
    problem: str


class BadJson(InvalidArgument):
    """The body is not the JSON that the route takes."""

    reason = "bad_json"
    template = "The request body does not fit: {problem}"
    problem: str


class BadTaskId(InvalidArgument):
    reason = "bad_task_id"
    template = (
        "task_id {task_id!r} is not usable: use 1 to 128 letters, digits, '.', '_' and '-', "
        "starting with a letter or digit"
    )
    task_id: str


class UnknownAction(InvalidArgument):
    reason = "unknown_action"
    template = "Unknown action {action!r}; this route knows: {known}"
    action: str
    known: str


class ImageNotFound(InvalidArgument):
    """The image named in a create exists on no host that could take the machine."""

    reason = "image_not_found"
    template = "There is no image {image!r}; `fuse image list` shows what exists, `fuse image build {image}` builds it"
    image: str


class CommandNotFound(InvalidArgument):
    reason = "command_not_found"
    template = "The command {command!r} does not exist in the machine or is not executable"
    command: str


class BadCwd(InvalidArgument):
    reason = "bad_cwd"
    template = "The working directory {cwd!r} is not a directory in the machine"
    cwd: str


class UnknownUser(InvalidArgument):
    reason = "unknown_user"
    template = "The machine knows no user {user!r}; a numeric uid (or uid:gid) always works"
    user: str


class UnknownSignal(InvalidArgument):
    reason = "unknown_signal"
    template = "There is no signal {signal!r}; use a name such as TERM or a number"
    signal: str


class BadPath(InvalidArgument):
    reason = "bad_path"
    template = "The path {path!r} is not usable: it must be absolute and without NUL"
    path: str


class BadRange(InvalidArgument):
    reason = "bad_range"
    template = "The range is not within the file of {size} bytes"
    size: int


class BadRequest(InvalidArgument):
    """The guest agent could not read a request."""

    reason = "bad_request"
    template = "The request does not fit: {field}"
    field: str


class BadSetting(InvalidArgument):
    """A setting (variable, flag or line of the settings file) is wrong. Raised at start, before anything is touched."""

    reason = "bad_setting"
    template = "{setting}: {problem}"
    setting: str
    problem: str


class ImageCorrupt(InvalidArgument):
    reason = "image_corrupt"
    template = "The image file {path} is damaged ({problem}); rebuild it with `fuse image build --force {image}`"
    image: str
    path: str
    problem: str


class KernelCorrupt(InvalidArgument):
    reason = "kernel_corrupt"
    template = "The kernel file {path} is damaged or no kernel ({problem}); delete it and build it again"
    path: str
    problem: str


class PathTooLong(InvalidArgument):
    """A Unix socket path has at most 107 bytes (unix(7), sun_path)."""

    reason = "path_too_long"
    template = (
        "The path {path} is too long for a Unix socket (at most {limit} bytes); choose a shorter data or run directory"
    )
    path: str
    limit: int


# -- authentication ------------------------------------------------------------------------------------------------


class Unauthorized(Error):
    reason = "unauthorized"
    code, status = "unauthorized", 401
    template = "{problem}; send the header `Authorization: Bearer <token>`"
    problem: str


class Forbidden(Error):
    reason = "forbidden"
    code, status = "forbidden", 403
    template = "{problem}"
    problem: str


# -- not_found -----------------------------------------------------------------------------------------------------


class NotFound(Error):
    code, status = "not_found", 404


class RouteNotFound(Error):
    reason = "route_not_found"
    code, status = "route_not_found", 404
    template = "No route {method} {path}; /openapi.json lists all routes"
    method: str
    path: str


class MethodNotAllowed(Error):
    reason = "method_not_allowed"
    code, status = "invalid_argument", 405
    template = "{path} does not take {method}; it takes {allowed}"
    method: str
    path: str
    allowed: str


class EnvironmentNotFound(NotFound):
    reason = "environment_not_found"
    template = "There is no environment {id!r}"
    id: str


class EnvironmentEnded(NotFound):
    """The id belonged to an environment that is over; its record can be asked for by uid."""

    reason = "ended"
    template = "Environment {id!r} has ended ({state}: {cause}); GET it with ?uid={uid} for its record"
    id: str
    uid: str
    state: str
    cause: str


class HostNotFound(NotFound):
    reason = "host_not_found"
    template = "There is no host {id!r}; `fuse host list` shows the registered ones"
    id: str


class MachineNotFound(NotFound):
    reason = "machine_not_found"
    template = "This host has no machine {id!r}"
    id: str


class FileNotFound(NotFound):
    reason = "file_not_found"
    template = "There is no {path!r} in the machine"
    path: str


class ProcessNotFound(NotFound):
    reason = "process_not_found"
    template = "There is no process {pid} that was started through the API"
    pid: str


# -- conflict ------------------------------------------------------------------------------------------------------


class Conflict(Error):
    code, status = "conflict", 409


class TaskExists(Conflict):
    reason = "task_exists"
    template = "Environment {id!r} is live ({state}); delete it first or use another task_id"
    id: str
    state: str


class WrongState(Conflict):
    reason = "wrong_state"
    template = "{id} is {state}; {wanted}"
    id: str
    state: str
    wanted: str


class StaleIncarnation(Conflict):
    """Fencing: the host has seen a newer incarnation, or the deletion, of this environment's machine."""

    reason = "stale_incarnation"
    template = "Incarnation {incarnation} of {uid} is out of date; the host has seen {seen}"
    uid: str
    incarnation: int
    seen: int


class StaleAction(Conflict):
    """Fencing: the host has carried out a newer order of the same environment."""

    reason = "stale_action"
    template = "Action {action_seq} of {uid} is out of date; the host has seen {seen}"
    uid: str
    action_seq: int
    seen: int


class WrongCluster(Conflict):
    reason = "wrong_cluster"
    template = "This host belongs to cluster {cluster}; it takes no orders from {asked}"
    cluster: str
    asked: str


class MachineExists(Conflict):
    reason = "machine_exists"
    template = "Machine {id!r} exists already with other settings"
    id: str


class IsADirectory(Conflict):
    reason = "is_a_directory"
    template = "{path!r} is a directory"
    path: str


class NotADirectory(Conflict):
    reason = "not_a_directory"
    template = "{path!r} is not a directory"
    path: str


class DirectoryNotEmpty(Conflict):
    reason = "directory_not_empty"
    template = "The directory {path!r} is not empty; say recursive to remove it with its contents"
    path: str


class FileExists(Conflict):
    reason = "file_exists"
    template = "{path!r} exists already"
    path: str


class PermissionDenied(Conflict):
    """The guest's kernel refused (EACCES, EPERM, EROFS)."""

    reason = "permission_denied"
    template = "The machine refused access to {path!r}"
    path: str


class StdinClosed(Conflict):
    reason = "stdin_closed"
    template = "The standard input of process {pid} is closed"
    pid: str


class DataRootInUse(Conflict):
    reason = "data_root_in_use"
    template = "{path} is in use by another process (pid {pid}); stop that one or choose another data directory"
    path: str
    pid: str


class SchemaTooNew(Conflict):
    """A newer program has written this database; an older one would damage it."""

    reason = "schema_too_new"
    template = "{path} has schema {found}, this program knows {known}; start the newer program, or upgrade this one"
    path: str
    found: int
    known: int


class PortInUse(Conflict):
    reason = "port_in_use"
    template = "The address {address} is in use; choose another with {setting}"
    address: str
    setting: str


class NetworkRangeConflict(Conflict):
    reason = "network_range_conflict"
    template = "The machine address range {range} overlaps {route}; choose another with {setting}"
    range: str
    route: str
    setting: str


class IdempotencyKeyReused(Conflict):
    """The key came before with another request; answering it with the stored answer would be a lie."""

    reason = "idempotency_key_reused"
    template = "The Idempotency-Key {key!r} was used for another request; use a new key for a new request"
    key: str


class IdempotencyInProgress(Conflict):
    """The first request with this key has no answer yet, or was cut off before it got one."""

    reason = "idempotency_in_progress"
    retryable = True
    template = "The request with Idempotency-Key {key!r} is still under way, or was cut off and may have had an effect"
    key: str


class SlotInUse(Conflict):
    """Two machines were given one number: a fault of the journal's bookkeeping."""

    reason = "slot_in_use"
    template = "Network slot {index} is in use by another machine; this is a bug"
    index: int


class RevisionConflict(Conflict):
    """Another writer was faster; the caller reads again and decides again. Never leaves the control plane."""

    reason = "revision_conflict"
    retryable = True
    template = "{uid} changed meanwhile (revision {revision})"
    uid: str
    revision: int


# -- limits, time, capacity ----------------------------------------------------------------------------------------


class PayloadTooLarge(Error):
    reason = "payload_too_large"
    code, status = "payload_too_large", 413
    template = "The request body is larger than {limit} bytes"
    limit: int


class Unimplemented(Error):
    reason = "unimplemented"
    code, status = "unimplemented", 501
    template = "{feature} is not available: {why}"
    feature: str
    why: str


class NotSupported(Error):
    """The guest agent, or the driver, lacks what was asked for."""

    reason = "not_supported"
    code, status = "unimplemented", 501
    template = "{feature} is not supported here"
    feature: str


class Unavailable(Error):
    code, status, retryable = "unavailable", 503, True


class NoCapacity(Unavailable):
    """No host can take the machine; `rejections` counts hosts per reason."""

    reason = "no_capacity"
    template = "No host can take this environment ({rejections}); free capacity or add a host"
    rejections: str


class NoHosts(Unavailable):
    reason = "no_hosts"
    template = "No host is registered; start one with `fuse up`, or register one with `fuse host register`"


class HostUnreachable(Unavailable):
    reason = "host_unreachable"
    template = "Host {id} does not answer ({problem})"
    id: str
    problem: str


class HostFull(Unavailable):
    """Admission on the host refused before any side effect."""

    reason = "host_full"
    template = "The host has no room: {resource} needs {needed}, {free} are free"
    resource: str
    needed: str
    free: str


class SlotFailed(Unavailable):
    """A slot's kernel objects could not be made, or are not in use."""

    reason = "slot_failed"
    template = "Network slot {index} is not usable: {problem}"
    index: int
    problem: str


class NoSpace(Unavailable):
    reason = "no_space"
    template = "No disk space left below {path}: {needed} bytes needed, {free} free; remove images or machines"
    path: str
    needed: int
    free: int


class NoSpaceInGuest(Unavailable):
    reason = "no_space_in_guest"
    template = "The machine's disk is full (writing {path!r}); ask for a larger storage_gb"
    path: str


class StoreFull(Unavailable):
    reason = "store_full"
    template = "The database cannot write ({problem}); free disk space"
    problem: str


class ShuttingDown(Unavailable):
    reason = "shutting_down"
    template = "The server is shutting down; try again shortly"


class GuestUnreachable(Unavailable):
    reason = "guest_unreachable"
    template = "The guest agent of {id} does not answer ({problem})"
    id: str
    problem: str


class BootFailed(Unavailable):
    """The machine did not come up; its console's last words are in `problem`."""

    reason = "boot_failed"
    retryable = False
    template = "Machine {id} did not start: {problem}"
    id: str
    problem: str


class ToolMissing(Unavailable):
    """A program that the host daemon needs is not installed."""

    reason = "tool_missing"
    retryable = False
    template = "The program {program} is not installed; install it with `apt-get install {package}` or run `make setup`"
    program: str
    package: str


class VmmMissing(Unavailable):
    reason = "vmm_missing"
    retryable = False
    template = "{program} is not installed; {remedy}"
    program: str
    remedy: str


class Timeout(Error):
    code, status, retryable = "timeout", 504, True
    reason = "timeout"
    template = "{what} took longer than {limit_s} s"
    what: str
    limit_s: int


# -- our fault -----------------------------------------------------------------------------------------------------


class Internal(Error):
    """A bug or a broken machine. The cause is in the log under the request id."""

    reason = "internal"
    template = "Internal error ({problem}); the server's log has the details under the request id"
    problem: str


class AgentFailure(Error):
    """The guest agent failed in a way that has no class of its own."""

    reason = "agent_failure"
    template = "The guest agent failed: {problem}"
    problem: str


class HostRejected(Error):
    """The host daemon refused our credentials."""

    reason = "host_rejected"
    code, status = "unauthorized", 502
    template = "Host {id} refused the token; register it again with the token it printed"
    id: str


class CommandFailed(Error):
    """A system command on the host failed; `command` can be pasted into a shell."""

    reason = "command_failed"
    template = "`{command}` failed with status {exit_status}: {stderr}"
    command: str
    exit_status: int
    stderr: str
