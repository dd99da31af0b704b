"""Placement never books more than the limits, whatever is asked, released and planned on an old reading."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fusevm.core.placement import can_reserve, limits, place, rejection, score
from fusevm.core.policy import Policy
from fusevm.core.spec import complete, resources_of
from fusevm.model.environment import Spec
from fusevm.model.errors import BadField, Error, HostNotFound, ImageNotFound, NoCapacity, NoHosts
from fusevm.model.host import Host, HostHealth, HostState, Resources

AMOUNTS = ("cpus", "ram_mb", "storage_gb", "vm_count")
percents = st.integers(min_value=0, max_value=500)
policies = st.builds(
    Policy,
    cpu_overcommit_percent=percents,
    ram_overcommit_percent=percents,
    storage_overcommit_percent=percents,
    placement=st.sampled_from(["spread", "binpack"]),
)
capacities = st.builds(
    Resources,
    cpus=st.integers(0, 64),
    ram_mb=st.integers(0, 65536),
    storage_gb=st.integers(0, 1000),
    vm_count=st.integers(0, 20),
)
hosts = st.lists(
    st.builds(
        Host,
        id=st.sampled_from([f"h{n}" for n in range(8)]),
        url=st.just(""),
        region=st.sampled_from(["", "eu", "us"]),
        arch=st.sampled_from(["amd64", "arm64", "x86_64"]),
        labels=st.sampled_from([{}, {"disk": "ssd"}]),
        images=st.sampled_from([(), ("debian-12",), ("alpine", "debian-12"), ("alpine",)]),
        state=st.sampled_from(HostState),
        health=st.sampled_from(HostHealth),
        capacity=capacities,
        created_at_ms=st.just(0),
        updated_at_ms=st.just(0),
    ),
    max_size=6,
    unique_by=lambda host: host.id,
)
roomy = st.lists(
    st.builds(
        Host,
        id=st.sampled_from([f"h{n}" for n in range(4)]),
        url=st.just(""),
        capacity=capacities,
        created_at_ms=st.just(0),
        updated_at_ms=st.just(0),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda host: host.id,
)
specs = st.builds(
    complete,
    st.just(Policy()),
    cpus=st.integers(0, 32),
    ram_mb=st.integers(128, 16384),
    storage_gb=st.integers(0, 200),
    region=st.sampled_from([None, "eu"]),
    arch=st.sampled_from([None, "amd64", "aarch64"]),
    labels=st.sampled_from([None, {"disk": "ssd"}]),
    host_id=st.sampled_from([None, None, "h0", "h9"]),
)


def minus(one: Resources, other: Resources) -> Resources:
    return Resources(**{name: getattr(one, name) - getattr(other, name) for name in AMOUNTS})


def is_within(host: Host, policy: Policy) -> bool:
    most = limits(host, policy)
    return all(0 <= getattr(host.allocated, name) <= getattr(most, name) for name in AMOUNTS)


@given(roomy, policies, st.lists(st.tuples(specs, st.integers(0, 6), st.booleans()), max_size=40))
@settings(max_examples=200)
def test_no_host_is_ever_booked_beyond_its_limits(start, policy, requests):
    """Each request plans on a reading that is up to six bookings old, then books under the condition, or releases."""
    readings = [{host.id: host for host in start}]
    booked: list[tuple[str, Spec]] = []
    for spec, age, is_release in requests:
        now = dict(readings[-1])
        if is_release and booked:
            id_, old = booked.pop(age % len(booked))
            now[id_] = replace(now[id_], allocated=minus(now[id_].allocated, resources_of(old)))
        else:
            stale = readings[max(0, len(readings) - 1 - age)]
            try:
                chosen = place(list(stale.values()), spec, policy)
            except (NoCapacity, HostNotFound, ImageNotFound):
                continue
            if can_reserve(now[chosen], spec, policy):
                allocated = now[chosen].allocated.plus(resources_of(spec))
                now[chosen] = replace(now[chosen], allocated=allocated)
                booked.append((chosen, spec))
        readings.append(now)
        assert all(is_within(host, policy) for host in now.values())
    for id_, host in readings[-1].items():
        total = Resources()
        for where, spec in booked:
            total = total.plus(resources_of(spec)) if where == id_ else total
        assert host.allocated == total


def outcome(given_hosts: list[Host], spec: Spec, policy: Policy) -> str | Error:
    """The chosen host's id, or the refusal."""
    try:
        return place(given_hosts, spec, policy)
    except (NoCapacity, NoHosts, HostNotFound, ImageNotFound) as refusal:
        return refusal


@given(hosts, specs, policies, st.randoms(use_true_random=False))
def test_the_choice_is_feasible_and_best_and_the_same_in_any_order(given_hosts, spec, policy, dice):
    shuffled = list(given_hosts)
    dice.shuffle(shuffled)
    chosen, again = outcome(given_hosts, spec, policy), outcome(shuffled, spec, policy)
    feasible = {host.id: score(host, spec, policy) for host in given_hosts if rejection(host, spec, policy) is None}
    if isinstance(chosen, Error):
        assert feasible == {}
        assert (type(again), str(again)) == (type(chosen), str(chosen))
    else:
        assert again == chosen
        assert feasible[chosen] == max(feasible.values())


@given(hosts, specs, policies)
def test_a_refusal_counts_every_host_that_was_asked_exactly_once(given_hosts, spec, policy):
    refusal = outcome(given_hosts, spec, policy)
    if isinstance(refusal, NoCapacity):
        counted = sum(int(part.split()[0]) for part in refusal.rejections.split(", "))
        assert counted == (1 if spec.host_id else len(given_hosts))


wild = st.one_of(st.none(), st.integers(-(10**20), 10**20), st.integers(-2, 200))


@given(
    cpus=wild, ram_mb=wild, storage_gb=wild, idle=wild, runtime=st.one_of(wild, st.text(max_size=12)), arch=st.text()
)
def test_a_spec_is_either_within_bounds_or_refused_by_field(cpus, ram_mb, storage_gb, idle, runtime, arch):
    policy = Policy()
    try:
        spec = complete(
            policy,
            cpus=cpus,
            ram_mb=ram_mb,
            storage_gb=storage_gb,
            idle_timeout_seconds=idle,
            max_runtime_seconds=runtime,
            arch=arch if cpus else None,
        )
    except BadField as refusal:
        spec = refusal
    if isinstance(spec, BadField):
        assert spec.field.startswith("spec.")
        return
    assert 1 <= spec.cpus <= policy.max_cpus
    assert policy.min_ram_mb <= spec.ram_mb <= policy.max_ram_mb
    assert 1 <= spec.storage_gb <= policy.max_storage_gb
    assert spec.idle_timeout_seconds == 0 or spec.idle_timeout_seconds >= 60
    assert spec.max_runtime_seconds == -1 or spec.max_runtime_seconds >= 1
    assert spec.arch in {"", "amd64", "arm64"}
    again = complete(
        policy,
        cpus=spec.cpus,
        ram_mb=spec.ram_mb,
        storage_gb=spec.storage_gb,
        image=spec.image,
        arch=spec.arch,
        max_runtime_seconds=spec.max_runtime_seconds,
        idle_timeout_seconds=spec.idle_timeout_seconds,
    )
    assert again == spec
