"""Limits and delays that the decisions depend on. One record, filled from the settings at start."""

import msgspec


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Durations in milliseconds unless the name says otherwise."""

    default_cpus: int = 1
    default_ram_mb: int = 512
    default_storage_gb: int = 4
    default_image: str = "debian-12"
    #: -1: unlimited.
    default_max_runtime_seconds: int = 7200
    #: May a request ask for -1?
    allow_unlimited_runtime: bool = True
    #: Longest runtime that a request may ask for; 0: none is too long.
    longest_runtime_seconds: int = 0
    default_idle_timeout_seconds: int = 0
    max_cpus: int = 32
    min_ram_mb: int = 128
    #: 16 TiB and 1 PiB: no host is larger, and sums stay far inside of 64 bits.
    max_ram_mb: int = 1 << 24
    max_storage_gb: int = 1 << 20
    #: How long a boot may take, repetitions included.
    boot_deadline_ms: int = 120_000
    #: How long a setup may take, repetitions included; the startup script's own limit comes on top.
    setup_deadline_ms: int = 60_000
    default_startup_timeout_s: int = 30
    max_startup_timeout_s: int = 3_600
    #: How long the drain command and the daemon's end may take together.
    drain_deadline_ms: int = 30_000
    rotate_deadline_ms: int = 30_000
    network_deadline_ms: int = 30_000
    snapshot_deadline_ms: int = 600_000
    restore_deadline_ms: int = 600_000
    #: Longest wait for a place that a request may ask for.
    max_queue_seconds: int = 86_400
    #: After this long without a place, a host is kept free for the environment that has waited longest.
    queue_patience_ms: int = 30_000
    #: How long a drained environment stays before it is destroyed.
    linger_ms: int = 3_600_000
    #: Activity closer together than this is written once; an idle timeout ends that much later, never earlier.
    activity_grain_ms: int = 5_000
    #: First and largest pause between attempts at one action.
    backoff_first_ms: int = 250
    backoff_max_ms: int = 30_000
    #: Silence after which a host is called unreachable, and lost.
    host_unreachable_ms: int = 15_000
    host_lost_ms: int = 120_000
    #: Placement: reserved may exceed capacity by these factors, in percent.
    cpu_overcommit_percent: int = 400
    ram_overcommit_percent: int = 100
    storage_overcommit_percent: int = 400
    #: `spread` or `binpack`.
    placement: str = "spread"
