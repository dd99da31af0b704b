"""Which releases are accepted, and why others are not."""

import pytest

from fusevm.host.vmm.firecracker.versions import Version, judge_versions, parse_version


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Firecracker v1.16.1\n\nThe log goes on.\n", (1, 16, 1)),
        ("Jailer v1.16.1", (1, 16, 1)),
        ("Firecracker v1.17.0-dev\n", None),
        ("Firecracker v1.16.1-dirty", None),
        ("qemu-system-x86_64 version 7.2", None),
        ("", None),
    ],
)
def test_versions_are_read(text, version):
    assert parse_version(text) == version


PIN = Version(1, 16, 1)


def test_the_pinned_release_is_accepted():
    assert judge_versions(PIN, PIN) == ""


@pytest.mark.parametrize(
    ("firecracker", "jailer", "reason"),
    [
        (None, PIN, "it is no release"),
        (PIN, None, "it is no release"),
        (PIN, Version(1, 15, 1), "Firecracker is 1.16.1 and its jailer 1.15.1"),
        (Version(1, 16, 0), Version(1, 16, 0), "1.16.0 loses connections from the guest after a restore"),
        (Version(1, 14, 2), Version(1, 14, 2), "1.14.2 writes wrong diff snapshots of machines over 3 GiB"),
        (Version(1, 13, 1), Version(1, 13, 1), "1.13.1 has no `/serial`"),
        (Version(1, 15, 1), Version(1, 15, 1), "made and tested for 1.16.1, not for 1.15.1"),
        (Version(1, 17, 0), Version(1, 17, 0), "made and tested for 1.16.1, not for 1.17.0"),
    ],
)
def test_others_are_refused_with_the_reason_and_the_remedy(firecracker, jailer, reason):
    problem = judge_versions(firecracker, jailer)
    assert reason in problem
    assert "install" in problem
