"""The jail: how the jailer is called, and what is in the jail."""

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from fusevm.host.vmm.firecracker import staging
from fusevm.host.vmm.firecracker.jail import Inside, Jail, JailOrder, find_jail, render_jailer
from fusevm.model.errors import BadSetting

INSIDE = Inside()


@pytest.fixture
def jail(tmp_path: Path) -> Jail:
    return Jail(base=tmp_path / "jail", machine_id="m-1", program="firecracker-v1.16.1")


@pytest.fixture
def order() -> JailOrder:
    return JailOrder(
        jailer=Path("/opt/jailer"),
        firecracker=Path("/opt/firecracker-v1.16.1"),
        uid=200_001,
        gid=200_002,
        netns=Path("/run/netns/fuse-3"),
        max_file_bytes=4 << 30,
    )


def test_the_whole_command_line(jail, order):
    assert render_jailer(order, jail, INSIDE) == [
        "/opt/jailer",
        *("--id", "m-1"),
        *("--exec-file", "/opt/firecracker-v1.16.1"),
        *("--uid", "200001"),
        *("--gid", "200002"),
        *("--chroot-base-dir", str(jail.base)),
        *("--netns", "/run/netns/fuse-3"),
        *("--resource-limit", "no-file=2048"),
        *("--resource-limit", f"fsize={4 << 30}"),
        "--",
        *("--api-sock", "/run/api.sock"),
        *("--metadata", "/metadata.json"),
    ]


def test_it_stays_where_signals_and_the_exit_status_reach_it(jail, order):
    """In a process namespace of its own it would ignore SIGTERM, and be no child of ours."""
    words = render_jailer(order, jail, INSIDE)
    assert not {"--new-pid-ns", "--daemonize", "--config-file", "--no-api", "--no-seccomp"} & set(words)


def test_limits_are_not_left_to_the_jailer(jail, order):
    """Its `--cgroup` takes no value with `=`, and without one it may leave the process in no group, silently."""
    assert not [word for word in render_jailer(order, jail, INSIDE) if "cgroup" in word]


def test_without_a_namespace_there_is_no_word_of_one(jail, order):
    assert "--netns" not in render_jailer(msgspec.structs.replace(order, netns=None), jail, INSIDE)


def test_a_jail_is_found_whatever_its_program_was_called(jail):
    assert find_jail(jail.base, "m-1") is None
    jail.root.mkdir(parents=True)
    assert find_jail(jail.base, "m-1") == jail
    assert find_jail(jail.base, "m-2") is None


def make_files(plan):
    for path in (plan.kernel, plan.initramfs, plan.image, plan.overlay):
        path.write_bytes(path.name.encode())


def test_files_are_linked_not_copied(whole_plan, jail):
    make_files(whole_plan)
    staging.stage(whole_plan, jail, INSIDE)
    for source, path in staging.linked_files(whole_plan, INSIDE).items():
        assert jail.outside(path).samefile(source)
    assert jail.outside("/run").stat().st_mode & 0o777 == 0o700
    for path in (INSIDE.log, INSIDE.metrics, INSIDE.console):
        assert jail.outside(path).is_fifo()


def test_the_metadata_are_there_before_the_machine_is_and_hold_nothing_secret(whole_plan, jail):
    make_files(whole_plan)
    staging.stage(whole_plan, jail, INSIDE)
    text = jail.outside(INSIDE.metadata).read_bytes()
    assert msgspec.json.decode(text) == {"latest": {"meta-data": {"instance-id": "m-1"}}}
    assert b"abc" not in text  # the nonce


def test_what_an_earlier_machine_left_is_gone(whole_plan, jail):
    make_files(whole_plan)
    for stale in ("root/firecracker-v1.16.1.pid", "root/run/api.sock", "root/run/v.sock", "root/dev/kvm"):
        path = jail.root.parent / stale
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"stale")
    staging.stage(whole_plan, jail, INSIDE)
    assert sorted(path.name for path in jail.root.rglob("*") if not path.is_dir()) == [
        "console",
        "image",
        "initramfs",
        "kernel",
        "log",
        "metadata.json",
        "metrics",
        "overlay",
    ]


def test_removing_follows_no_link_and_is_idempotent(whole_plan, jail, tmp_path):
    make_files(whole_plan)
    staging.stage(whole_plan, jail, INSIDE)
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_bytes(b"kept")
    (jail.root / "link").symlink_to(other)
    staging.remove(jail.base)
    staging.remove(jail.base)
    assert not jail.base.exists()
    assert (other / "kept").read_bytes() == b"kept"
    assert whole_plan.kernel.read_bytes() == b"vmlinux"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("option", ["nodev", "noexec"])
def test_a_file_system_without_devices_or_programs_is_refused_with_the_remedy(whole_plan, tmp_path, option):
    folder = tmp_path / "data"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"dev,exec,{option}", "fuse-test", folder], check=True)
    try:
        with pytest.raises(BadSetting, match=f"mounted with `{option}`"):
            staging.stage(whole_plan, Jail(base=folder / "jail", machine_id="m-1", program="firecracker"), INSIDE)
        assert not list(folder.iterdir())
    finally:
        subprocess.run(["umount", folder], check=True)


def test_files_on_another_file_system_are_refused_with_the_remedy(whole_plan, jail, monkeypatch):
    make_files(whole_plan)
    elsewhere = Path("/proc/self/cmdline")
    plan = msgspec.structs.replace(whole_plan, kernel=elsewhere)
    with pytest.raises(BadSetting, match="keep images, kernels and machines on one file system"):
        staging.stage(plan, jail, INSIDE)
    assert os.path.lexists(whole_plan.image)
