"""The waiting line never overcommits, wastes no room, is fair between tenants and passes nobody over for ever."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fusevm.core.lifecycle import Identity, begin
from fusevm.core.placement import can_reserve, limits
from fusevm.core.policy import Policy
from fusevm.core.queue import plan_placements
from fusevm.core.spec import complete, resources_of
from fusevm.model.environment import Environment
from fusevm.model.host import Host, HostState, Resources

POLICY = Policy(cpu_overcommit_percent=100, storage_overcommit_percent=100)
AMOUNTS = Resources.__struct_fields__
NOW = 10**9
#: Sizes in units of one cpu, 512 MiB and 4 GiB.
sizes = st.integers(1, 6)
tenants = st.sampled_from(["", "acme", "blue"])


def waiting(number: int, tenant: str, size: int, since_ms: int, seed: str = "") -> Environment:
    identity = Identity(uid=f"u{number:03}", task_id=f"t{number}", machine_id=f"m-{number}", tenant=tenant)
    spec = complete(POLICY, cpus=size, ram_mb=512 * size, storage_gb=4 * size, queue_seconds=60)
    spec = replace(spec, seed_snapshot_id=seed)
    return begin(identity, spec, "", cause="c", now_ms=since_ms, policy=POLICY).record


def host(number: int, size: int, used: int = 0, **fields: object) -> Host:
    return Host(
        id=f"h{number}",
        url="",
        capacity=amount(size, machines=10),
        allocated=amount(min(used, size), machines=min(used, size)),
        created_at_ms=0,
        updated_at_ms=0,
        **fields,
    )


def amount(size: int, machines: int) -> Resources:
    return Resources(cpus=size, ram_mb=512 * size, storage_gb=4 * size, vm_count=machines)


lines = st.lists(
    st.tuples(tenants, sizes, st.integers(NOW - 60_000, NOW), st.sampled_from(["", "", "", "s1", "s2"])), max_size=14
).map(lambda those: [waiting(number, *one) for number, one in enumerate(those)])
fleets = st.lists(
    st.tuples(
        st.integers(0, 8), st.integers(0, 8), st.sampled_from([HostState.ACTIVE, HostState.ACTIVE, HostState.CORDONED])
    ),
    max_size=4,
).map(lambda those: [host(number, size, used, state=state) for number, (size, used, state) in enumerate(those)])
usages = st.dictionaries(tenants, st.integers(0, 10).map(lambda size: amount(size, size)))
SEEDS = {"s1": "h0"}


def book(hosts: Sequence[Host], those: Sequence[Environment], placed: Sequence[tuple[str, str]]) -> dict[str, Host]:
    """The hosts after the plan; each step must fit."""
    after = {host.id: host for host in hosts}
    specs = {env.uid: env.spec for env in those}
    for uid, host_id in placed:
        assert can_reserve(after[host_id], specs[uid], POLICY)
        allocated = after[host_id].allocated.plus(resources_of(specs[uid]))
        after[host_id] = replace(after[host_id], allocated=allocated)
    return after


def plan(
    those: Sequence[Environment], hosts: Sequence[Host], usage: dict[str, Resources], now_ms: int = NOW
) -> list[tuple[str, str]]:
    return list(plan_placements(those, hosts, usage, POLICY, now_ms=now_ms, seeds=SEEDS).placed)


@given(lines, fleets, usages)
@settings(max_examples=300)
def test_nobody_is_placed_twice_or_where_there_is_no_room(those, hosts, usage):
    placed = plan(those, hosts, usage)
    assert len({uid for uid, _ in placed}) == len(placed)
    after = book(hosts, those, placed)
    for host_ in after.values():
        before = next(one for one in hosts if one.id == host_.id)
        if host_.allocated != before.allocated:
            assert all(getattr(host_.allocated, name) <= getattr(limits(host_, POLICY), name) for name in AMOUNTS)
    seeds = {env.uid: env.spec.seed_snapshot_id for env in those}
    assert all(SEEDS.get(seeds[uid]) == host_id for uid, host_id in placed if seeds[uid])


@given(lines, fleets, usages)
@settings(max_examples=300)
def test_no_room_is_left_that_somebody_could_use_but_on_the_one_reserved_host(those, hosts, usage):
    planned = plan_placements(those, hosts, usage, POLICY, now_ms=NOW, seeds=SEEDS)
    placed, open_ = planned.placed, {one.id for one in hosts} - {planned.kept_free}
    after = book(hosts, those, placed)
    left = [env for env in those if env.uid not in {uid for uid, _ in placed}]
    for env in left:
        seed = env.spec.seed_snapshot_id
        allowed = [one for one in after.values() if one.id in open_ and (not seed or SEEDS.get(seed) == one.id)]
        assert not any(can_reserve(one, env.spec, POLICY) for one in allowed)
    if not any(NOW - env.created_at_ms >= POLICY.queue_patience_ms for env in left):
        assert open_ == {one.id for one in hosts}


@given(lines, fleets, usages, st.randoms(use_true_random=False))
def test_the_order_in_which_the_store_lists_them_does_not_matter(those, hosts, usage, dice):
    shuffled, others = list(those), list(hosts)
    dice.shuffle(shuffled)
    dice.shuffle(others)
    assert plan(shuffled, others, usage) == plan(those, hosts, usage)


@given(st.integers(1, 40), st.lists(st.tuples(tenants, st.integers(NOW - 9_000, NOW)), max_size=40))
def test_equal_tenants_with_equal_wishes_get_equal_shares(room, wishes):
    those = [waiting(number, tenant, 1, since) for number, (tenant, since) in enumerate(wishes)]
    hosts = [host(number, 4) for number in range(room // 4)]
    placed = {uid for uid, _ in plan(those, hosts, {})}
    got = {name: sum(env.uid in placed for env in those if env.tenant == name) for name in ("", "acme", "blue")}
    for name, count in got.items():
        if count < sum(env.tenant == name for env in those):
            # It wanted more: nobody has got more than one more than it.
            assert max(got.values()) <= count + 1


@given(lines, fleets, usages)
def test_a_tenants_older_equal_comes_first(those, hosts, usage):
    placed = {uid for uid, _ in plan(those, hosts, usage)}
    for young in those:
        for old in those:
            same = old.tenant == young.tenant and old.spec == young.spec
            if same and (old.created_at_ms, old.uid) < (young.created_at_ms, young.uid) and young.uid in placed:
                assert old.uid in placed


@given(
    fleet=st.integers(1, 3),
    size=st.integers(2, 4),
    lifetimes=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    flood=st.lists(st.integers(1, 2), min_size=1, max_size=6),
    step_ms=st.integers(1_000, 20_000),
)
@settings(max_examples=60, deadline=None)
def test_a_large_one_gets_its_place_however_many_small_ones_come(fleet, size, lifetimes, flood, step_ms):
    """A flood of small machines of other tenants never ends; one tenant waits for a whole host.

    Bound of the module's docstring: patience, and a longest lifetime for every move of the choice; the choice moves
    only to an emptier host, so at most once per machine that fits a host.
    """
    hosts = [host(number, size) for number in range(fleet)]
    running: list[tuple[int, str, str, Environment]] = []
    large = waiting(0, "large", size, NOW)
    queue: list[Environment] = []
    longest = max(lifetimes) * step_ms
    bound = POLICY.queue_patience_ms + (size + 1) * longest + 2 * step_ms
    number, now_ms = 0, NOW
    for tick in range(bound // step_ms + 2):
        now_ms = NOW + tick * step_ms
        running = [one for one in running if one[0] > now_ms]
        for wish in flood:
            number += 1
            queue.append(waiting(number, f"small{number % 3}", min(wish, size - 1), now_ms))
        hosts = [replace(one, allocated=Resources()) for one in hosts]
        usage: dict[str, Resources] = {}
        for _, host_id, tenant, env in running:
            index = int(host_id[1:])
            hosts[index] = replace(hosts[index], allocated=hosts[index].allocated.plus(resources_of(env.spec)))
            usage[tenant] = usage.get(tenant, Resources()).plus(resources_of(env.spec))
        # On the first day only the flood is served, so that the large one meets a busy fleet.
        those = queue if tick == 0 else [large, *queue]
        placed = dict(plan(those, hosts, usage, now_ms))
        if large.uid in placed:
            return
        for env in queue:
            if env.uid in placed:
                lifetime = lifetimes[int(env.uid[1:]) % len(lifetimes)] * step_ms
                running.append((now_ms + lifetime, placed[env.uid], env.tenant, env))
        queue = [env for env in queue if env.uid not in placed][:30]
    raise AssertionError(f"still waiting after {now_ms - NOW} ms, the bound is {bound} ms")
