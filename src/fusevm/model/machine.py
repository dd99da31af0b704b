"""A machine: one microVM on one host, as the host daemon sees it."""

from enum import StrEnum

import msgspec

from fusevm.model.environment import Timings
from fusevm.model.network import Exposure, Network, PublishedPort


class Phase(StrEnum):
    """Where a machine is in its life."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    FAILED = "failed"
    DELETING = "deleting"

    @classmethod
    def _missing_(cls, value: object) -> "Phase | None":
        """Machines of the contract's users are shown to everybody in the contract's word (`host.contract.render`)."""
        return cls.CREATING if value == "starting" else None


#: The only transitions the journal accepts. A deleted machine has no record but a tombstone.
ALLOWED: dict[Phase, frozenset[Phase]] = {
    Phase.CREATING: frozenset({Phase.RUNNING, Phase.FAILED, Phase.DELETING}),
    Phase.RUNNING: frozenset({Phase.PAUSED, Phase.STOPPED, Phase.FAILED, Phase.CREATING, Phase.DELETING}),
    Phase.PAUSED: frozenset({Phase.RUNNING, Phase.STOPPED, Phase.FAILED, Phase.CREATING, Phase.DELETING}),
    Phase.STOPPED: frozenset({Phase.CREATING, Phase.DELETING}),
    Phase.FAILED: frozenset({Phase.STOPPED, Phase.CREATING, Phase.DELETING}),
    Phase.DELETING: frozenset(),
}


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A moment on a host's own steady clock, which nobody sets. Moments of different clocks cannot be compared."""

    #: Changes whenever that clock begins anew: the host's boot id.
    clock: str
    #: Milliseconds since it began.
    ms: int


class Fence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who gives an order. Every call that changes a machine carries one; the host refuses what is out of date."""

    #: Id of the cluster (control-plane database).
    cluster: str
    #: Environment.
    uid: str
    incarnation: int
    action_seq: int
    #: An order of the control plane is taken up until then, by the host's clock. None: what users send, and what
    #: cannot come too late. Never kept.
    valid_until: Moment | None = None


class MachineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine is made of."""

    #: Name or digest; the record keeps the digest.
    image: str
    cpus: int = 1
    memory_mib: int = 512
    #: Size of the private writable disk.
    disk_bytes: int = 4 << 30
    hostname: str = ""
    #: Environment of every command.
    env: dict[str, str] = {}
    network: Network = Network()
    #: Ports that are published when it is made.
    expose: tuple[Exposure, ...] = ()


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """What a user of computer-host's machine API asked the machine to be made of."""

    kernel_image_url: str = ""
    rootfs_url: str = ""


class Login(msgspec.Struct, frozen=True, kw_only=True):
    """Who may log in to a machine by SSH, and the key by which it proves who it is."""

    #: Private, in OpenSSH's format. A secret.
    host_key: str
    #: `ssh-ed25519 AAAA...`, without a comment.
    host_public_key: str
    authorized_keys: tuple[str, ...] = ()
    #: Certificate authorities whose users are let in.
    trusted_user_ca_keys: tuple[str, ...] = ()


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a machine one of computer-host's machine API: it belongs to no cluster, and people log in to it."""

    #: None: it is of an image of the host's own.
    artifact: Artifact | None = None
    login: Login


class Isolation(StrEnum):
    """How a machine is separated from the rest of the host."""

    #: Own network namespace, tap, uid and gid, cgroup.
    NAMESPACE = "namespace"
    #: Daemon without root: QEMU user network, the daemon's own uid, no cgroup.
    USER_NETWORK = "user-network"


class VmmProcess(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of a VMM process: a bare pid may be reused, pid and start time together are not."""

    pid: int
    #: Field 22 of /proc/<pid>/stat: clock ticks since boot (proc(5)).
    start_ticks: int
    #: /proc/sys/kernel/random/boot_id of the host; after a reboot no pid means anything.
    boot_id: str


class DiskSeed(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine's disk began with: a snapshot of the same host, which may be gone since."""

    snapshot_id: str
    #: Names the content: the first 16 hex digits of the snapshot's digest.
    base: str


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The durable record of one machine on its host."""

    id: str
    fence: Fence
    spec: MachineSpec
    phase: Phase
    image_digest: str = ""
    kernel_digest: str = ""
    #: Whose VMM it runs in, or ran in last; before that, whom it was made for.
    driver: str = ""
    isolation: Isolation = Isolation.NAMESPACE
    #: Reserved numbers; -1: none. Network slot and user id of the VMM.
    slot: int = -1
    uid: int = -1
    #: Address by which the host reaches the guest's namespace; empty without one.
    address: str = ""
    vmm: VmmProcess | None = None
    #: Per-boot secret that the right guest repeats; 32 hex digits.
    nonce: str = ""
    #: What its disk began with; None: a blank.
    seed: DiskSeed | None = None
    #: A restore is under way: what its disk is about to become.
    next_seed: DiskSeed | None = None
    #: Number of the order that put its disk back last; -1: none did.
    restored_seq: int = -1
    #: None: it was made by Fuse's own API.
    contract: Contract | None = None
    #: Ports of the host that lead to it; kept while it is stopped.
    ports: tuple[PublishedPort, ...] = ()
    #: How often it was started.
    generation: int = 0
    timings: Timings = Timings()
    #: Why it failed or stopped, for people.
    error: str = ""
    created_at_ms: int
    started_at_ms: int | None = None
    updated_at_ms: int
