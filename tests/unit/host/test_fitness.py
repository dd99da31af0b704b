"""Each of the 36 checks, on a machine where all is well and on one where it is not."""

import hashlib
import struct
from pathlib import Path

import msgspec
import pytest

from fusevm.host.config import HostConfig
from fusevm.host.doctor import judge, report_fitness
from fusevm.host.fitness.facts import Facts, Kvm, Pit, gather
from fusevm.host.fitness.finding import Finding, Level
from fusevm.host.fitness.machine import own_table
from fusevm.host.fitness.memory import mount_options
from fusevm.host.fitness.programs import (
    NAMES,
    ProgramFacts,
    find_programs,
    is_static,
    observe_program,
    observe_programs,
)
from fusevm.host.fitness.table import FITNESS
from fusevm.host.vmm.firecracker.pins import VERSION, release_folder
from fusevm.host.vmm.firecracker.release import RECORD, ReleaseRecord, is_release_whole
from fusevm.host.vmm.firecracker.versions import Version

RULES = """table ip other {
\tchain forward {
\t\ttype filter hook forward priority 0;
\t}
}
table ip6 mangle {
\tchain FORWARD {
\t\ttype filter hook forward priority -150; policy accept;
\t\tcounter
\t}
}
table ip mangle {
\tchain FORWARD {
\t\ttype filter hook forward priority -150; policy accept;
\t}
\tchain POSTROUTING {
\t\ttype filter hook postrouting priority -150; policy accept;
\t\tcounter
\t}
}
table inet fuse_second {
\tchain forward {
\t\ttype filter hook forward priority -20; policy accept;
\t\tiifname "fuse2-*" drop
\t}
}
table inet fuse_fuse {
\tset private {
\t\telements = { 10.0.0.0/8, 169.254.0.0/16 }
\t}
\tchain guard {
\t\ttype filter hook prerouting priority -300; policy accept;
\t\tiifname "fuse-v*" drop
\t}
\tchain forward {
\t\ttype filter hook forward priority -10;
\t}
\tchain input {
\t\ttype filter hook input priority -10;
\t}
}
"""
#: As others have them: before ours.
EARLIER = """table ip mangle {
\tchain FORWARD {
\t\ttype filter hook forward priority -150; policy accept;
\t\ttcp flags syn tcp option maxseg size set rt mtu
\t}
}
"""
RAW = """table inet raw {
\tchain early {
\t\ttype filter hook prerouting priority -301; policy accept;
\t\tip saddr 10.0.0.1 notrack
\t}
}
"""
MOUNTS = """22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:27 / /sys/fs/cgroup rw,nosuid,nodev,noexec shared:4 - cgroup2 cgroup2 rw,nsdelegate,favordynmods
40 22 254:1 / /var/lib/fuse rw,relatime - xfs /dev/vdb rw
"""
VULNERABILITIES = "/sys/devices/system/cpu/vulnerabilities/"
KVM = "/sys/module/kvm/parameters/"
MM = "/sys/kernel/mm/"
SYSCTL = "/proc/sys/"
PROGRAM = ProgramFacts(
    path="/f/firecracker", is_there=True, version=Version(*VERSION), is_static=True, snapshot_version="10.0.0"
)
#: All is well here.
GOOD = Facts(
    files={
        "/proc/cmdline": "BOOT_IMAGE=/vmlinuz quiet loglevel=1",
        "/proc/cpuinfo": "processor\t: 0\nmicrocode\t: 0x2b0\nflags\t\t: fpu vmx\n",
        "/proc/misc": " 10 other\n257 userfaultfd\n",
        "/proc/self/mountinfo": MOUNTS,
        "/proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
        SYSCTL + "fs/inotify/max_user_instances": "8192",
        SYSCTL + "kernel/dmesg_restrict": "1",
        SYSCTL + "kernel/kptr_restrict": "1",
        SYSCTL + "kernel/io_uring_disabled": "0",
        SYSCTL + "kernel/pid_max": "4194304",
        SYSCTL + "kernel/printk": "1 4 1 7",
        SYSCTL + "kernel/seccomp/actions_avail": "kill_process kill_thread trap errno",
        SYSCTL + "net/ipv4/ip_forward": "1",
        SYSCTL + "net/ipv4/neigh/default/gc_thresh3": "16384",
        SYSCTL + "net/netfilter/nf_conntrack_max": "8257536",
        SYSCTL + "vm/max_map_count": "262144",
        "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids",
        "/sys/devices/system/cpu/smt/control": "off\n",
        VULNERABILITIES + "itlb_multihit": "Not affected\n",
        VULNERABILITIES + "spectre_v2": "Mitigation: Enhanced IBRS\n",
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "/sys/devices/system/edac/mc/mc0/mc_name": "skx",
        MM + "hugepages/hugepages-2048kB/nr_hugepages": "0",
        MM + "ksm/run": "0",
        MM + "transparent_hugepage/enabled": "always [madvise] never",
        MM + "transparent_hugepage/shmem_enabled": "always within_size advise [never]",
        KVM + "nx_huge_pages": "never",
        KVM + "min_timer_period_us": "200",
        "/sys/module/kvm_intel/parameters/nested": "Y",
    },
    kernel_release="6.1.0-37-amd64",
    kernel_build="#1 SMP Debian 6.1.140-1 (2025-05-22)",
    kvm=Kvm(api_version=12, creates=True),
    pits=(Pit(pid=100, vmm=99, is_confined=True),),
    has_reflink=True,
    devices={"/var/lib/fuse": 1, "/var/lib/fuse/host": 1},
    data_root="/var/lib/fuse",
    ids=(("root", 0, 1), ("max in /etc/subuid", 100_000, 65_536)),
    uid_base=200_000,
    uid_count=65_536,
    programs={"firecracker": PROGRAM, "jailer": msgspec.structs.replace(PROGRAM, path="/f/jailer")},
    seccomp={99: (2, 2, 2)},
    ruleset=RULES,
    is_serving=True,
    is_clock_in_step=True,
    has_ptp_kvm=True,
    files_limit=1 << 20,
    max_machines=1000,
    machines_at_once=1000,
    disk_free=100 << 30,
    disk_reserve=2 << 30,
    inodes_free=1_000_000,
    inodes=2_000_000,
)
OK, DEGRADED, UNFIT = Level.OK, Level.DEGRADED, Level.UNFIT


def files(**changes: str) -> Facts:
    """The good machine with other files; each is named by the end of its path."""
    changed = dict(GOOD.files)
    for name, text in changes.items():
        (path,) = [path for path in changed if path.endswith("/" + name)]
        changed[path] = text
    return msgspec.structs.replace(GOOD, files=changed)


def but(**changes: object) -> Facts:
    return msgspec.structs.replace(GOOD, **changes)


def look(number: int, facts: Facts) -> Finding:
    (check,) = [check for check in FITNESS if check.number == number]
    return check.judge(facts)


#: Number, the machine, the level, a word of what is found, a word of the remedy.
BAD = [
    (1, but(kvm=Kvm(problem="No such file or directory")), DEGRADED, "/dev/kvm", "virtualisation"),
    (1, but(kvm=Kvm(api_version=12)), DEGRADED, "no machine can be created", "virtualisation"),
    (1, but(kvm=Kvm(api_version=11, creates=True)), DEGRADED, "version 11", "virtualisation"),
    (1, but(kvm=Kvm(problem="Permission denied"), driver="firecracker"), UNFIT, "Permission", "firmware"),
    (1, but(kvm=Kvm(problem="x"), architecture="aarch64"), UNFIT, "x", "firmware"),
    (
        1,
        but(kvm=Kvm(api_version=12, creates=True, trial="KVM does not run our kernel here", boots=False)),
        DEGRADED,
        "does not run our kernel",
        "virtualisation",
    ),
    (2, files(cpuinfo="flags\t: fpu hypervisor lahf_lm\n"), DEGRADED, "virtual machine", "bare metal"),
    (3, but(kernel_release="6.12.9-amd64"), DEGRADED, "6.12.9", "5.10, 6.1, 6.18"),
    (4, files(**{"cgroup.controllers": "cpu memory pids"}), DEGRADED, "no controller io, cpuset", "unified"),
    (
        4,
        files(mountinfo="9 1 0:9 / /sys/fs/cgroup/x rw - cgroup cgroup rw,cpu,memory,blkio,pids,cpuset\n"),
        DEGRADED,
        "v1 for cpu",
        "unified",
    ),
    (
        5,
        files(mountinfo=MOUNTS.replace(",favordynmods", "")),
        DEGRADED,
        "not set",
        "remount,favordynmods /sys/fs/cgroup",
    ),
    (6, files(nx_huge_pages="auto"), DEGRADED, "does not need it", "nx_huge_pages=never"),
    (6, files(itlb_multihit="KVM: Vulnerable"), DEGRADED, "halt the host", "nx_huge_pages=auto"),
    (7, files(min_timer_period_us="0"), DEGRADED, "0 microseconds", "min_timer_period_us=200"),
    (8, but(pits=(Pit(pid=100, vmm=99, is_confined=False),)), DEGRADED, "kvm-pit/99", "echo 100"),
    (9, files(control="on"), DEGRADED, "share a core", "nosmt"),
    (10, files(run="1"), DEGRADED, "memory", "echo 2"),
    (11, files(swaps="Filename Type\n/dev/sda2 partition 1 0 -2\n"), DEGRADED, "/dev/sda2", "swapoff"),
    (12, files(spectre_v2="Vulnerable: no microcode"), DEGRADED, "spectre_v2", "microcode"),
    (
        15,
        but(files={**GOOD.files, SYSCTL + "kernel/printk": "7 4 1 7", "/proc/cmdline": ""}),
        DEGRADED,
        "7",
        "printk=1",
    ),
    (16, files(enabled="always madvise [never]"), DEGRADED, "never", "madvise"),
    (
        17,
        but(
            files={**GOOD.files, f"{MM}hugepages/hugepages-2048kB/nr_hugepages": "10"}
            | {f"{MM}hugepages/hugepages-2048kB/free_hugepages": "6"}
        ),
        DEGRADED,
        "12 MiB of 20",
        "echo 4 >",
    ),
    (20, but(has_reflink=False), DEGRADED, "copied", "xfs"),
    (20, but(has_reflink=None), DEGRADED, "/var/lib/fuse", "repeat"),
    (21, but(devices={"/a": 1, "/b": 2}), DEGRADED, "/a, /b", "--artefacts"),
    (22, files(mountinfo=MOUNTS.replace("fuse rw,", "fuse rw,nodev,noexec,")), DEGRADED, "nodev,noexec", "dev,exec"),
    (
        22,
        msgspec.structs.replace(files(mountinfo=MOUNTS.replace("fuse rw,", "fuse rw,nodev,")), driver="firecracker"),
        UNFIT,
        "nodev",
        "dev,exec",
    ),
    (23, files(mountinfo=MOUNTS * 40), DEGRADED, "120 mounts", "unmount"),
    (24, but(writable="/opt/shared"), DEGRADED, "/opt/shared", "chown root /opt/shared"),
    (25, but(ids=(("ldap", 250_000, 1),)), DEGRADED, "ldap", "other ids"),
    (25, but(ids=(("sub in /etc/subuid", 150_000, 65_536),)), DEGRADED, "/etc/subuid", "other ids"),
    (26, but(programs={"firecracker": ProgramFacts(path="/f")}), DEGRADED, "/f is not there", "fuse host install"),
    (26, but(programs={}, driver="firecracker"), UNFIT, "not there", "fuse host install"),
    (
        26,
        but(programs={**GOOD.programs, "jailer": ProgramFacts(path="/j", is_there=True, version=Version(1, 15, 1))}),
        DEGRADED,
        "its jailer 1.15.1",
        "fuse host install",
    ),
    (
        26,
        but(programs={**GOOD.programs, "firecracker": msgspec.structs.replace(PROGRAM, is_static=False)}),
        DEGRADED,
        "no release build",
        "fuse host install",
    ),
    (
        26,
        but(programs={**GOOD.programs, "jailer": msgspec.structs.replace(PROGRAM, path="/j", is_as_installed=False)}),
        DEGRADED,
        "/j has not the digest",
        "fuse host install",
    ),
    (
        26,
        but(
            driver="firecracker",
            programs=dict.fromkeys(NAMES, msgspec.structs.replace(PROGRAM, is_as_installed=False)),
        ),
        UNFIT,
        "has not the digest",
        "fuse host install",
    ),
    (27, files(actions_avail=""), UNFIT, "cannot filter", "CONFIG_SECCOMP"),
    (27, but(seccomp={99: (2, 0)}), DEGRADED, "99", "restart them"),
    (28, but(has_tun=False), UNFIT, "/dev/net/tun", "modprobe tun"),
    (28, but(ruleset=None), UNFIT, "nftables", "apt-get install nftables"),
    (28, files(nf_conntrack_max="4096"), DEGRADED, "4096", "nf_conntrack_max"),
    (28, files(nf_conntrack_max="262144"), DEGRADED, "gets 196", "nf_conntrack_max=8257536"),
    (29, but(ruleset=RULES.replace("hook input", "hook output")), DEGRADED, "missing", "restart fuse-host"),
    (29, but(ruleset=RULES.replace("hook prerouting", "hook output")), DEGRADED, "missing", "restart fuse-host"),
    (29, but(instance="other"), DEGRADED, "missing", "restart fuse-host"),
    (
        29,
        but(ruleset=EARLIER + RULES),
        DEGRADED,
        "chain ip mangle FORWARD sees packets at forward (-150) before the table fuse_fuse",
        "nft list chain ip mangle FORWARD",
    ),
    (29, but(ruleset=RULES + RAW), DEGRADED, "prerouting (-301)", "nft list chain inet raw early"),
    (30, but(ruleset=RULES.replace("169.254.0.0/16", "172.16.0.0/12")), DEGRADED, "169.254", "restart fuse-host"),
    (31, but(is_clock_in_step=False), DEGRADED, "not in step", "chrony"),
    (32, files(scaling_governor="powersave"), DEGRADED, "powersave", "performance"),
    (33, files(pid_max="4096"), DEGRADED, "4096 threads", "kernel.pid_max"),
    (33, but(files_limit=1024), DEGRADED, "1024 descriptors", "LimitNOFILE"),
    (34, but(disk_free=1 << 30), UNFIT, "1 GiB", "free disk space"),
    (34, but(disk_free=10 << 30), DEGRADED, "10 GiB", "20 GiB"),
    (34, but(inodes_free=5), DEGRADED, "5 files", "file system"),
    (35, but(architecture="aarch64"), DEGRADED, "6.1", "6.4"),
]
#: What informs only: number, the machine, a word of what is found.
TOLD = [
    (1, but(kvm=Kvm(api_version=12, creates=True, trial="a machine booted")), "; a machine booted"),
    (2, GOOD, "bare metal (machines may nest: Y)"),
    (4, GOOD, "v2"),
    (5, but(kernel_release="5.10.0-1"), "not needed"),
    (6, files(nx_huge_pages=""), "not loaded"),
    (7, files(min_timer_period_us=""), "not loaded"),
    (8, but(pits=()), "none"),
    (11, files(swaps="Filename Type\n/dev/zram0 partition 1 0 100\n"), "compressed"),
    (13, GOOD, "microcode 0x2b0"),
    (13, files(cpuinfo=""), "microcode unknown"),
    (14, GOOD, "skx"),
    (14, files(mc_name=""), "()"),
    (14, but(files={}), "no error correction"),
    (18, GOOD, "minor 257"),
    (18, but(has_userfaultfd=False), "not there"),
    (18, but(has_userfaultfd=False, files={SYSCTL + "vm/unprivileged_userfaultfd": "1"}), "for everybody"),
    (19, GOOD, "there; Sync"),
    (19, files(io_uring_disabled="2"), "switched off"),
    (19, but(kernel_release="5.10.1"), "kernel 5.10.1"),
    (22, but(is_root=False), "without root"),
    (25, but(is_root=False, ids=(("x", 200_001, 1),)), "without root"),
    (26, but(programs={}, kvm=Kvm(problem="x")), "of no use without KVM"),
    (26, GOOD, "snapshot format 10.0.0"),
    (26, GOOD, "no digests"),
    (
        26,
        but(programs=dict.fromkeys(NAMES, msgspec.structs.replace(PROGRAM, is_as_installed=True))),
        "with the digests",
    ),
    (29, GOOD, "replaces rp_filter"),
    (29, but(ruleset=RULES + EARLIER.replace("-150", "-10")), "comes first"),
    (29, but(is_serving=False, ruleset=""), "when it runs"),
    (30, but(is_serving=False, ruleset=""), "when it runs"),
    (31, but(is_clock_in_step=None), "could not be asked"),
    (32, but(files={}, numa_nodes=2), "2 NUMA nodes"),
    (35, GOOD, "not needed on x86_64"),
    (35, but(architecture="aarch64", kernel_release="6.18.1"), "6.18.1"),
    (36, GOOD, "restricted to root"),
    (36, files(dmesg_restrict="0"), "every user"),
]


def test_all_is_well_on_a_good_machine():
    reports = report_fitness(GOOD)
    assert [one for one in reports if one.level is not OK] == []
    assert judge(reports) == "fit"


def test_the_checks_are_numbered_from_1_to_36():
    assert [check.number for check in FITNESS] == list(range(1, 37))
    assert len({check.name for check in FITNESS}) == 36


@pytest.mark.parametrize(("number", "facts", "level", "found", "remedy"), BAD)
def test_what_is_wrong_is_found_with_its_remedy(number: int, facts: Facts, level: Level, found: str, remedy: str):
    finding = look(number, facts)
    assert (finding.level, found in finding.found, remedy in finding.remedy) == (level, True, True), finding


@pytest.mark.parametrize(("number", "facts", "found"), TOLD)
def test_what_informs_says_what_is_there(number: int, facts: Facts, found: str):
    finding = look(number, facts)
    assert (finding.level, found in finding.found, finding.remedy) == (OK, True, ""), finding


def test_every_check_is_seen_in_two_outcomes():
    for number in range(1, 37):
        seen = {look(number, facts).found for facts in (GOOD, *(one[1] for one in [*BAD, *TOLD] if one[0] == number))}
        assert len(seen) > 1, number


def test_nothing_that_cannot_be_looked_at_breaks_a_check():
    for one in report_fitness(Facts()):
        assert one.found
        assert bool(one.remedy) == (one.level is not OK), one


def test_this_machine_is_looked_at_without_a_trace(tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    facts = gather(HostConfig(data_root=tmp_path / "data"), None)
    assert facts.version > (3, 0)
    assert facts.data_root == str(tmp_path)
    assert facts.inodes_free > 0 or facts.inodes == 0
    assert facts.is_clock_in_step in (True, False)
    assert facts.text("/proc/self/mountinfo")
    assert sorted(tmp_path.iterdir()) == before


def test_the_mount_of_a_path_is_the_longest_above_it():
    assert mount_options(MOUNTS, "/var/lib/fuse/host") == ["rw", "relatime"]
    assert "noexec" in mount_options(MOUNTS, "/sys/fs/cgroup/x")
    assert mount_options(MOUNTS, "/var/lib/fused") == ["rw", "relatime"]


def test_only_our_own_table_counts():
    assert "hook forward priority -10" in own_table(GOOD)
    assert "priority 0" not in own_table(GOOD)


def make_elf(*kinds: int) -> bytes:
    """A 64-bit ELF header with program headers of these types (elf(5))."""
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, len(kinds))
    return bytes(header) + b"".join(struct.pack("<I", kind).ljust(56, b"\0") for kind in kinds)


@pytest.mark.parametrize(("content", "expected"), [
    (make_elf(1, 2), True), (make_elf(1, 3), False), (make_elf(), True), (b"#!/bin/sh\n", False), (b"", False),
])  # fmt: skip
def test_a_release_build_is_one_without_a_loader(tmp_path: Path, content: bytes, expected: bool):
    (tmp_path / "program").write_bytes(content)
    assert is_static(tmp_path / "program") is expected


def test_programs_that_have_changed_since_they_were_installed_are_found(tmp_path: Path):
    config, folder = HostConfig(data_root=tmp_path), release_folder(tmp_path)
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(make_elf(1))

    def seen() -> list[bool | None]:
        return [one.is_as_installed for one in observe_programs(config).values()]

    assert seen() == [False, False], "nobody has noted anything"
    digest = hashlib.sha256(make_elf(1)).hexdigest()
    record = ReleaseRecord(archive_sha256="0" * 64, files=dict.fromkeys(NAMES, digest))
    (folder / RECORD).write_bytes(msgspec.json.encode(record))
    assert seen() == [True, True]
    assert is_release_whole(folder, "0" * 64)
    assert not is_release_whole(folder, "1" * 64)
    (folder / "jailer").write_bytes(make_elf(1) + b"x")
    assert seen() == [True, False]
    assert not is_release_whole(folder, "0" * 64)
    own = HostConfig(data_root=tmp_path, firecracker_binary=tmp_path / "own")
    (tmp_path / "own").write_bytes(make_elf(1))
    assert observe_programs(own)["firecracker"].is_as_installed is None
    (folder / RECORD).write_bytes(b"{")
    assert seen() == [False, False]


def test_the_programs_are_those_that_the_daemon_will_start(tmp_path: Path):
    config = HostConfig(data_root=tmp_path, firecracker_binary=tmp_path / "firecracker")
    assert find_programs(config)["jailer"] == release_folder(tmp_path) / "jailer"
    found = find_programs(config)["firecracker"]
    assert observe_program(found) == ProgramFacts(path=str(found))
    found.write_text("#!/bin/sh\n[ $1 = --version ] && echo Firecracker v1.16.1 || echo v10.0.0\n")
    found.chmod(0o755)
    facts = observe_program(found)
    assert (facts.version, facts.snapshot_version, facts.is_static) == (Version(1, 16, 1), "10.0.0", False)
