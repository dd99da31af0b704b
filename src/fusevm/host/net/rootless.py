"""The network of a machine whose daemon is not root: QEMU's user network (slirp).

By default it is closed (`restrict=on`): the guest reaches nothing, the host reaches the declared ports. Opened, it is
as wide as the daemon itself: the host's loopback, private ranges, everything. No policy can be enforced then, so the
machine's record says `Isolation.USER_NETWORK` and the daemon warns.

Owns: the arguments. Must not: start QEMU.
"""

from collections.abc import Iterable

from fusevm.host.net.plan import GATEWAY, GUEST_ADDRESS
from fusevm.host.net.terms import Forward

#: QEMU keeps the gateway, its DNS server and the guest apart: a /30 is too small.
_NETWORK = "10.208.0.0/24"
_DNS = "10.208.0.3"
#: What QEMU's user network segments for (slirp's default).
_MTU = 1500


def render_user_network(*, forwards: Iterable[Forward], internet: bool, user_network: bool) -> str:
    """Render what follows `-netdev user,id=...,` on QEMU's command line for one machine.

    `forwards` lead from ports of the host's loopback address to ports of the guest. The network is open only if the
    administrator allows it (`user_network`) and the machine's policy wants it (`internet`).
    """
    is_open = internet and user_network
    options = [
        f"restrict={'off' if is_open else 'on'}",
        "ipv6=off",
        f"net={_NETWORK}",
        f"host={GATEWAY}",
        f"dns={_DNS}",
        f"dhcpstart={GUEST_ADDRESS}",
        *(
            f"hostfwd={forward.protocol}:127.0.0.1:{forward.host_port}-{GUEST_ADDRESS}:{forward.port}"
            for forward in sorted(forwards)
        ),
    ]
    return ",".join(options)


def render_user_kernel_arguments() -> str:
    """Render the network part of the guest's kernel command line (docs/guest-protocol.md section 5)."""
    return f"fuse.ip={GUEST_ADDRESS}/24,{GATEWAY},{_MTU} fuse.dns={_DNS}"
