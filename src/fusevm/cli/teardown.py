"""Remove what a host daemon keeps on the machine for its next start: network slots and rules, groups, sockets.

Only for an installation whose daemon has ended and that has no machine any more.
"""

import asyncio
import contextlib
import os
import shutil

from fusevm.host.cgroup import Cgroups, observe_mounts
from fusevm.host.config import HostConfig
from fusevm.host.net.network import HostNetwork
from fusevm.host.net.plan import NetworkPlan


def has_machines(config: HostConfig) -> bool:
    """Does anything of a machine exist below the data root?"""
    folder = config.data_root / "machines"
    return folder.is_dir() and any(folder.iterdir())


def remove_traces(config: HostConfig) -> None:
    """Remove all kernel objects of this instance, and its run directory. Idempotent."""
    if os.geteuid() == 0:
        plan = NetworkPlan(prefix=config.instance, range=config.network_range, mtu=config.network_mtu)
        asyncio.run(HostNetwork(plan, uplink=config.egress_interface).sweep(()))
        groups = f"{config.instance}/machines"
        for root in Cgroups(groups, observe_mounts()).roots():
            for group in (root / groups, root / config.instance):
                with contextlib.suppress(OSError):  # not there, or in use by somebody else
                    group.rmdir()
    shutil.rmtree(config.runtime_directory, ignore_errors=True)
