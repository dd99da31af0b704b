"""Which addresses a download may be led to."""

import ipaddress

import pytest

from fusevm.host.images.addresses import is_own, parse_networks, refusal
from fusevm.model.errors import BadSetting


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("127.0.0.1", "this host"),
        ("127.99.1.1", "this host"),
        ("::1", "this host"),
        ("0.0.0.0", "no address"),
        ("::", "no address"),
        ("169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("10.1.2.3", "private"),
        ("172.16.0.1", "private"),
        ("192.168.1.1", "private"),
        ("fd00:ec2::254", "private"),
        ("100.64.0.1", "not public"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("240.0.0.1", "in a private network"),
        ("255.255.255.255", "in a private network"),
        # IPv4 in the clothes of IPv6.
        ("::ffff:127.0.0.1", "this host"),
        ("::ffff:169.254.169.254", "link-local"),
        ("64:ff9b::a00:1", "private"),
        ("::10.0.0.1", "private"),
        ("2002:7f00:1::", "this host"),
        ("2002:a9fe:a9fe::1", "link-local"),
    ],
)
def test_what_is_not_public_is_refused(text: str, kind: str):
    assert kind in refusal(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::101:101"])
def test_what_is_public_may_be_fetched_from(text: str):
    assert refusal(ipaddress.ip_address(text)) == ""


def test_a_setting_allows_networks_and_nothing_else():
    allowed = parse_networks(["10.20.0.0/16", "fd00::/8"])
    assert refusal(ipaddress.ip_address("10.20.3.4"), allowed) == ""
    assert refusal(ipaddress.ip_address("::ffff:10.20.3.4"), allowed) == ""
    assert refusal(ipaddress.ip_address("fd12::1"), allowed) == ""
    assert refusal(ipaddress.ip_address("10.21.3.4"), allowed) != ""
    assert refusal(ipaddress.ip_address("127.0.0.1"), allowed) != ""
    with pytest.raises(BadSetting, match=r"10\.0\.0\.1/8"):
        parse_networks(["10.0.0.1/8"])


def test_this_hosts_own_addresses_are_known():
    assert is_own(ipaddress.ip_address("127.0.0.1"))
    assert not is_own(ipaddress.ip_address("1.1.1.1"))
