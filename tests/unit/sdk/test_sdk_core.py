"""The sans-I/O core: requests, answers, when to repeat; addresses and proxies."""

import pytest

from fusevm.model.errors import (
    BadField,
    HostFull,
    IdempotencyInProgress,
    Internal,
    NoCapacity,
    ShuttingDown,
    WrongState,
)
from fusevm.sdk import core
from fusevm.sdk.address import check_tunnel, parse_address, proxy_for, tunnel_request
from fusevm.sdk.core import Answer
from fusevm.sdk.exchange import Exchange
from fusevm.sdk.failures import ConnectionLost, ProtocolBroken, ServerUnreachable
from fusevm.wire.errors import render_envelope, render_flat
from fusevm.wire.frames import Frame, FrameType, encode_frame
from fusevm.wire.guest import ExecRequest
from fusevm.wire.rest import ExecBody

LOST = ConnectionLost(url="u", problem="p")
REFUSED = ServerUnreachable(url="u", problem="p")


def test_targets_encode_slashes_and_leave_out_what_is_empty() -> None:
    assert core.make_target("environments", "fuse-a/b ü", query={"a": "", "b": None, "c": True, "d": "x&y"}) == (
        "/v1/environments/fuse-a%2Fb%20%C3%BC?c=true&d=x%26y"
    )


def test_a_shell_target_carries_each_argument() -> None:
    assert core.shell_target("fuse-a", rows=2, cols=3, cmd=["sh", "-c", "a&b"]) == (
        "/v1/environments/fuse-a/shell?rows=2&cols=3&cmd=sh&cmd=-c&cmd=a%26b"
    )


@pytest.mark.parametrize(
    ("call", "error", "is_repeated"),
    [
        (core.get_version(), LOST, True),
        (core.get_version(), REFUSED, True),
        (core.get_version(), NoCapacity(rejections=""), False),
        (core.exec_environment("a", ExecBody(cmd=["x"])), LOST, False),
        (core.exec_environment("a", ExecBody(cmd=["x"])), REFUSED, True),
        (core.exec_environment("a", ExecBody(cmd=["x"])), ShuttingDown(), True),
        (core.exec_environment("a", ExecBody(cmd=["x"])), HostFull(resource="", needed="", free=""), False),
        (core.create_environment(core.make_create_request("t", {}), key="k"), LOST, True),
        (core.create_environment(core.make_create_request("t", {}), key="k"), IdempotencyInProgress(key="k"), True),
        (core.delete_environment("a"), LOST, True),
        (core.start_process("a", ExecRequest(cmd=["x"])), LOST, False),
        (core.write_file("a", "/x", b""), LOST, True),
        (core.write_file("a", "/x", None), LOST, False),
    ],
)
def test_what_is_repeated(call: core.Call[object], error: Exception, is_repeated: bool) -> None:
    assert (core.pause_s(call, error, 1, 0.5) is not None) is is_repeated  # type: ignore[arg-type]


def test_repetition_ends() -> None:
    assert core.pause_s(core.get_version(), LOST, 4, 0.5) is None
    assert core.pause_s(core.get_version(), IdempotencyInProgress(key="k"), 65, 0.5) is None


def test_an_answer_of_another_program_is_protocol_broken() -> None:
    with pytest.raises(ProtocolBroken):
        core.get_version().result(Answer(status=200, body=b"<html>"))
    with pytest.raises(Internal, match="Bad Gateway"):
        core.get_version().result(Answer(status=502, body=b"<html>"))


def test_not_ready_is_an_answer() -> None:
    ready = core.get_ready().result(Answer(status=503, body=b'{"status":"not_ready","checks":{"store":"gone"}}'))
    assert ready.checks == {"store": "gone"}
    with pytest.raises(WrongState):
        core.get_ready().result(Answer(status=409, body=render_envelope(WrongState(id="a", state="b", wanted="c"))))


def test_create_fields_become_the_contracts_body() -> None:
    request = core.make_create_request(
        "t", {"cpus": 2, "labels": {"a": "b"}, "manifest": b"x", "ram_mb": 0, "region": ""}
    )
    body = core.to_json(request)
    assert body == b'{"task_id":"t","spec":{"cpus":2,"labels":{"a":"b"}},"manifest_inline":"eA=="}'


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
        ("https://fuse.example.com", "https://fuse.example.com"),
        ("https://x.example/fuse/", "https://x.example/fuse"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    assert parse_address(text).url == url


@pytest.mark.parametrize("text", ["", "ftp://x", "http://", "http://x:99999", "http://x?y=1"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(BadField, match="base_url"):
        parse_address(text)


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("http://127.0.0.1:8080", {"http_proxy": "http://p:3128"}, None),
        ("http://localhost:8080", {"HTTP_PROXY": "http://p:3128"}, None),
        ("http://[::1]:8080", {"all_proxy": "http://p:3128"}, None),
        ("http://fuse.example", {"http_proxy": "http://p:3128"}, "http://p:3128"),
        ("https://fuse.example", {"HTTPS_PROXY": "p:3128"}, "http://p:3128"),
        ("https://fuse.example", {"http_proxy": "http://p:3128"}, None),
        ("https://a.fuse.example", {"all_proxy": "http://p:3128", "no_proxy": "x, .fuse.example"}, None),
        ("https://a.fuse.example", {"all_proxy": "http://p:3128", "no_proxy": "*"}, None),
        ("https://afuse.example", {"all_proxy": "http://p:3128", "no_proxy": "fuse.example"}, "http://p:3128"),
    ],
)
def test_proxies_are_never_used_for_loopback(url: str, environ: dict[str, str], proxy: str | None) -> None:
    found = proxy_for(parse_address(url), environ)
    assert (found.url if found else None) == proxy


def test_a_tunnel_is_asked_for_and_checked() -> None:
    proxy = parse_address("http://me:pass%20word@p:3128")
    request = tunnel_request(parse_address("https://fuse.example"), proxy).decode()
    assert request.startswith("CONNECT fuse.example:443 HTTP/1.1\r\n")
    assert "Proxy-Authorization: Basic bWU6cGFzcyB3b3Jk\r\n" in request
    check_tunnel(b"HTTP/1.1 200 OK\r\n\r\n")
    with pytest.raises(ConnectionError, match="407"):
        check_tunnel(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")


def test_an_exchange_knows_pid_output_and_end() -> None:
    exchange = Exchange("u")
    assert exchange.feed(encode_frame(Frame(FrameType.STARTED, b'{"pid":7}'))) == []
    assert exchange.feed(encode_frame(Frame(FrameType.STDOUT, b"x"))) == [Frame(FrameType.STDOUT, b"x")]
    assert exchange.feed(encode_frame(Frame(FrameType.EXIT, b'{"exit_code":3}'))) == []
    assert exchange.pid == 7
    assert exchange.exit is not None
    assert exchange.exit.exit_code == 3


def test_an_exchange_raises_the_error_it_is_told() -> None:
    with pytest.raises(WrongState, match="draining"):
        Exchange("u").feed(
            encode_frame(Frame(FrameType.ERROR, render_flat(WrongState(id="a", state="draining", wanted=""))))
        )
    with pytest.raises(ProtocolBroken):
        Exchange("u").feed(b"\xff" * 8)


def test_fragments_are_joined() -> None:
    exchange = Exchange("u")
    assert [exchange.join(b"a", is_last=False), exchange.join(b"b", is_last=True)] == [b"", b"ab"]
    assert exchange.join(b"c", is_last=True) == b"c"


def test_sizes_of_zero_are_not_sent() -> None:
    assert Exchange("u").resize(0, 70_000).payload == b'{"rows":1,"cols":65535}'
    assert Exchange("u").signal("SIGINT").payload == b'{"signal":"INT"}'
