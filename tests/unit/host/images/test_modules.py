"""Which modules are loaded, and in which order."""

import pytest

from fusevm.host.images.modules import (
    REQUIRED,
    MissingModules,
    is_vsock,
    load_order,
    module_name,
    parse_builtin,
    parse_dependencies,
    without_signature,
)

DEP = """\
kernel/fs/overlayfs/overlay.ko.xz:
kernel/drivers/virtio/virtio_mmio.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz kernel/drivers/virtio/virtio.ko.xz
kernel/drivers/virtio/virtio_ring.ko.xz: kernel/drivers/virtio/virtio.ko.xz
kernel/drivers/virtio/virtio.ko.xz:
kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz kernel/drivers/virtio/virtio.ko.xz
kernel/drivers/net/virtio_net.ko.xz: kernel/drivers/net/net_failover.ko.xz kernel/net/core/failover.ko.xz
kernel/drivers/net/net_failover.ko.xz: kernel/net/core/failover.ko.xz
kernel/net/core/failover.ko.xz:
kernel/drivers/char/hw_random/virtio-rng.ko.xz:
kernel/sound/soundcore.ko.xz:
"""


def order_of(dep: str = DEP, builtin: str = "kernel/fs/ext4/ext4.ko\n") -> list[str]:
    return [module_name(file) for file in load_order(parse_dependencies(dep), parse_builtin(builtin))]


def test_each_module_comes_after_all_it_needs():
    order = order_of()
    assert order.index("virtio") < order.index("virtio_ring") < order.index("virtio_mmio") < order.index("virtio_blk")
    assert order.index("failover") < order.index("net_failover") < order.index("virtio_net")


def test_each_module_is_there_once_and_nothing_unneeded():
    order = order_of()
    assert len(order) == len(set(order))
    assert "soundcore" not in order


def test_what_is_built_in_is_not_loaded():
    assert "ext4" in REQUIRED
    assert "ext4" not in order_of()


def test_an_optional_module_is_loaded_where_it_exists():
    vsock = "kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko.xz: kernel/net/vmw_vsock/vsock.ko.xz\n"
    vsock += "kernel/net/vmw_vsock/vsock.ko.xz:\n"
    assert order_of(DEP + vsock)[-2:] == ["vsock", "vmw_vsock_virtio_transport"]
    assert [is_vsock(name) for name in order_of(DEP + vsock)].count(True) == 2


def test_a_signature_is_cut_off_and_an_unsigned_module_is_left_alone():
    signature = b"s" * 300
    info = bytes(8) + len(signature).to_bytes(4, "big")
    assert without_signature(b"ELF code" + signature + info + b"~Module signature appended~\n") == b"ELF code"
    assert without_signature(b"ELF code") == b"ELF code"


def test_missing_modules_are_all_named():
    with pytest.raises(MissingModules, match="ext4, overlay"):
        order_of(DEP.replace("overlay.ko", "underlay.ko"), builtin="")


def test_a_kernel_with_everything_built_in_loads_nothing():
    assert order_of("", builtin="\n".join(f"kernel/{name}.ko" for name in REQUIRED)) == []
