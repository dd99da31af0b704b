"""Who of those that wait gets which place."""

from collections.abc import Mapping, Sequence

from making import NOW, POLICY, host, queued
from msgspec.structs import replace

from fusevm.core.queue import plan_placements
from fusevm.model.environment import Environment
from fusevm.model.host import Host, HostState, Resources

SOON = NOW + 1_000
#: When patience is over for who came at NOW.
LATE = NOW + POLICY.queue_patience_ms


def waiting(uid: str, tenant: str = "", *, since_ms: int = NOW, seed: str = "", **spec: object) -> Environment:
    env = replace(queued(uid, **spec), tenant=tenant, created_at_ms=since_ms)
    return replace(env, spec=replace(env.spec, seed_snapshot_id=seed))


def small(id_: str = "h1", machines: int = 2, **fields: object) -> Host:
    """A host for this many machines of 1 cpu and 512 MiB."""
    capacity = Resources(cpus=machines, ram_mb=512 * machines, storage_gb=1000, vm_count=machines)
    return host(id_, capacity=capacity, **fields)


def full(machines: int) -> Resources:
    """What so many machines of 1 cpu and 512 MiB take."""
    return Resources(cpus=machines, ram_mb=512 * machines, storage_gb=4 * machines, vm_count=machines)


def plan(
    those: Sequence[Environment],
    hosts: Sequence[Host],
    usage: Mapping[str, Resources] | None = None,
    now_ms: int = SOON,
    seeds: Mapping[str, str] | None = None,
) -> list[tuple[str, str]]:
    return list(plan_placements(those, hosts, usage or {}, POLICY, now_ms=now_ms, seeds=seeds or {}).placed)


def kept_free(
    those: Sequence[Environment], hosts: Sequence[Host], now_ms: int = LATE, seeds: Mapping[str, str] | None = None
) -> str:
    return plan_placements(those, hosts, {}, POLICY, now_ms=now_ms, seeds=seeds or {}).kept_free


def test_nobody_waits_for_nothing():
    assert plan([], [small()]) == []
    assert plan([waiting("a")], []) == []


def test_each_is_planned_against_what_those_before_took():
    those = [waiting(name, since_ms=NOW + number) for number, name in enumerate("abc")]
    assert plan(those, [small("h1", 1), small("h2", 1)]) == [("a", "h1"), ("b", "h2")]


def test_the_oldest_of_a_tenant_comes_first():
    those = [waiting("young", since_ms=NOW + 1), waiting("old")]
    assert plan(those, [small(machines=1)]) == [("old", "h1")]
    same = [waiting("b"), waiting("a")]
    assert plan(same, [small(machines=1)]) == [("a", "h1")]


def test_tenants_take_turns():
    those = [waiting(f"a{n}", "acme", since_ms=NOW + n) for n in range(3)]
    those += [waiting(f"b{n}", "blue", since_ms=NOW + 10 + n) for n in range(3)]
    assert [uid for uid, _ in plan(those, [small(machines=4)])] == ["a0", "b0", "a1", "b1"]


def test_who_holds_less_comes_first():
    those = [waiting("a", "acme"), waiting("b", "blue", since_ms=NOW + 1)]
    usage = {"acme": full(2), "blue": full(1)}
    assert plan(those, [small(machines=4, allocated=full(3))], usage) == [("b", "h1")]


def test_the_share_that_counts_is_the_dominant_one():
    """Many cpus or much memory: what a tenant holds most of, relative to the whole, is its share."""
    those = [waiting("a", "acme"), waiting("b", "blue", since_ms=NOW + 1)]
    usage = {"acme": Resources(cpus=1, ram_mb=900), "blue": Resources(cpus=2, ram_mb=64)}
    big = host(capacity=Resources(cpus=1, ram_mb=2000, storage_gb=100, vm_count=100), allocated=Resources(ram_mb=1000))
    assert plan(those, [big], usage)[0][0] == "a"  # 900/2000 against 2/4: cpus are overcommitted four times


def test_a_large_one_does_not_hold_up_small_ones_not_even_its_own_tenants():
    those = [waiting("large", ram_mb=1024), waiting("own", since_ms=NOW + 1), waiting("other", "blue")]
    assert plan(those, [small(machines=2, allocated=full(1))]) == [("other", "h1")]
    assert plan(those[:2], [small(machines=2, allocated=full(1))]) == [("own", "h1")]


def test_patience_has_an_end_and_then_a_host_is_kept_free():
    those = [waiting("large", ram_mb=1024), waiting("small", "blue", since_ms=LATE)]
    half = small(machines=2, allocated=full(1))
    assert plan(those, [half], now_ms=LATE - 1) == [("small", "h1")]
    assert plan(those, [half], now_ms=LATE) == []
    assert plan(those, [half, small("h2", 1)], now_ms=LATE) == [("small", "h2")]
    assert plan(those, [small(machines=2)], now_ms=LATE) == [("large", "h1")]


def test_the_emptiest_host_that_could_take_it_is_kept_free():
    large = waiting("large", ram_mb=1024)
    hosts = [
        small("h1", 4, allocated=Resources(ram_mb=1900, vm_count=3)),
        small("h2", 4, allocated=Resources(ram_mb=1536, vm_count=1)),
        small("h3", 1),
        small("h4", 4, state=HostState.CORDONED),
    ]
    assert kept_free([large], hosts) == "h2"
    assert kept_free([large], hosts, LATE - 1) == ""
    assert kept_free([], hosts) == ""


def test_one_host_at_a_time_is_kept_free():
    those = [waiting("x", ram_mb=1024), waiting("y", "blue", ram_mb=1024)]
    hosts = [small("h1", 2, allocated=full(1)), small("h2", 2, allocated=full(1))]
    assert kept_free(those, hosts) == "h1"
    newer = waiting("small", "blue", since_ms=LATE)
    assert plan([*those, newer], hosts, now_ms=LATE) == [("small", "h2")]


def test_what_fits_no_host_even_if_empty_keeps_none_free():
    those = [waiting("huge", ram_mb=1 << 20), waiting("elsewhere", region="moon"), waiting("small")]
    assert plan(those, [small(machines=1)], now_ms=LATE) == [("small", "h1")]
    full_host = small(machines=1, allocated=full(1))
    assert kept_free(those[:2], [full_host]) == ""


def test_who_starts_from_a_snapshot_goes_where_its_bytes_are():
    seeded = waiting("seeded", seed="snap-1")
    hosts = [small("h1"), small("h2")]
    assert plan([seeded], hosts, seeds={"snap-1": "h2"}) == [("seeded", "h2")]
    assert plan([seeded], hosts, seeds={"snap-1": "h9"}) == []
    assert plan([seeded], hosts) == []
    busy = [small("h1"), small("h2", allocated=full(2))]
    assert kept_free([seeded], busy, seeds={"snap-1": "h2"}) == "h2"


def test_a_fleet_without_any_capacity_gives_no_places():
    nothing = host(capacity=Resources())
    assert plan([waiting("a", "acme"), waiting("b", "blue")], [nothing], {"acme": full(1)}) == []
