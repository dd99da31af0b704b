"""May one more machine run here? Pure arithmetic over what is booked, before any side effect.

Memory is never overcommitted and counts what the VMM itself needs; CPUs and disk are, by ratio; the disk also has a
watermark, since sparse disks grow after they were admitted.
"""

from __future__ import annotations

import msgspec

from fusevm.host.watermarks import Place
from fusevm.model.errors import BadField, HostFull
from fusevm.model.host import Resources
from fusevm.model.machine import MachineSpec
from fusevm.wire.host_api import AdmissionBody, AmountBody, PlaceBody

_GIB = 1 << 30


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What the journal's machines have booked."""

    #: All machines, stopped and failed ones included.
    machines: int = 0
    #: Those with a VMM, or about to have one.
    active: int = 0
    #: Of the active ones.
    cpus: int = 0
    memory_mib: int = 0
    #: Of all: a stopped machine keeps its disk.
    disk_bytes: int = 0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to book, reserves already taken off."""

    max_machines: int
    #: CPUs of the host, and virtual ones given out for each.
    cpus: int
    cpu_ratio: float
    memory_mib: int
    #: What a VMM takes besides the guest's memory.
    overhead_mib: int
    #: Size of the file system, and bytes of disk given out for each.
    disk_bytes: int
    disk_ratio: float
    #: Free on the file system now, and what must stay free.
    disk_free_bytes: int
    disk_reserve_bytes: int
    #: Every file system that machines take from, with its watermarks.
    places: tuple[Place, ...] = ()

    @property
    def bookable_disk_bytes(self) -> int:
        """Bytes of disk that all machines together may have."""
        return int(self.disk_bytes * self.disk_ratio)


def check_room(limits: Limits, needed_bytes: int) -> None:
    """Raise HostFull when a copy would take what must stay free."""
    free = limits.disk_free_bytes - limits.disk_reserve_bytes
    if needed_bytes >= free:
        raise HostFull(resource="disk", needed=f"{needed_bytes} bytes", free=f"{max(0, free)} bytes")


def check_admission(usage: Usage, limits: Limits, spec: MachineSpec, *, is_new: bool) -> None:
    """Raise HostFull, naming the resource, when the machine does not fit. A start of a known machine books no disk."""
    memory_free = limits.memory_mib - usage.memory_mib - usage.active * limits.overhead_mib
    memory_needed = spec.memory_mib + limits.overhead_mib
    if memory_needed > memory_free:
        raise HostFull(resource="memory", needed=f"{memory_needed} MiB", free=f"{max(0, memory_free)} MiB")
    cpus_free = int(limits.cpus * limits.cpu_ratio) - usage.cpus
    if spec.cpus > cpus_free:
        raise HostFull(resource="cpu", needed=str(spec.cpus), free=str(max(0, cpus_free)))
    above_watermark = limits.disk_free_bytes - limits.disk_reserve_bytes
    if above_watermark <= 0:
        raise HostFull(
            resource="disk",
            needed=f"{limits.disk_reserve_bytes} bytes kept free",
            free=f"{limits.disk_free_bytes} bytes",
        )
    for place in limits.places:
        if place.shortage is not None:
            needed, free = place.shortage
            raise HostFull(resource="inodes" if "inodes" in needed else "disk", needed=needed, free=free)
    if not is_new:
        return
    disk_free = limits.bookable_disk_bytes - usage.disk_bytes
    if spec.disk_bytes > disk_free:
        raise HostFull(resource="disk", needed=f"{spec.disk_bytes} bytes", free=f"{max(0, disk_free)} bytes")
    if usage.machines >= limits.max_machines:
        raise HostFull(resource="machines", needed="1", free="0")


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine is to become; 0: as it is."""

    memory_mib: int = 0
    disk_bytes: int = 0


def resized(spec: MachineSpec, size: Size, others: Usage, limits: Limits) -> MachineSpec:
    """The spec of a machine of another size. Raises BadField for a smaller disk, HostFull for one that cannot be.

    `others` is what the other machines have booked: of disk it counts, of memory only what the host has at all.
    The machine is at rest afterwards, and its start is admitted like any other.
    """
    disk_bytes = size.disk_bytes or spec.disk_bytes
    if disk_bytes < spec.disk_bytes:
        problem = f"must not be less than the {spec.disk_bytes} that the disk has: disks only grow"
        raise BadField(field="storage_bytes", problem=problem)
    memory_mib = size.memory_mib or spec.memory_mib
    spec = msgspec.structs.replace(spec, memory_mib=memory_mib, disk_bytes=disk_bytes)
    booked = msgspec.structs.replace(others, machines=0, active=0, cpus=0, memory_mib=0)
    check_admission(booked, limits, spec, is_new=True)
    return spec


def render_capacity(limits: Limits) -> Resources:
    """What there is, without ratios: whoever places machines has ratios of their own."""
    return Resources(
        cpus=limits.cpus,
        ram_mb=limits.memory_mib,
        storage_gb=limits.disk_bytes // _GIB,
        vm_count=limits.max_machines,
    )


def render_reserved(usage: Usage, limits: Limits) -> Resources:
    """What is booked, VMM overhead included."""
    return Resources(
        cpus=usage.cpus,
        ram_mb=usage.memory_mib + usage.active * limits.overhead_mib,
        storage_gb=-(-usage.disk_bytes // _GIB),
        vm_count=usage.machines,
    )


def render_admission(usage: Usage, limits: Limits) -> AdmissionBody:
    """The numbers that a create is measured by, as of now."""
    memory = usage.memory_mib + usage.active * limits.overhead_mib
    places = [
        PlaceBody(
            path=place.path,
            holds=place.holds,
            free_bytes=place.free_bytes,
            reserve_bytes=place.reserve_bytes,
            free_inodes=place.free_inodes,
            reserve_inodes=place.reserve_inodes if place.all_inodes else 0,
            is_low=place.shortage is not None,
        )
        for place in limits.places
    ]
    return AdmissionBody(
        cpus=AmountBody(limit=int(limits.cpus * limits.cpu_ratio), booked=usage.cpus),
        memory_mib=AmountBody(limit=limits.memory_mib, booked=memory),
        disk_bytes=AmountBody(limit=limits.bookable_disk_bytes, booked=usage.disk_bytes),
        machines=AmountBody(limit=limits.max_machines, booked=usage.machines),
        overhead_mib=limits.overhead_mib,
        places=places,
    )
