"""A host: a server that runs the host daemon, as the control plane sees it."""

from enum import StrEnum

import msgspec


class HostState(StrEnum):
    """What the operator wants of the host."""

    ACTIVE = "active"
    CORDONED = "cordoned"
    DRAINING = "draining"


class HostHealth(StrEnum):
    """What we observe of the host.

    `unreachable`: silent for a while, or refusing us. `lost`: silent for so long that its machines were given up; that
    it refuses us never leads there.
    """

    OK = "ok"
    UNREACHABLE = "unreachable"
    LOST = "lost"


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """Amounts: a host's capacity, what is reserved of it, or what a machine needs."""

    cpus: int = 0
    #: MiB.
    ram_mb: int = 0
    #: GiB.
    storage_gb: int = 0
    #: Machines.
    vm_count: int = 0

    def plus(self, other: "Resources") -> "Resources":
        """Sum of both."""
        return Resources(
            cpus=self.cpus + other.cpus,
            ram_mb=self.ram_mb + other.ram_mb,
            storage_gb=self.storage_gb + other.storage_gb,
            vm_count=self.vm_count + other.vm_count,
        )


def effective(declared: Resources, reported: Resources) -> Resources:
    """The capacity in force: each amount as declared, else as reported."""
    return Resources(
        cpus=declared.cpus or reported.cpus,
        ram_mb=declared.ram_mb or reported.ram_mb,
        storage_gb=declared.storage_gb or reported.storage_gb,
        vm_count=declared.vm_count or reported.vm_count,
    )


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The durable record of one host."""

    id: str
    #: Base URL of the host daemon.
    url: str
    region: str = ""
    arch: str = "amd64"
    labels: dict[str, str] = {}
    #: Driver and version as the daemon reports them, for people.
    driver: str = ""
    version: str = ""
    #: Of the VMM, the guest agent and the guest kernel there; empty until the daemon has said them.
    vmm_version: str = ""
    agent_version: str = ""
    kernel: str = ""
    images: tuple[str, ...] = ()
    state: HostState = HostState.ACTIVE
    health: HostHealth = HostHealth.OK
    #: Why it is not well, as the last heartbeat found it; empty: it is.
    problem: str = ""
    #: Not well although it answers: it refuses us.
    is_refusing: bool = False
    #: What may be reserved: what the daemon reports, where the operator has declared nothing else.
    capacity: Resources
    #: What the operator declared at registration; 0: as reported.
    declared: Resources = Resources()
    #: Sum of the placements; derived, kept by the store in the same transaction.
    allocated: Resources = Resources()
    last_seen_ms: int = 0
    created_at_ms: int
    updated_at_ms: int
    revision: int = 0


def can_be_given_up(host: Host) -> bool:
    """May an operator remove it with what is placed there? Not while it may only be cut off for a moment."""
    return host.health is HostHealth.LOST or host.is_refusing
