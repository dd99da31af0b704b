"""What fits is admitted, what does not is refused with the name of the resource."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevm.host.admission import (
    Limits,
    Usage,
    check_admission,
    render_admission,
    render_capacity,
    render_reserved,
)
from fusevm.host.config import HostConfig
from fusevm.host.watermarks import Place, observe_places
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


# -- watermarks -------------------------------------------------------------------------------------------------------

PLACE = Place(
    path="/data",
    holds="disks",
    free_bytes=3 * GIB,
    reserve_bytes=2 * GIB,
    free_inodes=5000,
    all_inodes=100_000,
    reserve_inodes=2000,
)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_file_system_below_a_watermark_refuses_and_is_named(*, is_new: bool):
    roomy = changed(LIMITS, places=(PLACE, changed(PLACE, path="/images", all_inodes=0, free_inodes=0)))
    check_admission(Usage(), roomy, SPEC, is_new=is_new)
    for place, words in (
        (changed(PLACE, path="/images", free_bytes=2 * GIB), f"{2 * GIB} bytes kept free below /images"),
        (changed(PLACE, free_inodes=2000), "2000 inodes kept free below /data"),
    ):
        with pytest.raises(HostFull, match=words) as caught:
            check_admission(Usage(), changed(LIMITS, places=(PLACE, place)), SPEC, is_new=is_new)
        assert caught.value.resource == ("inodes" if "inodes" in words else "disk")
        assert "delete or stop machines" in caught.value.message
        low = [body.path for body in render_admission(Usage(), changed(LIMITS, places=(place,))).places if body.is_low]
        assert low == [place.path]


def test_every_file_system_is_looked_at_once(tmp_path: Path):
    (tmp_path / "data").mkdir()
    config = HostConfig(data_root=tmp_path / "data", artefact_root=tmp_path / "none", run_dir=Path("/proc"))
    data, run = observe_places(config)
    assert (data.path, data.reserve_bytes) == (str(tmp_path / "data"), config.disk_reserve_bytes)
    assert data.free_bytes > 0
    # /proc counts no inodes.
    assert (run.path, run.all_inodes) == ("/proc", 0)


AMOUNTS = st.integers(0, 40)


@given(
    usage=st.builds(Usage, machines=AMOUNTS, active=AMOUNTS, cpus=AMOUNTS, memory_mib=AMOUNTS, disk_bytes=AMOUNTS),
    spec=st.builds(
        MachineSpec, image=st.just("i"), cpus=st.integers(1, 9), memory_mib=st.integers(1, 9), disk_bytes=AMOUNTS
    ),
    ratio=st.sampled_from([0.5, 1.0, 1.7]),
)
def test_what_is_shown_is_what_is_decided_by(usage: Usage, spec: MachineSpec, ratio: float):
    limits = Limits(
        max_machines=20,
        cpus=20,
        cpu_ratio=ratio,
        memory_mib=60,
        overhead_mib=1,
        disk_bytes=40,
        disk_ratio=ratio,
        disk_free_bytes=2,
        disk_reserve_bytes=1,
        places=(PLACE,),
    )
    shown = render_admission(usage, limits)
    needed = {
        "cpus": spec.cpus,
        "memory_mib": spec.memory_mib + shown.overhead_mib,
        "disk_bytes": spec.disk_bytes,
        "machines": 1,
    }
    amounts = {name: getattr(shown, name) for name in needed}
    fits = all(amount.booked + needed[name] <= amount.limit for name, amount in amounts.items())
    try:
        check_admission(usage, limits, spec, is_new=True)
    except HostFull:
        assert not fits
    else:
        assert fits
