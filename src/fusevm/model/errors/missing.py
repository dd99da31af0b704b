"""Errors about what is not there."""

from fusevm.model.errors.base import Error


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


class LogNotFound(NotFound):
    """The environment has no such log, or not yet."""

    reason = "log_not_found"
    template = "{id} has no log {source!r}: {problem}"
    id: str
    source: str
    problem: str


class SnapshotNotFound(NotFound):
    reason = "snapshot_not_found"
    template = "No snapshot {id!r}"
    id: str


class LocalSnapshotMissing(NotFound):
    """The bytes are not on this host. The sentence begins with words that control planes of computer-host look for."""

    reason = "local_snapshot_missing"
    template = "local snapshot restore unavailable: {problem}; send `snapshot` with download_url to fetch it"
    problem: str


class ArtifactNotFound(NotFound):
    reason = "artifact_not_found"
    template = "Snapshot {snapshot} has no artifact {id!r}"
    snapshot: str
    id: str


class KeyNotFound(NotFound):
    reason = "key_not_found"
    template = "No API key {id!r}"
    id: str
