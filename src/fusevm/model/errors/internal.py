"""Errors that are our fault, or another program's."""

from fusevm.model.errors.base import Error


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


class HostUnproven(HostRejected):
    """What answers is not the host that we know, or has another certificate than it had: it gets nothing of us."""

    reason = "host_unproven"
    template = "What answers as host {id} does not have the key that its token names; register it again with its token"


class CommandFailed(Error):
    """A system command on the host failed; `command` can be pasted into a shell."""

    reason = "command_failed"
    template = "`{command}` failed with status {exit_status}: {stderr}"
    command: str
    exit_status: int
    stderr: str


class SnapshotFailed(Error):
    """A snapshot was not taken or not restored; the environment goes on."""

    reason = "snapshot_failed"
    code, status = "internal", 500
    template = "Snapshot {id} failed: {problem}"
    id: str
    problem: str
