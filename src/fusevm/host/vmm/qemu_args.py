"""The QEMU command line of a machine, as a pure function of its plan.

`-M microvm`: virtio-mmio devices, no PCI, an ELF kernel entered directly. What is passed by descriptor (channel, QMP,
console, tap) is named by its number. Why each kernel parameter is there was measured: docs/decisions, bench/.
"""

from typing import Literal

import msgspec

from fusevm.host.vmm.driver import BootPlan, Nic, Rate

Accelerator = Literal["tcg", "kvm"]

#: Name of the virtio-serial port that the agent opens (docs/guest-protocol.md section 1).
AGENT_PORT = "fuse.agent"
#: Cache of translated code under TCG, in MiB: part of the memory that a machine takes beside its own. A boot and a
#: first command fill 64. A full cache is dropped as a whole: with 64 that came within the first command, and a sixth to
#: a quarter of all code was translated twice.
_TRANSLATION_CACHE_MIB = 96
#: What QEMU needs beside guest memory and translation cache, in MiB (measured, with room).
_PROCESS_MIB = 96

#: QEMU denies itself what it does not need once it has started (seccomp).
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

#: A panic ends the machine at once (with -no-reboot, QEMU exits) instead of hanging it. The kernel in the machine
#: guards nothing but the machine, so what it does for its own defence is left out.
_KERNEL_ALWAYS = ("console=ttyS0", "quiet", "panic=-1", "mitigations=off", "lsm=", "cryptomgr.notests")
#: Emulated, the self-test of the jitter random generator takes 0.1 s of a boot of 1.5 (virtio-rng seeds the guest), and
#: clearing pages before they are used a sixth of the time of writing a file. QEMU before 8.0 translates code anew for
#: every address at which it meets it: with randomised addresses (`norandmaps` turns that off) every start of a program
#: costs the translation of its libraries, 0.15 s instead of 0.05 for a shell.
_KERNEL_EMULATED = ("tsc=reliable", "initcall_blacklist=jent_mod_init", "init_on_alloc=0", "norandmaps")


class Descriptors(msgspec.Struct, frozen=True, kw_only=True):
    """Open descriptors that QEMU inherits: three listening sockets, and the tap."""

    agent: int
    qmp: int
    console: int
    tap: int | None = None


class Acceleration(msgspec.Struct, frozen=True, kw_only=True):
    """How guest code is run."""

    kind: Accelerator
    #: Frequency of the time stamp counter that a TCG guest sees.
    tsc_khz: int = 0


def overhead_mib(accelerator: Accelerator) -> int:
    """Return what a machine takes of the host's memory beside its own, in MiB."""
    return _PROCESS_MIB + (_TRANSLATION_CACHE_MIB if accelerator == "tcg" else 0)


def render_command_line(
    program: str, plan: BootPlan, acceleration: Acceleration, descriptors: Descriptors
) -> list[str]:
    """Return the words that start QEMU for a machine."""
    return [
        program,
        *("-name", plan.machine_id),
        *("-M", "microvm"),
        *("-accel", _accelerator(plan, acceleration.kind)),
        *("-cpu", "max"),
        *("-smp", str(plan.cpus)),
        *("-m", f"{plan.memory_mib}M"),
        *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
        *("-sandbox", _SANDBOX),
        *("-kernel", str(plan.kernel)),
        *("-initrd", str(plan.initramfs)),
        *("-append", render_kernel_parameters(plan, acceleration)),
        *_socket("console", descriptors.console),
        *("-serial", "chardev:console"),
        *_socket("qmp", descriptors.qmp),
        *("-mon", "chardev=qmp,mode=control"),
        *_socket("agent", descriptors.agent),
        *("-device", "virtio-serial-device,max_ports=2"),
        *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"),
        *("-device", "virtio-rng-device"),
        *_disks(plan),
        *(_network(plan.nic, descriptors.tap) if plan.nic is not None else ()),
    ]


def render_kernel_parameters(plan: BootPlan, acceleration: Acceleration) -> str:
    """Return the kernel's command line: what this driver needs, then the agent's."""
    words = list(_KERNEL_ALWAYS)
    if acceleration.kind == "tcg":
        words += [f"tsc_early_khz={acceleration.tsc_khz}", *_KERNEL_EMULATED]
    return " ".join([*words, plan.command_line]).strip()


def _accelerator(plan: BootPlan, kind: Accelerator) -> str:
    if kind == "kvm":
        return "kvm"
    # One thread for all vCPUs is never worse with one vCPU, and lacks parallelism with more.
    return f"tcg,thread={'single' if plan.cpus == 1 else 'multi'},tb-size={_TRANSLATION_CACHE_MIB}"


def _socket(name: str, descriptor: int) -> tuple[str, str]:
    # The daemon listens and connects before QEMU starts, so the first client waits in the backlog.
    return "-chardev", f"socket,id={name},fd={descriptor},server=on,wait=off"


def _disks(plan: BootPlan) -> list[str]:
    words: list[str] = []
    if plan.image is not None:
        words += _disk("image", str(plan.image), f"format=raw,readonly=on{_throttle(plan.disk_rate)}")
    if plan.overlay is not None:
        # Cached by the host, flushed when the guest says so: what it has synced survives a crash of the host
        # (docs/decisions/0004). An error is the guest's to see; QEMU would otherwise stop the machine and wait for
        # somebody to notice.
        options = f"format={plan.overlay_format},discard=unmap,werror=report,rerror=report"
        words += _disk("overlay", str(plan.overlay), options + _throttle(plan.disk_rate))
    return words


def _throttle(rate: Rate) -> str:
    words = f",throttling.bps-total={rate.bytes_per_s}" if rate.bytes_per_s else ""
    return words + (f",throttling.iops-total={rate.ops_per_s}" if rate.ops_per_s else "")


def _disk(name: str, path: str, options: str) -> list[str]:
    drive = f"if=none,id={name},file={path.replace(',', ',,')},{options}"
    return ["-drive", drive, "-device", f"virtio-blk-device,drive={name},serial={name}"]


def _network(nic: Nic, tap: int | None) -> list[str]:
    user = f"user,id=net,{nic.user_network}".rstrip(",")
    mac = f",mac={nic.mac}" if nic.mac else ""
    return [
        "-netdev",
        f"tap,id=net,fd={tap}" if tap is not None else user,
        "-device",
        f"virtio-net-device,netdev=net{mac}",
    ]
