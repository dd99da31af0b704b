"""The fake's rules by themselves: those of the reference, also where the driver never goes."""

import json
from pathlib import Path

import pytest

from fusevm.testing.fake_firecracker.install import find_visible
from fusevm.testing.fake_firecracker.rules import MAX_BODY, Answer, Rules
from fusevm.testing.fake_firecracker.sinks import Counts, Log, Serial, open_sink

BOOT = [
    ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128}),
    ("PUT", "/boot-source", {"kernel_image_path": "/kernel"}),
    ("PUT", "/drives/disk", {"drive_id": "disk", "is_root_device": False, "path_on_host": "/disk"}),
    ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "/v.sock"}),
]
START = ("PUT", "/actions", {"action_type": "InstanceStart"})
LOAD = {"snapshot_path": "/state", "mem_backend": {"backend_type": "File", "backend_path": "/mem"}}


def ask(rules: Rules, method: str, path: str, body: object | None = None) -> Answer:
    return rules.answer(method, path, json.dumps(body).encode() if body is not None else b"")


def fault(answer: Answer) -> str:
    assert answer.status == 400, answer
    return answer.body["fault_message"]


@pytest.fixture
def fresh() -> Rules:
    return Rules("m-1")


@pytest.fixture
def running() -> Rules:
    rules = Rules("m-1")
    for request in (*BOOT, START):
        assert ask(rules, *request).status == 204
    return rules


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [("GET", "/vm"), ("POST", "/actions"), ("PUT", "/nowhere"), ("DELETE", "/vsock")])
def test_what_does_not_exist_is_a_fault_never_a_404(fresh, request_):
    assert "Invalid request method and/or path" in fault(ask(fresh, *request_, {} if request_[0] != "GET" else None))


def test_bodies_are_where_they_belong(fresh):
    assert "GET request cannot have a body" in fault(fresh.answer("GET", "/", b"{}"))
    assert "Empty PUT request" in fault(fresh.answer("PUT", "/vsock", b""))
    assert "deserializing" in fault(fresh.answer("PUT", "/vsock", b"{"))
    assert fresh.answer("PUT", "/vsock", b" " * (MAX_BODY + 1)).status == 413


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"guest_cid": 3}, "missing field `uds_path`"),
        ({"guest_cid": 3, "uds_path": "/v", "more": 1}, "unknown field `more`"),
        ({"guest_cid": "3", "uds_path": "/v"}, "invalid type of `guest_cid`"),
        ({"guest_cid": True, "uds_path": "/v"}, "invalid type of `guest_cid`"),
        ({"guest_cid": -1, "uds_path": "/v"}, "invalid type of `guest_cid`"),
        ([3], "expected an object"),
    ],
)
def test_a_body_with_anything_wrong_is_refused(fresh, body, words):
    assert words in fault(ask(fresh, "PUT", "/vsock", body))


def test_nested_fields_are_looked_at_too(fresh):
    body = {"rate_limiter": {"bandwidth": {"size": 1}}}
    assert "missing field `refill_time`" in fault(ask(fresh, "PUT", "/entropy", body))


# -- states ------------------------------------------------------------------------------------------------------------


def test_it_tells_its_state_in_one_place(running):
    assert ask(running, "GET", "/").body["state"] == "Running"


@pytest.mark.parametrize("request_", BOOT)
def test_nothing_is_configured_after_the_start(running, request_):
    assert "not supported after starting" in fault(ask(running, *request_))


def test_nothing_is_changed_before_the_start(fresh):
    for request in (("PATCH", "/vm", {"state": "Paused"}), ("PATCH", "/balloon", {"amount_mib": 1})):
        assert "not supported before starting" in fault(ask(fresh, *request))
    for kind in ("FlushMetrics", "SendCtrlAltDel"):
        assert "not supported before starting" in fault(ask(fresh, "PUT", "/actions", {"action_type": kind}))


def test_it_starts_once_and_with_a_kernel(fresh, running):
    assert "without kernel" in fault(ask(fresh, *START))
    assert "not supported after starting" in fault(ask(running, *START))


def test_sinks_are_configured_once_and_machines_as_often_as_one_likes(fresh):
    for _ in range(2):
        assert ask(fresh, *BOOT[0]).status == 204
    body = {"log_path": "/log", "level": "Info"}
    assert ask(fresh, "PUT", "/logger", body).status == 204
    assert "already initialized" in fault(ask(fresh, "PUT", "/logger", body))


def test_a_snapshot_is_loaded_before_anything_but_sinks(fresh):
    assert ask(fresh, "PUT", "/metrics", {"metrics_path": "/m"}).status == 204
    assert ask(fresh, "PUT", "/snapshot/load", LOAD | {"resume_vm": True}).status == 204
    assert fresh.state == "Running"
    begun = Rules("m-2")
    ask(begun, *BOOT[0])
    assert "not allowed after configuring" in fault(ask(begun, "PUT", "/snapshot/load", LOAD))


def test_a_snapshot_is_made_of_a_paused_machine(running):
    create = ("PUT", "/snapshot/create", {"snapshot_path": "/state", "mem_file_path": "/mem"})
    assert "not paused" in fault(ask(running, *create))
    ask(running, "PATCH", "/vm", {"state": "Paused"})
    assert ask(running, *create).status == 204


# -- faults of this release --------------------------------------------------------------------------------------------


def test_a_bare_pause_makes_it_deaf_and_one_with_a_snapshot_does_not(running):
    ask(running, "PATCH", "/vm", {"state": "Paused"})
    ask(running, "PUT", "/snapshot/create", {"snapshot_path": "/state", "mem_file_path": "/mem"})
    ask(running, "PATCH", "/vm", {"state": "Resumed"})
    assert not running.is_deaf
    for state in ("Paused", "Resumed"):
        ask(running, "PATCH", "/vm", {"state": state})
    assert running.is_deaf


def test_metadata_are_no_boot_configuration_and_are_merged(fresh):
    assert "not initialized" in fault(ask(fresh, "PATCH", "/mmds", {"a": 1}))
    assert ask(fresh, "PUT", "/mmds", {"a": {"b": 1, "c": 2}}).status == 204
    assert ask(fresh, "PATCH", "/mmds", {"a": {"b": None, "d": 3}}).status == 204
    assert ask(fresh, "GET", "/mmds").body == {"a": {"c": 2, "d": 3}}
    assert ask(fresh, "PUT", "/snapshot/load", LOAD).status == 204


# -- sinks -------------------------------------------------------------------------------------------------------------


def test_a_log_has_what_its_level_allows(tmp_path: Path):
    log = Log("m-1")
    log.write("Error", "before it is configured")
    log.open(tmp_path / "log", "Warning")
    for level in ("Error", "Warning", "Info"):
        log.write(level, level)
    log.close()
    assert [line.split()[-1] for line in (tmp_path / "log").read_text().splitlines()] == ["Error", "Warning"]


def test_each_line_of_metrics_begins_anew(tmp_path: Path):
    counts = Counts()
    counts.flush()
    counts.open(tmp_path / "metrics")
    counts.add("vsock", "conns_added", 2)
    counts.flush()
    counts.flush()
    counts.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics").read_text().splitlines()]
    assert [line["vsock"]["conns_added"] for line in lines] == [2, 0]


def test_a_serial_port_drops_what_its_bucket_does_not_hold(tmp_path: Path):
    counts = Counts()
    counts.open(tmp_path / "metrics")
    limit = {"size": 10, "refill_time": 1_000_000, "one_time_burst": 5}
    serial = Serial(open_sink(tmp_path / "console"), limit, counts)
    for _ in range(3):
        serial.write(b"12345678")
    assert (tmp_path / "console").read_bytes() == b"1234567812345678"[:15]
    counts.flush()
    for sink in (serial, counts):
        sink.close()
    assert json.loads((tmp_path / "metrics").read_text())["uart"]["rate_limiter_dropped_bytes"] == 9


def test_what_is_inside_of_something_visible_is_mounted_once(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    visible = find_visible(tmp_path, [str(tmp_path / "inner"), str(tmp_path / "missing")])
    assert tmp_path in visible
    assert tmp_path / "inner" not in visible
    assert tmp_path / "missing" not in visible
