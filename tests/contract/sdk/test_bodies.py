"""Every body that the contract's SDK parses: with all its fields, and with none that may be left out. Never a null."""

import json
import types as python_types
from collections.abc import Iterator
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin

import fuse
import httpx
import msgspec
import pytest
from fuse import errors, types

from fusevm.control.call import reply
from fusevm.control.events import encode_event
from fusevm.control.render import render_environment, render_event, render_host
from fusevm.model.environment import Desired, Ending, Environment, Spec, State, Timings
from fusevm.model.errors import error_classes, field_names
from fusevm.model.fact import Fact, Kind
from fusevm.model.host import Host, HostHealth, HostState, Resources
from fusevm.wire import rest, rest_fleet, rest_keys
from fusevm.wire.errors import render_envelope
from fusevm.wire.sse import KEEPALIVE

T = TypeVar("T", bound=msgspec.Struct)
TIME = "2026-11-21T21:16:37.730Z"
#: Every character at which Python ends a line.
BREAKS = "a\nb\rc\vd\fe\x1cf\x1dg\x1eh\x85i\u2028j\u2029k"
#: Texts that must be more than a text.
TEXTS = {"state": "running", "event": "state"} | dict.fromkeys(("last_seen", "since", "retention_until"), TIME)
BODIES: list[tuple[type[msgspec.Struct], type[Any]]] = [
    (rest.EnvironmentBody, types.EnvironmentInfo),
    (rest.EnvironmentPage, types.EnvironmentPage),
    (rest.HostBody, types.Host),
    (rest.HostPage, types.HostPage),
    (rest.EventBody, types.Event),
    (rest.ExecAnswer, types.ExecResult),
    (rest_fleet.SnapshotBody, types.Snapshot),
    (rest_fleet.SnapshotPage, types.SnapshotPage),
    (rest_keys.KeyBody, types.APIKey),
    (rest_keys.NewKey, types.CreatedAPIKey),
]


def full(kind: type[T]) -> T:
    """An instance with every field filled."""
    return kind(**{field.name: _filled(field.name, field.type) for field in msgspec.structs.fields(kind)})


def bare(kind: type[T]) -> T:
    """An instance with only the fields that it cannot do without."""
    return kind(**{field.name: _bare(field) for field in msgspec.structs.fields(kind) if field.required})


def _bare(field: Any) -> Any:
    if get_origin(field.type) is list:
        return []
    is_struct = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
    return bare(field.type) if is_struct else _filled(field.name, field.type)


def _filled(name: str, kind: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, python_types.UnionType):
        return _filled(name, next(part for part in parts if part not in (type(None), msgspec.UnsetType)))
    if origin in (list, tuple):
        return origin([_filled(name, parts[0])])
    if origin is dict:
        return {"key": "value"}
    if parts:  # a literal
        return parts[0]
    if issubclass(kind, msgspec.Struct):
        return full(kind)
    if issubclass(kind, Enum):
        return next(iter(kind))
    if kind is str:
        return TIME if name.endswith("_at") else TEXTS.get(name, f"a {name}")
    return {bool: True, int: 7, float: 1.5}[kind]


def sent(body: Any) -> Any:
    """The body as it is sent, decoded again; without a null anywhere."""
    decoded = json.loads(bytes(reply(body).body))
    assert list(_nulls(decoded, "")) == []
    return decoded


def _nulls(value: Any, where: str) -> Iterator[str]:
    if value is None:
        yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _nulls(item, f"{where}.{key}")


def _check_equal(parsed: Any, raw: dict[str, Any]) -> None:
    """Whatever both sides know arrived unchanged."""
    shown = json.loads(parsed.model_dump_json(by_alias=True))
    for name in set(shown) & set(raw):
        if isinstance(raw[name], str | int | float) and raw[name] != TIME:
            assert shown[name] == raw[name], name
        if raw[name] == TIME:
            assert shown[name], name


@pytest.mark.parametrize(("ours", "theirs"), BODIES, ids=lambda kind: kind.__name__)
def test_a_body_with_every_field_parses(ours: type[msgspec.Struct], theirs: type[Any]) -> None:
    raw = sent(full(ours))
    assert set(raw) == set(ours.__struct_fields__)
    _check_equal(theirs.model_validate(raw), raw)


@pytest.mark.parametrize(("ours", "theirs"), BODIES, ids=lambda kind: kind.__name__)
def test_a_body_with_nothing_that_may_be_left_out_parses(ours: type[msgspec.Struct], theirs: type[Any]) -> None:
    raw = sent(bare(ours))
    _check_equal(theirs.model_validate(raw), raw)


def test_pages_carry_what_they_list() -> None:
    page = types.EnvironmentPage.model_validate(sent(full(rest.EnvironmentPage)))
    assert (len(page.environments), page.next_cursor) == (1, "a next_cursor")
    assert page.environments[0].spec.labels == {"key": "value"}
    assert types.EnvironmentPage.model_validate(sent(bare(rest.EnvironmentPage))).next_cursor is None
    hosts = types.HostPage.model_validate(sent(full(rest.HostPage)))
    assert (hosts.hosts[0].capacity.cpus, hosts.hosts[0].allocated.vm_count) == (7, 7)
    assert types.HostPage.model_validate(sent(bare(rest.HostPage))).hosts == []


# -- records -------------------------------------------------------------------------------------------------------

NEW = Environment(
    uid="u1",
    task_id="t",
    spec=Spec(cpus=1, ram_mb=512, storage_gb=4, image="debian-12"),
    state=State.PROVISIONING,
    desired=Desired.RUNNING,
    host_id="h1",
    machine_id="m-1",
    incarnation=1,
    action_seq=1,
    created_at_ms=1_700_000_000_000,
    updated_at_ms=1_700_000_000_000,
    last_activity_ms=1_700_000_000_000,
)
ENDED = msgspec.structs.replace(
    NEW,
    spec=Spec(
        cpus=2,
        ram_mb=1024,
        storage_gb=8,
        image="i",
        region="eu",
        arch="amd64",
        labels={"a": "b"},
        host_id="h1",
        max_runtime_seconds=-1,
        idle_timeout_seconds=60,
    ),
    state=State.FAILED,
    desired=Desired.DESTROYED,
    ending=Ending(state=State.FAILED, reason="machine_exited", message="gone"),
    error="gone",
    timings=Timings(schedule_ms=1, prepare_ms=2, boot_ms=3, agent_ms=4, host_ms=5),
    running_at_ms=1_700_000_000_001,
    ended_at_ms=1_700_000_000_002,
)


def test_records_render_to_what_parses() -> None:
    new = types.EnvironmentInfo.model_validate(sent(render_environment(NEW)))
    assert (new.id, new.state, new.error, new.url) == ("fuse-t", "provisioning", "", "")
    ended = types.EnvironmentInfo.model_validate(sent(render_environment(ENDED)))
    assert (ended.state, ended.error, ended.spec.max_runtime_seconds) == ("failed", "gone", -1)
    new_host = Host(id="h", url="x", capacity=Resources(), created_at_ms=1, updated_at_ms=1)
    assert types.Host.model_validate(sent(render_host(new_host))).last_seen is None
    host = msgspec.structs.replace(
        new_host,
        state=HostState.CORDONED,
        health=HostHealth.LOST,
        region="eu",
        labels={"a": "b"},
        images=("i",),
        last_seen_ms=1_700_000_000_000,
    )
    parsed = types.Host.model_validate(sent(render_host(host)))
    assert (parsed.state, parsed.region, parsed.labels) == ("cordoned", "eu", {"a": "b"})
    assert parsed.last_seen is not None


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", list(error_classes()), ids=lambda cls: cls.reason)
def test_every_error_parses(cls: Any) -> None:
    error = cls(**{name: (7 if kind is int else "x") for name, kind in field_names(cls).items()})
    body = render_envelope(error)
    assert list(_nulls(json.loads(body), "")) == []
    parsed = errors.parse_api_error(error.status, httpx.Headers({"x-request-id": "req_1"}), body)
    assert (parsed.code, parsed.message, parsed.request_id) == (error.code, error.message, "req_1")
    assert parsed.details == error.details
    assert all(isinstance(value, str) for value in json.loads(body)["error"].get("details", {}).values())


# -- events --------------------------------------------------------------------------------------------------------


def _iterate(*chunks: bytes) -> list[types.Event]:
    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=b"".join(chunks))

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://fuse") as http:
        client = fuse.Client("http://fuse", http_client=http)
        client._t._stream.close()
        client._t._stream = http
        return list(client.environments.events("fuse-t"))


def _message(body: rest.EventBody) -> bytes:
    sent(body)
    return encode_event(body)


def test_a_stream_of_full_and_bare_events_is_iterated_to_its_end() -> None:
    ended = msgspec.structs.replace(full(rest.EventBody), state="failed")
    after = full(rest.EventBody)
    stream = (_message(bare(rest.EventBody)), KEEPALIVE, _message(full(rest.EventBody)), _message(ended))
    seen = _iterate(*stream, _message(after))
    assert [(event.id, event.state, event.err) for event in seen] == [
        ("", "running", None),
        ("a id", "running", None),
        ("a id", "failed", None),
    ]
    assert (seen[1].kind, seen[1].url, seen[1].error) == ("state", "a url", "a error")
    assert all(event.updated_at is not None for event in seen)


@pytest.mark.parametrize("kind", Kind)
def test_events_of_every_kind_are_iterated(kind: Kind) -> None:
    told = Fact(uid="u1", seq=1, kind=kind, state=State.RUNNING, at_ms=1_700_000_000_000, cause="c", data={"a": "b"})
    odd = msgspec.structs.replace(told, message=f'"{BREAKS}"', reason="r")
    seen = _iterate(_message(render_event(told, "t")), _message(render_event(odd, "t")))
    assert [(event.kind, event.vm_id, event.err) for event in seen] == [(kind.value, "fuse-t", None)] * 2
    assert seen[1].error == (f'"{BREAKS}"' if kind is Kind.STATE else "")
