"""The life of a snapshot's record."""

import pytest
from making import NOW, ready, running
from msgspec.structs import replace

from fusevm.core.snapshots import (
    MAX_RETENTION_SECONDS,
    begin_delete,
    begin_snapshot,
    check_seed,
    check_usable,
    given_up,
    made,
    restored,
    restoring,
    stranded,
)
from fusevm.model.errors import ActionUnderWay, BadField, SnapshotNotReady, WrongState
from fusevm.model.snapshot import Snapshot, SnapshotKind, SnapshotState

LATER = NOW + 10_000
ENV = running()


def numbered(number: int, **fields: object) -> Snapshot:
    """The number-th ready snapshot of one environment."""
    return replace(ready(ENV), id=f"snap-{number}", created_at_ms=NOW + number, **fields)


def test_a_new_snapshot_knows_where_it_comes_from():
    snapshot = begin_snapshot(ENV, "01abc", now_ms=LATER, parent_id="snap-0", arch="amd64", retention_seconds=60)
    assert snapshot == Snapshot(
        id="snap-01abc",
        uid="u1",
        task_id="task-u1",
        host_id="h1",
        machine_id="m-u1",
        parent_id="snap-0",
        image="debian-12",
        state=SnapshotState.CREATING,
        mode="manual",
        arch="amd64",
        created_at_ms=LATER,
        updated_at_ms=LATER,
        retention_until_ms=LATER + 60_000,
    )


def test_a_snapshot_keeps_what_the_request_says_about_it():
    fields = {
        "kind": SnapshotKind.LIVE,
        "mode": "auto",
        "comment": "before the upgrade\n",
        "metadata": {"name": "nightly"},
        "layer_key": "sha256:abc",
        "export_ref": "s3://bucket/key",
        "export_status": "pending",
    }
    snapshot = begin_snapshot(replace(ENV, tenant="acme"), "01", now_ms=LATER, **fields)
    assert {name: getattr(snapshot, name) for name in fields} == fields
    assert (snapshot.tenant, snapshot.retention_until_ms) == ("acme", None)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"mode": "Manual"}, "mode"),
        ({"mode": "x" * 33}, "mode"),
        ({"comment": "x" * 4097}, "comment"),
        ({"comment": "a\x00b"}, "comment"),
        ({"layer_key": "a b"}, "layer_key"),
        ({"export_ref": "x" * 1025}, "export_ref"),
        ({"export_status": "x" * 1025}, "export_status"),
        ({"metadata": {str(n): "x" for n in range(65)}}, "metadata"),
        ({"metadata": {"": "x"}}, "metadata"),
        ({"metadata": {"x" * 64: "x"}}, "metadata"),
        ({"metadata": {"a\nb": "x"}}, "metadata"),
        ({"metadata": {"name": "x" * 1025}}, "metadata.name"),
        ({"retention_seconds": -1}, "retention_seconds"),
        ({"retention_seconds": MAX_RETENTION_SECONDS + 1}, "retention_seconds"),
    ],
)
def test_a_field_that_cannot_be_kept_is_refused_by_name(fields, field: str):
    with pytest.raises(BadField) as refusal:
        begin_snapshot(ENV, "01", now_ms=LATER, **fields)
    assert refusal.value.field == field


def test_the_ways_of_a_snapshot():
    snapshot = begin_snapshot(ENV, "01", now_ms=NOW)
    complete = made(snapshot, 42, "sha256:ab", LATER)
    assert (complete.state, complete.size_bytes, complete.digest) == (SnapshotState.READY, 42, "sha256:ab")
    assert complete.updated_at_ms == LATER
    used = restoring(complete, LATER + 1)
    assert used.state is SnapshotState.RESTORING
    assert restored(replace(used, last_error="x"), LATER + 2) == replace(complete, updated_at_ms=LATER + 2)
    assert given_up(used, "no space", LATER + 2) == replace(complete, updated_at_ms=LATER + 2, last_error="no space")
    assert given_up(snapshot, "no space", LATER).state is SnapshotState.ERROR


def test_a_clock_that_runs_behind_never_turns_a_snapshot_back():
    assert restoring(numbered(1, updated_at_ms=LATER), NOW).updated_at_ms == LATER


def test_a_way_that_is_not_in_the_table_is_a_bug_and_says_so():
    with pytest.raises(AssertionError, match="ready -> ready is not in the table"):
        made(numbered(1), 1, "x", LATER)


@pytest.mark.parametrize("state", SnapshotState)
def test_only_a_ready_one_can_be_used(state: SnapshotState):
    snapshot = numbered(1, state=state)
    if state is SnapshotState.READY:
        check_usable(snapshot)
    else:
        with pytest.raises(SnapshotNotReady, match=f"snap-1 is {state}"):
            check_usable(snapshot)


def test_another_environment_starts_from_a_ready_disk_snapshot():
    check_seed(numbered(1))
    with pytest.raises(WrongState, match="snap-1 is live; "):
        check_seed(numbered(1, kind=SnapshotKind.LIVE))
    with pytest.raises(SnapshotNotReady):
        check_seed(numbered(1, state=SnapshotState.DELETING))


@pytest.mark.parametrize("state", [SnapshotState.READY, SnapshotState.ERROR])
def test_a_snapshot_at_rest_can_be_deleted_once(state: SnapshotState):
    doomed = begin_delete(numbered(1, state=state), LATER)
    assert (doomed.state, doomed.updated_at_ms) == (SnapshotState.DELETING, LATER)
    assert begin_delete(doomed, LATER + 1) is doomed


@pytest.mark.parametrize("state", [SnapshotState.CREATING, SnapshotState.RESTORING])
def test_a_snapshot_that_is_worked_on_cannot_be_deleted(state: SnapshotState):
    with pytest.raises(ActionUnderWay, match="snap-1 is busy"):
        begin_delete(numbered(1, state=state), LATER)


def test_a_snapshot_whose_host_is_removed_cannot_be_used_and_says_why():
    lost = stranded(ready(ENV), LATER)
    assert (lost.state, lost.last_error) == (SnapshotState.ERROR, "host h1, where its bytes are, was removed")
    assert begin_delete(lost, LATER).state is SnapshotState.DELETING
