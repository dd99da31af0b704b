"""Tap devices: made, owned and opened inside a slot's namespace.

A tap is persistent: it exists as long as its namespace, with its address and its anti-spoofing rules, while VMMs come
and go. It belongs to root; an unprivileged VMM gets an open descriptor (`open_tap`), or, where it can only open a tap
itself, is made its owner (`lend_tap`): nobody else gets into its namespace.

Struct ifreq as used here (netdevice(7), linux/if_tun.h), native endianness:

| offset | size | field |
|---|---|---|
| 0 | 16 | interface name, NUL-padded |
| 16 | 2 | flags |
| 18 | 22 | unused |
"""

import fcntl
import os
import socket
import struct

from fusevm.host.net.namespace import run_inside

_TUN_DEVICE = "/dev/net/tun"
#: linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
#: Each frame starts with a virtio_net_hdr, for checksum and segmentation offload; both VMMs ask for it.
_IFF_VNET_HDR = 0x4000
_IFREQ = struct.Struct("16sH22x")
_FLAGS = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR


async def open_tap(namespace_path: str, name: str) -> int:
    """Open a tap inside a namespace, creating it if it is missing; return a descriptor, which the caller closes.

    The descriptor is close-on-exec and works in whatever namespace it is used from. OSError with EBUSY if another
    process has the tap open. A tap that this call created goes away with the descriptor.
    """
    return await run_inside(namespace_path, lambda: attach_tap(name), discard=os.close)


async def lend_tap(namespace_path: str, name: str, uid: int) -> None:
    """Let a user, and nobody else but root, open a tap inside a namespace. OSError as `open_tap`."""
    await run_inside(namespace_path, lambda: _set_owner(name, uid))


def _set_owner(name: str, uid: int) -> None:
    fd = attach_tap(name)
    try:
        fcntl.ioctl(fd, _TUNSETOWNER, uid)
    finally:
        os.close(fd)


def ensure_tap(name: str) -> None:
    """Create a persistent tap that only root may open, in the namespace of the calling thread. Idempotent."""
    if name in {interface for _, interface in socket.if_nameindex()}:
        return
    fd = attach_tap(name)
    try:
        fcntl.ioctl(fd, _TUNSETOWNER, 0)
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    finally:
        os.close(fd)


def attach_tap(name: str) -> int:
    """Open a tap in the namespace of the calling thread."""
    fd = os.open(_TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), _FLAGS))
    except BaseException:
        os.close(fd)
        raise
    return fd
