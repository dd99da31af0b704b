"""Bodies of Firecracker's API, field by field as its description of 1.16.1 has them. Unset fields are not sent.

Paths are inside the jail. Sizes and times are in the units of their names; a rate limiter counts bytes or operations
and refills in milliseconds. Unknown fields are refused by Firecracker.
"""

from typing import Literal

import msgspec

Api = Literal["Not started", "Running", "Paused"]


class _Body(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A request's or an answer's body."""


class TokenBucket(_Body, frozen=True, kw_only=True):
    """So much per `refill_time` ms; the burst comes once, on top."""

    size: int
    refill_time: int
    one_time_burst: int | msgspec.UnsetType = msgspec.UNSET


class RateLimiter(_Body, frozen=True, kw_only=True):
    """Limits of one device, in one direction."""

    bandwidth: TokenBucket | msgspec.UnsetType = msgspec.UNSET
    ops: TokenBucket | msgspec.UnsetType = msgspec.UNSET


class MachineConfig(_Body, frozen=True, kw_only=True):
    """`PUT /machine-config`."""

    vcpu_count: int
    mem_size_mib: int
    smt: bool = False
    track_dirty_pages: bool = False


class BootSource(_Body, frozen=True, kw_only=True):
    """`PUT /boot-source`. The kernel is an uncompressed ELF file on x86; `boot_args` has at most 2048 bytes."""

    kernel_image_path: str
    initrd_path: str | msgspec.UnsetType = msgspec.UNSET
    boot_args: str


class Drive(_Body, frozen=True, kw_only=True):
    """`PUT /drives/{drive_id}`; ids have letters, digits and `_` only."""

    drive_id: str
    path_on_host: str
    #: Required, and never true beside an initramfs.
    is_root_device: bool
    is_read_only: bool = False
    #: `Writeback`: what the guest flushes is flushed by the host.
    cache_type: Literal["Unsafe", "Writeback"] = "Unsafe"
    rate_limiter: RateLimiter | msgspec.UnsetType = msgspec.UNSET


class NetworkInterface(_Body, frozen=True, kw_only=True):
    """`PUT /network-interfaces/{iface_id}`; the tap is opened by name, in the jail's network namespace."""

    iface_id: str
    host_dev_name: str
    guest_mac: str


class Vsock(_Body, frozen=True, kw_only=True):
    """`PUT /vsock`; the context id may be the same in all machines: the socket tells them apart."""

    guest_cid: int
    uds_path: str


class MmdsConfig(_Body, frozen=True, kw_only=True):
    """`PUT /mmds/config`; the interfaces must have been configured before. The data are not part of it."""

    network_interfaces: tuple[str, ...]
    version: Literal["V1", "V2"] = "V1"


class Entropy(_Body, frozen=True, kw_only=True):
    """`PUT /entropy`."""

    rate_limiter: RateLimiter | msgspec.UnsetType = msgspec.UNSET


class Balloon(_Body, frozen=True, kw_only=True):
    """`PUT /balloon`. Statistics are there only when an interval was given at boot."""

    amount_mib: int
    deflate_on_oom: bool
    stats_polling_interval_s: int = 0
    free_page_reporting: bool = False


class Serial(_Body, frozen=True, kw_only=True):
    """`PUT /serial`: a file or a named pipe, and what the guest may write to it."""

    serial_out_path: str
    rate_limiter: TokenBucket | msgspec.UnsetType = msgspec.UNSET


class Logger(_Body, frozen=True, kw_only=True):
    """`PUT /logger`, once."""

    log_path: str
    level: Literal["Error", "Warning", "Info", "Debug"]
    show_level: bool = False


class Metrics(_Body, frozen=True, kw_only=True):
    """`PUT /metrics`, once: a JSON object per line, once a minute and on FlushMetrics."""

    metrics_path: str


class Action(_Body, frozen=True, kw_only=True):
    """`PUT /actions`."""

    action_type: Literal["InstanceStart"]


class InstanceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `GET /`: the only place that tells the state."""

    id: str
    state: Api
    vmm_version: str


class FaultBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every refusal."""

    fault_message: str
