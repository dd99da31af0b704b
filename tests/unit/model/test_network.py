"""Policies: their normal form, what is refused, and the judgement of open connections."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fusevm.model.errors import BadField
from fusevm.model.network import (
    DENIED,
    Exposure,
    Flow,
    Network,
    Protocol,
    Rule,
    Transport,
    Verdict,
    check_exposures,
    check_network,
    is_denied,
    matches_domain,
    permits,
)

TCP, UDP, ICMP = 6, 17, 1


def closed(*rules: Rule) -> Network:
    return check_network(Network(internet=False, rules=rules))


def flow(address: str, port: int = 443, protocol: int = TCP, mark: int = 0) -> Flow:
    return Flow(protocol=protocol, address=address, port=port, mark=mark)


def test_the_normal_form_joins_ports_and_spells_names_and_networks():
    (rule,) = closed(Rule(cidr="192.0.2.77/24", ports=("90-100", 80, 81, "95-110"))).rules
    assert (rule.cidr, rule.ports) == ("192.0.2.0/24", ("80-81", "90-110"))
    (rule,) = closed(Rule(domain="*.Bücher.Example.")).rules
    assert rule.domain == "*.xn--bcher-kva.example"
    assert check_network(closed(rule)) == closed(rule)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(domain="localhost"),
        Rule(domain="a..org"),
        Rule(domain="a b.org"),
        Rule(domain="*.*.org"),
        Rule(domain="a*.org"),
        Rule(domain="192.0.2.1"),
        Rule(domain="x" * 64 + ".org"),
        Rule(domain=".".join(["abcdefgh"] * 40)),
        Rule(domain="a.org", action=Verdict.DENY),
        Rule(cidr="192.0.2.0/33"),
        Rule(cidr="::1"),
        Rule(cidr="169.254.169.254"),
        Rule(cidr="192.168.1.0/24"),
        Rule(ports=(0,)),
        Rule(ports=(65_536,)),
        Rule(ports=("1-2-3",)),
        Rule(ports=(443, 853)),
        Rule(ports=("90-80",)),
        Rule(ports=tuple(range(1, 131, 2))),
        Rule(ports=(8,), protocol=Protocol.ICMP),
        Rule(cidr="192.0.2.0/24", domain="a.org"),
        Rule(domain="ä" * 80 + ".org"),
    ],
)
def test_what_means_nothing_is_refused(rule: Rule):
    with pytest.raises(BadField, match=r"network\.rules\[0\]"):
        closed(rule)


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (Network(rules=tuple(Rule(ports=(n,)) for n in range(1000, 1065))), "network.rules"),
        (Network(ingress_kbit=1), "network.ingress_kbit"),
        (Network(egress_kbit=100_000_001), "network.egress_kbit"),
        (Network(internet=True, rules=(Rule(domain="a.org"),)), "network.internet"),
    ],
)
def test_what_a_policy_as_a_whole_cannot_be_names_its_field(policy: Network, field: str):
    with pytest.raises(BadField) as caught:
        check_network(policy)
    assert caught.value.details["field"] == field


def test_the_rules_by_name_are_told_apart():
    by_name, by_address = Rule(domain="a.org"), Rule(cidr="192.0.2.0/24")
    assert closed(by_address, by_name).domain_rules == (by_name,)


def test_what_is_denied_to_all_may_be_denied_again():
    assert closed(Rule(action=Verdict.DENY, cidr="10.0.0.0/8"))


def test_names_match_by_whole_labels():
    (rule,) = closed(Rule(domain="*.example.org")).rules
    names = (
        "www.example.org",
        "a.b.example.org",
        "example.org",
        "wwwexample.org",
        "www.example.org.net",
        ".example.org",
    )
    assert [name for name in names if matches_domain(rule, name)] == ["www.example.org", "a.b.example.org"]
    (rule,) = closed(Rule(domain="example.org")).rules
    assert [name for name in names if matches_domain(rule, name)] == ["example.org"]


def test_an_open_connection_is_judged_by_the_first_rule_that_matches():
    (name,) = closed(Rule(domain="example.org")).rules
    policy = closed(
        Rule(action=Verdict.DENY, cidr="198.51.100.7"),
        Rule(cidr="198.51.100.0/24", protocol=Protocol.TCP, ports=("400-500",)),
        name,
    )
    assert permits(policy, flow("198.51.100.8"))
    assert not permits(policy, flow("198.51.100.7"))
    assert not permits(policy, flow("198.51.100.8", 80))
    assert not permits(policy, flow("198.51.100.8", protocol=UDP))
    assert not permits(policy, flow("203.0.113.1"))
    assert permits(policy, flow("203.0.113.1", mark=name.mark))
    assert not permits(replace(policy, rules=policy.rules[:2]), flow("203.0.113.1", mark=name.mark))
    ping = closed(Rule(protocol=Protocol.ICMP), Rule(ports=(443,)))
    assert permits(ping, flow("203.0.113.1", 0, ICMP))
    assert not permits(ping, flow("203.0.113.1", 0, 47))


@given(st.sampled_from(DENIED), st.booleans(), st.integers(1, 65_535))
def test_no_policy_permits_what_is_denied_to_all(cidr: str, internet: bool, port: int):
    address = cidr.partition("/")[0]
    assert is_denied(address)
    everything = check_network(Network(internet=internet, rules=(Rule(cidr="0.0.0.0/0"),)))
    assert not permits(everything, flow(address, port))


def test_ports_are_published_once_each_and_there_is_a_limit():
    twice = [Exposure(port=80), Exposure(port=80), Exposure(port=80, protocol=Transport.UDP)]
    assert len(check_exposures(twice)) == 2
    for wrong in (
        [Exposure(port=n) for n in range(1, 66)],
        [Exposure(port=1, name="a\n")],
        [Exposure(port=-1)],
        [Exposure(port=1, host_port=65_536)],
        [Exposure(port=1), Exposure(port=1, host_port=8080)],
    ):
        with pytest.raises(BadField, match="expose"):
            check_exposures(wrong)
