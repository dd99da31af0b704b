"""Rules for every error class, walked over the whole tree."""

import string

import pytest

from fusevm.model import errors
from fusevm.model.errors import BadField, Error, InvalidArgument, NoSpace, error_classes, field_names

#: The SDK has a few of its own that never cross a wire.
CLASSES = sorted(
    (cls for cls in error_classes() if cls.__module__.startswith(errors.__name__)), key=lambda cls: cls.__name__
)
#: The contract's short list, with the statuses that each may have.
STATUSES = {
    "invalid_argument": {400, 405},
    "unauthorized": {401, 403, 502},
    "forbidden": {403},
    "not_found": {404},
    "route_not_found": {404},
    "conflict": {409, 412},
    "payload_too_large": {413},
    "rate_limited": {429},
    "internal": {500, 502},
    "unimplemented": {501},
    "unavailable": {503},
    "timeout": {504},
}
EVERY_CLASS = pytest.mark.parametrize("cls", CLASSES)


def some(cls: type[Error]) -> Error:
    """An instance with a value in every field."""
    return cls(**{name: 7 if kind is int else f"the {name}" for name, kind in field_names(cls).items()})


def test_every_class_with_a_template_is_concrete():
    everything = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Error)]
    assert {cls for cls in everything if cls.__dict__.get("template")} == set(CLASSES)


def test_reasons_are_unique():
    reasons = [cls.reason for cls in CLASSES]
    assert len(set(reasons)) == len(reasons)


@EVERY_CLASS
def test_reasons_are_snake_case(cls: type[Error]):
    assert set(cls.reason) <= set(string.ascii_lowercase + "_0123456789")


@EVERY_CLASS
def test_the_code_is_one_of_the_contract_with_an_allowed_status(cls: type[Error]):
    assert cls.status in STATUSES[cls.code]


@EVERY_CLASS
def test_the_message_says_every_field_and_only_fields(cls: type[Error]):
    used = {name for _, name, _, _ in string.Formatter().parse(cls.template) if name}
    assert used <= set(field_names(cls))
    assert some(cls).message == cls.template.format(**{name: getattr(some(cls), name) for name in field_names(cls)})
    assert some(cls).message


@EVERY_CLASS
def test_details_are_strings_and_start_with_the_reason(cls: type[Error]):
    details = some(cls).details
    assert details["reason"] == cls.reason
    assert set(details) == {"reason", *field_names(cls)}
    assert all(isinstance(value, str) for value in details.values())


@EVERY_CLASS
def test_an_error_is_rebuilt_from_its_details(cls: type[Error]):
    sent = some(cls)
    got = cls.rebuild(sent.message, sent.details)
    assert type(got) is cls
    assert (got.message, got.details) == (sent.message, sent.details)


def test_an_error_takes_exactly_its_fields():
    with pytest.raises(TypeError, match=r"BadField takes exactly \['field', 'problem'\], got \['field'\]"):
        BadField(field="cpus")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="got"):
        BadField(field="a", problem="b", more="c")  # type: ignore[call-arg]


def test_details_that_a_peer_left_out_or_garbled_become_empty():
    got = NoSpace.rebuild("full", {"needed": "-12", "free": "lots"})
    assert (got.path, got.needed, got.free, got.message) == ("", -12, 0, "full")
    for garbage in ("--1", "²", "1" * 5_000, " 1", "1e3"):
        assert NoSpace.rebuild("full", {"needed": garbage}).needed == 0


def test_groups_are_caught_together():
    with pytest.raises(InvalidArgument):
        raise BadField(field="cpus", problem="too many")


def test_only_what_may_go_away_by_itself_is_worth_a_retry():
    assert {cls.reason for cls in CLASSES if cls.retryable and cls.status < 500} <= {
        "revision_conflict",
        "idempotency_in_progress",
        "action_under_way",
        "rate_limited",
        "order_expired",
    }
