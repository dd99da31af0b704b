"""The checks in the order of Firecracker's advice for production hosts."""

from collections.abc import Callable

import msgspec

from fusevm.host.fitness import cpu, kernel, machine, memory
from fusevm.host.fitness.facts import Facts
from fusevm.host.fitness.finding import Finding


class FitnessCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One numbered check."""

    number: int
    name: str
    #: Why it matters.
    purpose: str
    judge: Callable[[Facts], Finding]


def _check(number: int, name: str, purpose: str, judge: Callable[[Facts], Finding]) -> FitnessCheck:
    return FitnessCheck(number=number, name=name, purpose=purpose, judge=judge)


FITNESS: tuple[FitnessCheck, ...] = (
    _check(1, "kvm", "Runs machines at full speed", cpu.judge_kvm),
    _check(2, "nesting", "A virtual machine in a virtual machine is slow", cpu.judge_nesting),
    _check(3, "host_kernel", "What Firecracker is tested on", kernel.judge_kernel),
    _check(4, "cgroups", "Limits of memory, CPU and processes", kernel.judge_cgroups),
    _check(5, "favordynmods", "Machines are created without waiting for the kernel", kernel.judge_favordynmods),
    _check(6, "nx_huge_pages", "A fault of some processors, and its price", cpu.judge_nx_huge_pages),
    _check(7, "timer_period", "Timers of machines must not flood the host", cpu.judge_timer_period),
    _check(8, "kvm_pit", "Timers of machines are charged to them", cpu.judge_pits),
    _check(9, "smt", "Machines on one core can measure each other", cpu.judge_smt),
    _check(10, "ksm", "Merged pages tell what others have in memory", memory.judge_ksm),
    _check(11, "swap", "Secrets in memory stay in memory", memory.judge_swap),
    _check(12, "mitigations", "Known faults of processors", cpu.judge_mitigations),
    _check(13, "microcode", "How new the fixes are", cpu.judge_microcode),
    _check(14, "memory_errors", "Bits that a machine could flip", cpu.judge_memory_errors),
    _check(15, "host_console", "Kernel messages on the console stop processors", kernel.judge_console),
    _check(16, "transparent_huge_pages", "Speed of machines with much memory", memory.judge_transparent_pages),
    _check(17, "huge_pages", "Reserved memory is none for machines", memory.judge_huge_pages),
    _check(18, "userfaultfd", "Memory could be served by a program", memory.judge_userfaultfd),
    _check(19, "io_uring", "Disks could be served asynchronously", kernel.judge_io_uring),
    _check(20, "reflink", "Disks are copied without copying", memory.judge_reflink),
    _check(21, "file_system", "Files are linked into jails, not copied", memory.judge_one_file_system),
    _check(22, "mount_options", "Jails hold devices and programs", memory.judge_mount_options),
    _check(23, "mounts", "Every jail copies the table of mounts", memory.judge_mounts),
    _check(24, "paths", "What root runs is root's alone", machine.judge_paths),
    _check(25, "user_ids", "Every machine has a user of its own", machine.judge_ids),
    _check(26, "firecracker", "The release that this daemon was tested with", machine.judge_programs),
    _check(27, "seccomp", "System calls of the VMM are filtered", kernel.judge_seccomp),
    _check(28, "network", "Machines' network cards and rules", machine.judge_network),
    _check(29, "isolation", "Machines do not reach each other", machine.judge_isolation),
    _check(30, "metadata", "Machines do not reach the cloud's metadata", machine.judge_metadata),
    _check(31, "clock", "Machines get their time from here", machine.judge_clock),
    _check(32, "governor", "Starts are short bursts of work", cpu.judge_governor),
    _check(33, "limits", "The kernel's limits fit the number of machines", kernel.judge_limits),
    _check(34, "disk", "Room for the machines' disks", memory.judge_room),
    _check(35, "arm_counter", "Clocks of restored machines on ARM", cpu.judge_arm),
    _check(36, "kernel_log", "Who can read the kernel's messages", kernel.judge_secrecy),
)
