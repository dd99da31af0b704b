"""What is said to Firecracker's API, in which order: pure functions of a machine's plan.

The order is the documented one: logger, metrics and serial first, because they may not come later; InstanceStart last.
"""

from typing import Final, Literal, NamedTuple

import msgspec

from fusevm.host.vmm.driver import BootPlan, Rate
from fusevm.host.vmm.firecracker import records
from fusevm.host.vmm.firecracker.jail import Inside

Method = Literal["GET", "PUT", "PATCH"]

#: Devices are few and known, so nothing is probed: serial port and keyboard controller cost tens of ms. A panic ends
#: the machine at once. What the kernel does for its own defence guards nothing here but the machine itself.
_KERNEL_ALWAYS: Final = (
    "console=ttyS0 quiet loglevel=1 reboot=k panic=-1 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.dumbkbd "
    "i8042.nopnp cryptomgr.notests swiotlb=noforce pci=off mitigations=off"
)
#: The kernel's own limit (COMMAND_LINE_SIZE on x86).
MAX_BOOT_ARGS: Final = 2048
#: The same in every machine: a context id has a meaning only together with the machine's own socket.
GUEST_CID: Final = 3
NIC: Final = "net0"
#: Console output that a guest may write: at once, and per second.
_SERIAL_BURST, _SERIAL_PER_S = 1 << 20, 64 << 10
#: Random bytes that a guest may take per second: it seeds itself with some hundred, once.
_ENTROPY_PER_S: Final = 64 << 10
#: Buckets are filled anew so often, in milliseconds.
_REFILL_MS: Final = 1000


class Call(NamedTuple):
    """One request to the API socket."""

    method: Method
    path: str
    body: msgspec.Struct | None = None


def plan_boot(plan: BootPlan, inside: Inside) -> list[Call]:
    """Everything from a fresh process to a running guest."""
    calls = [
        *plan_sinks(inside),
        _put("/machine-config", records.MachineConfig(vcpu_count=plan.cpus, mem_size_mib=plan.memory_mib)),
        _put(
            "/boot-source",
            records.BootSource(
                kernel_image_path=inside.kernel, initrd_path=inside.initramfs, boot_args=render_boot_args(plan)
            ),
        ),
    ]
    # Firecracker gives disks serials of its own: the agent takes the first for the image, the second for the overlay.
    if plan.image is not None:
        calls.append(_drive("image", inside.image, plan.disk_rate, is_read_only=True))
    if plan.overlay is not None:
        calls.append(_drive("overlay", inside.overlay, plan.disk_rate, is_read_only=False))
    if plan.nic is not None:
        nic = records.NetworkInterface(iface_id=NIC, host_dev_name=plan.nic.tap, guest_mac=plan.nic.mac)
        calls.append(_put(f"/network-interfaces/{NIC}", nic))
        # Version 1 answers whoever asks, also somebody else's request that a program in the guest passes on.
        calls.append(_put("/mmds/config", records.MmdsConfig(network_interfaces=(NIC,), version="V2")))
    return [
        *calls,
        _put("/vsock", records.Vsock(guest_cid=GUEST_CID, uds_path=inside.vsock)),
        _put("/entropy", records.Entropy(rate_limiter=records.RateLimiter(bandwidth=_bucket(_ENTROPY_PER_S)))),
        _put("/balloon", records.Balloon(amount_mib=0, deflate_on_oom=True, free_page_reporting=True)),
        _put("/actions", records.Action(action_type="InstanceStart")),
    ]


def plan_sinks(inside: Inside) -> list[Call]:
    """Where log, metrics and console go; set anew for each process, a loaded snapshot has none."""
    limit = _bucket(_SERIAL_PER_S, burst=_SERIAL_BURST)
    return [
        # At `Info` it says how it has ended, which nobody else can tell a daemon that did not start it.
        _put("/logger", records.Logger(log_path=inside.log, level="Info", show_level=True)),
        _put("/metrics", records.Metrics(metrics_path=inside.metrics)),
        _put("/serial", records.Serial(serial_out_path=inside.console, rate_limiter=limit)),
    ]


def render_boot_args(plan: BootPlan) -> str:
    """The kernel's command line: what this driver needs, then the agent's."""
    return f"{_KERNEL_ALWAYS} {plan.command_line}".strip()


def _drive(name: str, path: str, rate: Rate, *, is_read_only: bool) -> Call:
    # What the guest has synced survives a crash of the host: docs/decisions/0004.
    drive = records.Drive(
        drive_id=name,
        path_on_host=path,
        is_root_device=False,
        is_read_only=is_read_only,
        cache_type="Unsafe" if is_read_only else "Writeback",
        rate_limiter=_limiter(rate),
    )
    return _put(f"/drives/{name}", drive)


def _limiter(rate: Rate) -> records.RateLimiter | msgspec.UnsetType:
    if rate == Rate():
        return msgspec.UNSET
    return records.RateLimiter(
        bandwidth=_bucket(rate.bytes_per_s) if rate.bytes_per_s else msgspec.UNSET,
        ops=_bucket(rate.ops_per_s) if rate.ops_per_s else msgspec.UNSET,
    )


def _bucket(per_s: int, burst: int | msgspec.UnsetType = msgspec.UNSET) -> records.TokenBucket:
    return records.TokenBucket(size=per_s, refill_time=_REFILL_MS, one_time_burst=burst)


def _put(path: str, body: msgspec.Struct) -> Call:
    return Call("PUT", path, body)
