"""An error crosses a wire and is the same error on the other side."""

import msgspec
import pytest

from fusevm.model.errors import (
    BadField,
    Conflict,
    Error,
    HostRejected,
    Internal,
    InvalidArgument,
    MethodNotAllowed,
    NotFound,
    Timeout,
    Unauthorized,
    Unavailable,
    Unimplemented,
    error_classes,
    field_names,
)
from fusevm.wire.errors import parse_error, render_envelope, render_flat

#: The SDK has a few of its own that never cross a wire.
CLASSES = [cls for cls in error_classes() if cls.__module__.startswith("fusevm.model.errors")]
EVERY_CLASS = pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda cls: cls.__name__))


def some(cls: type[Error]) -> Error:
    return cls(**{name: 7 if kind is int else f'the "{name}" \u00e9\n' for name, kind in field_names(cls).items()})


@EVERY_CLASS
@pytest.mark.parametrize("render", [render_envelope, render_flat])
def test_every_error_comes_back_as_itself(cls: type[Error], render):
    sent = some(cls)
    got = parse_error(cls.status, render(sent))
    assert type(got) is cls
    assert (got.message, got.details) == (sent.message, sent.details)
    assert all(getattr(got, name) == getattr(sent, name) for name in field_names(cls))


@EVERY_CLASS
def test_an_error_that_is_passed_on_stays_the_same(cls: type[Error]):
    """Guest to host to control plane to client: three conversions."""
    sent = some(cls)
    relayed = parse_error(cls.status, render_flat(parse_error(cls.status, render_flat(sent))))
    assert render_envelope(relayed) == render_envelope(sent)


def test_the_public_body_is_the_envelope_of_the_contract():
    body = msgspec.json.decode(render_envelope(BadField(field="spec.cpus", problem="0 is too few")))
    assert body == {
        "error": {
            "code": "invalid_argument",
            "message": "spec.cpus: 0 is too few",
            "details": {"reason": "bad_field", "field": "spec.cpus", "problem": "0 is too few"},
        }
    }


def test_the_host_body_is_flat():
    body = msgspec.json.decode(render_flat(BadField(field="id", problem="bad")))
    assert body == {
        "error": "id: bad",
        "code": "invalid_argument",
        "details": {"reason": "bad_field", "field": "id", "problem": "bad"},
    }


@pytest.mark.parametrize(
    ("status", "body", "cls"),
    [
        (404, b'{"error":{"code":"not_found","message":"gone"}}', NotFound),
        (503, b'{"error":"full","code":"unavailable"}', Unavailable),
        (409, b'{"error":"x","code":"conflict"}', Conflict),
        (400, b'{"error":"x","code":"invalid_argument"}', InvalidArgument),
        (405, b'{"error":"x","code":"invalid_argument"}', MethodNotAllowed),
        (401, b'{"error":"x","code":"unauthorized"}', Unauthorized),
        (504, b'{"error":"x","code":"timeout"}', Timeout),
        (501, b'{"error":"x","code":"unimplemented"}', Unimplemented),
        (502, b'{"error":"bad token","code":"unauthorized"}', HostRejected),
        (500, b'{"error":"boom","code":"internal"}', Internal),
        (418, b'{"error":"boom"}', Internal),
        (404, b'{"error":"x","code":"not_found","details":{"reason":"of_a_later_version"}}', NotFound),
    ],
)
def test_a_body_without_a_known_reason_says_no_more_than_its_code(status: int, body: bytes, cls: type[Error]):
    got = parse_error(status, body)
    assert type(got) is cls
    assert got.message in {"gone", "full", "bad token", "boom", "x"}


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (502, b"<html>Bad gateway</html>", "status 502 (Bad Gateway): <html>Bad gateway</html>"),
        (500, b"", "status 500 (Internal Server Error)"),
        (799, b"\xff\xfe", "status 799 (unknown status): \ufffd\ufffd"),
        (500, b'{"error": 5}', 'status 500 (Internal Server Error): {"error": 5}'),
        (500, b'{"error": "x", "details": {"n": 1}}', 'status 500 (Internal Server Error): {"error": "x", "details"'),
        (500, b'"text"', 'status 500 (Internal Server Error): "text"'),
    ],
)
def test_a_body_that_is_no_error_names_the_status(status: int, body: bytes, message: str):
    got = parse_error(status, body)
    assert type(got) is Internal
    assert got.message.startswith(message)


def test_a_body_that_is_nested_without_end_is_no_error_either():
    assert type(parse_error(500, b'{"error":"x","more":' + b"[" * 100_000)) is Internal


def test_a_huge_body_that_is_no_error_is_cut():
    assert len(parse_error(500, b"x" * 1_000_000).message) < 300


def test_garbled_numbers_in_details_do_no_harm():
    body = b'{"error":"x","code":"unavailable","details":{"reason":"no_space","needed":"many","free":"--1"}}'
    got = parse_error(503, body)
    assert (got.reason, got.details["needed"], got.details["free"]) == ("no_space", "0", "0")
