import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusevm.host.net.dns_message import REFUSED, SERVFAIL, is_answer, parse_query, render_failure
from fusevm.host.net.resolvers import Resolver, ResolverFile, parse_resolvers


def query(name="example.org", number=0x1234, flags=0x0100, counts=(1, 0, 0, 1), tail=b"\0\0\x29\x10\0\0\0\0\0\0\0"):
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".") if part)
    return struct.pack("!HHHHHH", number, flags, *counts) + labels + b"\0" + struct.pack("!HH", 1, 1) + tail


def answer(number=0x1234, name="example.org", flags=0x8180):
    return query(name, number, flags, (1, 0, 0, 0), b"")


def test_a_query_is_read():
    parsed = parse_query(query())
    assert parsed is not None
    assert (parsed.id, parsed.question.name) == (0x1234, b"\x07example\x03org\0")
    assert parsed.with_id(0xABCD) == b"\xab\xcd" + query()[2:]
    assert parse_query(query(".")) is not None, "the root has a name, too"


@pytest.mark.parametrize(
    "message",
    [
        b"",
        query()[:11],
        query(flags=0x8100),
        query(flags=0x2800),
        query(counts=(0, 0, 0, 0)),
        query(counts=(2, 0, 0, 0)),
        query(counts=(1, 1, 0, 0)),
        query(tail=b"")[:-1],
        query()[:14],
        query()[:12] + b"\xc0\x0c\0\x01\0\x01",
        query(".".join(["a" * 60] * 5)),
    ],
)
def test_what_is_no_plain_query_is_not(message):
    assert parse_query(message) is None


@given(st.binary(max_size=600))
def test_any_bytes_are_read_without_an_exception(data):
    parse_query(data)
    is_answer(data, 1, parse_query(query()).question)


def test_an_answer_fits_by_id_and_question():
    question = parse_query(query()).question
    assert is_answer(answer(), 0x1234, question)
    assert is_answer(answer(name="eXample.ORG"), 0x1234, question)
    assert not is_answer(answer(), 0x1235, question)
    assert not is_answer(answer(name="example.com"), 0x1234, question)
    assert not is_answer(query(), 0x1234, question)
    assert not is_answer(answer()[:12], 0x1234, question)


@pytest.mark.parametrize("code", [SERVFAIL, REFUSED])
def test_a_failure_repeats_the_question(code):
    parsed = parse_query(query())
    failure = render_failure(parsed, code)
    assert is_answer(failure, 0x1234, parsed.question)
    assert failure[3] & 0x0F == code
    assert struct.unpack("!HHHH", failure[4:12]) == (1, 0, 0, 0)
    assert failure[2] & 0x01, "recursion desired is repeated"


def test_resolvers_are_read_from_resolv_conf():
    text = """# made by something
search example.org
nameserver 192.0.2.1
nameserver fe80::1%eth0
nameserver	2001:db8::1 # a comment
nameserver not-an-address
 nameserver 192.0.2.2
nameserver
options edns0
nameserver 192.0.2.3
"""
    assert parse_resolvers(text) == [Resolver("192.0.2.1"), Resolver("fe80::1%eth0"), Resolver("2001:db8::1")]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "resolv.conf"
    resolvers = ResolverFile(path)
    assert resolvers.current() == []
    path.write_text("nameserver 192.0.2.1\n")
    assert resolvers.current() == [Resolver("192.0.2.1")]
    path.write_text("nameserver 192.0.2.1\nnameserver 192.0.2.2\n")
    assert resolvers.current() == [Resolver("192.0.2.1"), Resolver("192.0.2.2")]
    path.unlink()
    assert resolvers.current() == []
