"""An environment: its specification, its states and the table of allowed transitions, its record, and the actions and
events that move it. `core.lifecycle.step` decides; this module only says what exists."""

from enum import StrEnum

import msgspec

from fusevm.model.network import Exposure, Network, PublishedPort
from fusevm.model.setup import AgentStatus, Duties, HealthStatus
from fusevm.model.snapshot import Snapshot


class State(StrEnum):
    """Where an environment is. `destroyed` and `failed` are terminal."""

    PROVISIONING = "provisioning"
    RUNNING = "running"
    PAUSED = "paused"
    DRAINING = "draining"
    DESTROYING = "destroying"
    DESTROYED = "destroyed"
    FAILED = "failed"


class Desired(StrEnum):
    """What the user wants. Changes at once; the observed state follows."""

    RUNNING = "running"
    DRAINED = "drained"
    DESTROYED = "destroyed"


#: The only transitions the store accepts. `failed` directly: the host is lost and nobody is there to confirm.
ALLOWED: dict[State, frozenset[State]] = {
    # Directly to an end: it was still waiting for a place, and no machine was ever made.
    State.PROVISIONING: frozenset({State.RUNNING, State.DESTROYING, State.DESTROYED, State.FAILED}),
    State.RUNNING: frozenset({State.PAUSED, State.DRAINING, State.DESTROYING, State.FAILED}),
    State.PAUSED: frozenset({State.RUNNING, State.DESTROYING, State.FAILED}),
    State.DRAINING: frozenset({State.DESTROYING, State.FAILED}),
    State.DESTROYING: frozenset({State.DESTROYED, State.FAILED}),
    State.DESTROYED: frozenset(),
    State.FAILED: frozenset(),
}
TERMINAL = frozenset(state for state, following in ALLOWED.items() if not following)


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, with all defaults filled in (`core.spec.complete`)."""

    #: Virtual CPUs, 1..32.
    cpus: int
    #: Memory in MiB, >= 128 (the contract's name says MB).
    ram_mb: int
    #: Writable disk in GiB, >= 1.
    storage_gb: int
    #: Name or digest of the image.
    image: str
    region: str = ""
    arch: str = ""
    labels: dict[str, str] = {}
    #: Exact pin; empty: any host.
    host_id: str = ""
    #: Seconds from getting a place to the end; -1: unlimited.
    max_runtime_seconds: int = 7200
    #: Seconds without activity to the end; 0: never.
    idle_timeout_seconds: int = 0
    network: Network = Network()
    #: Ports of the machine that its host publishes.
    expose: tuple[Exposure, ...] = ()
    #: Snapshot whose disk the machine starts from; empty: the image alone.
    seed_snapshot_id: str = ""
    #: How long it may wait for a place when none fits; 0: refuse at once.
    queue_seconds: int = 0


class Timings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Milliseconds spent per phase of a create, as measured by whoever did the work."""

    schedule_ms: float = 0.0
    #: Host: reservations, disk, network, process start.
    prepare_ms: float = 0.0
    #: Process start to the first byte of the guest agent.
    boot_ms: float = 0.0
    #: First byte to a configured agent.
    agent_ms: float = 0.0
    #: Whole call at the host.
    host_ms: float = 0.0
    #: Delivering the setup, the startup script included.
    setup_ms: float = 0.0


class ActionHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What all actions carry."""

    #: Order of actions of one environment; an outcome with another number than the pending one changes nothing.
    seq: int
    #: Why: the id of the request, tick or observation behind it.
    cause: str
    #: How often it was tried before.
    attempt: int = 0
    #: Do not start before (backoff). Milliseconds since the epoch.
    not_before_ms: int = 0


class BootMachine(ActionHeader, frozen=True, kw_only=True, tag="boot_machine"):
    """Make the machine and wait until its agent answers. Idempotent by (uid, incarnation)."""

    host_id: str
    machine_id: str
    incarnation: int
    #: When to give up. Milliseconds since the epoch.
    deadline_ms: int


class DestroyMachine(ActionHeader, frozen=True, kw_only=True, tag="destroy_machine"):
    """Destroy the machine and leave a tombstone. Idempotent; also right when it was never made."""

    host_id: str
    machine_id: str
    incarnation: int


class SetUpMachine(ActionHeader, frozen=True, kw_only=True, tag="set_up_machine"):
    """Deliver the setup, run the startup script, start the daemon. Idempotent by (uid, incarnation)."""

    host_id: str
    machine_id: str
    incarnation: int
    deadline_ms: int


class DrainAgent(ActionHeader, frozen=True, kw_only=True, tag="drain_agent"):
    """Run the drain command and wait for the daemon's end. Idempotent."""

    host_id: str
    machine_id: str
    incarnation: int
    deadline_ms: int


class RotateToken(ActionHeader, frozen=True, kw_only=True, tag="rotate_token"):
    """Deliver the sealed setup's new token and restart the daemon. Idempotent."""

    host_id: str
    machine_id: str
    incarnation: int
    deadline_ms: int


class ChangeNetwork(ActionHeader, frozen=True, kw_only=True, tag="change_network"):
    """Hold the machine to another network policy. Idempotent."""

    host_id: str
    machine_id: str
    incarnation: int
    deadline_ms: int
    network: Network


class SnapshotMachine(ActionHeader, frozen=True, kw_only=True, tag="snapshot_machine"):
    """Take a snapshot. Idempotent by the snapshot's id."""

    host_id: str
    machine_id: str
    incarnation: int
    deadline_ms: int
    #: As it was when the action was given.
    snapshot: Snapshot


class RestoreMachine(ActionHeader, frozen=True, kw_only=True, tag="restore_machine"):
    """Put the machine's disk back to a snapshot, and start it again. Idempotent by the action's seq."""

    host_id: str
    machine_id: str
    incarnation: int
    deadline_ms: int
    snapshot: Snapshot


Action = (
    BootMachine
    | SetUpMachine
    | DrainAgent
    | RotateToken
    | ChangeNetwork
    | SnapshotMachine
    | RestoreMachine
    | DestroyMachine
)
#: Actions that are given up at their deadline; a destroy never is.
TimedAction = BootMachine | SetUpMachine | DrainAgent | RotateToken | ChangeNetwork | SnapshotMachine | RestoreMachine


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How it will end, decided when the end begins."""

    #: `destroyed` or `failed`.
    state: State
    #: Stable snake_case: `deleted`, `boot_timeout`, `setup_timeout`, `no_capacity`, `max_runtime`, `idle`, `linger`,
    #: `machine_exited`, `machine_missing`, `host_lost`, or the reason of the error that the boot or the setup met.
    reason: str
    #: A sentence for people.
    message: str = ""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The durable record of one environment. Changed only by `core.lifecycle`."""

    #: Key everywhere: time-ordered, never reused.
    uid: str
    task_id: str
    tenant: str = ""
    spec: Spec
    state: State
    desired: Desired
    duties: Duties = Duties()
    #: Set by placement; empty while it waits for a place.
    host_id: str
    machine_id: str
    #: 1 for the first machine; grows with every new machine.
    incarnation: int
    #: Number of the newest action ever given.
    action_seq: int
    #: The one action under way, or None.
    pending: Action | None = None
    ending: Ending | None = None
    #: Last problem, for people; empty when all is well.
    error: str = ""
    timings: Timings = Timings()
    #: Under which name or address its host is reached, and the ports there that lead to its machine.
    host_address: str = ""
    ports: tuple[PublishedPort, ...] = ()
    #: The user's daemon and the health check, as last seen; None: not seen yet, or there is none.
    agent: AgentStatus | None = None
    health: HealthStatus | None = None
    #: Stream of the startup script to the offset up to which its output was told.
    startup_told: dict[str, int] = {}
    #: While it waits for a place: when it gives up.
    queued_until_ms: int | None = None
    #: Compare-and-swap counter of the row; +1 with every change.
    revision: int = 0
    #: Number of the newest event; gapless.
    event_seq: int = 0
    #: All times in milliseconds since the epoch.
    created_at_ms: int
    updated_at_ms: int
    #: When it got its place; None: it waits, or never got one.
    placed_at_ms: int | None = None
    running_at_ms: int | None = None
    draining_at_ms: int | None = None
    ended_at_ms: int | None = None
    last_activity_ms: int

    @property
    def id(self) -> str:
        """The public id."""
        return "fuse-" + self.task_id

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def is_queued(self) -> bool:
        """Does it wait for a place?"""
        return self.queued_until_ms is not None and not self.is_terminal
