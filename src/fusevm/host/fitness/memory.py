"""Memory and disks: what is shared, what reaches a disk, what can be copied cheaply. Pure."""

from typing import Final

from fusevm.host.fitness.facts import Facts
from fusevm.host.fitness.finding import Finding, degraded, ok, unfit

_HUGE: Final = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
_THP: Final = "/sys/kernel/mm/transparent_hugepage/"
_WANTED_BYTES: Final = 20 << 30
_MIN_INODES: Final = 10_000
_MANY_MOUNTS: Final = 100


def judge_ksm(facts: Facts) -> Finding:
    """10. Are equal pages of machines merged? Who merges tells each what the other has."""
    run = facts.text("/sys/kernel/mm/ksm/run")
    if run in ("", "0"):
        return ok("off")
    return degraded("on: a machine can find out what is in another's memory", "echo 2 >/sys/kernel/mm/ksm/run")


def judge_swap(facts: Facts) -> Finding:
    """11. Can machines' memory end up on a disk?"""
    devices = [line.split()[0] for line in facts.text("/proc/swaps").splitlines()[1:]]
    on_disk = [name for name in devices if not name.startswith("/dev/zram")]
    if on_disk:
        return degraded(f"{', '.join(on_disk)}: machines' memory may end up on disk", "swapoff -a, or encrypt the swap")
    return ok("compressed memory only" if devices else "none")


def judge_transparent_pages(facts: Facts) -> Finding:
    """16. Can machines' memory use large pages?"""
    mode, shared = (_chosen(facts.text(f"{_THP}{name}")) for name in ("enabled", "shmem_enabled"))
    if mode == "never":
        remedy = f"echo madvise >{_THP}enabled: machines with much memory are faster"
        return degraded("never", remedy)
    return ok(f"{mode or 'not in this kernel'}, shared memory {shared or 'unknown'}")


def _chosen(text: str) -> str:
    return next((word[1:-1] for word in text.split() if word.startswith("[")), "")


def judge_huge_pages(facts: Facts) -> Finding:
    """17. Is memory set aside that no machine gets? Fuse plans with none."""
    total, free = facts.number(f"{_HUGE}nr_hugepages") or 0, facts.number(f"{_HUGE}free_hugepages") or 0
    if free:
        return degraded(
            f"{free * 2} MiB of {total * 2} are reserved and free; machines cannot use them",
            f"echo {total - free} >{_HUGE}nr_hugepages, unless another program needs them",
        )
    return ok(f"{total * 2} MiB are in use by others" if total else "none reserved")


def judge_userfaultfd(facts: Facts) -> Finding:
    """18. Could page faults of machines be served by a program? Informational: memory files are mapped."""
    minor = next(
        (line.split()[0] for line in facts.text("/proc/misc").splitlines() if line.endswith(" userfaultfd")), ""
    )
    if facts.has_userfaultfd:
        return ok(f"/dev/userfaultfd (minor {minor or 'unknown'})")
    if facts.number("/proc/sys/vm/unprivileged_userfaultfd"):
        return ok("the system call, for everybody")
    return ok("not there; memory files are mapped instead")


def judge_reflink(facts: Facts) -> Finding:
    """20. Can disks be copied without copying?"""
    if facts.has_reflink is None:
        return degraded(f"could not be tried below {facts.data_root}", "repeat it as the user of the host daemon")
    if not facts.has_reflink:
        remedy = "put the data folder on XFS (mkfs.xfs) or btrfs: snapshots then take no time, and no space"
        return degraded("not on this file system: disks are copied", remedy)
    return ok("works")


def judge_one_file_system(facts: Facts) -> Finding:
    """21. Are images, kernels and jails on one file system, so that files can be linked?"""
    if len(set(facts.devices.values())) > 1:
        folders = ", ".join(facts.devices)
        return degraded(
            f"{folders} are on several: files are copied into jails", "set --artefacts below the data folder"
        )
    return ok("one")


def judge_mount_options(facts: Facts) -> Finding:
    """22. Can the jails hold devices and programs?"""
    options = mount_options(facts.text("/proc/self/mountinfo"), facts.data_root)
    wrong = [option for option in ("nodev", "noexec") if option in options]
    if wrong and facts.is_root:
        where = f"the file system of {facts.data_root}"
        remedy = f"mount {where} with dev,exec: a jail has device nodes and the program in it"
        found = f"{where} is mounted {','.join(wrong)}"
        return unfit(found, remedy) if facts.driver == "firecracker" else degraded(found, remedy)
    return ok("dev, exec" if facts.is_root else "not needed without root")


def mount_options(mountinfo: str, path: str) -> list[str]:
    """The options of the mount that a path is on (proc(5), /proc/[pid]/mountinfo)."""
    best, options = "", list[str]()
    for line in mountinfo.splitlines():
        fields = line.split()
        if len(fields) < 6:
            continue
        point = fields[4]
        is_above = path == point or path.startswith(point.rstrip("/") + "/")
        if is_above and len(point) >= len(best):
            best, options = point, fields[5].split(",")
    return options


def judge_mounts(facts: Facts) -> Finding:
    """23. How many mounts does each new jail have to copy?"""
    count = len(facts.text("/proc/self/mountinfo").splitlines())
    if count >= _MANY_MOUNTS:
        return degraded(f"{count} mounts: every jail copies them, which takes time", "unmount what is not needed")
    return ok(f"{count} mounts")


def judge_room(facts: Facts) -> Finding:
    """34. Is there room for the machines' disks?"""
    found = f"{facts.disk_free >> 30} GiB free below {facts.data_root}"
    if facts.disk_free < facts.disk_reserve:
        return unfit(found, "free disk space, or choose another data directory")
    if facts.inodes and facts.inodes_free < _MIN_INODES:
        return degraded(f"{facts.inodes_free} files can still be made", "remove files, or choose another file system")
    if facts.disk_free < _WANTED_BYTES:
        return degraded(found, "machines' disks grow as they are written: 20 GiB or more are better")
    return ok(found)
