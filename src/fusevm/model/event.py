"""What moves an environment: requests, outcomes of actions, observations.

`core.lifecycle.step` is fed with them, one at a time; what it makes known of them is a `Fact`.
"""

import msgspec

from fusevm.model.environment import Timings
from fusevm.model.fact import Kind
from fusevm.model.network import Network, PublishedPort
from fusevm.model.setup import AgentStatus, HealthStatus
from fusevm.model.snapshot import Snapshot


class EventHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What all events carry."""

    #: Id of the request, action or observation that led to it.
    cause: str


class BootSucceeded(EventHeader, frozen=True, kw_only=True, tag="boot_succeeded"):
    seq: int
    timings: Timings = Timings()
    host_address: str = ""
    ports: tuple[PublishedPort, ...] = ()


class BootRefused(EventHeader, frozen=True, kw_only=True, tag="boot_refused"):
    """The host answered that the machine will not come up."""

    seq: int
    reason: str
    message: str


class Placed(EventHeader, frozen=True, kw_only=True, tag="placed"):
    """A waiting environment got a place; the store books it in the same transaction."""

    host_id: str


class SetUpSucceeded(EventHeader, frozen=True, kw_only=True, tag="set_up_succeeded"):
    seq: int
    setup_ms: float = 0.0


class ActionRefused(EventHeader, frozen=True, kw_only=True, tag="action_refused"):
    """A setup, drain, rotation, snapshot or restore failed for good."""

    seq: int
    reason: str
    message: str


class AgentDrained(EventHeader, frozen=True, kw_only=True, tag="agent_drained"):
    """The drain is over. `message` is empty when the daemon ended as it should."""

    seq: int
    exit_code: int | None = None
    message: str = ""


class TokenRotated(EventHeader, frozen=True, kw_only=True, tag="token_rotated"):
    seq: int


class NetworkChanged(EventHeader, frozen=True, kw_only=True, tag="network_changed"):
    """The host holds the machine to the new policy."""

    seq: int


class SnapshotTaken(EventHeader, frozen=True, kw_only=True, tag="snapshot_taken"):
    seq: int
    size_bytes: int
    digest: str


class SnapshotRestored(EventHeader, frozen=True, kw_only=True, tag="snapshot_restored"):
    seq: int


class DestroyConfirmed(EventHeader, frozen=True, kw_only=True, tag="destroy_confirmed"):
    seq: int


class OutcomeUnknown(EventHeader, frozen=True, kw_only=True, tag="outcome_unknown"):
    """The host did not answer, or failed in a way that a repetition may cure."""

    seq: int
    message: str


class DestroyRequested(EventHeader, frozen=True, kw_only=True, tag="destroy_requested"):
    pass


class DrainRequested(EventHeader, frozen=True, kw_only=True, tag="drain_requested"):
    pass


class RotateRequested(EventHeader, frozen=True, kw_only=True, tag="rotate_requested"):
    """The new token is in the sealed setup that is saved with this event."""


class NetworkRequested(EventHeader, frozen=True, kw_only=True, tag="network_requested"):
    #: Checked.
    network: Network


class SnapshotRequested(EventHeader, frozen=True, kw_only=True, tag="snapshot_requested"):
    #: In state `creating`.
    snapshot: Snapshot


class RestoreRequested(EventHeader, frozen=True, kw_only=True, tag="restore_requested"):
    #: As read; must be ready and of this environment.
    snapshot: Snapshot


class AgentSeen(EventHeader, frozen=True, kw_only=True, tag="agent_seen"):
    """The guest agent told how the user's daemon is."""

    status: AgentStatus


class HealthSeen(EventHeader, frozen=True, kw_only=True, tag="health_seen"):
    """The guest agent told the verdict of the health check."""

    status: HealthStatus


class Reported(EventHeader, frozen=True, kw_only=True, tag="reported"):
    """Something to tell that changes nothing."""

    kind: Kind
    message: str = ""
    reason: str = ""
    data: dict[str, str] = {}


class OutputSeen(EventHeader, frozen=True, kw_only=True, tag="output_seen"):
    """The startup script wrote something."""

    #: stdout or stderr.
    stream: str
    #: Of its first byte, and of the one after it.
    offset: int
    end: int
    text: str


class CommandEnd(msgspec.Struct, frozen=True, kw_only=True):
    """A command that a user had run in the machine is over; of a background process: was started."""

    #: Id of the request.
    cause: str
    message: str
    #: Empty, or why its end is not known.
    reason: str = ""
    data: dict[str, str] = {}


class CommandsEnded(EventHeader, frozen=True, kw_only=True, tag="commands_ended"):
    """Commands that ended since the last report, in this order."""

    commands: tuple[CommandEnd, ...]


class MachineExited(EventHeader, frozen=True, kw_only=True, tag="machine_exited"):
    """The host saw the VMM end, lists the machine as failed or stopped, or as stuck (two strikes already counted)."""

    machine_id: str
    message: str


class MachineMissing(EventHeader, frozen=True, kw_only=True, tag="machine_missing"):
    """The host answers and does not know the machine (two strikes already counted)."""

    machine_id: str


class HostLost(EventHeader, frozen=True, kw_only=True, tag="host_lost"):
    """The host was silent for so long that its machines are given up and fenced."""

    host_id: str


class ActivitySeen(EventHeader, frozen=True, kw_only=True, tag="activity_seen"):
    """Somebody used the machine."""

    #: None: now.
    at_ms: int | None = None


class Tick(EventHeader, frozen=True, kw_only=True, tag="tick"):
    """Look at the deadlines."""


Event = (
    BootSucceeded
    | BootRefused
    | Placed
    | SetUpSucceeded
    | ActionRefused
    | AgentDrained
    | TokenRotated
    | NetworkChanged
    | SnapshotTaken
    | SnapshotRestored
    | DestroyConfirmed
    | OutcomeUnknown
    | DestroyRequested
    | DrainRequested
    | RotateRequested
    | NetworkRequested
    | SnapshotRequested
    | RestoreRequested
    | AgentSeen
    | HealthSeen
    | Reported
    | OutputSeen
    | CommandsEnded
    | MachineExited
    | MachineMissing
    | HostLost
    | ActivitySeen
    | Tick
)
