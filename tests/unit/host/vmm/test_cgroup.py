"""Control groups on trees of ordinary files: which hierarchy, which files, what is degraded."""

from pathlib import Path

import pytest

from fusevm.host.cgroup import Cgroups, Limits, Mounts, has_run_out_of_memory, limit_files, parse_mountinfo
from fusevm.model.errors import BadSetting

LIMITS = Limits(memory_bytes=600 << 20, cpus=1.5, pids=99)

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:4 master:1 - cgroup2 cgroup2 rw
"""
UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_mounts_are_read():
    unified, legacy = parse_mountinfo(HYBRID)
    assert unified == Path("/sys/fs/cgroup/uni fied")
    assert legacy["cpu"] == legacy["cpuacct"] == Path("/sys/fs/cgroup/cpu,cpuacct")
    assert legacy["memory"] == Path("/sys/fs/cgroup/memory")
    assert parse_mountinfo(UNIFIED) == (Path("/sys/fs/cgroup"), {})
    assert parse_mountinfo("") == (None, {})


@pytest.mark.parametrize(
    ("controller", "is_unified", "files"),
    [
        ("memory", True, {"memory.max": str(600 << 20), "memory.oom.group": "1"}),
        ("memory", False, {"memory.limit_in_bytes": str(600 << 20)}),
        ("cpu", True, {"cpu.max": "150000 100000"}),
        ("cpu", False, {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000"}),
        ("pids", True, {"pids.max": "99"}),
        ("pids", False, {"pids.max": "99"}),
    ],
)
def test_limit_files(controller, is_unified, files):
    assert {name: value for name, value, _ in limit_files(controller, LIMITS, is_unified=is_unified)} == files


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.events": "low 0\noom 3\noom_kill 1\noom_group_kill 1\n"}, True),
        ({"memory.events": "low 0\noom 3\noom_kill 0\noom_group_kill 0\n"}, False),
        ({"memory.oom_control": "oom_kill_disable 0\nunder_oom 1\noom_kill 2\n"}, True),
        ({"memory.oom_control": "oom_kill_disable 0\nunder_oom 1\noom_kill 0\n"}, False),
        ({"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}, False),  # kernels before 4.13
        ({}, False),
    ],
)
def test_a_kill_for_want_of_memory_is_seen(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert has_run_out_of_memory([tmp_path / "gone", tmp_path]) is expected


def tree(root: Path, mounts: Mounts, machine: str = "m-1") -> None:
    """Make the files that the kernel would make."""
    for mount in {mounts.unified, *mounts.legacy.values()} - {None}:
        for folder in (mount, mount / "fuse", mount / "fuse" / machine):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "cgroup.procs").write_text("")
            (folder / "cgroup.subtree_control").write_text("")


async def test_v2_gets_one_leaf_with_delegated_controllers(tmp_path):
    mounts = Mounts(unified=tmp_path, unified_controllers=frozenset({"memory", "cpu", "pids", "io"}))
    tree(tmp_path, mounts)
    made = await Cgroups("fuse", mounts).ensure("m-1", LIMITS)
    assert made.paths == (tmp_path / "fuse" / "m-1",)
    assert made.degraded == ()
    assert (tmp_path / "fuse/m-1/memory.max").read_text() == str(600 << 20)
    assert (tmp_path / "fuse/m-1/cpu.max").read_text() == "150000 100000"
    assert (tmp_path / "fuse/cgroup.subtree_control").read_text() == "+pids"  # the last of three writes
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+pids"


async def test_v1_gets_a_group_per_controller_and_v2_beside_it_for_killing(tmp_path):
    legacy = {c: tmp_path / c for c in ("memory", "cpu", "pids", "freezer", "blkio")}
    mounts = Mounts(unified=tmp_path / "unified", unified_controllers=frozenset({"hugetlb"}), legacy=legacy)
    tree(tmp_path, mounts)
    made = await Cgroups("fuse", mounts).ensure("m-1", LIMITS)
    assert {p.relative_to(tmp_path).parts[0] for p in made.paths} == {"memory", "cpu", "pids", "unified"}
    assert made.degraded == ()
    assert (tmp_path / "cpu/fuse/m-1/cpu.cfs_quota_us").read_text() == "150000"


async def test_without_v2_the_freezer_is_used_for_killing(tmp_path):
    legacy = {c: tmp_path / c for c in ("memory", "freezer")}
    made = await Cgroups("fuse", Mounts(legacy=legacy)).ensure("m-1", LIMITS)
    assert {p.relative_to(tmp_path).parts[0] for p in made.paths} == {"memory", "freezer"}
    assert made.degraded == (
        "no cpu limit: this host has no cpu controller",
        "no pids limit: this host has no pids controller",
    )


async def test_a_host_without_control_groups_says_so():
    made = await Cgroups("fuse", Mounts()).ensure("m-1", LIMITS)
    assert made.paths == ()
    assert len(made.degraded) == 3


async def test_a_hierarchy_that_cannot_be_written_is_degraded_with_its_reason(tmp_path):
    (tmp_path / "memory").write_text("a file where a folder should be")
    made = await Cgroups("fuse", Mounts(legacy={"memory": tmp_path / "memory"})).ensure("m-1", LIMITS)
    assert made.paths == ()
    assert any("Not a directory" in reason for reason in made.degraded)


async def test_removing_is_idempotent_and_leaves_other_machines(tmp_path):
    mounts = Mounts(legacy={"memory": tmp_path / "memory"})
    groups = Cgroups("fuse/deep", mounts)
    for name in ("m-1", "m-2"):
        (tmp_path / "memory/fuse/deep" / name).mkdir(parents=True)
    assert await groups.names() == {"m-1", "m-2"}
    await groups.remove("m-1")
    await groups.remove("m-1")
    await groups.kill("m-1")
    assert await groups.names() == {"m-2"}


@pytest.mark.parametrize("parent", ["", "/fuse", "../fuse", "fuse/../x", "fuse/", ".hidden"])
def test_a_parent_that_leads_elsewhere_is_refused(parent):
    with pytest.raises(BadSetting):
        Cgroups(parent, Mounts())


async def test_a_name_that_leads_elsewhere_is_refused(tmp_path):
    groups = Cgroups("fuse", Mounts(legacy={"memory": tmp_path}))
    for name in ("..", "", "a/b"):
        with pytest.raises(ValueError, match="no name"):
            await groups.remove(name)
