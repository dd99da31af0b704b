"""The running kernel, its control groups, its settings and its limits. Pure."""

from typing import Final

from fusevm.host.cgroup import parse_mountinfo
from fusevm.host.fitness.facts import Facts
from fusevm.host.fitness.finding import Finding, degraded, ok, unfit

#: Series that Firecracker 1.16 is tested on.
_TESTED: Final = ((5, 10), (6, 1), (6, 18))
_CONTROLLERS: Final = ("cpu", "memory", "io", "pids", "cpuset")
#: The same, as version 1 names them.
_LEGACY: Final = {"io": "blkio"}
_QUIET_LEVEL: Final = 4
_UNIFIED: Final = "/sys/fs/cgroup"
#: Per machine: descriptors, threads, neighbours.
_PER_MACHINE: Final = (
    ("descriptors (ulimit -Hn)", "files_limit", 24, "LimitNOFILE= of the unit"),
    ("threads", "/proc/sys/kernel/pid_max", 16, "sysctl kernel.pid_max=4194304"),
    ("mappings of a process", "/proc/sys/vm/max_map_count", 0, "sysctl vm.max_map_count=262144"),
    ("inotify instances", "/proc/sys/fs/inotify/max_user_instances", 0, "sysctl fs.inotify.max_user_instances=8192"),
    ("neighbours", "/proc/sys/net/ipv4/neigh/default/gc_thresh3", 1, "sysctl net.ipv4.neigh.default.gc_thresh3=16384"),
)
#: What is needed however few machines there are.
_LEAST: Final = {"/proc/sys/vm/max_map_count": 65_530, "/proc/sys/fs/inotify/max_user_instances": 128}


def judge_kernel(facts: Facts) -> Finding:
    """3. Is it one of the kernels that Firecracker is tested on?"""
    if facts.version in _TESTED:
        return ok(facts.kernel_release)
    series = ", ".join(f"{major}.{minor}" for major, minor in _TESTED)
    return degraded(f"{facts.kernel_release}: not one that Firecracker is tested on", f"boot a kernel {series}")


def judge_cgroups(facts: Facts) -> Finding:
    """4. Can machines be limited, by version 2 of control groups?"""
    unified, legacy = parse_mountinfo(facts.text("/proc/self/mountinfo"))
    there = set(facts.text(f"{_UNIFIED}/cgroup.controllers").split()) if unified is not None else set()
    absent = [name for name in _CONTROLLERS if name not in there]
    if not absent:
        return ok("v2")
    old = [name for name in absent if _LEGACY.get(name, name) in legacy]
    remedy = "boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1)"
    if len(old) == len(absent):
        return degraded(f"v1 for {', '.join(old)}: restores are slower", remedy)
    return degraded(f"no controller {', '.join(name for name in absent if name not in old)}", remedy)


def judge_favordynmods(facts: Facts) -> Finding:
    """5. Is the creation of machines not slowed down by control groups (6.1 and newer)?"""
    line = next((one for one in facts.text("/proc/self/mountinfo").splitlines() if " - cgroup2 " in one), "")
    if not line or facts.version < (6, 1):
        return ok("not needed: " + ("no cgroup v2" if not line else f"kernel {facts.kernel_release}"))
    if "favordynmods" in line.split(" - ")[1]:
        return ok("set")
    point = line.split()[4]
    return degraded("not set: creating a machine may take tens of ms longer", f"mount -o remount,favordynmods {point}")


def judge_console(facts: Facts) -> Finding:
    """15. Does the kernel write much to the console? Every line stops a processor."""
    level = facts.number("/proc/sys/kernel/printk")
    words = facts.text("/proc/cmdline").split()
    if level is None or level <= _QUIET_LEVEL or "quiet" in words:
        return ok(f"level {level if level is not None else 'unknown'}{', quiet' if 'quiet' in words else ''}")
    return degraded(
        f"level {level}: restores may take ms longer", "sysctl kernel.printk=1, and boot with quiet loglevel=1"
    )


def judge_io_uring(facts: Facts) -> Finding:
    """19. Could disks be served asynchronously? Informational: `Sync` is used, which starts faster."""
    is_off = facts.number("/proc/sys/kernel/io_uring_disabled")
    if facts.version < (5, 11) or is_off:
        return ok(f"not there ({'switched off' if is_off else f'kernel {facts.kernel_release}'}); Sync is used")
    return ok("there; Sync is used")


def judge_limits(facts: Facts) -> Finding:
    """33. Are the kernel's limits made for so many machines?"""
    short, remedies = list[str](), list[str]()
    for name, source, each, remedy in _PER_MACHINE:
        limit = facts.files_limit if source == "files_limit" else facts.number(source)
        needed = max(each * facts.max_machines, _LEAST.get(source, 0))
        if limit is not None and 0 <= limit < needed:
            short.append(f"{limit} {name} instead of {needed}")
            remedies.append(remedy)
    if short:
        return degraded(f"for {facts.max_machines} machines: {', '.join(short)}", "; ".join(remedies))
    return ok(f"enough for {facts.max_machines} machines")


def judge_secrecy(facts: Facts) -> Finding:
    """36. Who can read the kernel's log and addresses? Informational."""
    values = [facts.text(f"/proc/sys/kernel/{name}") or "?" for name in ("dmesg_restrict", "kptr_restrict")]
    words = "restricted to root" if values[0] == "1" else "readable by every user"
    return ok(f"the kernel's log is {words} (dmesg_restrict {values[0]}, kptr_restrict {values[1]})")


def judge_seccomp(facts: Facts) -> Finding:
    """27. Are system calls filtered, in every thread of what runs?"""
    if "kill" not in facts.text("/proc/sys/kernel/seccomp/actions_avail"):
        return unfit("this kernel cannot filter system calls", "boot a kernel with CONFIG_SECCOMP_FILTER")
    loose = [pid for pid, modes in facts.seccomp.items() if set(modes) != {2}]
    if loose:
        pids = ", ".join(map(str, loose))
        return degraded(
            f"firecracker {pids} runs without a filter", "install the release (`fuse host install`), restart them"
        )
    return ok(f"filtered in {len(facts.seccomp)} processes" if facts.seccomp else "available; no Firecracker runs")
