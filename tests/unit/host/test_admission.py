"""What fits is admitted, what does not is refused with the name of the resource."""

import msgspec
import pytest

from fusevm.host.admission import Limits, Usage, check_admission, render_capacity, render_reserved
from fusevm.model.errors import HostFull
from fusevm.model.machine import MachineSpec

GIB = 1 << 30
LIMITS = Limits(
    max_machines=3,
    cpus=2,
    cpu_ratio=2.0,
    memory_mib=1000,
    overhead_mib=100,
    disk_bytes=10 * GIB,
    disk_ratio=2.0,
    disk_free_bytes=5 * GIB,
    disk_reserve_bytes=GIB,
)
SPEC = MachineSpec(image="i", cpus=1, memory_mib=400, disk_bytes=4 * GIB)
ONE = Usage(machines=1, active=1, cpus=1, memory_mib=400, disk_bytes=4 * GIB)


def changed(record, **fields):
    return msgspec.structs.replace(record, **fields)


def test_a_machine_that_fits_exactly_is_admitted():
    check_admission(ONE, LIMITS, SPEC, is_new=True)
    check_admission(Usage(), LIMITS, changed(SPEC, memory_mib=900, cpus=4, disk_bytes=20 * GIB), is_new=True)


@pytest.mark.parametrize(
    ("usage", "limits", "spec", "resource"),
    [
        (ONE, LIMITS, changed(SPEC, memory_mib=401), "memory"),
        (Usage(), LIMITS, changed(SPEC, memory_mib=901), "memory"),
        (changed(ONE, cpus=4), LIMITS, SPEC, "cpu"),
        (Usage(), LIMITS, changed(SPEC, cpus=5), "cpu"),
        (Usage(), LIMITS, changed(SPEC, disk_bytes=20 * GIB + 1), "disk"),
        (changed(ONE, machines=3), LIMITS, SPEC, "machines"),
        (ONE, changed(LIMITS, disk_free_bytes=GIB), SPEC, "disk"),
    ],
)
def test_a_machine_that_does_not_fit_is_refused(usage: Usage, limits: Limits, spec: MachineSpec, resource: str):
    with pytest.raises(HostFull, match=resource):
        check_admission(usage, limits, spec, is_new=True)


def test_a_start_books_memory_but_neither_disk_nor_a_place():
    full = changed(ONE, machines=3, disk_bytes=20 * GIB)
    check_admission(full, LIMITS, SPEC, is_new=False)
    with pytest.raises(HostFull, match="memory"):
        check_admission(changed(full, memory_mib=500), LIMITS, SPEC, is_new=False)
    with pytest.raises(HostFull, match="disk"):
        check_admission(ONE, changed(LIMITS, disk_free_bytes=0), SPEC, is_new=False)


def test_what_is_shown_counts_overhead_and_leaves_ratios_to_the_control_plane():
    assert msgspec.to_builtins(render_capacity(LIMITS)) == {"cpus": 2, "ram_mb": 1000, "storage_gb": 10, "vm_count": 3}
    reserved = render_reserved(ONE, LIMITS)
    assert msgspec.to_builtins(reserved) == {"cpus": 1, "ram_mb": 500, "storage_gb": 4, "vm_count": 1}
