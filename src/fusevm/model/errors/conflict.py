"""Errors about a state that does not allow what was asked."""

from fusevm.model.errors.base import Error


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


class OrderExpired(Conflict):
    """Fencing: the order arrived after the moment until which it was valid, and was not carried out."""

    reason = "order_expired"
    retryable = True
    template = "Action {action_seq} of {uid} came too late and was not carried out"
    uid: str
    action_seq: int


class HostPortTaken(Conflict):
    reason = "host_port_taken"
    template = "Port {port}/{protocol} of the host is taken; ask for another one, or for none in particular"
    port: int
    protocol: str


class PublishedPortExists(Conflict):
    reason = "published_port_exists"
    template = "A published port {id!r} exists already; delete it first, or use another id"
    id: str


class WrongCluster(Conflict):
    reason = "wrong_cluster"
    template = "This host belongs to cluster {cluster}; it takes no orders from {asked}"
    cluster: str
    asked: str


class MachineExists(Conflict):
    reason = "machine_exists"
    template = "Machine {id!r} exists already"
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


class HostInUse(Conflict):
    """`machines`: how many environments are placed there."""

    reason = "host_in_use"
    template = (
        "Host {id} still has {machines} environments; delete them first; "
        "one that is lost or refuses us can be removed with ?force=true"
    )
    id: str
    machines: int


class ActionUnderWay(Conflict):
    """One action at a time is at work on a machine."""

    reason = "action_under_way"
    retryable = True
    template = "{id} is busy with another action ({action}); try again when that is over"
    id: str
    action: str


class SnapshotNotReady(Conflict):
    reason = "snapshot_not_ready"
    template = "Snapshot {id} is {state}; only a ready one can be used"
    id: str
    state: str


class SnapshotExists(Conflict):
    """A host has a snapshot of this id, of another machine."""

    reason = "snapshot_exists"
    template = "Snapshot {id} exists already, of another machine; choose another id"
    id: str


class SnapshotMismatch(Conflict):
    """A snapshot does not fit where it should be put."""

    reason = "snapshot_mismatch"
    template = "Snapshot {id} does not fit: {problem}"
    id: str
    problem: str


class PreconditionFailed(Conflict):
    """If-Match names another revision than the present one."""

    reason = "precondition_failed"
    status = 412
    template = "{id} has changed meanwhile: its ETag is {etag}"
    id: str
    etag: str
