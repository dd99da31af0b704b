"""What an error of a host means for a machine that may be in use, and for one that is only being made."""

import pytest
from msgspec.structs import replace

from fusevm.control.outcome import error_outcome
from fusevm.core.endings import PUT_BACK
from fusevm.model.environment import BootMachine, ChangeNetwork, DestroyMachine, SetUpMachine
from fusevm.model.errors import (
    BadSetting,
    CommandFailed,
    DaemonFailed,
    Error,
    HostRejected,
    HostUnproven,
    HostUnreachable,
    Internal,
    MachineNotFound,
    PolicyNotEnforceable,
    WrongCluster,
)
from fusevm.model.event import ActionRefused, BootRefused, DestroyConfirmed, OutcomeUnknown
from fusevm.model.network import Network

WHERE = {"seq": 3, "cause": "c", "host_id": "h1", "machine_id": "m-1", "incarnation": 1}
BOOT = BootMachine(**WHERE, deadline_ms=1)
SET_UP = SetUpMachine(**WHERE, deadline_ms=1)
DESTROY = DestroyMachine(**WHERE)
TURNED_AWAY = [HostRejected(id="h1"), HostUnproven(id="h1"), WrongCluster(cluster="a", asked="b")]
NO_KEY = BadSetting(setting="encryption_key", problem="sealed with another one")


@pytest.mark.parametrize("error", [*TURNED_AWAY, NO_KEY, HostUnreachable(id="h1", problem="x")], ids=lambda e: e.reason)
def test_what_does_not_concern_the_machine_costs_none_that_may_be_in_use(error: Error):
    assert isinstance(error_outcome(SET_UP, error), OutcomeUnknown)
    assert isinstance(error_outcome(DESTROY, error), OutcomeUnknown)


@pytest.mark.parametrize("error", TURNED_AWAY, ids=lambda e: e.reason)
def test_a_create_is_not_kept_waiting_for_a_host_that_turns_us_away(error: Error):
    outcome = error_outcome(BOOT, error)
    assert isinstance(outcome, BootRefused)
    assert outcome.reason == error.reason


def test_what_the_guest_refuses_is_refused():
    assert isinstance(error_outcome(SET_UP, DaemonFailed(problem="no such program")), ActionRefused)


def test_a_machine_that_is_not_there_is_destroyed():
    assert isinstance(error_outcome(DESTROY, MachineNotFound(id="m-1")), DestroyConfirmed)


@pytest.mark.parametrize("error", [CommandFailed(command="nft", exit_status=1, stderr="no"), Internal(problem="a bug")])
def test_a_policy_is_put_back_until_a_host_in_trouble_has_done_it(error: Error):
    change = ChangeNetwork(**WHERE, deadline_ms=1, network=Network())
    assert isinstance(error_outcome(change, error), ActionRefused)
    assert isinstance(error_outcome(replace(change, cause=PUT_BACK), error), OutcomeUnknown)


def test_a_host_that_cannot_hold_any_policy_is_not_asked_for_ever():
    change = ChangeNetwork(**{**WHERE, "cause": PUT_BACK}, deadline_ms=1, network=Network())
    assert isinstance(error_outcome(change, PolicyNotEnforceable(what="rules", why="no root")), ActionRefused)
