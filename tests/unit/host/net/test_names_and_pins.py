"""Answers that are read, questions that are judged, addresses that are pinned, counts that are read. All pure."""

import contextlib
import struct
from ipaddress import IPv4Address

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevm.host.net.conntrack import parse_connections
from fusevm.host.net.dns_message import Question, make_query, parse_query, read_addresses, render_addresses
from fusevm.host.net.listing import Counts, parse_table, parse_uses
from fusevm.host.net.names import MAX_TTL_S, Ruling, bound_ttl, judge_question, pin_lifetime
from fusevm.host.net.nft import Table
from fusevm.host.net.pins import Pinboard
from fusevm.host.net.plan import NetworkPlan
from fusevm.host.net.tables import USE_MEMORY_S
from fusevm.host.net.tracking import MAX_CONNECTIONS, connections_each, needed_entries
from fusevm.host.net.traffic import parse_traffic
from fusevm.host.net.verdicts import MAX_PINS
from fusevm.model.network import Network, Rule, check_network

A = b"\0\1\0\1"
QUESTION = Question(b"\x07example\x03org\0", A)
POLICY = check_network(Network(internet=False, rules=(Rule(domain="example.org"),)))


def answer(*records: bytes) -> bytes:
    return struct.pack("!HHHHHH", 1, 0x8180, 1, len(records), 0, 0) + QUESTION.name + A + b"".join(records)


def record(name: bytes, kind: int, ttl: int, data: bytes) -> bytes:
    return name + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


@pytest.mark.parametrize(
    ("policy", "question", "ruling"),
    [
        (None, QUESTION, Ruling.REFUSE),
        (Network(), QUESTION, Ruling.FORWARD),
        (Network(internet=False), QUESTION, Ruling.REFUSE),
        (POLICY, QUESTION, Ruling.PIN),
        (POLICY, Question(QUESTION.name, b"\0\x10\0\1"), Ruling.EMPTY),
        (POLICY, Question(QUESTION.name, b"\0\1\0\3"), Ruling.EMPTY),
        (POLICY, Question(b"\x0bexample.org\0", A), Ruling.REFUSE),
        (POLICY, Question(b"\0", A), Ruling.REFUSE),
    ],
)
def test_questions_are_judged_by_name_and_type(policy, question, ruling):
    assert judge_question(policy, question) is ruling


def test_times_are_bounded():
    assert bound_ttl(1 << 31) == MAX_TTL_S
    assert pin_lifetime(0) == 30
    assert pin_lifetime(MAX_TTL_S) > MAX_TTL_S


def test_aliases_in_a_circle_lead_nowhere():
    other = b"\x05other\x03org\0"
    circle = answer(record(QUESTION.name, 5, 60, other), record(other, 5, 60, QUESTION.name))
    assert read_addresses(circle, QUESTION).addresses == ()


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        answer(record(b"\xc0\x0c", 1, 60, b"\1\2\3\4"))[:-1],
        answer(b"\xc0\xff"),
        answer(record(b"\xc0" + bytes([12 + len(QUESTION.name) + 4]), 1, 60, b"\1\2\3\4")),
        answer(b"\x80abc"),
    ],
)
def test_an_answer_that_is_none_is_an_error(broken):
    with pytest.raises(ValueError, match=r".*"):
        read_addresses(broken, QUESTION)


@given(st.binary(max_size=300))
def test_whatever_comes_is_read_or_refused(noise):
    with contextlib.suppress(ValueError):
        read_addresses(answer(noise, noise), QUESTION)
    list(parse_connections(noise))


def test_an_answer_of_ours_is_read_as_it_was_meant():
    query = parse_query(make_query(QUESTION).message)
    found = read_addresses(render_addresses(query, ["1.2.3.4", "5.6.7.8"], 77), QUESTION)
    assert (found.addresses, found.ttl, found.code) == (("1.2.3.4", "5.6.7.8"), 77, 0)


def test_pins_that_last_cost_nothing_and_those_that_end_are_given_more_time():
    board, table = Pinboard(), Table("inet", "t")
    assert board.want(1, ["s"], ["1.2.3.4"], now=0, lifetime_s=100)
    assert len(board.take(lambda *_: True).render(table)) == 1
    board.settle()
    assert not board.want(1, ["s"], ["1.2.3.4"], now=40, lifetime_s=100)
    assert board.want(1, ["s"], ["1.2.3.4"], now=60, lifetime_s=100)
    again = board.take(lambda *_: True)
    assert [next(iter(line)) for line in again.render(table)] == ["add", "delete", "add"]
    assert board.remaining(now=100) == {"s": {"1.2.3.4": 60}}
    board.keep(1, set())
    assert board.remaining(now=100) == {}


def test_what_the_kernel_may_not_have_yet_is_waited_for_and_not_asked_for_twice():
    board = Pinboard()
    assert not board.want(1, ["s"], [], now=0, lifetime_s=100)
    for asked_s in (0, 60):  # fresh, and given more time
        board.want(1, ["s"], ["1.2.3.4"], now=asked_s, lifetime_s=100)
        board.take(lambda *_: True)
        assert board.want(1, ["s"], ["1.2.3.4"], now=asked_s, lifetime_s=100)
        assert not board.want(1, ["s"], [], now=asked_s, lifetime_s=100)
        assert not board.want(2, ["t"], [], now=asked_s, lifetime_s=100)
        board.settle()
        assert board.take(lambda *_: True).slots == []
        assert not board.want(1, ["s"], ["1.2.3.4"], now=asked_s, lifetime_s=100)


def test_what_belongs_to_no_rule_or_did_not_get_in_is_not_pinned():
    board = Pinboard()
    board.want(1, ["gone"], ["1.2.3.4"], now=0, lifetime_s=100)
    assert board.take(lambda *_: False).fresh == {}
    board.want(1, ["s"], ["1.2.3.4"], now=0, lifetime_s=100)
    board.forget(board.take(lambda *_: True))
    assert board.remaining(now=1) == {"s": {}}
    assert board.want(1, ["s"], ["1.2.3.4"], now=1, lifetime_s=100)


def test_counts_are_the_machines_and_others_interfaces_are_passed_over():
    rows = (("lo", 100, 1, 100, 1), ("fuse-v3", 2000, 20, 9000, 90), ("fuse-v4", 1, 1, 1, 1))
    lines = [f"{name:>8}: {rx} {packets} 0 0 0 0 0 0 {tx} {sent} 0 0 0 0 0 0" for name, rx, packets, tx, sent in rows]
    devices = "\n".join(["Inter-|   Receive  |  Transmit", " face |bytes packets |bytes packets", *lines, ""])
    counts = {3: Counts(opened=4, refused=1) + Counts(opened=1, accepted=2)}
    (seen,) = parse_traffic(NetworkPlan(), devices, counts, {3: 7}).values()
    assert (seen.sent_bytes, seen.sent_packets, seen.received_bytes, seen.received_packets) == (2000, 20, 9000, 90)
    assert (seen.connections_opened, seen.connections_accepted) == (5, 2)
    assert (seen.packets_refused, seen.names_refused) == (1, 7)


def test_uses_are_read_as_seconds_that_have_gone_by():
    elements = [
        {"elem": {"val": "fuse-v3", "timeout": USE_MEMORY_S, "expires": USE_MEMORY_S - 30}},
        {"elem": {"val": "fuse-v4", "timeout": 60}},
        {"elem": {"val": "eth0", "timeout": 60, "expires": 9}},
    ]
    listed = {"set": {"family": "inet", "name": "used", "table": "fuse_fuse", "type": "ifname", "elem": elements}}
    listing = msgspec.json.encode({"nftables": [{"metainfo": {}}, listed]})
    assert parse_uses(NetworkPlan(), listing) == {3: 30, 4: USE_MEMORY_S}
    assert parse_table(NetworkPlan(), listing).uses == {3: 30, 4: USE_MEMORY_S}
    assert parse_uses(NetworkPlan(), b"") == {}


def test_no_table_is_no_machines():
    assert not parse_table(NetworkPlan(), b"").exists


def test_what_a_set_cannot_hold_is_not_asked_of_it():
    """One address too many would have the kernel refuse the pins of all machines that share the transaction."""
    board = Pinboard()
    many = [str(IPv4Address(i)) for i in range(1 << 27, (1 << 27) + MAX_PINS + 9)]
    for start in range(0, MAX_PINS - 1, 9):
        board.want(1, ["s"], many[start : start + 9], now=0, lifetime_s=100)
    batch = board.take(lambda *_: True)
    board.settle()
    fitting = MAX_PINS // 9 * 9
    assert [len(pins) for pins in batch.fresh.values()] == [fitting]
    assert not board.want(1, ["s"], many[fitting : fitting + 9], now=1, lifetime_s=100)
    assert not board.holds(1, ["s"], many[fitting : fitting + 9], now=1)
    assert board.want(1, ["s"], many[:9], now=90, lifetime_s=100), "more time takes no room"
    assert board.want(1, ["t"], many[-9:], now=1, lifetime_s=100), "another set has its own room"
    assert not board.want(1, ["s"], many[-9:], now=200, lifetime_s=100), "the kernel may still have the expired ones"
    assert board.want(1, ["s"], many[-9:], now=400, lifetime_s=100)


def test_a_refused_batch_leaves_each_machine_what_it_had():
    board = Pinboard()
    board.want(1, ["s"], ["1.2.3.4"], now=0, lifetime_s=100)
    board.take(lambda *_: True)
    board.want(1, ["s"], ["1.2.3.4", "5.6.7.8"], now=60, lifetime_s=100)
    board.want(2, ["t"], ["5.6.7.8"], now=60, lifetime_s=100)
    batch = board.take(lambda *_: True)
    assert batch.slots == [1, 2]
    board.forget(batch.of(1))
    assert board.remaining(now=60) == {"s": {"1.2.3.4": 40}, "t": {"5.6.7.8": 100}}


@pytest.mark.parametrize(("entries", "machines", "each"), [(65_536, 100, 491), (262_144, 20, 8192), (4096, 9999, 64)])
def test_machines_share_what_the_host_does_not_need_of_its_connections(entries, machines, each):
    assert connections_each(entries, machines) == each
    assert connections_each(needed_entries(machines), machines) == MAX_CONNECTIONS
