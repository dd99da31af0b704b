"""Why Firecracker ended, from its status and its log."""

import pytest

from fusevm.host.vmm.exit_reason import LastWords, explain_exit
from fusevm.host.vmm.firecracker.exits import explain_status, is_for_people, parse_status

LOG = b"""2026-01-01T00:00:00.000000000 [m-1:main:INFO] Running Firecracker v1.16.1
2026-01-01T00:00:00.100000000 [m-1:fc_api:INFO] The API server received a Put request on "/actions".
2026-01-01T00:00:01.000000000 [m-1:main:%s
"""


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (b"INFO] Firecracker exiting successfully. exit_code=0", 0),
        (b"ERROR] Firecracker exiting with error. exit_code=148", 148),
        (b"INFO] Vmm is stopping.", None),
    ],
)
def test_the_log_tells_a_status_that_nobody_else_knows(last, status):
    assert parse_status(LOG % last) == status


@pytest.mark.parametrize("status", [148, 149, 150, 151, 152, 153, 154, 155, 156, 157])
def test_a_status_of_its_own_is_explained(status):
    said = explain_exit(LastWords(status=status, meaning=explain_status(status)))
    assert f"status {status} (" in said


def test_a_common_status_is_left_as_it_is():
    assert explain_status(1) == explain_status(0) == explain_status(None) == ""
    assert explain_exit(LastWords(status=1, output=b"boom")) == "the VMM failed with status 1: boom"


def test_people_see_warnings_and_what_no_logger_wrote():
    lines = [
        b"2026-01-01T00:00:00.0 [m-1:main:INFO] Running Firecracker",
        b"2026-01-01T00:00:00.0 [m-1:main:INFO:src/main.rs:1] Running Firecracker",
        b"2026-01-01T00:00:00.0 [m-1:main:WARN] slow",
        b"2026-01-01T00:00:00.0 [m-1:fc_vcpu 0:ERROR] [x:main:INFO] forged",
        b"thread 'main' panicked at src/main.rs:",
    ]
    assert [is_for_people(line) for line in lines] == [False, False, True, True, True]
