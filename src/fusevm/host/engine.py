"""What runs machines on this host: a driver, why this one, and what follows from it. `driver_choice` is who chooses;
tests give `main.serve` another one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from fusevm.host.boot_files import BootFileFinder
from fusevm.host.config import HostConfig
from fusevm.host.disk.overlay import Method, WithoutReflink
from fusevm.host.vmm.driver import Driver
from fusevm.host.vmm.firecracker.vmm import Count
from fusevm.host.wiring import Taps


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A driver with what is told about it, and what it needs."""

    driver: Driver
    #: For people: the driver with its accelerator, and why it is this one.
    title: str
    why: str
    #: Of the VMM program, as it says itself; empty when it cannot be asked.
    version: str
    #: Memory of a VMM beside its guest's: booked by admission, allowed by the control group.
    overhead_mib: int
    #: What its machines boot from.
    boot_files: BootFileFinder
    #: How a private disk is made where blocks cannot be shared.
    overlays: WithoutReflink = Method.QCOW2
    taps: Taps = "descriptor"


#: Chooses; what VMMs count is told to the second argument.
ChooseEngine: TypeAlias = Callable[[HostConfig, Count], Awaitable[Engine]]
