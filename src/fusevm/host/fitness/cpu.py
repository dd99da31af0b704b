"""Processors, virtualisation and what is known to be wrong with them. Pure."""

from collections.abc import Mapping
from typing import Final

from fusevm.host.fitness.facts import Facts
from fusevm.host.fitness.finding import Finding, degraded, ok, unfit

_VULNERABILITIES: Final = "/sys/devices/system/cpu/vulnerabilities/"
_NX: Final = "/sys/module/kvm/parameters/nx_huge_pages"
_TIMER: Final = "/sys/module/kvm/parameters/min_timer_period_us"
#: What the kernel itself uses (arch/x86/kvm/x86.c).
_MIN_TIMER_US: Final = 200
_SINGLE: Final = ("off", "forceoff", "notsupported", "notimplemented", "")


def judge_kvm(facts: Facts) -> Finding:
    """1. Is hardware virtualisation there, and does it work?"""
    kvm = facts.kvm
    if facts.has_kvm:
        return ok("API version 12, and a machine can be created" + (f"; {kvm.trial}" if kvm.trial else ""))
    if kvm.problem:
        found = f"/dev/kvm: {kvm.problem}"
    elif kvm.api_version != 12:
        found = f"API version {kvm.api_version} instead of 12"
    elif not kvm.creates:
        found = "/dev/kvm opens, but no machine can be created"
    else:
        found = kvm.trial
    if facts.driver == "firecracker" or facts.architecture != "x86_64":
        return unfit(found, "use a machine with hardware virtualisation, and switch it on in its firmware")
    return degraded(found, "machines are emulated, about 10 times slower; use a machine with hardware virtualisation")


def judge_nesting(facts: Facts) -> Finding:
    """2. Is this machine a virtual one itself?"""
    names = ("kvm_intel", "kvm_amd")
    nested = next((text for name in names if (text := facts.text(f"/sys/module/{name}/parameters/nested"))), "")
    if " hypervisor" not in facts.text("/proc/cpuinfo"):
        return ok("bare metal" + (f" (machines may nest: {nested})" if nested else ""))
    return degraded("a virtual machine", "use bare metal: nested machines are slower, and their speed varies")


def judge_nx_huge_pages(facts: Facts) -> Finding:
    """6. Is the protection against the iTLB multihit fault on where it is needed, and only there?"""
    value, state = facts.text(_NX), facts.text(f"{_VULNERABILITIES}itlb_multihit")
    if not value:
        return ok("the kvm module is not loaded, or has no such parameter")
    is_off = value in ("never", "N", "0")
    option = "/etc/modprobe.d/kvm.conf: options kvm nx_huge_pages="
    if state == "Not affected" and not is_off:
        return degraded(f"{value}, but this processor does not need it: restores are slower", f"{option}never")
    if state not in ("", "Not affected") and is_off:
        return degraded(f"{value}, but this processor needs it: a machine could halt the host", f"{option}auto")
    return ok(value)


def judge_timer_period(facts: Facts) -> Finding:
    """7. How often may a machine's timer interrupt the host?"""
    period = facts.number(_TIMER)
    if period is None:
        return ok("the kvm module is not loaded, or has no such parameter")
    if period < _MIN_TIMER_US:
        remedy = f"/etc/modprobe.d/kvm.conf: options kvm min_timer_period_us={_MIN_TIMER_US} (or more)"
        return degraded(f"{period} microseconds: a machine can flood the host with timer interrupts", remedy)
    return ok(f"{period} microseconds")


def judge_pits(facts: Facts) -> Finding:
    """8. Are the kernel's threads for machines' timers charged to those machines?"""
    loose = [pit for pit in facts.pits if not pit.is_confined]
    if loose:
        names = ", ".join(f"kvm-pit/{pit.vmm}" for pit in loose)
        return degraded(
            f"{names} outside of the machine's control group",
            "; ".join(f"echo {pit.pid} >/sys/fs/cgroup/<group of {pit.vmm}>/cgroup.threads" for pit in loose),
        )
    return ok(f"{len(facts.pits)} threads, each in its machine's group" if facts.pits else "there is none")


def judge_smt(facts: Facts) -> Finding:
    """9. Do machines share cores?"""
    control = facts.text("/sys/devices/system/cpu/smt/control")
    if control in _SINGLE:
        return ok(control or "notsupported")
    return degraded(
        f"{control}: two machines may share a core, and measure each other",
        "echo off >/sys/devices/system/cpu/smt/control, or boot with nosmt; leave it when all tenants are trusted",
    )


def judge_mitigations(facts: Facts) -> Finding:
    """12. What does the kernel say of the processor's faults?"""
    known = _vulnerabilities(facts.files)
    open_ones = [name for name, state in known.items() if state.startswith("Vulnerable")]
    if open_ones:
        remedy = (
            "update kernel and microcode (apt-get install intel-microcode or amd64-microcode), drop mitigations=off"
        )
        return degraded(f"vulnerable: {', '.join(open_ones)}", remedy)
    return ok(f"{len(known)} known faults, none open" if known else "this kernel does not tell")


def _vulnerabilities(files: Mapping[str, str]) -> dict[str, str]:
    return {
        path.removeprefix(_VULNERABILITIES): text.strip()
        for path, text in files.items()
        if path.startswith(_VULNERABILITIES)
    }


def judge_microcode(facts: Facts) -> Finding:
    """13. Which microcode and kernel build are these? Informational."""
    lines = facts.text("/proc/cpuinfo").splitlines()
    microcode = next((line.partition(":")[2].strip() for line in lines if line.startswith("microcode")), "")
    shown = f"microcode {microcode}" if microcode else "microcode unknown (a virtual machine, or no x86)"
    return ok(f"{shown}, kernel {facts.kernel_release} {facts.kernel_build}")


def judge_memory_errors(facts: Facts) -> Finding:
    """14. Does the memory correct errors, so that Rowhammer is harder? Informational."""
    chips = [text.strip() for path, text in facts.files.items() if path.startswith("/sys/devices/system/edac/mc/")]
    if chips:
        return ok(f"memory with error correction ({', '.join(chips)})")
    return ok("no error correction is reported; `dmidecode -t memory` knows more")


def judge_governor(facts: Facts) -> Finding:
    """32. Do processors run at full speed, and are they all near?"""
    governors = {text.strip() for path, text in facts.files.items() if path.endswith("/scaling_governor")}
    nodes = f"{facts.numa_nodes} NUMA node{'s' if facts.numa_nodes > 1 else ''}"
    slow = governors - {"performance"}
    if slow:
        remedy = "cpupower frequency-set -g performance: starts of machines are short bursts"
        return degraded(f"governor {', '.join(sorted(slow))}, {nodes}", remedy)
    return ok(f"{'governor performance' if governors else 'no frequency scaling'}, {nodes}")


def judge_arm(facts: Facts) -> Finding:
    """35. On ARM: can the counter be set, so that a restored machine's clock goes on?"""
    if facts.architecture != "aarch64":
        return ok(f"not needed on {facts.architecture}")
    if facts.version < (6, 4):
        return degraded(
            f"kernel {facts.kernel_release}", "boot 6.4 or newer: restored machines see a jump of their counter"
        )
    return ok(f"kernel {facts.kernel_release}")
