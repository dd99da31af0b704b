"""Tables and records: closed under themselves, and the same after a trip through JSON."""

import msgspec
import pytest
from msgspec.structs import replace

from fusevm.model import environment, fact, machine, snapshot
from fusevm.model.api_key import ApiKey
from fusevm.model.environment import (
    TERMINAL,
    Action,
    BootMachine,
    DestroyMachine,
    RestoreMachine,
    SnapshotMachine,
    State,
)
from fusevm.model.event import DestroyRequested, Event, OutcomeUnknown, SnapshotRequested
from fusevm.model.fact import Fact
from fusevm.model.host import Host, HostHealth, Resources, can_be_given_up, effective
from fusevm.model.machine import Phase
from fusevm.model.snapshot import Snapshot, SnapshotState


@pytest.mark.parametrize(
    ("names", "table"),
    [(State, environment.ALLOWED), (Phase, machine.ALLOWED), (SnapshotState, snapshot.ALLOWED)],
)
def test_a_table_of_transitions_is_complete_and_closed(names, table):
    assert set(table) == set(names)
    for state, following in table.items():
        assert following <= set(names)
        assert state not in following


def test_the_ends_are_the_states_that_lead_nowhere():
    assert {State.DESTROYED, State.FAILED} == TERMINAL


def test_every_state_can_be_reached_and_can_end():
    reached, todo = {State.PROVISIONING}, [State.PROVISIONING]
    while todo:
        found = environment.ALLOWED[todo.pop()] - reached
        reached |= found
        todo += found
    assert reached == set(State)
    for state in State:
        assert state in TERMINAL or State.DESTROYING in environment.ALLOWED[state] or state is State.DESTROYING


def test_actions_and_events_keep_their_kind_in_json():
    boot = BootMachine(seq=1, cause="c", host_id="h", machine_id="m", incarnation=1, deadline_ms=5)
    destroy = DestroyMachine(seq=2, cause="c", host_id="h", machine_id="m", incarnation=1, attempt=3)
    taken = Snapshot(
        id="s",
        uid="u",
        task_id="t",
        host_id="h",
        machine_id="m",
        state=SnapshotState.CREATING,
        created_at_ms=1,
        updated_at_ms=1,
    )
    address = {"seq": 3, "cause": "c", "host_id": "h", "machine_id": "m", "incarnation": 1, "deadline_ms": 5}
    take, restore = SnapshotMachine(**address, snapshot=taken), RestoreMachine(**address, snapshot=taken)
    for action in (boot, destroy, take, restore):
        assert msgspec.json.decode(msgspec.json.encode(action), type=Action) == action  # type: ignore[arg-type]
    for event in (
        DestroyRequested(cause="c"),
        OutcomeUnknown(cause="c", seq=1, message="x"),
        SnapshotRequested(cause="c", snapshot=taken),
    ):
        assert msgspec.json.decode(msgspec.json.encode(event), type=Event) == event  # type: ignore[arg-type]


def test_the_tags_of_actions_and_events_are_unique():
    for union in (Action, Event):
        tags = [kind.__struct_config__.tag for kind in union.__args__]
        assert len(set(tags)) == len(tags)


def test_a_record_survives_json_and_ignores_fields_of_a_later_version():
    record = Fact(uid="u", seq=1, kind=fact.Kind.STATE, state=State.RUNNING, at_ms=1, cause="c")
    raw = msgspec.json.decode(msgspec.json.encode(record))
    assert msgspec.convert({**raw, "later": 1}, Fact) == record


def test_a_key_without_limits_sees_everything_and_may_nothing():
    key = ApiKey(id="ak_1", prefix="p", digest="d", created_at_ms=1)
    assert (key.tenant, key.scopes, key.expires_at_ms, key.revoked_at_ms) == ("", (), None, None)
    assert msgspec.json.decode(msgspec.json.encode(key), type=ApiKey) == key


def test_amounts_add_up():
    one = Resources(cpus=1, ram_mb=2, storage_gb=3, vm_count=4)
    assert one.plus(Resources(cpus=10, ram_mb=20, storage_gb=30, vm_count=40)) == Resources(
        cpus=11, ram_mb=22, storage_gb=33, vm_count=44
    )
    assert one.plus(Resources()) == one


def test_records_cannot_be_changed_in_place():
    host = Host(id="h", url="http://h", capacity=Resources(), created_at_ms=1, updated_at_ms=1)
    with pytest.raises(AttributeError):
        host.id = "other"  # type: ignore[misc]


def test_what_is_declared_goes_before_what_is_reported():
    reported = Resources(cpus=8, ram_mb=4096, storage_gb=100, vm_count=50)
    assert effective(Resources(), reported) == reported
    assert effective(Resources(cpus=2, vm_count=4), reported) == replace(reported, cpus=2, vm_count=4)


@pytest.mark.parametrize(
    ("health", "is_refusing", "can_be"),
    [
        (HostHealth.OK, False, False),
        (HostHealth.UNREACHABLE, False, False),
        (HostHealth.UNREACHABLE, True, True),
        (HostHealth.LOST, False, True),
    ],
)
def test_a_host_that_may_only_be_cut_off_for_a_moment_is_not_given_up(health, is_refusing, can_be):
    host = Host(
        id="h1", url="x", capacity=Resources(), created_at_ms=1, updated_at_ms=1, health=health, is_refusing=is_refusing
    )
    assert can_be_given_up(host) is can_be


def test_a_phase_in_the_contracts_word_is_understood_and_no_other_word_is():
    assert Phase("starting") is Phase.CREATING
    with pytest.raises(ValueError, match="started"):
        Phase("started")
