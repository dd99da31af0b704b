"""Targets and ports as people write them."""

import pytest

from fusevm.cli.failures import CliError
from fusevm.cli.networking import read_policy, read_ports


def test_what_is_allowed_and_denied_becomes_rules_denials_first():
    policy = read_policy(
        no_internet=True, allow=("pypi.org:443", "*.debian.org", "192.0.2.0/24:80,8000-8100"), deny=("192.0.2.7",)
    )
    assert policy == {
        "internet": False,
        "rules": [
            {"action": "deny", "cidr": "192.0.2.7"},
            {"domain": "pypi.org", "ports": [443]},
            {"domain": "*.debian.org"},
            {"cidr": "192.0.2.0/24", "ports": [80, "8000-8100"]},
        ],
    }
    assert read_policy(no_internet=False, allow=(), deny=()) == {}
    assert read_policy(no_internet=False, allow=(":25",), deny=()) == {"rules": [{"ports": [25]}]}


def test_ports_have_a_protocol_and_a_place_on_the_host():
    assert read_ports(("80", "8080:80", "53/udp")) == [
        {"port": 80},
        {"port": 80, "host_port": 8080},
        {"port": 53, "protocol": "udp"},
    ]


@pytest.mark.parametrize("text", ["", "a b", "pypi.org:https", "http://a.org"])
def test_a_target_that_is_none_is_wrong_usage(text):
    with pytest.raises(CliError, match="--allow"):
        read_policy(no_internet=False, allow=(text,), deny=())


@pytest.mark.parametrize("text", ["", "web", "80/sctp", "1:2:3"])
def test_a_port_that_is_none_is_wrong_usage(text):
    with pytest.raises(CliError, match="--publish"):
        read_ports((text,))
