"""How large a simulated world is, how long it lives, how bad its luck is, and which of its safeguards are off."""

from random import Random

import msgspec

from fusevm.core.policy import Policy


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """Size and length. The rest follows from the seed."""

    hosts: int = 5
    #: Users who want one.
    environments: int = 60
    replicas: int = 3
    #: Virtual seconds in which users come and things break.
    active_s: float = 300.0
    #: Virtual seconds that everything may take to come to rest afterwards.
    settle_s: float = 1_800.0
    #: Machines that fit on a host.
    room: int = 8


SMALL = Scale()
#: A few users ask for what cannot be, such as a start from a snapshot that is gone: more of them than environments.
FULL = Scale(hosts=50, environments=2_100, active_s=600.0, room=20)


class Safeguards(msgspec.Struct, frozen=True, kw_only=True):
    """What a correct system needs. Switch one off, and the checker must see it."""

    #: Hosts refuse orders that are older than one they have seen.
    fences: bool = True
    #: Hosts remember machines that they have destroyed.
    tombstones: bool = True
    #: An action is taken up only by whoever gets its lease.
    leases: bool = True
    #: A suspicion of reconcile is acted upon at its second strike.
    strikes: bool = True
    #: Hosts refuse orders that come after the moment until which they are valid.
    deadlines: bool = True
    #: A host that refuses us is told apart from one that is silent.
    refusals: bool = True


class Luck(msgspec.Struct, frozen=True, kw_only=True):
    """How often a call meets a fault (probabilities), and how often the world does (times per virtual minute)."""

    lost_request: float = 0.01
    lost_reply: float = 0.02
    #: Arrives long after its caller has given up.
    late: float = 0.02
    duplicate: float = 0.03
    refused_boot: float = 0.02
    slow_boot: float = 0.05
    failed_boot: float = 0.01
    #: Per host and minute.
    partitions: float = 0.4
    daemon_crashes: float = 0.2
    reboots: float = 0.04
    short_lists: float = 0.6
    vmm_crashes: float = 0.3
    #: Per replica and minute.
    kills: float = 0.6
    restarts: float = 0.3
    clock_steps: float = 0.6
    #: Of the database, per minute.
    stalls: float = 0.40
    lost_commits: float = 1.2
    outages: float = 0.3
    #: Part of the hosts that are lost for ever.
    lost_hosts: float = 0.15
    #: Per host and minute.
    stuck_ways: float = 0.1
    refusals: float = 0.1
    stuck_machines: float = 0.05


ALL_ON = Safeguards()
NO_FAULTS = Luck(**dict.fromkeys(Luck.__struct_fields__, 0.0))
#: Most of any probability, and what each kind of fault is multiplied by in one world.
_MOST, _FACTORS = 0.2, (0.0, 0.5, 1.0, 1.0, 3.0)


def luck_of(seed: int) -> Luck:
    """The bad luck of a world: each kind of fault is missing, rare, usual or frequent, so that seeds differ in kind."""
    chance = Random(f"{seed} luck")  # noqa: S311 - no secrets
    found: dict[str, float] = {}
    for name, usual in msgspec.structs.asdict(Luck()).items():
        most = _MOST if name in _PROBABILITIES else usual * max(_FACTORS)
        found[name] = min(most, usual * chance.choice(_FACTORS))
    return Luck(**found)


_PROBABILITIES = frozenset(
    {"lost_request", "lost_reply", "late", "duplicate", "refused_boot", "slow_boot", "failed_boot", "lost_hosts"}
)
#: Limits that are short enough for a simulation to see them pass.
POLICY = Policy(
    boot_deadline_ms=90_000,
    setup_deadline_ms=45_000,
    drain_deadline_ms=20_000,
    rotate_deadline_ms=20_000,
    snapshot_deadline_ms=30_000,
    restore_deadline_ms=30_000,
    linger_ms=60_000,
    host_unreachable_ms=15_000,
    host_lost_ms=60_000,
    queue_patience_ms=15_000,
)
