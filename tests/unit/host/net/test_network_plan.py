from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevm.host.net.plan import (
    GUEST_MAC,
    INSIDE,
    NetworkPlan,
    Route,
    check_range,
    parse_namespace,
    parse_veth,
    plan_slot,
    render_kernel_arguments,
)
from fusevm.host.net.rootless import render_user_kernel_arguments, render_user_network
from fusevm.host.net.terms import Forward
from fusevm.model.errors import BadSetting, NetworkRangeConflict
from fusevm.model.network import Transport

PLAN = NetworkPlan()


def test_the_first_slots_of_the_default_range():
    first, second = plan_slot(PLAN, 0), plan_slot(PLAN, 1)
    assert (first.namespace, first.veth) == ("fuse-0", "fuse-v0")
    assert first.namespace_path == "/run/netns/fuse-0"
    assert (first.host_address, first.address) == ("10.210.0.1", "10.210.0.2")
    assert (second.host_address, second.address) == ("10.210.0.5", "10.210.0.6")
    assert (first.tap, first.guest_mac, first.guest_address, first.gateway) == (
        "tap0",
        "06:00:0a:d0:00:02",
        "10.208.0.2",
        "10.208.0.1",
    )


def test_inside_everything_is_the_same():
    inside = ("tap", "peer", "gateway", "gateway_mac", "guest_address", "guest_prefix_length", "guest_mac", "mtu")
    first, last = plan_slot(PLAN, 0), plan_slot(PLAN, PLAN.capacity - 1)
    assert all(getattr(first, name) == getattr(last, name) for name in inside)


def test_the_mac_spells_the_address():
    assert bytes.fromhex(GUEST_MAC.replace(":", ""))[2:] == IPv4Address("10.208.0.2").packed


@given(st.integers(0, PLAN.capacity - 1), st.integers(0, PLAN.capacity - 1))
def test_outside_everything_is_unique_and_within_the_range(one, other):
    slots = plan_slot(PLAN, one), plan_slot(PLAN, other)
    outside = [{slot.namespace, slot.veth, slot.address, slot.host_address} for slot in slots]
    assert outside[0].isdisjoint(outside[1]) is (one != other)
    for slot in slots:
        net = IPv4Network(f"{slot.address}/{slot.prefix_length}", strict=False)
        assert net.subnet_of(PLAN.network)
        assert IPv4Address(slot.host_address) in net
        assert len(slot.veth) <= 15


@given(st.integers(0, 10**9))
def test_names_lead_back_to_the_slot(index):
    assert parse_namespace(PLAN, f"fuse-{index}") == index
    assert parse_veth(PLAN, f"fuse-v{index}") == index


@pytest.mark.parametrize("name", ["fuse-", "fuse-v", "fuse-01", "fuse-v01", "fusex-1", "fuse-1x", "xfuse-1", "fuse-٣"])
def test_names_of_others_lead_nowhere(name):
    assert parse_namespace(PLAN, name) is None
    assert parse_veth(PLAN, name.replace("fuse-", "fuse-v")) is None


def test_prefixes_of_each_other_do_not_mix():
    longer = NetworkPlan(prefix="fuse2")
    assert parse_veth(PLAN, plan_slot(longer, 3).veth) is None
    assert parse_namespace(PLAN, plan_slot(longer, 3).namespace) is None
    assert not plan_slot(longer, 3).veth.startswith(PLAN.veth_pattern.rstrip("*"))


def test_capacity_is_bounded_by_the_range_and_by_interface_names():
    assert PLAN.capacity == 16384
    assert NetworkPlan(range="10.0.0.0/9", prefix="abcdefgh").capacity == 10**5
    for plan in (PLAN, NetworkPlan(range="10.0.0.0/9", prefix="abcdefgh")):
        assert len(plan_slot(plan, plan.capacity - 1).veth) <= 15
        with pytest.raises(ValueError, match="slot"):
            plan_slot(plan, plan.capacity)
    with pytest.raises(ValueError, match="slot -1"):
        plan_slot(PLAN, -1)


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"prefix": ""}, "network_prefix"),
        ({"prefix": "Fuse"}, "network_prefix"),
        ({"prefix": "a-b"}, "network_prefix"),
        ({"prefix": "ninechars"}, "network_prefix"),
        ({"range": "10.210.0.0"}, None),
        ({"range": "10.210.0.1/16"}, "network_range"),
        ({"range": "fd00::/64"}, "network_range"),
        ({"range": "10.210.0.0/31"}, "network_range"),
        ({"range": "10.208.0.0/12"}, "network_range"),
        ({"mtu": 100}, "network_mtu"),
        ({"mtu": 65536}, "network_mtu"),
    ],
)
def test_bad_settings_are_named(fields, setting):
    with pytest.raises(BadSetting) as refusal:
        NetworkPlan(**fields)
    assert setting is None or refusal.value.setting == setting


@pytest.mark.parametrize("destination", ["10.210.0.0/16", "10.210.4.4", "10.0.0.0/8", "10.210.255.0/24"])
def test_a_route_into_the_range_is_a_conflict(destination):
    with pytest.raises(NetworkRangeConflict, match=r"10\.210\.0\.0/16 overlaps .* on vpn0; .*network_range"):
        check_range(PLAN, [Route(destination=destination, device="vpn0")])


@pytest.mark.parametrize("destination", ["0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1", "10.211.0.0/16", "192.0.2.0/24"])
def test_default_routes_and_other_networks_are_no_conflict(destination):
    check_range(PLAN, [Route(destination=destination, device="eth0")])


def test_our_own_routes_are_no_conflict_but_those_of_another_instance_are():
    check_range(PLAN, [Route(destination="10.210.0.0/30", device="fuse-v0")])
    with pytest.raises(NetworkRangeConflict):
        check_range(PLAN, [Route(destination="10.210.0.0/30", device="other-v0")])


def test_the_guest_learns_its_network_from_the_kernel_command_line():
    slot = plan_slot(NetworkPlan(mtu=1400), 77)
    assert render_kernel_arguments(slot) == "fuse.ip=10.208.0.2/30,10.208.0.1,1400 fuse.dns=10.208.0.1"
    assert INSIDE.prefixlen == 30


def test_the_user_network_is_closed_unless_administrator_and_policy_open_it():
    for internet, user_network in ((True, False), (False, True), (False, False)):
        value = render_user_network(forwards={}, internet=internet, user_network=user_network)
        assert "restrict=on" in value.split(",")
    value = render_user_network(forwards={}, internet=True, user_network=True)
    assert "restrict=off" in value.split(",")


def test_the_user_network_in_full():
    forwards = [
        Forward(protocol=Transport.TCP, host_port=40002, port=443),
        Forward(protocol=Transport.UDP, host_port=40001, port=53),
        Forward(protocol=Transport.TCP, host_port=40001, port=80),
    ]
    value = render_user_network(forwards=forwards, internet=False, user_network=False)
    assert value == (
        "restrict=on,ipv6=off,net=10.208.0.0/24,host=10.208.0.1,dns=10.208.0.3,dhcpstart=10.208.0.2,"
        "hostfwd=tcp:127.0.0.1:40001-10.208.0.2:80,hostfwd=tcp:127.0.0.1:40002-10.208.0.2:443,"
        "hostfwd=udp:127.0.0.1:40001-10.208.0.2:53"
    )
    assert render_user_kernel_arguments() == "fuse.ip=10.208.0.2/24,10.208.0.1,1500 fuse.dns=10.208.0.3"
