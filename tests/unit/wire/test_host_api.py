"""The fence in the headers of an order, and the bodies of the machine API."""

import msgspec
import pytest

from fusevm.model.errors import BadField
from fusevm.model.host import Resources
from fusevm.model.machine import Fence, MachineSpec, Moment, Phase
from fusevm.wire.host_api import (
    CreateMachine,
    HostFacts,
    MachineBody,
    MachineEvent,
    MachineList,
    fence_headers,
    parse_fence,
)

FENCE = Fence(cluster="c1", uid="01hz", incarnation=3, action_seq=12)


def test_a_fence_survives_its_headers():
    assert parse_fence(fence_headers(FENCE)) == FENCE


def test_a_limit_survives_its_header():
    for ms in (0, 12_345, -1):
        limited = msgspec.structs.replace(FENCE, valid_until=Moment(clock="b-1", ms=ms))
        assert parse_fence(fence_headers(limited)) == limited


@pytest.mark.parametrize("value", ["", " 5", "b", "b x", "b 1.5", "b -", "b \u00b2", f"b {'9' * 19}"])
def test_a_bad_limit_is_refused(value: str):
    with pytest.raises(BadField, match="name of a clock"):
        parse_fence({**fence_headers(FENCE), "fuse-valid-until": value})


def test_a_limit_without_a_fence_is_refused():
    with pytest.raises(BadField, match="belong together"):
        parse_fence({"fuse-valid-until": "b 5"})


def test_no_header_means_no_fence():
    assert parse_fence({"host": "x"}) is None


@pytest.mark.parametrize("name", fence_headers(FENCE))
def test_a_partial_fence_is_refused(name: str):
    headers = fence_headers(FENCE)
    del headers[name]
    with pytest.raises(BadField, match="belong together"):
        parse_fence(headers)
    with pytest.raises(BadField, match="belong together"):
        parse_fence({name: fence_headers(FENCE)[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fuse-cluster", ""),
        ("fuse-uid", ""),
        ("fuse-incarnation", "-1"),
        ("fuse-incarnation", "1.0"),
        ("fuse-incarnation", ""),
        ("fuse-action-seq", "x"),
        ("fuse-action-seq", "9" * 19),
        ("fuse-action-seq", "\u00b2"),
    ],
)
def test_a_bad_fence_is_refused(name: str, value: str):
    with pytest.raises(BadField):
        parse_fence({**fence_headers(FENCE), name: value})


def test_bodies_survive_json():
    spec = MachineSpec(image="debian-12")
    machine = MachineBody(id="m-1", phase=Phase.RUNNING, spec=spec, created_at="2026-01-01T00:00:00Z")
    facts = HostFacts(version="1", epoch="e", clock=Moment(clock="b", ms=1), capacity=Resources(cpus=1))
    for body in (
        CreateMachine(machine_id="m-1", spec=spec),
        machine,
        MachineList(machines=[machine], tombstones=2),
        facts,
        MachineEvent(kind="hello", epoch="e"),
    ):
        assert msgspec.json.decode(msgspec.json.encode(body), type=type(body)) == body
