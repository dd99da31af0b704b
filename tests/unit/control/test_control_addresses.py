"""Whose address a request comes from, with and without proxies."""

import pytest

from fusevm.control.addresses import Networks, client_address, group_of, parse_address
from fusevm.model.errors import BadField

TRUSTED = Networks(("10.0.0.0/8", "fd00::/8"))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:4711", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:80", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ('"[2001:db8::1]:4711"', "2001:db8::1"),
        (" 192.0.2.1 ", "192.0.2.1"),
        ("unknown", "None"),
        ("_hidden", "None"),
        ("", "None"),
        ("1.2.3.4.5", "None"),
    ],
)
def test_an_address_is_read_in_every_spelling(text: str, address: str) -> None:
    assert str(parse_address(text)) == address


@pytest.mark.parametrize(
    ("address", "is_within"),
    [("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("11.0.0.1", False), ("fd00::1", True), ("2001:db8::1", False)],
)
def test_mapped_addresses_belong_to_ipv4_networks(address: str, is_within: bool) -> None:
    found = parse_address(address)
    assert found is not None
    assert (found in TRUSTED) is is_within


@pytest.mark.parametrize(
    ("peer", "forwarded", "forwarded_for", "client"),
    [
        # Nobody is believed who is no proxy of ours.
        ("192.0.2.9", [], ["198.51.100.1"], "192.0.2.9"),
        ("192.0.2.9", ["for=198.51.100.1"], [], "192.0.2.9"),
        ("10.0.0.1", [], [], "10.0.0.1"),
        # The right-most that is no proxy; what the client made up stands left of it.
        ("10.0.0.1", [], ["203.0.113.1, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", [], ["203.0.113.1, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", [], ["203.0.113.1", "198.51.100.1"], "198.51.100.1"),
        ("fd00::1", [], ["2001:db8::7"], "2001:db8::7"),
        ("10.0.0.1", ['for=203.0.113.1, For="[2001:db8::7]:47";proto=https;by=10.0.0.1'], [], "2001:db8::7"),
        # All are proxies: the outermost.
        ("10.0.0.1", [], ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        # A proxy that hides its client, and a name that is none.
        ("10.0.0.1", ["for=unknown"], [], "None"),
        ("10.0.0.1", [], ["198.51.100.1, what"], "None"),
        ("10.0.0.1", ["proto=https"], [], "None"),
        # Both headers, one story.
        ("10.0.0.1", ["for=198.51.100.1"], ["198.51.100.1"], "198.51.100.1"),
        ("", [], [], "None"),
    ],
)
def test_the_client_is_the_first_from_the_right_that_is_no_proxy(
    peer: str, forwarded: list[str], forwarded_for: list[str], client: str
) -> None:
    found = client_address(peer, forwarded=forwarded, forwarded_for=forwarded_for, trusted=TRUSTED)
    assert str(found) == client


def test_two_headers_that_disagree_are_refused() -> None:
    """A proxy sets one of them; the other one was sent by the client."""
    with pytest.raises(BadField, match="different clients"):
        client_address("10.0.0.1", forwarded=["for=10.9.9.9"], forwarded_for=["198.51.100.1"], trusted=TRUSTED)


def test_clients_of_ipv6_count_by_their_network() -> None:
    one, other = parse_address("2001:db8:1:2::1"), parse_address("2001:db8:1:2:ffff::1")
    assert group_of(one) == group_of(other) == "2001:db8:1:2::/64"
    assert group_of(parse_address("192.0.2.1")) == "192.0.2.1"
    assert group_of(None) == "unknown"


def test_no_networks_are_false() -> None:
    assert not Networks(())
    assert Networks(("::1",))
