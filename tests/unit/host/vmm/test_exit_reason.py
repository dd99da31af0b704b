"""Why a machine ended, from what is known about it."""

import pytest

from fusevm.host.vmm.exit_reason import LastWords, explain_absence, explain_exit

PANIC = b"[ 1.0] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n[ 1.1] CPU: 0\r\n"
FATAL = b"fused: FATAL: no disk with serial 'overlay'\r\n"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (LastWords(killed="killed by the daemon", status=-9, console=PANIC), "killed by the daemon"),
        (LastWords(shutdown="guest-reset", status=0), "the guest shut down"),
        (LastWords(shutdown="guest-shutdown", status=0, console=b"bye\r\n"), "the guest shut down"),
        (
            LastWords(shutdown="guest-reset", console=PANIC),
            "the guest's kernel panicked: VFS: Unable to mount root fs",
        ),
        (LastWords(shutdown="guest-reset", console=FATAL), "the guest agent gave up: no disk with serial 'overlay'"),
        (LastWords(console=PANIC), "the guest's kernel panicked: VFS: Unable to mount root fs"),
        (LastWords(shutdown="host-signal", status=0), "the VMM was asked to end by a signal"),
        (LastWords(shutdown="host-qmp-quit", status=0), "the VMM ended (host-qmp-quit)"),
        (LastWords(status=-9), "the VMM was killed by SIGKILL"),
        (LastWords(status=-9, is_out_of_memory=True), "the VMM was killed because memory ran out"),
        (LastWords(is_out_of_memory=True, output=b"x"), "the VMM was killed because memory ran out"),
        (LastWords(shutdown="guest-reset", is_out_of_memory=True), "the guest shut down"),
        (LastWords(status=-64, output=b"x"), "the VMM was killed by SIGRTMAX: x"),
        (LastWords(status=-99), "the VMM was killed by signal 99"),
        (LastWords(status=1, output=b"qemu: no kernel\n"), "the VMM failed with status 1: qemu: no kernel"),
        (LastWords(status=0), "unknown"),
        (LastWords(), "unknown"),
        (LastWords(output=b"some last words"), "unknown: some last words"),
    ],
)
def test_reasons(words, reason):
    assert explain_exit(words) == reason


AWAY = " while the daemon was away"


@pytest.mark.parametrize(
    ("console", "is_out_of_memory", "is_disk_clean", "reason"),
    [
        (b"", False, True, f"the guest shut down{AWAY}"),
        (b"", True, False, f"the VMM was killed because memory ran out{AWAY}"),
        (PANIC, False, False, f"the guest's kernel panicked: VFS: Unable to mount root fs{AWAY}"),
        # What an earlier run of the machine said is no reason.
        (PANIC + b"fused: ready after 900 ms\r\n", False, None, f"unknown: the VMM ended{AWAY}"),
        (b"fused: ready after 900 ms\r\nhello", False, False, f"unknown: the VMM ended{AWAY}"),
    ],
)
def test_the_reason_of_an_end_that_nobody_has_seen(console, is_out_of_memory, is_disk_clean, reason):
    assert explain_absence(console, is_out_of_memory=is_out_of_memory, is_disk_clean=is_disk_clean) == reason


def test_what_a_guest_says_is_cut_and_cleaned():
    said = b"fused: FATAL: \x1b[31mred\x07" + b"x" * 1000
    reason = explain_exit(LastWords(shutdown="guest-reset", console=said))
    assert reason.startswith("the guest agent gave up: redxxx")
    assert len(reason) < 500
    assert reason.isprintable()
