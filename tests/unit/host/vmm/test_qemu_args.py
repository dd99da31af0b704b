"""The QEMU command line, word for word."""

from pathlib import Path

import msgspec
import pytest

from fusevm.host.vmm.driver import BootPlan, Nic, Rate
from fusevm.host.vmm.qemu_args import (
    Acceleration,
    Descriptors,
    overhead_mib,
    render_command_line,
    render_kernel_parameters,
)

PLAN = BootPlan(
    machine_id="m-abc",
    cpus=1,
    memory_mib=512,
    kernel=Path("/data/vmlinux"),
    initramfs=Path("/data/initramfs.cpio"),
    command_line="fuse.nonce=00 fuse.hostname=box",
    image=Path("/data/root,fs.ext4"),
    overlay=Path("/data/overlay"),
    run_dir=Path("/run/fuse/m-abc"),
    console_log=Path("/run/fuse/m-abc/console.log"),
    nic=Nic(tap_fd=9, mac="06:00:0a:d0:00:02"),
)
TCG = Acceleration(kind="tcg", tsc_khz=2596122)
DESCRIPTORS = Descriptors(agent=5, qmp=6, console=7, tap=9)

GOLDEN = """
/usr/bin/qemu-system-x86_64
-name m-abc
-M microvm
-accel tcg,thread=single,tb-size=96
-cpu max
-smp 1
-m 512M
-nodefaults -no-user-config -nographic -no-reboot
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-kernel /data/vmlinux
-initrd /data/initramfs.cpio
-append APPEND
-chardev socket,id=console,fd=7,server=on,wait=off -serial chardev:console
-chardev socket,id=qmp,fd=6,server=on,wait=off -mon chardev=qmp,mode=control
-chardev socket,id=agent,fd=5,server=on,wait=off
-device virtio-serial-device,max_ports=2
-device virtserialport,chardev=agent,name=fuse.agent
-device virtio-rng-device
-drive if=none,id=image,file=/data/root,,fs.ext4,format=raw,readonly=on
-device virtio-blk-device,drive=image,serial=image
-drive if=none,id=overlay,file=/data/overlay,format=qcow2,discard=unmap,werror=report,rerror=report
-device virtio-blk-device,drive=overlay,serial=overlay
-netdev tap,id=net,fd=9
-device virtio-net-device,netdev=net,mac=06:00:0a:d0:00:02
"""


def changed(**fields) -> BootPlan:
    return msgspec.structs.replace(PLAN, **fields)


def after(words: list[str], flag: str) -> list[str]:
    """All values of a flag."""
    return [words[i + 1] for i, word in enumerate(words) if word == flag]


def test_the_whole_command_line():
    words = render_command_line("/usr/bin/qemu-system-x86_64", PLAN, TCG, DESCRIPTORS)
    parameters = words[words.index("-append") + 1]
    assert [("APPEND" if word == parameters else word) for word in words] == GOLDEN.split()


def test_kernel_parameters_under_emulation_end_with_the_agents():
    text = render_kernel_parameters(PLAN, TCG)
    assert text.startswith("console=ttyS0 quiet panic=-1 ")
    assert " tsc_early_khz=2596122 tsc=reliable initcall_blacklist=jent_mod_init init_on_alloc=0 norandmaps " in text
    assert text.endswith(" fuse.nonce=00 fuse.hostname=box")


def test_kvm_guests_are_not_told_a_frequency():
    words = render_command_line("qemu", PLAN, Acceleration(kind="kvm"), DESCRIPTORS)
    assert after(words, "-accel") == ["kvm"]
    assert "tsc" not in after(words, "-append")[0]


def test_several_cpus_run_in_several_threads():
    words = render_command_line("qemu", changed(cpus=3), TCG, DESCRIPTORS)
    assert after(words, "-accel") == ["tcg,thread=multi,tb-size=96"]
    assert after(words, "-smp") == ["3"]


def test_a_probe_has_neither_disks_nor_network():
    words = render_command_line("qemu", changed(image=None, overlay=None, nic=None), TCG, DESCRIPTORS)
    assert "-drive" not in words
    assert "-netdev" not in words


def test_a_raw_overlay_is_named_raw():
    words = render_command_line("qemu", changed(overlay_format="raw"), TCG, DESCRIPTORS)
    assert "format=raw,discard=unmap" in after(words, "-drive")[1]


@pytest.mark.parametrize(
    ("nic", "netdev"),
    [
        (Nic(user_network="restrict=on"), "user,id=net,restrict=on"),
        (Nic(), "user,id=net"),
    ],
)
def test_user_networks(nic, netdev):
    words = render_command_line("qemu", changed(nic=nic), TCG, msgspec.structs.replace(DESCRIPTORS, tap=None))
    assert after(words, "-netdev") == [netdev]
    assert after(words, "-device")[-1] == "virtio-net-device,netdev=net"


def test_emulation_takes_more_memory_beside_the_guests():
    assert overhead_mib("tcg") == overhead_mib("kvm") + 96


def test_disks_are_limited_as_planned():
    plan = msgspec.structs.replace(PLAN, disk_rate=Rate(bytes_per_s=50_000_000, ops_per_s=300))
    words = render_command_line("/usr/bin/qemu-system-x86_64", plan, TCG, DESCRIPTORS)
    disks = [word for word in words if word.startswith("if=none")]
    assert len(disks) == 2
    assert all(word.endswith(",throttling.bps-total=50000000,throttling.iops-total=300") for word in disks)
