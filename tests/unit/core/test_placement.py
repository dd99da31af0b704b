"""Which host is chosen, and why another is not."""

import pytest
from making import POLICY, host
from msgspec.structs import replace

from fusevm.core.placement import can_reserve, limits, place, rejection, score
from fusevm.core.spec import complete, resources_of
from fusevm.model.errors import BadField, HostNotFound, ImageNotFound, NoCapacity, NoHosts, SnapshotNotReady
from fusevm.model.host import HostHealth, HostState, Resources

SPEC = complete(POLICY, cpus=1, ram_mb=1024, storage_gb=10)
FULL = Resources(cpus=0, ram_mb=4096, storage_gb=0, vm_count=0)


def booked(**amounts: int) -> Resources:
    return Resources(**amounts)


def test_limits_are_capacity_times_overcommit_and_machines_are_counted_as_they_are():
    policy = replace(POLICY, cpu_overcommit_percent=250, ram_overcommit_percent=90, storage_overcommit_percent=199)
    assert limits(host(), policy) == Resources(cpus=10, ram_mb=3686, storage_gb=199, vm_count=10)


@pytest.mark.parametrize(
    ("fields", "asked", "reason"),
    [
        ({}, {}, None),
        ({"state": HostState.CORDONED}, {}, "not_active"),
        ({"state": HostState.DRAINING}, {}, "not_active"),
        ({"health": HostHealth.UNREACHABLE}, {}, "unhealthy"),
        ({"health": HostHealth.LOST}, {}, "unhealthy"),
        ({"region": "us"}, {"region": "eu"}, "region"),
        ({"region": "us"}, {}, None),
        ({}, {"arch": "arm64"}, "arch"),
        ({"arch": "x86_64"}, {"arch": "amd64"}, None),
        ({"arch": "riscv64"}, {"arch": "amd64"}, "arch"),
        ({"labels": {"disk": "ssd"}}, {"labels": {"disk": "hdd"}}, "labels"),
        ({"labels": {"disk": "ssd", "rack": "1"}}, {"labels": {"disk": "ssd"}}, None),
        ({}, {"host_id": "h2"}, "pinned_elsewhere"),
        ({}, {"host_id": "h1"}, None),
        ({"allocated": booked(ram_mb=3073)}, {}, "memory"),
        ({"allocated": booked(ram_mb=3072)}, {}, None),
        ({"allocated": booked(cpus=16)}, {}, "cpu"),
        ({"allocated": booked(cpus=15)}, {}, None),
        ({"allocated": booked(storage_gb=391)}, {}, "disk"),
        ({"allocated": booked(storage_gb=390)}, {}, None),
        ({"allocated": booked(vm_count=10)}, {}, "machine_count"),
        ({"allocated": booked(vm_count=9)}, {}, None),
        ({"images": ("alpine",)}, {}, "image"),
        ({"images": ("alpine", "debian-12")}, {}, None),
        ({"state": HostState.CORDONED, "health": HostHealth.LOST}, {"region": "eu"}, "not_active"),
        ({"images": ("alpine",), "allocated": FULL}, {}, "memory"),
    ],
)
def test_a_host_is_rejected_by_its_first_failing_gate(fields, asked, reason):
    size = {"cpus": 1, "ram_mb": 1024, "storage_gb": 10}
    spec = complete(POLICY, **{**size, **asked})
    assert rejection(host(**fields), spec, POLICY) == reason
    assert can_reserve(host(**fields), spec, POLICY) is (reason is None)


def test_spread_prefers_the_host_with_the_smaller_dominant_share():
    small = host("small", allocated=booked(ram_mb=1024, vm_count=1))
    large = host("large", capacity=Resources(cpus=64, ram_mb=65536, storage_gb=1000, vm_count=100))
    assert place([small, large], SPEC, POLICY) == "large"
    assert place([small, large], SPEC, replace(POLICY, placement="binpack")) == "small"


def test_the_dominant_share_may_be_any_resource():
    busy = {
        "cpus": host("h1", allocated=booked(cpus=8)),
        "disk": host("h1", allocated=booked(storage_gb=200)),
        "count": host("h1", allocated=booked(vm_count=5)),
        "memory": host("h1", allocated=booked(ram_mb=2048)),
    }
    for name, loaded in busy.items():
        assert place([loaded, host("h2")], SPEC, POLICY) == "h2", name


def test_a_host_that_is_known_to_have_the_image_comes_first_even_when_loaded():
    loaded = host("h2", images=("debian-12",), allocated=booked(ram_mb=3072, vm_count=3))
    assert place([host("h1"), loaded], SPEC, POLICY) == "h2"


def test_equal_hosts_are_chosen_by_id_in_whatever_order_they_come():
    hosts = [host("h3"), host("h1"), host("h2")]
    assert {place(order, SPEC, POLICY) for order in (hosts, hosts[::-1], hosts[1:] + hosts[:1])} == {"h1"}


def test_a_host_without_a_resource_counts_as_full():
    empty = host("h1", capacity=Resources(cpus=1, ram_mb=2048, storage_gb=0, vm_count=5))
    assert score(empty, SPEC, POLICY) == 0.0


def test_a_host_for_a_single_machine_is_empty_or_full():
    single = host("h1", capacity=Resources(cpus=99, ram_mb=99999, storage_gb=9999, vm_count=2))
    assert score(single, SPEC, POLICY) == 0.5
    tiny = replace(single, capacity=replace(single.capacity, vm_count=1))
    assert score(tiny, SPEC, replace(POLICY, placement="binpack")) == 1.0


def test_a_pin_is_obeyed():
    assert place([host("h1"), host("h2")], replace(SPEC, host_id="h2"), POLICY) == "h2"


def test_a_pin_on_an_unknown_host_is_not_found():
    for hosts in ([], [host("h1")]):
        with pytest.raises(HostNotFound, match="h9"):
            place(hosts, replace(SPEC, host_id="h9"), POLICY)


def test_a_pin_on_a_full_host_counts_only_that_host():
    with pytest.raises(NoCapacity) as caught:
        place([host("h1", allocated=FULL), host("h2")], replace(SPEC, host_id="h1"), POLICY)
    assert caught.value.rejections == "1 memory"


def test_no_host_at_all_is_its_own_answer():
    with pytest.raises(NoHosts):
        place([], SPEC, POLICY)


def test_a_refusal_counts_hosts_per_reason_the_most_frequent_first():
    hosts = [
        host("h1", state=HostState.CORDONED),
        host("h2", allocated=FULL),
        host("h3", allocated=FULL),
        host("h4", health=HostHealth.LOST),
        host("h5", images=("alpine",)),
        host("h6", state=HostState.DRAINING),
    ]
    with pytest.raises(NoCapacity) as caught:
        place(hosts, SPEC, POLICY)
    assert caught.value.rejections == "2 memory, 1 cordoned, 1 draining, 1 image, 1 lost"


def test_an_image_that_no_host_has_is_not_found():
    full = host("h2", images=("alpine",), allocated=FULL)
    for hosts in ([host("h1", images=("alpine",))], [host("h1", images=("alpine",)), full]):
        with pytest.raises(ImageNotFound, match=r"debian-12.*there are: alpine\."):
            place(hosts, SPEC, POLICY)
    many = host("h1", images=tuple(f"i{number:02}" for number in range(20)))
    with pytest.raises(ImageNotFound, match=r"i00, .*, i11 and 8 more\."):
        place([many], SPEC, POLICY)


def test_an_image_that_a_full_host_may_have_is_a_matter_of_capacity():
    for images in ((), ("debian-12",)):
        with pytest.raises(NoCapacity) as caught:
            place([host("h1", images=("alpine",)), host("h2", images=images, allocated=FULL)], SPEC, POLICY)
        assert caught.value.rejections == "1 image, 1 memory"


def test_a_reservation_that_is_booked_leaves_less_for_the_next():
    one, count = host(), 0
    while can_reserve(one, SPEC, POLICY):
        one, count = replace(one, allocated=one.allocated.plus(resources_of(SPEC))), count + 1
    assert count == 4
    assert rejection(one, SPEC, POLICY) == "memory"


# -- seed snapshots ------------------------------------------------------------------------------------------------

SEEDED = replace(SPEC, seed_snapshot_id="snap-1")


def test_a_machine_goes_where_the_bytes_of_its_snapshot_are():
    hosts = [host("h1"), host("h2", allocated=booked(ram_mb=2048))]
    assert place(hosts, SEEDED, POLICY, pinned_to="h2") == "h2"
    assert place(hosts, replace(SEEDED, host_id="h2"), POLICY, pinned_to="h2") == "h2"


def test_a_pin_elsewhere_than_the_snapshot_is_refused_with_where_it_is():
    with pytest.raises(BadField, match="snapshot snap-1 is on host h2; name that one, or none") as refusal:
        place([host("h1"), host("h2")], replace(SEEDED, host_id="h1"), POLICY, pinned_to="h2")
    assert refusal.value.field == "spec.host_id"


def test_a_snapshot_whose_host_is_gone_cannot_be_used():
    with pytest.raises(SnapshotNotReady, match="snap-1 is on host h9, which is not registered"):
        place([host("h1")], SEEDED, POLICY, pinned_to="h9")
    with pytest.raises(SnapshotNotReady):
        place([], SEEDED, POLICY, pinned_to="h9")


def test_only_the_host_of_the_snapshot_is_asked():
    with pytest.raises(NoCapacity, match="1 memory"):
        place([host("h1"), host("h2", allocated=FULL)], SEEDED, POLICY, pinned_to="h2")


def test_the_host_that_is_kept_free_takes_nobody_and_is_still_known():
    assert place([host("h1"), host("h2")], SPEC, POLICY, kept_free="h1") == "h2"
    for spec in (SPEC, replace(SPEC, host_id="h1")):
        with pytest.raises(NoCapacity, match="1 kept_for_queue"):
            place([host("h1")], spec, POLICY, kept_free="h1")
    with pytest.raises(NoCapacity, match="1 kept_for_queue"):
        place([host("h1")], SEEDED, POLICY, pinned_to="h1", kept_free="h1")
    with pytest.raises(NoCapacity, match="1 memory"):
        place([host("h1", allocated=FULL)], SPEC, POLICY, kept_free="h1")


def test_an_unknown_pin_is_named_even_where_there_is_no_host():
    with pytest.raises(HostNotFound):
        place([], replace(SPEC, host_id="h1"), POLICY)
